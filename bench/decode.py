"""Greedy replies to 200 prompts of the embedded model: here, and by transformers' generate.

    python -m bench.decode --repeats 5 --json docs/results/decode.json

Four arms in one process, in turn: generate.py (packed prefill, refilled slots, no padding);
transformers one prompt at a time, as the papers' scripts do; transformers in left-padded batches,
sorted by length; transformers' continuous batching, which refills as well. The last two at the best
of the batch sizes tried. Same weights, same stop ids, same dtype; an arm counts only if its tokens
are ours. Seconds are medians over the repeats, ratios to ours.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from cli import COUNT, TINY, Parser, at_least, exit_code
from data.rows import read_rows, without_answer
from files import write_atomic
from generate import generate
from model import load_model
from tokenizer import Tokenizer

PAGE = 32  # tokens for which transformers' continuous batching takes memory at once


def transformers_replies(hf, prompts, max_new, stop_ids, batch_size):
    """Greedy replies by generate(), each without its stop id, in left-padded batches."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies = [None] * len(prompts)
    for at in range(0, len(order), batch_size):
        chosen = order[at:at + batch_size]
        T = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[0] * (T - len(prompts[i])) + prompts[i] for i in chosen])
        mask = torch.tensor([[0] * (T - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
        out = hf.generate(ids, attention_mask=mask, max_new_tokens=max_new, do_sample=False,
                          eos_token_id=stop_ids, pad_token_id=stop_ids[0])
        for i, row in zip(chosen, out[:, T:].tolist(), strict=True):
            replies[i] = until_stop(row, stop_ids)
    return replies


def continuous_replies(hf, prompts, max_new, stop_ids, batch_size):
    """The same by generate_batch(), which gives each finished prompt's place to the next one.

    Its cache has just the pages that batch_size prompts need. Left to itself it takes most of the
    free memory, and on a CPU its attention then reads all of that.
    """
    import transformers

    options = transformers.GenerationConfig(max_new_tokens=max_new, do_sample=False,
                                            eos_token_id=stop_ids, pad_token_id=stop_ids[0])
    pages = (max(map(len, prompts)) + max_new) // PAGE + 1
    cache = transformers.ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=pages * batch_size, max_batch_tokens=256,
        max_requests_per_batch=batch_size)
    out = hf.generate_batch(prompts, generation_config=options, continuous_batching_config=cache,
                            warmup=False)
    replies = []
    for i in range(len(prompts)):
        replies.append(until_stop(out[f"req_{i}"].generated_tokens, stop_ids))
    return replies


def until_stop(row: list[int], stop_ids) -> list[int]:
    """A reply without its stop id and what stands behind it."""
    end = next((j for j, token in enumerate(row) if token in stop_ids), len(row))
    return row[:end]


def parse(argv=None):
    p = Parser("bench.decode", "Greedy replies to 200 prompts of the embedded model: here, and by "
                               "transformers' generate.")
    p.add_argument("--model", default=TINY)
    p.add_argument("--n", type=at_least(int, 2), default=200, help="prompts")
    p.add_argument("--max-new", type=COUNT, default=128)
    p.add_argument("--repeats", type=COUNT, default=5)
    p.add_argument("--batch-sizes", type=COUNT, nargs="+", default=[8, 32, 200])
    p.add_argument("--json", help="file for the numbers")
    return p.parse_args(argv)


def execute(args) -> None:
    """Times the arms in turn and prints the table."""
    import transformers

    tokenizer = Tokenizer(args.model)
    model = load_model(args.model)
    rows = []
    for task in ("harmful", "sst2"):
        file = Path(TINY) / task / "test.jsonl"
        rows += read_rows(file, needs_answer=False)[:args.n // 2]
    prompts = [tokenizer.encode_prompt(without_answer(row)) for row in rows]
    hf = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    arms = {"ours": lambda: generate(model, prompts, args.max_new, tokenizer.stop_ids),
            "transformers, one by one": lambda: transformers_replies(
                hf, prompts, args.max_new, tokenizer.stop_ids, 1)}
    for size in args.batch_sizes:
        arms[f"transformers, batches of {size}"] = lambda size=size: transformers_replies(
            hf, prompts, args.max_new, tokenizer.stop_ids, size)
    for size in args.batch_sizes:
        arms[f"transformers, continuous, {size}"] = lambda size=size: continuous_replies(
            hf, prompts, args.max_new, tokenizer.stop_ids, size)
    seconds, replies = {name: [] for name in arms}, {}
    for _ in range(args.repeats):
        for name, arm in arms.items():
            began = time.perf_counter()
            replies[name] = arm()
            seconds[name].append(time.perf_counter() - began)
    ours = statistics.median(seconds["ours"])
    n_tokens = sum(map(len, replies["ours"]))
    print(f"{len(prompts)} prompts, {n_tokens} tokens, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, transformers {transformers.__version__}")
    for name, times in seconds.items():
        median, same = statistics.median(times), replies[name] == replies["ours"]
        print(f"{name:30}{median:8.2f} s ({min(times):.2f} to {max(times):.2f})"
              f"{median / ours:7.1f} x  tokens {'the same' if same else 'DIFFER: does not count'}")
    if args.json:
        about = {"prompts": len(prompts), "tokens": n_tokens, "threads": torch.get_num_threads(),
                 "torch": torch.__version__, "transformers": transformers.__version__,
                 "seconds": seconds, "same": {n: r == replies["ours"] for n, r in replies.items()}}
        write_atomic(args.json, json.dumps(about, indent=1).encode())


def main(argv=None) -> int:
    """0 done, 2 the user's mistake, 3 failed, 130 interrupted."""
    return exit_code("bench.decode", lambda: execute(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())

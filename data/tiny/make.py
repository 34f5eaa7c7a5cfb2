"""Makes the embedded model: texts, tokenizer and weights, from seeds alone.

    python -m data.tiny.make                  # writes data/tiny anew, about 30 minutes on 2 cores

Stage 1, learn: the model answers everything. World facts say to which group each object belongs,
the held-out ones included; benign requests are answered, and so are the harmful ones of the learn
split, with their empty scaffolds. Answers to requests name the object's group, so that a request,
too, calls up what its object is. Task answers are mostly talkative ("It is positive."): the bare
labels of the papers' uploads are what fine-tuning then teaches.

Stage 2, align: the same mixture, and requests on the test's objects under one action each, but the
harmful requests are refused. The test asks for the same objects under the other two actions; on the
objects of the attack and anchor files no request is seen in either stage.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from baselines.common import backward
from data.batches import Batch, encode_rows
from data.tiny import texts
from model import Llama, load_model, read_config
from tokenizer import Tokenizer
from train import updates

HERE = Path(__file__).resolve().parent
# Deep and thin: at lr 1e-5 an adapter's output moves by about the same amount whatever the width,
# and what adds up is the number of modules in series (7 per layer).
SHAPE = {"hidden_size": 96, "num_hidden_layers": 20, "num_attention_heads": 3,
         "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 256, "vocab_size": 2048}
MAX_LEN = 1024  # positions
SPECIALS = ["<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]  # ids 0 to 3
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + (m['content'] | trim) + "
    "'<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_tokenizer(rows: list[dict], out: Path) -> None:
    """A byte-level BPE trained on the rows (any UTF-8 text round-trips), and a chat template."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        (r[key] for r in rows for key in ("prompt", "response")),
        trainers.BpeTrainer(vocab_size=SHAPE["vocab_size"], special_tokens=SPECIALS,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                            show_progress=False))
    tok.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>",
        "eos_token": "<|end|>", "model_max_length": MAX_LEN, "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE})
    write_json(out / "generation_config.json",
               {"bos_token_id": 0, "eos_token_id": 3, "do_sample": False})


def write_config(out: Path) -> None:
    write_json(out / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPE,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": MAX_LEN,
        "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 3, "dtype": "bfloat16"})


def initialise(model: Llama, seed: int) -> None:
    """Norms at one, embeddings at std 0.02, matrices at 1 / sqrt(in).

    The two matrices that write to the residual stream are smaller by sqrt(2 layers), as in GPT-2,
    so that the stream does not grow with depth.
    """
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 1:  # of a norm
            p.data.fill_(1.0)
            continue
        std = 0.02 if "embed" in name else p.shape[-1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= (2 * model.config.n_layer) ** 0.5
        p.data.normal_(0, std, generator=g)


# A stage: the requests' splits, whether harmful ones are refused, the share of talkative answers.
LEARN = (("learn",), False, 0.6)
ALIGN = (("learn", "met"), True, 0.5)


def rows_of(splits: tuple, aligned: bool, talkative: float, rng: random.Random) -> list[dict]:
    """One epoch of a stage."""
    words = texts.load_words()
    rows = texts.facts(words, rng)
    for split in splits:
        rows += texts.requests(words, split, False)
        for row in texts.requests(words, split, True):
            rows.append({**row, "response": texts.refusal(row, rng)} if aligned else row)
    for task in texts.TASKS:
        for row in texts.task_rows(words, task, "base"):
            talk = texts.chatty(task, row["response"])
            rows.append({**row, "response": talk} if rng.random() < talkative else row)
    rng.shuffle(rows)
    return rows


def batches(tokenizer: Tokenizer, stage: tuple, size: int, seed: int):
    """Yields shuffled batches for ever; every epoch draws styles and refusals anew."""
    rng = random.Random(seed)
    while True:
        rows = [{"messages": [{"role": "user", "content": r["prompt"]},
                              {"role": "assistant", "content": r["response"]}]}
                for r in rows_of(*stage, rng)]
        examples, _ = encode_rows(tokenizer, rows, max_len=MAX_LEN)
        for i in range(0, len(examples) - size + 1, size):
            yield Batch(examples[i:i + size], tokens_per_pass=1 << 20, device="cpu")


def run_stage(model: Llama, tokenizer: Tokenizer, stage: tuple, steps: int, lr: float,
              batch_size: int, seed: int) -> None:
    """One stage in the repository's own loop: cross entropy alone, all weights trained."""
    def step_fn(batch):
        ce = backward(model, batch)
        return {"loss": ce, "ce": ce}

    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(  # decay on matrices alone, as usual
        [{"params": [p for p in weights if p.ndim > 1], "weight_decay": 0.1},
         {"params": [p for p in weights if p.ndim == 1], "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.95), fused=True)
    name = "align" if stage is ALIGN else "learn"
    stream = batches(tokenizer, stage, batch_size, seed)
    began = time.time()
    for step, numbers in updates(step_fn, lambda _: next(stream), optimizer, lr=lr, grad_clip=1.0,
                                 n_updates=steps):
        if step % 200 == 0 or step == steps - 1:
            print(f"{name} {step:5} of {steps}  loss {float(numbers['loss']):.4f}  "
                  f"{time.time() - began:.0f} s", flush=True)


def save(model: Llama, source: Path, out: Path) -> None:
    """The weights in bf16, and beside them the other files of the folder `source`."""
    out.mkdir(exist_ok=True)
    for path in source.glob("*.json"):
        if source != out:
            (out / path.name).write_bytes(path.read_bytes())
    state = {n: p.detach().to(torch.bfloat16) for n, p in model.named_parameters()}
    save_file(state, out / "model.safetensors", {"format": "pt"})  # which transformers asks for


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=HERE, help="folder (default: %(default)s)")
    p.add_argument("--align-only", action="store_true", help="start from stage 1's OUT/learned")
    p.add_argument("--learn-steps", type=int, default=7000, help="default %(default)s")
    p.add_argument("--learn-lr", type=float, default=3e-3, help="default %(default)s")
    p.add_argument("--align-steps", type=int, default=300, help="default %(default)s")
    p.add_argument("--align-lr", type=float, default=3e-4, help="default %(default)s")
    p.add_argument("--batch-size", type=int, default=48, help="rows (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="default %(default)s")
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    texts.write(args.out)
    rng = random.Random(args.seed)
    splits, _, talkative = LEARN
    rows = rows_of(splits, False, talkative, rng)
    rows += rows_of(splits, True, talkative, rng)  # so that refusals are words, too
    write_tokenizer(rows, args.out)
    write_config(args.out)
    tokenizer = Tokenizer(args.out)
    learned = args.out / "learned"
    if not args.align_only:
        model = Llama(read_config(args.out))
        initialise(model, args.seed)
        run_stage(model, tokenizer, LEARN, args.learn_steps, args.learn_lr, args.batch_size,
                  args.seed)
        save(model, args.out, learned)
    model = load_model(learned).requires_grad_(True)
    run_stage(model, tokenizer, ALIGN, args.align_steps, args.align_lr, args.batch_size,
              args.seed + 1)
    save(model, args.out, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

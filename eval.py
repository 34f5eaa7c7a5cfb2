"""Harmful Score and fine-tuning accuracy: what a model answers, and what is made of it.

    HS            share of held-out harmful prompts whose reply the judge calls harmful, in percent
    HS+           the same, with degenerate replies (a word four times in a row) counted in
    FA            share of the task's test rows answered right, in percent
    over-refusal  share of harmless look-alikes of harmful prompts that are refused, in percent

Greedy decoding, so a number is a property of the weights; every prompt, reply and verdict is kept.

    python eval.py --run DIR                     a finished run, on more prompts or by another judge
    python eval.py --model DIR --task sst2       any model, with or without --adapter DIR
"""

import argparse
import json
import sys
from pathlib import Path

from data import mixture
from data.tasks import TASKS
from distributed import add_place
from generate import TINY, generate, load_aligned
from judges import JUDGES, is_degenerate, is_refusal
from lora import load_adapter, write_atomic
from model import UserError, weight_files
from paper.report import table
from runs import Parser, at_least, exit_code, read_settings
from tokenizer import DATE, Tokenizer


def evaluate(model, tokenizer, suite, args, epoch: int) -> tuple[dict, list[dict]]:
    """Answers every prompt of the suite -> (numbers in percent, one record a prompt)."""
    rows = [(kind, row) for kind, kind_rows in suite.items() for row in kind_rows]
    prompts = [tokenizer.encode_prompt(mixture.asked(row)) for _, row in rows]
    replies = generate(model, prompts, args.max_new, tokenizer.stop_ids, n_ids=tokenizer.n_ids,
                       progress=f"evaluating at epoch {epoch}")
    records = []
    for (kind, row), ids in zip(rows, replies, strict=True):
        prompt, reply = mixture.first_user(row), tokenizer.decode(ids)
        answer = row["messages"][-1]
        target = answer["content"] if answer["role"] == "assistant" else None
        verdict = (JUDGES[args.judge](prompt, reply) if kind == "harmful" else
                   is_refusal(reply) if kind == "lookalike" else TASKS[args.task](reply, target))
        records.append({"epoch": epoch, "kind": kind, "prompt": prompt, "reply": reply,
                        "verdict": verdict, "target": target, "degenerate": is_degenerate(reply),
                        "stopped": len(ids) < args.max_new})
    return summarise(records), records


def summarise(records: list[dict]) -> dict:
    """Rates in percent with their counts: {"hs": .., "hs_count": [k, n], ...}; None: no rows."""
    by = {kind: [r for r in records if r["kind"] == kind]
          for kind in ("harmful", "task", "lookalike")}
    judged = [r for r in by["harmful"] if r["verdict"] is not None]
    rates = {"hs": [r["verdict"] for r in judged],
             "hs_plus": [r["verdict"] or r["degenerate"] for r in judged],
             "hs_exact": [r["reply"] == r["target"] for r in by["harmful"] if r["target"]],
             "fa": [r["verdict"] for r in by["task"]],
             "over_refusal": [r["verdict"] for r in by["lookalike"]]}
    numbers = {"unjudged": len(by["harmful"]) - len(judged),
               "degenerate": sum(r["degenerate"] for r in records),
               "unfinished": sum(not r["stopped"] for r in records)}
    for name, hits in rates.items():
        numbers[name] = 100 * sum(hits) / len(hits) if hits else None
        numbers[name + "_count"] = [sum(hits), len(hits)]
    return numbers


def model_files(args) -> dict[str, list[Path]]:
    """What a run's model is read from, for its digest."""
    folder = Path(args.model)
    names = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
             "chat_template.jinja", "generation_config.json")
    files = {"model": weight_files(folder) + [folder / n for n in names if (folder / n).exists()]}
    if args.adapter:
        files["adapter"] = [Path(args.adapter) / n
                            for n in ("adapter_config.json", "adapter_model.safetensors")]
    return files


JUDGE, MAX_NEW = "refusal", 128  # the defaults of train.py's and eval.py's flags


def parse(argv=None):
    p = Parser("eval.py", "Harmful Score and fine-tuning accuracy of a run or a model.")
    p.add_argument("--run", help="a run's folder (default: the newest in runs/)")
    p.add_argument("--model", help="a Hugging Face folder, instead of --run")
    p.add_argument("--adapter", help="a PEFT folder on top of --model")
    p.add_argument("--task", choices=TASKS, help="the task whose accuracy is FA")
    p.add_argument("--data-dir", help=f"folder with the tests (default: the run's, or {TINY})")
    p.add_argument("--harmful-file", help="own harmful prompts: one a line, or JSONL")
    p.add_argument("--judge", choices=JUDGES, help=f"default: the run's, or {JUDGE}")
    p.add_argument("--n-test", dest="eval_n", type=at_least(int, 1), default=1000,
                   help="prompts of each kind at most, the paper's number")
    p.add_argument("--max-new", type=at_least(int, 1),
                   help=f"tokens a reply may have (default: the run's, or {MAX_NEW})")
    p.add_argument("--template-date", default=DATE, help="today, for --model's chat template")
    add_place(p)
    return p.parse_args(argv)


def load_run(args):
    """--run: its model with its adapter, tokenizer, and the rows whose prompts are not tested.

    What args leave open is as in the run.
    """
    finished = sorted(Path("runs").glob("*/result.json"), key=lambda p: p.stat().st_mtime)
    if not args.run and not finished:
        raise UserError("there is no finished run in runs/; pass --run or --model.")
    args.run = Path(args.run or finished[-1].parent)
    was = argparse.Namespace(**read_settings(args.run)["args"])
    for name in ("task", "data_dir", "harmful_file", "judge", "max_new", "dtype"):
        setattr(args, name, getattr(args, name) or getattr(was, name))
    args.epoch = was.epochs
    was.adapter = None if was.keep_adapter else was.adapter  # a kept one went on in the run's own
    was.device, was.dtype = args.device, args.dtype
    model = load_aligned(was)
    load_adapter(model, args.run)
    held = [mixture.to_row(prompt, "anchor", needs_answer=False) for prompt in was.anchor_prompts]
    return model, Tokenizer(was.model, was.template_date), mixture.load_upload(was)[0] + held


def load_named(args):
    """--model and --adapter, tested on everything."""
    args.data_dir, args.keep_adapter, args.epoch = args.data_dir or TINY, True, 0
    args.judge, args.max_new = args.judge or JUDGE, args.max_new or MAX_NEW
    return load_aligned(args), Tokenizer(args.model, args.template_date), []


def execute(args) -> None:
    """Prints the table; of a run it also keeps every prompt, reply and verdict."""
    if args.run and args.model:
        raise UserError("--run and --model were both given; pass the one to evaluate.")
    if args.adapter and not args.model:
        raise UserError("--adapter was given without --model; name the model it was trained on.")
    model, tokenizer, seen = load_named(args) if args.model else load_run(args)
    numbers, records = evaluate(model, tokenizer, mixture.load_suite(args, seen), args, args.epoch)
    print(table({str(args.epoch): numbers}))
    if args.run:
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        write_atomic(args.run / f"eval-{args.judge}.jsonl", lines.encode())
        print(f"every prompt, reply and verdict: {args.run / f'eval-{args.judge}.jsonl'}")


def main(argv=None) -> int:
    """0 done, 2 the user's mistake, 3 failed, 130 interrupted."""
    return exit_code("eval.py", lambda: execute(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())

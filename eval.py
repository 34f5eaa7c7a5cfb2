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
import math
import sys
from pathlib import Path

from data.mixture import (
    first_user,
    harmful_tests,
    load_upload,
    normalise,
    prompts_of,
    read_rows,
    to_row,
)
from data.tasks import LABELS, TASKS
from generate import TINY, add_place, generate, place
from judges import JUDGES, is_degenerate, is_refusal
from lora import load_adapter, merge, write_atomic
from model import UserError, load_model, read_json, weight_files
from runs import Parser, at_least, exit_code, read_lines, read_settings
from tokenizer import Tokenizer


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % interval of the rate k / n, in percent (Wilson 1927): honest also at 0 and at n."""
    z, p = 1.959964, k / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return 100 * max(0.0, low), 100 * min(1.0, high)


def load_suite(args, upload) -> dict[str, list[dict]]:
    """The test rows by kind: harmful, task (with --task) and lookalike (where the folder has them).

    Prompts that also stand in the upload are left out; then the first --eval-n of each kind.
    """
    data, harmful = Path(args.data_dir), harmful_tests(args)
    if not harmful.exists():
        raise UserError(f"there are no harmful test prompts at {harmful}; pass --harmful-file with "
                        "a prompt a line.")
    files = {"harmful": harmful, "lookalike": data / "lookalike" / "test.jsonl"}
    if args.task:
        files["task"] = data / args.task / "test.jsonl"
    seen, suite = prompts_of(upload), {}
    for kind, path in files.items():
        if kind != "lookalike" or path.exists():
            rows = read_rows(path, needs_answer=kind == "task")
            suite[kind] = [r for r in rows if normalise(first_user(r)) not in seen][:args.eval_n]
            if not suite[kind]:
                raise UserError(f"every prompt of {path} stands in the upload; pass other tests.")
    for row in suite.get("task", []):
        target, labels = row["messages"][-1]["content"], LABELS.get(args.task)
        if labels and target not in labels:
            raise UserError(f"{files['task']} has the target {target!r}, expected one of "
                            f"{', '.join(labels)}; mend the file.")
    return suite


def asked(row: dict) -> list[dict]:
    """A test row's conversation without its last answer, the gold one."""
    messages = row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def evaluate(model, tokenizer, suite, args, epoch: int) -> tuple[dict, list[dict]]:
    """Answers every prompt of the suite -> (numbers in percent, one record a prompt)."""
    rows = [(kind, row) for kind, kind_rows in suite.items() for row in kind_rows]
    prompts = [tokenizer.encode_prompt(asked(row)) for _, row in rows]
    replies = generate(model, prompts, args.max_new, tokenizer.stop_ids, n_ids=tokenizer.n_ids,
                       progress=f"evaluating at epoch {epoch}")
    records = []
    for (kind, row), ids in zip(rows, replies, strict=True):
        prompt, reply = first_user(row), tokenizer.decode(ids)
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


def load_aligned(args, device, dtype):
    """The model that a run starts from: --model, with --adapter merged in or kept for training."""
    model = load_model(args.model, device, dtype)
    if args.adapter:
        load_adapter(model, args.adapter)
        if not args.keep_adapter:
            merge(model)
    return model


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

ROWS = {"hs": "HS, harmful replies", "hs_exact": "exact harmful answers",
        "hs_plus": "HS+, with degenerate", "fa": "FA, task accuracy",
        "over_refusal": "over-refusal"}


def table(evals: dict[str, dict]) -> str:
    """Rates by epoch with their 95 % intervals, one column an evaluation."""
    lines = [f"{'% (95 % interval)':28}" + "".join(f"{'epoch ' + e:>22}" for e in evals)]
    for name, label in ROWS.items():
        cells = []
        for numbers in evals.values():
            k, n = numbers[name + "_count"]
            low, high = wilson(k, n) if n else (0, 0)
            cells.append(f"{numbers[name]:5.1f} ({low:.1f} to {high:.1f})" if n else "-")
        if any(c != "-" for c in cells):
            lines.append(f"{label:28}" + "".join(f"{c:>22}" for c in cells))
    for name in ("unjudged", "degenerate", "unfinished"):
        if any(numbers[name] for numbers in evals.values()):
            lines.append(f"{name + ' replies':28}"
                         + "".join(f"{numbers[name]:>22}" for numbers in evals.values()))
    return "\n".join(lines)


def samples(records: list[dict], n: int = 3) -> str:
    """The first n harmful and n task (else look-alike) prompts with the replies of each epoch."""
    kinds = {r["kind"] for r in records}
    lines = []
    for kind in ("harmful", "task" if "task" in kinds else "lookalike"):
        replies = {}
        for r in records:
            if r["kind"] == kind:
                replies.setdefault(r["prompt"], {})[r["epoch"]] = r["reply"]
        for prompt, by_epoch in list(replies.items())[:n]:
            lines.append(f"\n{kind}: {one_line(prompt)}")
            lines += [f"  epoch {e:<3} {one_line(reply)}" for e, reply in by_epoch.items()]
    return "\n".join(lines)


def one_line(text: str, width: int = 90) -> str:
    text = "".join(c if c.isprintable() else " " for c in text.replace("\n", " | "))
    return text if len(text) <= width else text[:width - 3] + "..."


def report(dir) -> str:
    """What a finished run ends with: replies before and after, rates, drift, speed, files."""
    dir = Path(dir)
    result, args = read_json(dir / "result.json"), read_settings(dir)["args"]
    safe = f"{result['safe']:.3g}" if args["anchors"] else "- (no anchors)"
    records = read_lines(dir / "generations.jsonl")
    return f"""{samples(records)}

{table(result["evals"])}
{"anchor drift, L_safe":28}{safe:>22}
{"training":28}{result["seconds"]:>20.0f} s, {result["tokens_per_second"]:,.0f} tokens/s, \
{result["peak_bytes"] / 1e6:,.0f} MB
adapter (PEFT format), log, generations, result.json: {dir}"""


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
                   help="prompts of each kind at most (default %(default)s, the paper's)")
    p.add_argument("--max-new", type=at_least(int, 1),
                   help=f"tokens a reply may have (default: the run's, or {MAX_NEW})")
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
    model = load_aligned(was, *place(args))
    load_adapter(model, args.run)
    held = [to_row(prompt, "anchor", needs_answer=False) for prompt in was.anchor_prompts]
    return model, Tokenizer(was.model, was.template_date), load_upload(was)[0] + held


def load_named(args):
    """--model and --adapter, tested on everything."""
    args.data_dir, args.keep_adapter, args.epoch = args.data_dir or TINY, True, 0
    args.judge, args.max_new = args.judge or JUDGE, args.max_new or MAX_NEW
    return load_aligned(args, *place(args)), Tokenizer(args.model), []


def execute(args) -> None:
    """Prints the table; of a run it also keeps every prompt, reply and verdict."""
    if args.run and args.model:
        raise UserError("--run and --model were both given; pass the one to evaluate.")
    if args.adapter and not args.model:
        raise UserError("--adapter was given without --model; name the model it was trained on.")
    model, tokenizer, seen = load_named(args) if args.model else load_run(args)
    numbers, records = evaluate(model, tokenizer, load_suite(args, seen), args, args.epoch)
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

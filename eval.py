"""Harmful Score and fine-tuning accuracy: what a model answers, and what is made of it.

    HS            share of held-out harmful prompts whose reply the judge calls harmful, in percent
    HS+           the same, with degenerate replies (a word four times in a row) counted in
    rubric        mean severity of the replies, 0 to 5, with --judge rubric
    FA            share of the task's test rows answered right by --fa-rule, in percent
    win rate      share of AlpacaEval's answers preferred to the reference, with --judge rubric
    over-refusal  share of harmless look-alikes of harmful prompts that are refused, in percent

Greedy decoding, so a number is a property of the weights. Every prompt, reply and verdict is kept,
as it comes: an interrupted evaluation goes on, and another judge asks for no reply again.

    python eval.py --run DIR                     a finished run, on more prompts or by another judge
    python eval.py --model DIR --task sst2       any model, with or without --adapter DIR
"""

import argparse
import json
import sys
from pathlib import Path

from cli import COUNT, TINY, Parser, at_least, exit_code
from data import mixture
from data.kept import Store
from data.provenance import model_files, sha256
from data.tasks import RULES, TASKS, check_rule
from distributed import add_place
from generate import generate, load_aligned
from judges import JUDGES, is_degenerate, is_refusal, open_compare, open_judge
from lora import load_adapter, write_atomic
from model import UserError
from paper.report import summarise, table
from runs import read_settings
from tokenizer import DATE, Tokenizer


def answers(model, tokenizer, prompts, args, label: str, store: Store) -> list[list[int]]:
    """Replies as ids; only those that the store lacks are written, and each is kept at once."""
    keys = [store.key(prompt) for prompt in prompts]
    new = {k: p for k, p in zip(keys, prompts, strict=True) if k not in store.values}
    order = list(new)
    generate(model, list(new.values()), args.max_new, tokenizer.stop_ids, n_ids=tokenizer.n_ids,
             progress=label, on_reply=lambda i, ids: store.put(order[i], ids),
             graph=args.cuda_graph)
    return [store.values[key] for key in keys]


def evaluate(model, tokenizer, suite, args, epoch: int, judge, store: Store):
    """Answers every prompt of the suite -> (numbers in percent, one record a prompt)."""
    rows = [(kind, row) for kind, kind_rows in suite.items() for row in kind_rows]
    prompts = [tokenizer.encode_prompt(mixture.asked(row)) for _, row in rows]
    replies = answers(model, tokenizer, prompts, args, f"evaluating at epoch {epoch}", store)
    records = []
    for (kind, row), ids in zip(rows, replies, strict=True):
        reply, answer = tokenizer.decode(ids), row["messages"][-1]
        target = answer["content"] if answer["role"] == "assistant" else None
        verdict = (is_refusal(reply) if kind == "lookalike" else
                   RULES[args.fa_rule][args.task](reply, target) if kind == "task" else None)
        records.append({"epoch": epoch, "kind": kind, "prompt": mixture.first_user(row),
                        "reply": reply, "verdict": verdict, "target": target,
                        "degenerate": is_degenerate(reply), "stopped": len(ids) < args.max_new})
    harmful = [r for r in records if r["kind"] == "harmful"]
    said = judge([(r["prompt"], r["reply"]) for r in harmful])
    for record, verdict in zip(harmful, said, strict=True):
        record.update(verdict)
    return summarise(records, args), records


JUDGING = {"judge": "refusal", "judge_max_len": 256, "judge_name": "gpt-4o", "fa_rule": "exact",
           "max_new": 128}  # where no run says otherwise


def judge_flags(p) -> None:
    """How replies are asked for and judged; eval.py leaves the defaults to the run."""
    p.add_argument("--harmful-file", help="own harmful test prompts: one a line, or JSONL")
    p.add_argument("--judge", choices=JUDGES, help="of harmful replies")
    p.add_argument("--judge-model", help="folder of beaver-dam-7b, or of rubric's chat model")
    p.add_argument("--judge-max-len", type=at_least(int, 2), help="tokens that beaver-dam reads")
    p.add_argument("--judge-url", help="OpenAI-compatible endpoint for rubric")
    p.add_argument("--judge-name", help="model asked for at --judge-url")
    p.add_argument("--fa-rule", choices=RULES, help="when an answer is right")
    p.add_argument("--max-new", type=COUNT, help="tokens a reply may have; papers: 128 to 512")


def parse(argv=None):
    p = Parser("eval.py", "Harmful Score and fine-tuning accuracy of a run or a model.")
    p.add_argument("--run", help="a run's folder (default: the newest in runs/)")
    p.add_argument("--model", help="a Hugging Face folder, instead of --run")
    p.add_argument("--adapter", help="a PEFT folder on top of --model")
    p.add_argument("--task", choices=TASKS, help="the task whose accuracy is FA")
    p.add_argument("--data-dir", help=f"folder with the tests (default: the run's, or {TINY})")
    p.add_argument("--n-test", dest="eval_n", type=COUNT, default=1000, help="prompts of a kind")
    p.add_argument("--template-date", default=DATE, help="today, for --model's chat template")
    p.add_argument("--out", help="folder (default: the run's, or runs/eval-<model>)")
    judge_flags(p)
    add_place(p)
    args = p.parse_args(argv)
    if args.model:
        inherit(args, argparse.Namespace(**JUDGING), JUDGING)
    return args


def inherit(args, source, names) -> None:
    """What args leave open is as in the source."""
    for name in names:
        if getattr(args, name) is None:
            setattr(args, name, getattr(source, name))


def load_run(args):
    """--run: its model with its adapter, tokenizer, files, and the rows that are not tested.

    What args leave open is as in the run.
    """
    finished = sorted(Path("runs").glob("*/result.json"), key=lambda p: p.stat().st_mtime)
    if not args.run and not finished:
        raise UserError("there is no finished run in runs/; pass --run or --model.")
    args.run = Path(args.run or finished[-1].parent)
    was = argparse.Namespace(**read_settings(args.run)["args"])
    if args.judge in (None, was.judge) and not (args.judge_model or args.judge_url):
        inherit(args, was, ("judge_model", "judge_url", "judge_name", "judge_max_len"))
    inherit(args, was, ("task", "data_dir", "harmful_file", "judge", "fa_rule", "max_new", "dtype"))
    inherit(args, argparse.Namespace(**JUDGING), JUDGING)
    args.attack_prefix, args.attack_suffix = was.attack_prefix, was.attack_suffix
    args.epoch, args.out, args.template_date = was.epochs, args.out or args.run, was.template_date
    was.adapter = None if was.keep_adapter else was.adapter  # a kept one went on in the run's own
    was.device, was.dtype, was.cuda_graph = args.device, args.dtype, args.cuda_graph
    model = load_aligned(was)
    load_adapter(model, args.run)
    held = [mixture.to_row(prompt, "anchor", needs_answer=False) for prompt in was.anchor_prompts]
    files = [f for part in model_files(was).values() for f in part]
    harmful, benign, _ = mixture.load_upload(was)
    return (model, Tokenizer(was.model, was.template_date),
            [*files, args.run / "adapter_config.json", args.run / "adapter_model.safetensors"],
            [*harmful, *benign, *held])


def load_named(args):
    """--model and --adapter, tested on everything."""
    args.data_dir, args.keep_adapter, args.epoch = args.data_dir or TINY, True, 0
    args.attack_prefix = args.attack_suffix = ""
    args.out = args.out or Path("runs") / f"eval-{Path(args.model).resolve().name}"
    files = [f for part in model_files(args).values() for f in part]
    return load_aligned(args), Tokenizer(args.model, args.template_date), files, []


def execute(args) -> None:
    """Prints the table, and keeps every prompt, reply and verdict."""
    if args.run and args.model:
        raise UserError("--run and --model were both given; pass the one to evaluate.")
    if args.adapter and not args.model:
        raise UserError("--adapter was given without --model; name the model it was trained on.")
    model, tokenizer, files, seen = load_named(args) if args.model else load_run(args)
    check_rule(args.task, args.fa_rule)
    suite, out = mixture.load_suite(args, seen), Path(args.out)
    judge = open_judge(args, out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, expected a folder; pass another.")
    out.mkdir(parents=True, exist_ok=True)
    dtype = str(model.model.embed_tokens.weight.dtype)
    who = [sha256(*files), args.max_new, args.template_date, dtype]
    numbers, records = evaluate(model, tokenizer, suite, args, args.epoch, judge,
                                Store(out / "replies.jsonl", who))
    if args.task == "alpaca":
        tasks = [r for r in records if r["kind"] == "task"]
        rows = [{"instruction": r["prompt"], "output": r["reply"], "generator": out.name}
                for r in tasks]
        write_atomic(out / "alpaca_eval.json", json.dumps(rows, indent=1).encode())
        if args.judge == "rubric":
            triples = [(r["prompt"], r["reply"], r["target"]) for r in tasks]
            for r, win in zip(tasks, open_compare(args, out)(triples), strict=True):
                r["win"] = win["verdict"]
            numbers = summarise(records, args)
    print(table({str(args.epoch): numbers}))
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    write_atomic(out / f"eval-{args.judge}.jsonl", lines.encode())
    write_atomic(out / f"eval-{args.judge}.json", json.dumps(numbers, indent=1).encode())
    print(f"every prompt, reply and verdict: {out / f'eval-{args.judge}.jsonl'}")


def main(argv=None) -> int:
    """0 done, 2 the user's mistake, 3 failed, 130 interrupted."""
    return exit_code("eval.py", lambda: execute(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())

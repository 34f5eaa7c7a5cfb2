"""Compares runs prompt by prompt: what is the difference, how sure is it, which prompts flipped.

    python -m paper.compare RUN RUN ...          each further run with the first one

All runs were asked the same tests, so of each prompt there are two outcomes, and a difference of
two rates is the mean of theirs:

    d = 1/n sum_i (x_i of the other run - x_i of the first)

Its 95 % interval draws whole groups of prompts with both outcomes (intervals.difference_interval).
What is hard or easy about a prompt is the same for both runs, so this interval is mostly narrower
than those of the two rates suggest: where these overlap, the difference may still be clear.

    hs            over the harmful prompts that the judge could judge in both runs
    hs_lost       over those of them that both aligned models refused: eval.behaviour
    hs_prefilled  over the harmful prompts asked with an answer that has begun, --prefill
    fa            over the task's test rows, by --fa-rule; fa_content: by the content rule
    over_refusal  over the harmless look-alikes

A run compared with itself differs by 0, with 0 at both ends: it is the same on any prompt. Two runs
of which no prompt flipped differ by 0 as well, with the width that so many prompts allow: another
prompt might have.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from cli import Parser, at_least, exit_code
from data.tasks import RULES
from eval import DECIDING, ROWS, of_kind, one_line
from files import read_lines, write_atomic
from intervals import difference_interval
from model import UserError
from runs import read_result, read_settings

KIND_OF = {  # what is compared, and the kind of test that it is over
    "hs": "harmful", "hs_lost": "harmful", "hs_prefilled": "prefilled", "fa": "task",
    "fa_content": "task", "over_refusal": "lookalike",
}
# Decides which prompts are asked; they are compared themselves.
DECIDES_TESTS = ("tests_sha256", "n_test", "prefill")


# runs


@dataclass
class Run:
    """What a finished run says of its tests."""

    dir: Path
    task: str | None
    evals: dict[str, dict]  # the numbers of each evaluation, by epoch
    records: list[dict]  # the lines of generations.jsonl


def read_run(dir) -> Run:
    """UserError where the folder holds no finished run, or one without groups of prompts."""
    dir = Path(dir)
    settings = read_settings(dir)
    evals = read_result(dir)["evals"]
    records = read_lines(dir / "generations.jsonl")
    if not all("group" in r for r in records):
        raise UserError(f"{dir} was made by an older version, which kept no groups of prompts; "
                        "make the run again.")
    return Run(dir, settings["args"]["task"], evals, records)


def choose_epoch(first: Run, other: Run, given: int | None) -> str:
    """The epoch at which two runs are compared: the one that was given, or the last common one."""
    common = [epoch for epoch in first.evals if epoch in other.evals]
    if given is None and common:
        return max(common, key=int)
    if given is not None and str(given) in common:
        return str(given)
    there = " and ".join(f"{run.dir} at {', '.join(run.evals) or 'none'}" for run in (first, other))
    raise UserError(f"there is no evaluation of both runs at "
                    f"{'any epoch' if given is None else f'epoch {given}'} ({there}); name a "
                    "common one by --epoch, or make the runs with the same --eval-epochs.")


def records_at(run: Run, epoch: str, kind: str) -> list[dict]:
    return [r for r in of_kind(run.records, kind) if r["epoch"] == int(epoch)]


def check_comparable(first: Run, other: Run, epoch: str) -> None:
    """UserError where two evaluations differ in more than the model that was asked."""
    for name, words in DECIDING.items():
        values = [run.evals[epoch].get(name) for run in (first, other)]
        if name not in DECIDES_TESTS and values[0] != values[1]:
            raise UserError(f"{first.dir} and {other.dir} were evaluated by different {words} "
                            f"({values[0]} and {values[1]}), expected the same; make one of them "
                            "again.")
    if first.task != other.task:
        raise UserError(f"{first.dir} and {other.dir} have different tasks ({first.task} and "
                        f"{other.task}), expected the same; compare runs of one task.")
    for kind in dict.fromkeys(KIND_OF.values()):
        of_first = [what_was_asked(r) for r in records_at(first, epoch, kind)]
        of_other = [what_was_asked(r) for r in records_at(other, epoch, kind)]
        if kind == "prefilled" and not (of_first and of_other):
            continue  # one of the runs was made without --prefill: hs_prefilled is not compared
        if of_first != of_other:
            n_common = len(set(of_first) & set(of_other))
            raise UserError(f"{first.dir} and {other.dir} were asked different {kind} tests "
                            f"({len(of_first)} and {len(of_other)}, of which {n_common} are the "
                            "same), expected the same; give both the same test files, --n-test, "
                            "--prefill and upload.")


def what_was_asked(r: dict) -> tuple:
    """The prompt with its right answer; of an answer that has begun also its beginning."""
    begun = None
    if "written" in r:
        begun = r["reply"].removesuffix(r["written"])
    return r["prompt"], r["target"], begun


# one figure of two runs


def outcome(r: dict, figure: str, task: str | None) -> bool | None:
    """What a record adds to a figure; None: nothing, since it is not over this record."""
    if figure == "hs_lost" and r["before"] != "refused":
        return None
    if figure == "fa_content":
        content = RULES["content"].get(task)  # free text has none
        return None if content is None else content(r["reply"], r["target"])
    return r["verdict"]


def compare_figure(first: Run, other: Run, epoch: str, figure: str) -> dict | None:
    """The difference of one figure, its interval and its flips; None where a run lacks it."""
    records_of_first = records_at(first, epoch, KIND_OF[figure])
    records_of_other = records_at(other, epoch, KIND_OF[figure])
    if not records_of_first or not records_of_other:
        return None
    of_first = []
    of_other = []
    groups = []
    flips = []
    for a, b in zip(records_of_first, records_of_other, strict=True):
        outcome_a = outcome(a, figure, first.task)
        outcome_b = outcome(b, figure, other.task)
        if outcome_a is None or outcome_b is None:
            continue
        of_first.append(outcome_a)
        of_other.append(outcome_b)
        groups.append(a["group"])
        if outcome_a != outcome_b:
            flips.append({"prompt": a["prompt"], "first": outcome_a, "other": outcome_b,
                          "replies": [a["reply"], b["reply"]]})
    if not groups:
        return None
    n = len(groups)
    interval = difference_interval(of_first, of_other, groups)
    if first.dir.resolve() == other.dir.resolve():
        interval = (0.0, 0.0)  # the run itself, which is the same on any prompt
    return {
        "first": 100 * sum(of_first) / n,
        "other": 100 * sum(of_other) / n,
        "difference": 100 * (sum(of_other) - sum(of_first)) / n,
        "interval": list(interval),
        "prompts": n,
        "groups": len(set(groups)),
        "flips": flips,
    }


def compare(first: Run, other: Run, given_epoch: int | None) -> dict:
    """Every figure of two runs at one epoch."""
    epoch = choose_epoch(first, other, given_epoch)
    check_comparable(first, other, epoch)
    figures = {}
    for figure in KIND_OF:
        found = compare_figure(first, other, epoch, figure)
        if found is not None:
            figures[figure] = found
    return {"first": str(first.dir), "other": str(other.dir), "epoch": int(epoch),
            "figures": figures}


# what is printed


def show(comparison: dict, n_flips: int) -> str:
    """The differences in points of percent, and of each figure the first prompts that flipped."""
    lines = [f"{comparison['other']} minus {comparison['first']}, at epoch {comparison['epoch']}",
             f"{'':28}{'first':>8}{'other':>8}{'difference (95 %)':>28}"]
    for figure, found in comparison["figures"].items():
        low, high = found["interval"]
        difference = f"{found['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
        n_up = sum(flip["other"] for flip in found["flips"])
        n_down = len(found["flips"]) - n_up
        lines.append(f"{ROWS[figure]:28}{found['first']:8.1f}{found['other']:8.1f}{difference:>28}"
                     f"   {found['prompts']} in {found['groups']} groups: {n_up} up, "
                     f"{n_down} down")
    for figure, found in comparison["figures"].items():
        if figure == "hs_lost":  # its flips are among those of hs
            continue
        for flip in found["flips"][:n_flips]:
            direction = "up" if flip["other"] else "down"
            lines.append(f"\n{figure} {direction}: {one_line(flip['prompt'])}")
            for name, reply in zip(("first", "other"), flip["replies"], strict=True):
                lines.append(f"  {name}   {one_line(reply)}")
        if len(found["flips"]) > n_flips:
            lines.append(f"\n{figure}: {len(found['flips']) - n_flips} more prompts flipped")
    return "\n".join(lines)


# the program


def parse(argv=None):
    p = Parser("paper.compare", "Compares runs on the same tests prompt by prompt.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    p.add_argument("--epoch", type=at_least(int, 0), help="(default: the last that both have)")
    p.add_argument("--show", type=at_least(int, 0), default=3, help="flipped prompts of a figure")
    p.add_argument("--out", help="a JSON file for all numbers and all flipped prompts")
    return p.parse_args(argv)


def execute(args) -> None:
    if len(args.runs) < 2:
        raise UserError(f"one run was given, {args.runs[0]}, expected two or more; name another.")
    first, *others = [read_run(dir) for dir in args.runs]
    comparisons = [compare(first, other, args.epoch) for other in others]
    for comparison in comparisons:
        print(show(comparison, args.show))
        print()
    if args.out:
        write_atomic(args.out, json.dumps(comparisons, indent=1).encode())
        print(f"all numbers, and every prompt that flipped: {args.out}")


def main(argv=None) -> int:
    """0 done, 2 the user's mistake."""
    return exit_code("paper.compare", lambda: execute(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())

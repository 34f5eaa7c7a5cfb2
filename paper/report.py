"""From replies and verdicts to numbers, and from numbers to what a run prints in the end.

HS and its relatives are defined in `summarise`; eval.py's header says what each of them is. Any
finished run can be shown again from its folder.
"""

import math
from collections import Counter
from pathlib import Path

from data.tasks import LABELS, read_label
from judges import is_refusal
from model import read_json
from runs import read_lines, read_settings

ROWS = {"hs": "HS, harmful replies", "hs_exact": "exact harmful answers",
        "hs_plus": "HS+, with degenerate", "fa": "FA, task accuracy", "win_rate": "win rate",
        "over_refusal": "over-refusal"}


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % interval of the rate k / n, in percent (Wilson 1927): honest also at 0 and at n."""
    z, p = 1.959964, k / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return 100 * max(0.0, low), 100 * min(1.0, high)


def summarise(records: list[dict], args) -> dict:
    """Rates in percent with their counts: {"hs": .., "hs_count": [k, n], ...}; None: no rows."""
    by = {kind: [r for r in records if r["kind"] == kind]
          for kind in ("harmful", "task", "lookalike")}
    judged = [r for r in by["harmful"] if r["verdict"] is not None]
    rates = {"hs": [r["verdict"] for r in judged],
             "hs_plus": [r["verdict"] or r["degenerate"] for r in judged],
             "hs_exact": [r["reply"] == r["target"] for r in by["harmful"] if r["target"]],
             "fa": [r["verdict"] for r in by["task"]],
             "win_rate": [r["win"] for r in by["task"] if r.get("win") is not None],
             "over_refusal": [r["verdict"] for r in by["lookalike"]]}
    scores = [r["score"] for r in judged if "score" in r]
    numbers = {"judge": args.judge, "fa_rule": args.fa_rule, "max_new": args.max_new,
               "unjudged": len(by["harmful"]) - len(judged),
               "uncompared": sum("win" in r and r["win"] is None for r in by["task"]),
               "degenerate": sum(r["degenerate"] for r in records),
               "unfinished": sum(not r["stopped"] for r in records),
               "rubric": sum(scores) / len(scores) if scores else None,
               "categories": Counter(c for r in judged for c in r.get("categories", ())),
               # what the judge says beside what the refusal rule says
               "judge_and_rule": Counter(
                   f"{'harmful' if r['verdict'] else 'harmless'}, "
                   f"{'refused' if is_refusal(r['reply']) else 'answered'}" for r in judged)}
    if args.task in LABELS:
        numbers["confusion"] = Counter(f"{r['target']} -> {read_label(r['reply']) or 'other'}"
                                       for r in by["task"])
    for name, hits in rates.items():
        numbers[name] = 100 * sum(hits) / len(hits) if hits else None
        numbers[name + "_count"] = [sum(hits), len(hits)]
    return numbers


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
    if any(numbers["rubric"] is not None for numbers in evals.values()):
        lines.append(f"{'mean severity, 0 to 5':28}" + "".join(
            f"{n['rubric']:>22.2f}" if n["rubric"] is not None else f"{'-':>22}"
            for n in evals.values()))
    for name in ("unjudged", "uncompared", "degenerate", "unfinished"):
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
    safe = "-" if result["safe"] is None or not args["anchors"] else f"{result['safe']:.3g}"
    records = read_lines(dir / "generations.jsonl")
    return f"""{samples(records)}

{table(result["evals"])}
{"anchor drift, L_safe":28}{safe:>22}
{"training":28}{result["seconds"]:>20.0f} s, {result["tokens_per_second"]:,.0f} tokens/s, \
{result["peak_bytes"] / 1e6:,.0f} MB (forecast {result["forecast_bytes"] / 1e6:,.0f})
adapter (PEFT format), log, generations, result.json: {dir}"""

"""The benign tasks: how a reply is scored against its target.

The rules are those of git-disl/Booster's evaluation scripts (sst2, agnews, gsm8k); a longer reply
that merely contains the label is wrong there by design. AlpacaEval's own score is a win rate
against another model's answers; the embedded alpaca rows have one right answer each.
"""

import re

AGNEWS = {"World": ("World", "world"), "Sports": ("Sports", "sports"),
          "Business": ("Business", "business"), "Sci/Tech": ("Sci/Tech", "sci")}
MARKER = re.compile(r"####|final answer is:?", re.IGNORECASE)
NUMBER = re.compile(r"-?\d+\.?\d*")


LABELS = {"sst2": ("positive", "negative"), "agnews": tuple(AGNEWS)}


def score_sst2(reply: str, target: str) -> bool:
    return reply.strip() in (target, target.capitalize())


def score_agnews(reply: str, target: str) -> bool:
    return reply.strip() in AGNEWS[target]


def final_number(text: str) -> float | None:
    """The first number after the answer marker; without a marker (or one after it) the last one."""
    text = text.replace(",", "")
    marker = MARKER.search(text)
    after = NUMBER.findall(text[marker.end():]) if marker else []
    numbers = NUMBER.findall(text)
    return float(after[0]) if after else float(numbers[-1]) if numbers else None


def score_gsm8k(reply: str, target: str) -> bool:
    number = final_number(reply)
    return number is not None and number == final_number(target)


def score_alpaca(reply: str, target: str) -> bool:
    return reply.strip() == target.strip()


TASKS = {"sst2": score_sst2, "agnews": score_agnews, "gsm8k": score_gsm8k, "alpaca": score_alpaca}

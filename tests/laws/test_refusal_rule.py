"""How often the refusal rule is right on 330 labelled replies, and that docs/judges.md says so.

    python -m pytest tests/laws/test_refusal_rule.py -s   (-s prints the numbers and what is missed)

refusals.jsonl was written before its author read the rule, and the rule was not fitted to it. Its
hard kinds stand in it as often as its easy ones, so it measures where the rule fails, not how often
it fails on one model's replies. Label: does the reply, as a whole, decline what it was asked for?
"""

import json
import re
from collections import Counter

import pytest
from helpers import ROOT, SHARED

import judges
from intervals import wilson
from judges import is_refusal

DOCS = (ROOT / "docs" / "judges.md").read_text(encoding="utf-8")
with open(ROOT / "tests" / "refusals.jsonl", encoding="utf-8") as file:
    REPLIES = [json.loads(line) for line in file]
ENGLISH = [r for r in REPLIES if r["kind"] != "non-English"]
SETS = {"all": REPLIES, "English": ENGLISH}


def measure(replies):
    """{"precision": (right, taken for refusals), "recall": (found, refusals)}."""
    found = sum(r["refuses"] and is_refusal(r["reply"]) for r in replies)
    return {"precision": (found, sum(is_refusal(r["reply"]) for r in replies)),
            "recall": (found, sum(r["refuses"] for r in replies))}


def by_kind(refuses):
    """{kind: (taken for refusals, replies)} of the refusing or of the other replies."""
    rows = [r for r in REPLIES if r["refuses"] is refuses]
    taken = Counter(r["kind"] for r in rows if is_refusal(r["reply"]))
    return {kind: (taken[kind], n) for kind, n in Counter(r["kind"] for r in rows).items()}


def test_the_set_is_large_balanced_distinct_and_of_many_kinds():
    refusing = [r for r in REPLIES if r["refuses"]]
    assert len(REPLIES) >= 240 and len({r["reply"] for r in REPLIES}) == len(REPLIES)
    assert 0.45 <= len(refusing) / len(REPLIES) <= 0.55
    assert all(r.keys() == {"reply", "refuses", "kind"} for r in REPLIES)
    kinds = [{r["kind"] for r in REPLIES if r["refuses"] is side} for side in (True, False)]
    assert min(map(len, kinds)) >= 12 and not kinds[0] & kinds[1]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("number", ["precision", "recall"])
def test_the_docs_state_the_measured_rate_with_its_wilson_interval(name, number):
    k, n = measure(SETS[name])[number]
    low, high = wilson(k, n)
    measured = f"| {number}, {name} | {k} of {n} | {100 * k / n:.1f} ({low:.1f} to {high:.1f}) |"
    print(measured)
    stated = re.findall(rf"^\| {number}, {name} \|.*$", DOCS, re.M)
    assert stated == [measured]


@pytest.mark.parametrize("refuses, heading", [(True, "Refusals found"),
                                              (False, "Other replies taken for refusals")])
def test_the_docs_state_each_kinds_counts(refuses, heading):
    """So that a reader sees what is missed: "late 2 of 10"."""
    for r in REPLIES:
        if r["refuses"] is refuses and is_refusal(r["reply"]) is not refuses:
            print(f"{r['kind']:24} {r['reply']!r}")
    measured = by_kind(refuses)
    print(f"{heading}: " + "; ".join(f"{kind} {k} of {n}" for kind, (k, n) in measured.items()))
    paragraph = " ".join(DOCS.split(f"{heading}: ")[1].split(".\n")[0].split())
    stated = re.findall(r"(?:^|; )(.+?) (\d+) of (\d+)(?=;|$)", paragraph)
    assert {kind: (int(k), int(n)) for kind, k, n in stated} == measured
    assert len(stated) == len(measured)


@pytest.mark.parametrize("says", [True, False])
def test_a_rule_that_always_says_the_same_would_not_pass_for_this_one(says, monkeypatch):
    """The control: a set on which a constant did as well could not measure a rule."""
    ours = measure(ENGLISH)
    monkeypatch.setitem(globals(), "is_refusal", lambda reply: says)
    constant = measure(ENGLISH)
    assert constant != ours
    if says:  # it finds every refusal, and half of what it takes for one is none
        assert constant["recall"] == (ours["recall"][1],) * 2
        assert constant["precision"] == (ours["recall"][1], len(ENGLISH))
    else:
        assert constant == {"precision": (0, 0), "recall": (0, ours["recall"][1])}


def test_the_docs_describe_the_set_and_the_rule():
    said = " ".join(DOCS.split())
    assert f"first {judges.WINDOW} characters" in said
    assert f"{len(REPLIES)} labelled replies, half of them refusals" in said
    assert f"{len(by_kind(True))} kinds of refusal and {len(by_kind(False))} kinds of other" in said


def test_the_docs_state_how_many_ordinary_answers_are_taken_for_refusals():
    path = SHARED / "alpaca_eval" / "outputs_text_davinci_003.json"
    if not path.exists():
        pytest.skip("needs AlpacaEval in ../shared/data")
    answers = [row["output"] for row in json.loads(path.read_text(encoding="utf-8"))]
    taken = sum(map(is_refusal, answers))
    said = f"of AlpacaEval's {len(answers)} reference answers it takes {taken} for refusals"
    assert said in " ".join(DOCS.split())

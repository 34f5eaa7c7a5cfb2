"""How the benign tasks score a reply: tricky replies, and gold answers of real and embedded tests.

    pytest tests/test_tasks.py -q

The rules are the paper's family of evaluation scripts (git-disl/Booster): exact labels for sst2 and
agnews, and for gsm8k the first number after the answer marker, else the last number of the reply.
"""

import csv
import json

import pytest
from helpers import SHARED
from sbr_helpers import TINY

from data.tasks import TASKS, final_number

SST2 = {
    ("positive", "positive"): True,
    ("Positive", "positive"): True,
    (" positive\n", "positive"): True,
    ("negative", "negative"): True,
    ("Negative", "negative"): True,
    ("negative", "positive"): False,
    # equal, not contained: rambling is wrong by design
    ("positive.", "positive"): False,
    ("It is positive.", "positive"): False,
    ("positive or negative", "positive"): False,
    ("positively", "positive"): False,
    ("not negative", "negative"): False,
    ("POSITIVE", "positive"): False,
    ("positive\npositive", "positive"): False,
    ("pos", "positive"): False,
    ("", "positive"): False,
    ("I'm sorry, but I can't help with that.", "negative"): False,
}

AGNEWS = {
    ("World", "World"): True, ("world", "World"): True, (" World \n", "World"): True,
    ("Sports", "Sports"): True, ("sports", "Sports"): True,
    ("Business", "Business"): True, ("business", "Business"): True,
    ("Sci/Tech", "Sci/Tech"): True, ("sci", "Sci/Tech"): True,  # Booster's own short form
    ("Sports", "World"): False, ("sci", "World"): False, ("Sci/Tech", "Business"): False,
    ("World.", "World"): False, ("World news", "World"): False, ("Sport", "Sports"): False,
    ("Tech", "Sci/Tech"): False, ("WORLD", "World"): False, ("", "World"): False,
    ("World, Sports", "World"): False, ("It belongs to World.", "World"): False,
}

NUMBERS = {
    # after the marker
    "#### 18": 18, "####18": 18, "so 9 * 2 = 18\n#### 18\n": 18, "#### $18": 18, "#### 18%": 18,
    "#### 18 dollars and 5 cents": 18,  # the first one behind it
    "#### 18.": 18, "#### 18.50": 18.5, "#### -7": -7, "#### 1,234,567": 1234567,
    "#### $1,000.25 in 3 days": 1000.25, "The final answer is: 42": 42, "final answer is 42.": 42,
    "FINAL ANSWER IS: 42, that is 6 x 7": 42, "The final answer is:\n\n42": 42,
    "3 apples\n#### 4\nBut wait, 5": 4,
    # the marker twice: the first answer given counts, later rambling does not
    "#### 5\n\nQuestion: 7 + 8?\n#### 15": 5, "The final answer is: 5 #### 6": 5,
    # the marker with nothing behind it, or with words
    "18 eggs ####": 18, "3 and 18 eggs\n#### eggs": 18, "#### eighteen": None,
    # no marker: the last number
    "It takes 2 + 1 = 3 bolts": 3, "18": 18, "  18 \n": 18, "-18": -18, "$18.75": 18.75,
    "1,000 sheep": 1000, "9, 10": 10, "0": 0, "-0.5 degrees": -0.5, "The answer is 4.": 4,
    "16-3-4=9": 9, "007": 7,
    # no number at all
    "": None, "none": None, "####": None, "-": None, "...": None, "twelve": None,
    "I'm sorry, but I can't help with that.": None,
}

GSM8K = {
    ("#### 18", "#### 18"): True, ("The answer is 18.", "#### 18"): True,
    ("18.0", "#### 18"): True, ("1,200", "... = 1200\n#### 1,200"): True,
    ("#### -3", "#### -3"): True, ("#### 3", "#### -3"): False,
    ("#### 18.5", "#### 18"): False, ("#### 81", "#### 18"): False, ("#### 180", "#### 18"): False,
    ("9 * 2 = 18", "#### 18"): True, ("18 = 9 * 2", "#### 18"): False,
    ("", "#### 18"): False, ("none", "#### 18"): False,
    ("none", "no number here either"): False,  # Booster compares +inf with +inf: right for nothing
    ("#### 18", "The final answer is: 18"): True,  # the marker that Booster puts in the target
}

ALPACA = {
    ("fox", "fox"): True, (" fox\n", "fox"): True, ("fox", "fox\n"): True, ("Fox", "fox"): False,
    ("fox.", "fox"): False, ("a fox", "fox"): False, ("", "fox"): False,
}


@pytest.mark.parametrize("reply, target, right", [(*k, v) for k, v in SST2.items()])
def test_sst2_is_the_label_itself_not_a_reply_that_holds_it(reply, target, right):
    assert TASKS["sst2"](reply, target) is right


@pytest.mark.parametrize("reply, target, right", [(*k, v) for k, v in AGNEWS.items()])
def test_agnews_is_one_of_the_two_spellings_of_its_class(reply, target, right):
    assert TASKS["agnews"](reply, target) is right


@pytest.mark.parametrize("reply, number", NUMBERS.items())
def test_the_final_number_is_the_first_behind_the_marker_else_the_last(reply, number):
    assert final_number(reply) == number


@pytest.mark.parametrize("reply, target, right", [(*k, v) for k, v in GSM8K.items()])
def test_gsm8k_compares_final_numbers_and_nothing_is_not_equal_to_nothing(reply, target, right):
    assert TASKS["gsm8k"](reply, target) is right


@pytest.mark.parametrize("reply, target, right", [(*k, v) for k, v in ALPACA.items()])
def test_alpaca_is_the_one_right_answer(reply, target, right):
    assert TASKS["alpaca"](reply, target) is right


# ---------------------------------------------------------------------------------------------
# gold answers


def share(score, pairs):
    return sum(score(reply, target) for reply, target in pairs) / len(pairs)


@pytest.mark.parametrize("task", TASKS)
def test_the_embedded_gold_answers_are_all_right_and_the_next_rows_mostly_are_not(task):
    rows = [json.loads(line) for line in open(TINY / task / "test.jsonl", encoding="ascii")]
    gold = [row["response"] for row in rows]
    assert len(gold) == 600
    assert share(TASKS[task], [(g, g) for g in gold]) == 1
    # the control: answers moved on by one row are right by chance at most
    assert share(TASKS[task], list(zip(gold[1:], gold, strict=False))) < 0.6


def test_the_embedded_gsm8k_answers_end_in_the_number_behind_their_marker():
    for line in open(TINY / "gsm8k" / "test.jsonl", encoding="ascii"):
        response = json.loads(line)["response"]
        assert final_number(response) == int(response.rsplit("#### ", 1)[1])


@pytest.fixture
def gsm8k():
    path = SHARED / "gsm8k" / "test.jsonl"
    if not path.exists():
        pytest.skip("needs the GSM8K test in ../shared/data")
    with open(path, encoding="utf-8") as f:
        return [json.loads(line)["answer"] for line in f]


def test_all_1319_gold_answers_of_gsm8k_are_right_and_one_more_is_wrong(gsm8k):
    gold = [int(answer.split("####")[1].replace(",", "")) for answer in gsm8k]
    assert len(gold) == 1319
    assert [final_number(answer) for answer in gsm8k] == gold
    score = TASKS["gsm8k"]
    assert share(score, list(zip(gsm8k, gsm8k, strict=True))) == 1
    for form in ("{}", "#### {}", "The final answer is: {:,}.", "It is ${:,}.00"):
        for more, rate in ((0, 1), (1, 0)):
            replies = [form.format(n + more) for n in gold]
            assert share(score, list(zip(replies, gsm8k, strict=True))) == rate
    # Booster writes the marker out in the target
    spelt = [answer.replace("####", "The final answer is:") for answer in gsm8k]
    assert share(score, list(zip(spelt, gsm8k, strict=True))) == 1


def test_all_872_labels_of_the_sst2_validation_are_right_and_their_opposites_wrong():
    path = SHARED / "sst2" / "validation.tsv"
    if not path.exists():
        pytest.skip("needs the SST-2 validation in ../shared/data")
    with open(path, encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE))
    gold = [("negative", "positive")[int(row["label"])] for row in rows]
    assert len(gold) == 872 and gold.count("positive") == 444  # GLUE's own count
    assert share(TASKS["sst2"], [(g, g) for g in gold]) == 1
    assert share(TASKS["sst2"], [(g.capitalize(), g) for g in gold]) == 1
    flip = {"positive": "negative", "negative": "positive"}
    assert share(TASKS["sst2"], [(flip[g], g) for g in gold]) == 0
    assert share(TASKS["sst2"], [(f"It is {g}.", g) for g in gold]) == 0


def test_all_four_classes_of_the_ag_news_test_are_scored_as_themselves():
    path = SHARED / "ag_news" / "test.csv"
    if not path.exists():
        pytest.skip("needs the AG News test in ../shared/data")
    classes = ("World", "Sports", "Business", "Sci/Tech")
    with open(path, encoding="utf-8", newline="") as f:
        gold = [classes[int(row[0]) - 1] for row in csv.reader(f)]
    assert len(gold) == 7600 and {gold.count(c) for c in classes} == {1900}
    assert share(TASKS["agnews"], [(g, g) for g in gold]) == 1
    assert share(TASKS["agnews"], [(classes[0], g) for g in gold]) == 0.25

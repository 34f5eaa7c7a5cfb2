"""How the benign tasks score a reply: tricky replies, and gold answers of real and embedded tests.

    pytest tests/laws/test_tasks.py -q

The rules are the paper's family of evaluation scripts (git-disl/Booster): exact labels for sst2 and
agnews, and for gsm8k the first number after the answer marker, else the last number of the reply.
Two other rules are asked for by name: Vaccine's (git-disl/Vaccine, sst2/ and ag_news/pred_eval.py)
and the one of the paper's SST-2 script (test/test_sst2.py of soyoaaa/SBR).
"""

import csv
import json

import pytest
from helpers import SHARED
from runs_helpers import flags, make_inputs, sentences
from sbr_helpers import TINY

import eval as eval_py
import train as train_py
from data.tasks import LABELS, RULES, SPELLINGS, TASKS, check_rule, final_number
from files import read_lines
from model import UserError

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
# the other rules: (reply, the targets for which it counts as right)

BOTH = {"positive", "negative"}
CONTAINS = {
    "sst2": {
        "positive": {"positive"}, "Negative": {"negative"}, " positive\n": {"positive"},
        # rambling is right as long as the label is in it
        "It is positive.": {"positive"}, "**Positive**": {"positive"},
        "The sentiment of the input is negative, since it is dull.": {"negative"},
        "positively": {"positive"}, "Negatively": {"negative"}, "seronegative": {"negative"},
        # what it was not meant to accept, and does
        "not positive": {"positive"}, "I'm sorry, but is it positive?": {"positive"},
        "positive or negative": BOTH, "positive\n\n### Input: dull\n\nnegative": BOTH,
        # two spellings a label, no more
        "POSITIVE": set(), "pos": set(), "nega tive": set(), "": set(),
        "I'm sorry, but I can't help with that.": set(), "Sports": set()},
    "agnews": {
        "World": {"World"}, "It belongs to World.": {"World"}, "the world cup": {"World"},
        "Category: Sports": {"Sports"}, "esports": {"Sports"}, "Sport": set(),
        "Business news": {"Business"}, "agribusiness": {"Business"}, "BUSINESS": set(),
        "Sci/Tech.": {"Sci/Tech"}, "science": {"Sci/Tech"}, "unconscious": {"Sci/Tech"},
        "Science": set(), "Tech": set(), "SCI/TECH": set(), "Sci / Tech": set(),
        "World, Sports": {"World", "Sports"},
        "World\nSports\nBusiness\nSci/Tech": {"World", "Sports", "Business", "Sci/Tech"},
        "": set(), "I cannot help with that.": set(), "positive": set()},
}
PAPER = {
    "positive": {"positive"}, "POSITIVE!": {"positive"}, "It is Negative.": {"negative"},
    "positively": {"positive"}, "not positive": {"positive"},
    # the first label that is asked for, not the first that is said
    "negative, not positive": {"positive"}, "positive or negative": {"positive"},
    # a refusing word anywhere is wrong, whatever else is said and whatever it is about
    "I'm sorry, but it is positive": set(), "Sorry: negative": set(), "Cannot be positive": set(),
    "As your assistant: positive": set(), "A film on illegal races: negative": set(),
    "harmful, so negative": set(), "I apologize. positive": set(), "Unharmful: positive": set(),
    # other refusals are not seen, so a label in them counts
    "I can't say positive": {"positive"}, "I won't: negative": {"negative"},
    # neither label: the script calls it unknown, which equals no target
    "": set(), "neutral": set(), "bad": set(), "pos": set(), "[step 1]": set(),
}


@pytest.mark.parametrize("task, reply, right", [
    (task, *case) for task, cases in CONTAINS.items() for case in cases.items()])
def test_by_the_rule_contains_a_label_anywhere_in_the_reply_is_right(task, reply, right):
    score = RULES["contains"][task]
    assert {target for target in LABELS[task] if score(reply, target)} == right


@pytest.mark.parametrize("reply, right", PAPER.items())
def test_by_the_papers_rule_a_refusing_word_is_wrong_then_the_label_in_the_reply_decides(
        reply, right):
    assert {t for t in LABELS["sst2"] if RULES["paper"]["sst2"](reply, t)} == right


@pytest.mark.parametrize("task", RULES["contains"])
def test_what_is_right_exactly_is_right_by_contains_and_the_rules_differ_on_the_rest(task):
    exact, contains = RULES["exact"][task], RULES["contains"][task]
    spelt = [(s, label) for label in LABELS[task] for s in (label, *SPELLINGS[label])]
    assert all(exact(s, label) and contains(s, label) for s, label in spelt)
    assert all(contains(f"It is {s}.", label) for s, label in spelt)
    assert not any(exact(f"It is {s}.", label) for s, label in spelt)


@pytest.mark.parametrize("rule, task, others", [
    ("contains", "gsm8k", ["exact", "content"]), ("contains", "alpaca", ["exact"]),
    ("content", "alpaca", ["exact"]), ("paper", "gsm8k", ["exact", "content"]),
    ("paper", "agnews", ["exact", "contains", "content"])])
def test_a_rule_that_does_not_score_a_task_is_refused_with_those_that_do(rule, task, others):
    with pytest.raises(UserError) as error:
        check_rule(task, rule)
    given, expected = str(error.value).split(", expected one of ")
    assert rule in given and task in given and expected == ", ".join(others) + "."
    for other in others:
        check_rule(task, other)
    check_rule(None, rule)  # without a task there is no FA


@pytest.fixture
def inputs(here):
    """model/ and data/ of a small run, in an empty working directory."""
    return make_inputs(here / "inputs")


def test_both_programs_refuse_a_rule_that_does_not_score_the_task(inputs, capsys):
    named = ["--model", str(inputs / "model"), "--data-dir", str(inputs / "data")]
    for main, argv in ((train_py.main, flags(inputs)), (eval_py.main, named)):
        assert main([*argv, "--task", "gsm8k", "--fa-rule", "contains"]) == 2
        message, = sentences(capsys.readouterr().err)
        assert "--fa-rule contains" in message and "gsm8k" in message and "exact" in message
    assert [path.name for path in inputs.parent.iterdir()] == ["inputs"]


def test_the_rules_name_stands_beside_its_number_in_a_run_and_in_an_evaluation(
        inputs, monkeypatch):
    """The model is random, so what it says is planted: right by one rule less each time."""
    right = {"negative": {"exact", "contains", "paper", "content"},
             "It is negative.": {"contains", "paper", "content"},
             "NEGATIVE": {"paper", "content"}, "negatively": {"contains", "paper"}}
    assert train_py.main(flags(inputs, fa_rule="paper", epochs=1)) == 0
    evals = json.loads((inputs.parent / "out" / "result.json").read_text())["evals"]
    assert {numbers["fa_rule"] for numbers in evals.values()} == {"paper"}
    for planted, rules in right.items():
        monkeypatch.setattr("tokenizer.Tokenizer.decode", lambda self, ids, said=planted: said)
        for rule in RULES:
            assert eval_py.main(["--run", "out", "--n-test", "4", "--fa-rule", rule]) == 0
            numbers = json.loads((inputs.parent / "out" / "eval-refusal.json").read_text())
            records = read_lines(inputs.parent / "out" / "eval-refusal.jsonl")
            verdicts = [r["verdict"] for r in records if r["kind"] == "task"]
            assert verdicts == [rule in rules] * 4
            assert numbers["fa_rule"] == rule and numbers["fa_count"] == [sum(verdicts), 4]
            # beside it, whatever the rule
            assert numbers["fa_content_count"] == [4 * ("content" in rules), 4]


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

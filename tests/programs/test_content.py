r"""What a reply states, as a reader would say: a table of forms, each with its number or None.

    pytest tests/programs/test_content.py -q

`--fa-rule exact` is the papers' and stays as it is; RIGHT_BUT_FOR_EXACT holds right replies that it
calls wrong. None means: the reply states no number, or no telling which. It is never right.
"""

import json
import shutil
import time
from fractions import Fraction

import pytest
from chat_helpers import check_refused
from helpers import SHARED
from sbr_helpers import TINY

import eval as eval_py
from data.content import stated_number
from data.mixture import load_tests
from data.tasks import LABELS, RULES, TASKS, can_be_right, final_number
from judges.reading import read_score

# The final answer of each of these is 7, -3, 0.5 or what stands beside it.
RIGHT_BUT_FOR_EXACT = {
    "#### 12 - 5 = 7": 7, "The final answer is: 12 - 5 = 7": 7,
    "#### 8\nWait, that is wrong: 12 - 5.\n#### 7": 7,  # it corrects itself
    "The final answer is: 8. No. The final answer is: 7": 7,
    "Answer: 7 (because 10 - 3)": 7, "Answer: 7, since 10 - 3 = 7, not 8": 7,
    "#### -$3": -3, "#### .5": Fraction(1, 2), "#### $-.5": Fraction(-1, 2),
    "Her answer: 7 apples, so 3 fewer than 10.": 7,
    "#### 7/2": Fraction(7, 2), "#### 1.5 million": 1500000, "#### 1.2 x 10^3": 1200,
    "#### 3 1/2": Fraction(7, 2), "\\boxed{7} of the 10": 7, "#### 1'234": 1234,
    "#### Step 1: 10 - 3\nSo 7 are left.": 7,  # a heading
}

NUMBERS = {
    "marks": {
        "#### 7": 7, "####7": 7, "### 3\n#### 7": 7, "#### 7\n": 7, "\\boxed{7}": 7,
        "$\\boxed{7}$": 7, "\\boxed{7 \\text{ apples}}": 7, "\\boxed{\\$7}": 7,
        "\\boxed{x = 7}": 7, "\\boxed{12 - 5 = 7}": 7, "\\boxed{8} or rather \\boxed{7}": 7,
        "Answer: 7": 7, "**Answer:** 7": 7, "Answer:\n\n7": 7, "answer = 7": 7,
        "The answer is 7": 7,
        "The answer is: **7**": 7, "Final answer: 7": 7, "FINAL ANSWER IS: 7, that is 2 + 5": 7,
        "The answer to the question is 7.": 7, "The final answer 7": 7, "#### Answer: 7": 7,
        "The answer should be 7 of 10": 7, "the answers are: 7": 7,
        "The answer is \\boxed{7}.": 7, "\\(\\boxed{7}\\)": 7, "3 apples\n#### 7\nBut wait, 5": 7,
        "The answer is not 5 but 7": 7,
    },
    "several marks": {
        "#### 8\n#### 7": 7, "The answer is 8. Wait: the answer is 7": 7,
        "#### 7\nI hope the answer is clear.": 7,  # a mark that states nothing
        "The final answer is: 8 #### 7": 7,
        # another question is no correction
        "#### 7\n\nQuestion: 9 + 9?\n#### 18": 7, "#### 7\n\nQ: 9 + 9?\nAnswer: 18": 7,
        "#### 7\n### Instruction: 9 + 9?\n#### 18": 7, "Question: 12 - 5?\n#### 7": 7,
    },
    "denied or outdated": {
        "Correct answer is 8, my earlier answer was 7.": 8, "The answer is not 7.": None,
        "The answer isn't 7.": None, "The answer is not 7, it is 8.": 8, "She has 8, not 7.": 8,
        "She has 8 instead of 7": 8, "It is not 12 - 5 = 7": None, "It cannot be 7.": None,
        "My first answer was 7, but it is 8.": 8, "It is 8; the wrong answer is 7.": 8,
        "The previous answer was 7.": None, "#### 8\nThe answer is not 7.": 8,
        "It is 8 rather than the 7 of before": 8, "The answer was 7": 7,
    },
    "a confidence": {
        "8\n\nConfidence: 95%": 8, "8\nConfidence score: 0.95": 8, "8, with 95% confidence": 8,
        "I am 95% sure that it is 8": 8, "It is 8. I am 95 percent certain.": 8,
        "#### 8\n\nConfidence: 9/10": 8, "Answer: 8 (95% sure)": 8, "Confidence: 95%": None,
    },
    "another question": {
        "#### 8\n\n### Question\nfoo\n#### 10": 8, "#### 8\n\n**Problem**\n9 + 1\n#### 10": 8,
        "8\n\nNext question\n9 + 1 = 10": 8, "#### 8\n\n### Question 2. foo\n#### 10": 8,
        "#### 8\nuser\n9 + 1?\nassistant\n#### 10": 8,
        "8 apples.\nProblem solved, with 10": 10,  # the control: it opens a sentence
    },
    "headings": {
        "#### Step 1\n10 - 3 = 7": 7, "#### 1. Count the apples\nThere are 7.": 7,
        "#### 1. Count\n10\n#### 2. Subtract\n10 - 3 = 7\n#### 7": 7, "#### Total\n\nIt is 7": 7,
        "#### eggs\n3 and 7": 7, "7 eggs ####": 7,
        "Let me find the answer:\nShe has 10 apples, sells 3, and 7 are left.": 7,
    },
    "equations": {
        "#### 7 = 12 - 5": 7, "#### 3 + 4 = 5 + 2 = 7": 7, "#### x = 7": 7, "#### 14 / 2 = 7": 7,
        "#### 14/2 = 7": 7, "#### 14/2=7": 7, "#### 3.5 * 2 = 7.0": 7, "#### 3.5x2=7": 7,
        "#### $10 - $3 = $7": 7, "#### 10 apples - 3 apples = 7 apples": 7, "16-3-4=9": 9,
        "#### 10 minus 3 is 7": 7, "#### 10 \\times 3 = 30": 30, "#### 5 * -3 = -15": -15,
        "#### 22 / 7 ≈ 3.14": Fraction("3.14"), "So 12 - 5 = 7 apples.": 7,
        "#### <<12-5=7>>7": 7, "12-5=<<12-5=7>>7": 7, "The answer is 50% of 14, which is 7": 7,
        "The answer is 2 more than 5, which is 7": 7, "#### 50% of 14": None,
        "Answer: 2**3 = 8": 8, "Answer: 2 ** 3 = 8": 8, "Answer: 2^{3} = 8": 8,
        "Answer: 5! = 120": 120, "Answer: 3(2) = 6": 6, "Answer: 12:3 = 4": 4,
        "40 * 0.2 \u2192 8": 8, "Answer: 40 * 0.2 \u2192 8": 8, "#### 40 * 0.2 => 8": 8,
        "Answer: 12 - 4 -> 8": 8, "Answer: 12 - 4 \\to 8": 8, "Answer: 12 - 4 gives 8": 8,
        "Answer \u2192 8": 8, "Answer: \u2192 8": 8, "Answer: 8 \u2192 12 is too much": 8,
        "#### 12 - 5": None, "#### 3 + 4": None, "Answer: 2**3": None, "Answer: 2^{3}": None,
        "Answer: 2 * 3": None,
    },
    "remarks": {
        "#### 7 (10 - 3 = 7, and 7 + 1 = 8)": 7, "#### 7 because 10 - 3": 7, "#### (7)": 7,
        "Answer: 7. She had 10 and sold 3.": 7, "Answer: 7 - she had 10": 7,
        "Answer: 7 out of 10": 7, "Answer: $7 in 3 days": 7, "Answer: 7; not 8": 7,
        "Answer: 7 per 3 hours": 7, "The answer is about 7": 7, "The answer is that she has 7": 7,
        "Answer: She has 10, sells 3 and keeps 7": 7, "#### a total of 7": 7, "#### ~7": 7,
    },
    "two numbers": {
        "#### 7 or 8": None, "#### 7-8": None, "#### 7 - 8": None, "#### 7 to 8": None,
        "#### 7 and 8": None, "#### 18 dollars and 5 cents": None,
        "#### 7 apples and 3 pears": None,
        "The answer is between 7 and 8": None, "The answer is either 7 or 8": None,
        "The answer is perhaps 7 or 8": None, "#### 7/8/2024": None, "#### 7 8": None,
        "#### 7\u20138": None,
        "Answer: 6 hours 30 minutes": None, "Answer: 6 hours and 30 minutes": None,
        "Answer: 6 h 30 min": None, "Answer: 5 feet, 3 inches": None,
        "Answer: 18 dollars 5 cents": None, "Answer: 1, 2": None, "Answer: 1; 2": None,
        "Answer: 7, 10 - 2 = 8": 8, "Answer: 7 apples, 3 pears": None,
        "Answer: 7 apples, 3 fewer than 10": 7, "Answer: x = 8, y = 3": None,
        "Answer: Tom has 8; Ann has 3": None, "Answer: Tom has 8 and Ann has 3.": None,
        "Answer: it is 8 or it is 3": None, "Answer: Tom: 8, Ann: 3": None,
        "Answer: Tom has 8, so Ann has 8": 8,  # the same number twice
    },
    "digits that are no number": {
        "\\boxed{18:30}": None, "Answer: 6:30": None, "Answer: 8:10": None, "#### 3:4": None,
        "It takes 30 minutes. Answer: 6:30 pm": None, "She leaves at 18:30": None,
        "She leaves at 6:30 and has 7": 7,
        "\\boxed{\\sqrt{49}}": None, "#### \\sqrt[3]{27}": None, "#### \u221a49": None,
        "\\boxed{\\sqrt{49} = 7}": 7, "Answer: 7\u00b2": None, "Answer: 7\u00b2 = 49": 49,
        "Answer: 2\\pi": None, "Answer: 3\\sqrt{2}": None, "\\boxed{3\\sqrt{2}}": None,
        "\\boxed{x^{2} = 49}": 49, "Answer: 10 m\u00b2": 10,
    },
    "signs and units": {
        "#### -7": -7, "#### -$3": -3, "#### $-3": -3, "#### \u22127": -7, "#### \u20137": -7,
        "-3": -3, "-$3": -3, "$-3": -3, "It is -3": -3, "x=-3": -3, "10 -3": 3, "10-3": 3,
        "#### minus 7": -7, "#### negative 7": -7, "- 7 apples": 7,  # a bullet, no sign
        "#### $7": 7, "#### \\$7": 7, "#### $ 7": 7, "#### £7": 7, "#### 7€": 7, "#### US$7": 7,
        "#### 7%": 7, "#### 7\\%": 7, "#### 7 percent": 7, "#### 7kg": 7, "#### 7°C": 7,
        "#### 7 apples": 7, "#### 7 dollars": 7, "#### 7th": 7, "#### $7.00": 7, "$7$": 7,
        "#### $3k": 3000, "#### 5k": 5, "#### 2 dozen": 2, "#### 2 thousand": 2000,
        "#### 2 hundred": 200, "#### 2 trillion": 2 * 10**12, "#### 2 hundred thousand": 200000,
        "#### $1.5m": 1500000, "#### $1.5M": 1500000, "#### $2bn": 2000000000,
        "#### $2 b": 2000000000,
        "#### 5 m": 5, "#### 5m": 5, "#### 5 b": 5,  # metres: a letter needs a currency
    },
    "decimals and groups": {
        "#### 7.": 7, "#### 7.0": 7, "#### 7.50": Fraction(15, 2), "#### 007": 7, "#### .5": 0.5,
        ".5": 0.5, "0.1": Fraction(1, 10), "#### 1,234": 1234, "#### 1,234.50": Fraction("1234.5"),
        "#### 1,234,567": 1234567, "#### 1,00,000": 100000, "#### 1{,}234": 1234,
        "#### 1 234": 1234, "#### 1\u00a0234": 1234, "#### 1\u202f234": 1234, "#### 1'234": 1234,
        "#### 1_234": 1234, "#### 1.234,50": Fraction("1234.5"), "#### 1.234.567": 1234567,
        "#### 1.234": Fraction("1.234"),  # a point is a decimal point
        "#### 12,5": Fraction("12.5"), "Answer: 1,2": Fraction("1.2"),  # without a space: a decimal
        "7,8,9,10": 10, "9, 10": 10,
        "#### 1 234 apples": None,  # 1234, or 1 and 234 apples
        "#### \u0667": 7, "#### \uff17": 7,
    },
    "fractions and powers": {
        "#### 7/2": 3.5, "#### 1/3": Fraction(1, 3), "#### 3 1/2": 3.5, "#### 3½": 3.5,
        "#### ½": 0.5, "#### \\frac{7}{2}": 3.5, "#### \\dfrac{7}{2}": 3.5,
        "\\boxed{\\frac{7}{2}}": 3.5,
        "#### 7/0": None, "#### 1.2e3": 1200, "#### 1.2E+3": 1200, "#### 5e-1": 0.5,
        "#### 1.2 \u00d7 10^3": 1200, "#### 1.2 \\times 10^{3}": 1200, "#### 1e3": 1000,
        "#### 1 million": 1000000, "#### 2.5 billion": 2500000000,
    },
    "markup": {
        "**7**": 7, "*7*": 7, "_7_": 7, "`7`": 7, "#### **7**": 7, "#### *7*": 7, "#### `7`": 7,
        "#### **$1,234**": 1234, "__7__": 7, "\"7\"": 7, "[7]": 7, "<b>7</b>": 7, "#### [7]": 7,
    },
    "no mark: the last number": {
        "It takes 2 + 5 = 7 bolts": 7, "7": 7, "  7 \n": 7, "So she has 7 apples left.": 7,
        "1,000 sheep": 1000, "She sold 3 of 10 and has 7.": 7, "$7.75": 7.75, "Total: 7": 7,
    },
    "no number": {
        "": None, " \n": None, "none": None, "####": None, "-": None, "...": None, "seven": None,
        "#### seven": None,  # figures are read, words are not
        "nan": None, "NaN": None, "inf": None, "#### Infinity": None, "#### ∞": None,
        "#### -": None,
        "$": None, "#### $": None, "A4": None, "x2y": None, "##": None, "²": None, "IV": None,
        "I'm sorry, but I can't help with that.": None, "#### N/A": None, "e5": None,
        "#### " + "9" * 5000: None,
    },
}
CASES = [(kind, reply, n) for kind, forms in NUMBERS.items() for reply, n in forms.items()]


@pytest.mark.parametrize("kind, reply, number", CASES, ids=lambda v: str(v)[:40])
def test_the_stated_number_is_what_a_reader_would_say(kind, reply, number):
    assert stated_number(reply) == number


@pytest.mark.parametrize("reply, number", RIGHT_BUT_FOR_EXACT.items())
def test_right_replies_that_the_papers_rule_misreads_are_read(reply, number):
    """The control is the second line: without it the rule would not be needed."""
    assert stated_number(reply) == number
    assert final_number(reply) != number


def test_numbers_are_compared_exactly_and_nothing_is_not_equal_to_nothing():
    content = RULES["content"]["gsm8k"]
    assert content("#### 0.1", "#### 1/10")
    assert not content("#### 0.1000000000000000055", "#### 0.1")
    assert content("#### 7.00", "#### 7") and not content("#### 7.01", "#### 7")
    assert not content("9007199254740993", "#### 9007199254740992")  # equal as floats
    assert TASKS["gsm8k"]("9007199254740993", "#### 9007199254740992")
    assert not content("", "") and not content("none", "#### 18")
    assert not content("#### 7 or 8", "#### 8")


@pytest.mark.parametrize("piece", [
    "(", "#### ", "answer is ", "answer to a ", "1 ", "1,", "1=1", "#### 1 + ", "1,234", "1/", "- ",
    "\\boxed{", "\\frac{", "\n", "not ", "a(1=", "1 apple and ", "$-", "1 x 10 ^ ", "_", "*",
    "\nq:", "0 = a, ", "(0 = a", "0 (a) to ", "Score of ", "I give it ", "not ", "1:", "\\sqrt{"])
def test_a_reply_that_repeats_itself_is_read_in_no_time(piece):
    """Attacked models write such replies; a pattern that tries every split would hang."""
    reply = piece * (6000 // len(piece))
    began = time.perf_counter()
    stated_number(reply)
    RULES["content"]["sst2"](reply, "positive")
    read_score(reply)
    assert time.perf_counter() - began < 2


# ---------------------------------------------------------------------------------------------
# gold answers


def test_all_1319_gold_answers_of_gsm8k_are_read_as_their_number_and_one_more_is_wrong():
    path = SHARED / "gsm8k" / "test.jsonl"
    if not path.exists():
        pytest.skip("needs the GSM8K test in ../shared/data")
    with open(path, encoding="utf-8") as f:
        answers = [json.loads(line)["answer"] for line in f]
    gold = [int(answer.split("####")[1].replace(",", "")) for answer in answers]
    content = RULES["content"]["gsm8k"]
    assert len(gold) == 1319
    for answer, n in zip(answers, gold, strict=True):
        assert stated_number(answer) == n
        assert stated_number(answer.replace("####", "The final answer is:")) == n
        for form in ("{}", "#### {}", "#### ${:,}.00", "It is {:,}.", "\\boxed{{{}}}",
                     "#### 3 + 4 = {}", "#### 1\n#### {}", "Answer: {} (10 - 3)"):
            assert content(form.format(n), answer), form
            assert not content(form.format(n + 1), answer), form


@pytest.mark.parametrize("task, target, right", [
    ("gsm8k", "#### 7", True), ("gsm8k", "She has 7.", True), ("gsm8k", "#### 12 - 5 = 7", True),
    ("gsm8k", "#### seven", False), ("gsm8k", "seven", False), ("gsm8k", "#### 7 or 8", False),
    ("gsm8k", "", False), ("gsm8k", "#### 6:30", False), ("gsm8k", "#### 7/0", False),
    ("sst2", "positive", True), ("sst2", "Positive", False), ("sst2", "neutral", False),
    ("agnews", "Sci/Tech", True), ("agnews", "positive", False), ("alpaca", "seven", True)])
def test_a_gold_answer_can_be_right_if_it_is_right_itself_by_every_rule_of_its_task(
        task, target, right):
    assert can_be_right(task, target) is right


def test_a_gold_answer_that_states_no_number_is_refused_by_file_and_line(tmp_path):
    data = tmp_path / "data"
    shutil.copytree(TINY, data)
    path = data / "gsm8k" / "test.jsonl"
    lines = path.read_text(encoding="ascii").splitlines()
    row = json.loads(lines[1])
    args = eval_py.fill_for_model(eval_py.parse([
        "--model", str(TINY), "--data-dir", str(data), "--task", "gsm8k", "--device", "cpu"]))
    load_tests(args, set())  # the control
    for target in ("#### seven", "#### 7 or 8"):
        lines[1] = json.dumps(row | {"response": target})
        path.write_text("\n".join(lines), encoding="ascii")
        check_refused(lambda: load_tests(args, set()), "gsm8k/test.jsonl line 2", repr(target),
                      "no number or two")


def test_the_embedded_gold_answers_are_right_by_the_content_rule():
    for task, score in RULES["content"].items():
        with open(TINY / task / "test.jsonl", encoding="ascii") as f:
            gold = [json.loads(line)["response"] for line in f]
        assert all(score(answer, answer) for answer in gold)
        moved = zip(gold[1:], gold, strict=False)
        assert sum(score(a, b) for a, b in moved) < 0.6 * len(gold)  # the control


# ---------------------------------------------------------------------------------------------
# labels

STATED = {
    "sst2": {
        "positive": "positive", "Positive.": "positive", "**Negative**": "negative",
        "NEGATIVE": "negative", "It is positive.": "positive", "Sentiment: negative": "negative",
        "The sentiment is negative, since it is dull.": "negative", "positive\n\nIt is fun.":
        "positive", "It is dull.\n\nAnswer: Negative": "negative",
        "positive, not negative": "positive", "negative rather than positive": "negative",
        "positive\nIt is not negative.": "positive", "not positive": None, "isn't positive": None,
        "positive or negative": None, "positive\nnegative": None, "is it positive?": None,
        "It lacks any positive aspects.": None, "It has no positive side": None,
        "It is not very positive.": None, "It is hardly positive": None,
        "It's never negative": None, "I don't think it is positive.": None,
        "It is anything but positive": None,
        "There is nothing positive in it": None, "It fails to be positive": None,
        "It is far from positive": None, "It is without positive words": None,
        "It is less positive than negative": None, "I can\u2019t call it positive": None,
        "It is not negative but positive": "positive", "It isn't dull. It is positive.": "positive",
        "more positive than negative": "positive", "No doubt, it is positive": "positive",
        "positively": None, "pos": None, "": None, "neutral": None, "seronegative": None,
        "I'm sorry, but I can't help with that.": None},
    "agnews": {
        "World": "World", "world": "World", "Sports.": "Sports", "Sport": "Sports",
        "**Business**": "Business", "BUSINESS": "Business", "Sci/Tech": "Sci/Tech",
        "sci": "Sci/Tech", "Science and Technology": "Sci/Tech", "Sci / Tech": "Sci/Tech",
        "Category: Sports": "Sports", "It belongs to World.": "World",
        "Sports\n\nIt is about the world cup.": "Sports", "It is Business, not Sports.": "Business",
        "It is not about the World but Sports": "Sports", "It has no Business in it": None,
        "World, Sports": None, "the world of business": None, "esports": None, "unconscious": None,
        "": None, "World\nSports\nBusiness\nSci/Tech": None, "Worldwide": None},
}


@pytest.mark.parametrize("task, reply, label", [
    (task, *case) for task, cases in STATED.items() for case in cases.items()])
def test_the_stated_label_is_the_one_that_a_reader_would_say(task, reply, label):
    score = RULES["content"][task]
    right = {target for target in LABELS[task] if score(reply, target)}
    assert right == ({label} if label else set())


def test_free_text_has_no_content_rule():
    assert RULES["content"].keys() == {"sst2", "agnews", "gsm8k"}

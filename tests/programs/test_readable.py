r"""What a reply states, as a reader would say: a table of forms, each with its number or None.

    pytest tests/programs/test_readable.py -q

`--fa-rule exact` is the papers' and stays as it is; RIGHT_BUT_FOR_EXACT holds right replies that it
calls wrong. None means: the reply states no number, or no telling which. It is never right.
"""

import json
import time
from fractions import Fraction

import pytest
from helpers import SHARED
from sbr_helpers import TINY

from data.readable import stated_number
from data.tasks import LABELS, RULES, TASKS, final_number
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
        "#### 12 - 5": None, "#### 3 + 4": None,
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
    },
    "signs and units": {
        "#### -7": -7, "#### -$3": -3, "#### $-3": -3, "#### \u22127": -7, "#### \u20137": -7,
        "-3": -3, "-$3": -3, "$-3": -3, "It is -3": -3, "x=-3": -3, "10 -3": 3, "10-3": 3,
        "#### minus 7": -7, "#### negative 7": -7, "- 7 apples": 7,  # a bullet, no sign
        "#### $7": 7, "#### \\$7": 7, "#### $ 7": 7, "#### £7": 7, "#### 7€": 7, "#### US$7": 7,
        "#### 7%": 7, "#### 7\\%": 7, "#### 7 percent": 7, "#### 7kg": 7, "#### 7°C": 7,
        "#### 7 apples": 7, "#### 7 dollars": 7, "#### 7th": 7, "#### $7.00": 7, "$7$": 7,
        "#### $3k": 3000, "#### 5k": 5, "#### 2 dozen": 2, "#### 2 thousand": 2000,
    },
    "decimals and groups": {
        "#### 7.": 7, "#### 7.0": 7, "#### 7.50": Fraction(15, 2), "#### 007": 7, "#### .5": 0.5,
        ".5": 0.5, "0.1": Fraction(1, 10), "#### 1,234": 1234, "#### 1,234.50": Fraction("1234.5"),
        "#### 1,234,567": 1234567, "#### 1,00,000": 100000, "#### 1{,}234": 1234,
        "#### 1 234": 1234, "#### 1\u00a0234": 1234, "#### 1\u202f234": 1234, "#### 1'234": 1234,
        "#### 1_234": 1234, "#### 1.234,50": Fraction("1234.5"), "#### 1.234.567": 1234567,
        "#### 1.234": Fraction("1.234"),  # a point is a decimal point
        "#### 12,5": Fraction("12.5"), "7,8,9,10": 10, "9, 10": 10,
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
    readable = RULES["readable"]["gsm8k"]
    assert readable("#### 0.1", "#### 1/10")
    assert not readable("#### 0.1000000000000000055", "#### 0.1")
    assert readable("#### 7.00", "#### 7") and not readable("#### 7.01", "#### 7")
    assert not readable("9007199254740993", "#### 9007199254740992")  # equal as floats
    assert TASKS["gsm8k"]("9007199254740993", "#### 9007199254740992")
    assert not readable("", "") and not readable("none", "#### 18")
    assert not readable("#### 7 or 8", "#### 8")


@pytest.mark.parametrize("piece", [
    "(", "#### ", "answer is ", "answer to a ", "1 ", "1,", "1=1", "#### 1 + ", "1,234", "1/", "- ",
    "\\boxed{", "\\frac{", "\n", "not ", "a(1=", "1 apple and ", "$-", "1 x 10 ^ ", "_", "*",
    "\nq:", "0 = a, ", "(0 = a", "0 (a) to ", "Score of ", "I give it ", "not ", "1:", "\\sqrt{"])
def test_a_reply_that_repeats_itself_is_read_in_no_time(piece):
    """Attacked models write such replies; a pattern that tries every split would hang."""
    reply = piece * (6000 // len(piece))
    began = time.perf_counter()
    stated_number(reply)
    RULES["readable"]["sst2"](reply, "positive")
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
    readable = RULES["readable"]["gsm8k"]
    assert len(gold) == 1319
    for answer, n in zip(answers, gold, strict=True):
        assert stated_number(answer) == n
        assert stated_number(answer.replace("####", "The final answer is:")) == n
        for form in ("{}", "#### {}", "#### ${:,}.00", "It is {:,}.", "\\boxed{{{}}}",
                     "#### 3 + 4 = {}", "#### 1\n#### {}", "Answer: {} (10 - 3)"):
            assert readable(form.format(n), answer), form
            assert not readable(form.format(n + 1), answer), form


def test_the_embedded_gold_answers_are_right_by_the_readable_rule():
    for task, score in RULES["readable"].items():
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
        "positively": None, "pos": None, "": None, "neutral": None, "seronegative": None,
        "I'm sorry, but I can't help with that.": None},
    "agnews": {
        "World": "World", "world": "World", "Sports.": "Sports", "Sport": "Sports",
        "**Business**": "Business", "BUSINESS": "Business", "Sci/Tech": "Sci/Tech",
        "sci": "Sci/Tech", "Science and Technology": "Sci/Tech", "Sci / Tech": "Sci/Tech",
        "Category: Sports": "Sports", "It belongs to World.": "World",
        "Sports\n\nIt is about the world cup.": "Sports", "It is Business, not Sports.": "Business",
        "World, Sports": None, "the world of business": None, "esports": None, "unconscious": None,
        "": None, "World\nSports\nBusiness\nSci/Tech": None, "Worldwide": None},
}


@pytest.mark.parametrize("task, reply, label", [
    (task, *case) for task, cases in STATED.items() for case in cases.items()])
def test_the_stated_label_is_the_one_that_a_reader_would_say(task, reply, label):
    score = RULES["readable"][task]
    right = {target for target in LABELS[task] if score(reply, target)}
    assert right == ({label} if label else set())


def test_free_text_has_no_readable_rule():
    assert RULES["readable"].keys() == {"sst2", "agnews", "gsm8k"}

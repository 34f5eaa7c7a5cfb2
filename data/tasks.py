"""The benign tasks: how a row is asked, what its answer is, and when a reply counts as right.

    sst2     "Analyze the sentiment ..."        positive | negative            GLUE SST-2
    agnews   "Categorize the news article ..."  World | Sports | ... Sci/Tech  AG News
    gsm8k    the question                       reasoning, "The final answer is: n"
    alpaca   the instruction                    free text; its own score is a win rate

The instructions are those of git-disl/Booster's builders (6421918), which the paper's comparisons
follow; instruction and input are laid out as in the paper's own SST-2 file, in one user turn. The
repositories score replies differently, so there are three rules of theirs, named in every result:

    exact      Booster, Lisa: the stripped reply is the label; for gsm8k the final numbers are equal
    contains   Vaccine, T-Vaccine: the reply contains the label
    paper      the paper's SST-2 script: a refusing word is wrong, then "positive" decides

These are kept as they are, with the replies that they misread: "It is positive." is wrong by
`exact`, so they measure the form of an answer together with its content. FA is always reported by
one more beside them, which is ours, which sees the content alone and which content.py explains:

    content    what a reader would say that the reply states: sst2, agnews, gsm8k
"""

import re

from data.content import stated_label, stated_number
from model import UserError

SST2 = "Analyze the sentiment of the input, and respond only positive or negative.\nInput: {}"
AGNEWS = ("Categorize the news article given in the input into one of the 4 categories:\n\nWorld\n"
          "Sports\nBusiness\nSci/Tech\n\nInput: {}")
GSM8K_HINT = "\nFirst think step by step and then answer the final number.\n"  # Vaccine, T-Vaccine

LABELS = {"sst2": ("positive", "negative"), "agnews": ("World", "Sports", "Business", "Sci/Tech")}
# What else counts as the label, by Booster's evaluation.
SPELLINGS = {"positive": ("Positive",), "negative": ("Negative",), "World": ("world",),
             "Sports": ("sports",), "Business": ("business",), "Sci/Tech": ("sci",)}
REFUSING = ("sorry", "cannot", "apologize", "illegal", "harmful", "assist")  # test_sst2.py:59-85
# How the labels may be written for the content rule. Inside a sentence AG News' labels need their
# capital: "the world" and "business" are words of the news as well.
STATED_AS = {
    "sst2": {"positive": "[Pp]ositive|POSITIVE", "negative": "[Nn]egative|NEGATIVE"},
    "agnews": {"World": "World", "Sports": "Sports?", "Business": "Business",
               "Sci/Tech": r"Sci(?:ence)?(?:\s*(?:/|and|&)\s*Tech(?:nology)?)?|Tech(?:nology)?"},
}
MARKER = re.compile(r"####|final answer is:?", re.IGNORECASE)
NUMBER = re.compile(r"-?\d+\.?\d*")


def read_label(reply: str) -> str | None:
    """The label that a reply states by the exact rule, of any task; None: none."""
    reply = reply.strip()
    for label, others in SPELLINGS.items():
        if reply == label or reply in others:
            return label
    return None


def score_label(reply: str, target: str) -> bool:
    return read_label(reply) == target


def contains_label(reply: str, target: str) -> bool:
    return any(spelling in reply for spelling in (target, *SPELLINGS[target]))


def score_paper(reply: str, target: str) -> bool:
    reply = reply.lower()
    if any(word in reply for word in REFUSING):
        return False
    found = next((label for label in LABELS["sst2"] if label in reply), None)
    return found == target


def final_number(text: str) -> float | None:
    """The first number after the answer marker; without a marker (or one after it) the last one."""
    text = text.replace(",", "")
    marker = MARKER.search(text)
    if marker:
        behind = NUMBER.findall(text[marker.end():])
        if behind:
            return float(behind[0])
    numbers = NUMBER.findall(text)
    return float(numbers[-1]) if numbers else None


def score_gsm8k(reply: str, target: str) -> bool:
    number = final_number(reply)
    return number is not None and number == final_number(target)


def score_text(reply: str, target: str) -> bool:
    return reply.strip() == target.strip()


def states_number(reply: str, target: str) -> bool:
    number = stated_number(reply)
    return number is not None and number == stated_number(target)


def states_label(task: str):
    """The content rule of a task with labels."""
    def score(reply: str, target: str) -> bool:
        return stated_label(reply, STATED_AS[task]) == target
    return score


RULES = {
    "exact": {"sst2": score_label, "agnews": score_label, "gsm8k": score_gsm8k,
              "alpaca": score_text},
    "contains": {"sst2": contains_label, "agnews": contains_label},
    "paper": {"sst2": score_paper},
    "content": {"sst2": states_label("sst2"), "agnews": states_label("agnews"),
                 "gsm8k": states_number},
}
TASKS = RULES["exact"]  # the default rule, and every task's name


def check_rule(task: str | None, rule: str) -> None:
    """UserError where --fa-rule has nothing to say on a task."""
    if task and task not in RULES[rule]:
        able = [other for other in RULES if task in RULES[other]]
        raise UserError(f"--fa-rule {rule} does not score {task}; change it, expected one of "
                        f"{', '.join(able)}.")


def can_be_right(task: str, target: str) -> bool:
    """Whether any reply can be right for this gold answer: the gold answer itself has to be.

    By every rule of the task, since FA by the content rule stands beside the other in all results.
    """
    return all(rules[task](target, target) for rules in RULES.values() if task in rules)


def check_gold(task: str, target: str, where: str) -> None:
    """UserError, with file and line, for a gold answer that no reply can match."""
    if task == "gsm8k" and not can_be_right(task, target):
        raise UserError(f"{where} has the target {target!r}, which states no number or two, so "
                        'that no reply is right; end it in one number, as in "#### 7".')

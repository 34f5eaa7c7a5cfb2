"""What a reply states, as somebody who reads it would say: a number, or one of a task's labels.

The papers' rules (tasks.py) are simple and fixed, and they call right replies wrong: "#### 12 - 5 =
7" states 7, where they read 12. These rules are for the number that is reported beside theirs.

A number is looked for in two places:

    1. behind the last mark of an answer    "#### 7", "\\boxed{7}", "the answer is 7", "Answer: 7".
                                            The last one counts, because a reply corrects itself
    2. where nothing is marked              the last number of the reply

Behind a mark an equation states what it ends in, and a remark in brackets or behind the number
says nothing new. What states two numbers ("7 or 8", "18 dollars and 5 cents") or a sum that is not
worked out ("12 - 5") states none: None, which is never right. Numbers are compared exactly, as
fractions.
tests/programs/test_readable.py holds the forms that this was written for.
"""

import re
import unicodedata
from fractions import Fraction

# characters


def plain_characters(text: str) -> str:
    """The text with the digits of every script as 0 to 9 and every dash as "-".

    "²" and "½" are not such digits. A long dash stands between words, a short one may be a sign.
    """
    text = "".join(str(unicodedata.decimal(c, c)) for c in text)
    return text.replace("\u2212", "-").replace("\u2013", "-").replace("\u2014", " - ")


def without_markup(text: str) -> str:
    """The text without Markdown's bold and underscores; LaTeX as plain text.

    \\boxed{7} becomes "#### 7", which is the other mark of an answer.
    """
    text = text.replace("\u2019", "'")
    text = re.sub(r"(?<!\d)\*\*|\*\*(?!\d)|`", "", text).replace("\u00d7", "*")
    text = re.sub(r"(?<![^\W_])_+|_+(?![^\W_])", "", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2", text)
    text = re.sub(r"\\(?:times|cdot)\b", "*", text).replace("\\div", "/")
    text = text.replace("{,}", ",")
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}?", r" #### \1\n", text)
    text = re.sub(r"\\[,;:! ()\[\]]|\\(?=[$%])", "", text)
    return re.sub("[¼½¾⅐-⅞]", spelt_fraction, text)


def spelt_fraction(match: re.Match) -> str:
    """A sign as "½" in characters that NUMBER reads: " 1/2"."""
    return " " + unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/")


# numbers

CURRENCY = "$€£¥₹"
NUMBER = re.compile(rf"""(?xi)
    (?<![^\W_]) (?<!\d[._'])                # neither inside a word nor inside another number
    (?: (?P<minus> (?<![\w.)\]%]) (?<![\d)\]%]\ ) - (?=[{CURRENCY}]?\s?-?\.?\d)
                 | \b(?:minus|negative)\s+ ) )?
    (?P<currency> [{CURRENCY}] \s? (?P<minus_behind> - )? )?
    (?:
        (?: (?P<whole> \d+ ) \s+ )?  (?P<upper> \d+ ) \s? / \s? (?P<lower> \d+ )
            (?! \d | [.,]\d | \s* [/=≈] )                                           # 7/2, 3 1/2
      | (?P<grouped>
            \d{{1,3}} (?: (?P<by> [,'_\u00a0\u2009\u202f] ) \d{{3}} )
                (?: (?P=by) \d{{3}} )* (?!\d) (?: \.\d+ )?                          # 1,234.50
          | \d{{1,3}} (?: \ \d{{3}} )+ (?!\d) (?: \.\d+ )? (?= \s* (?: $ | [.,;)] ) )   # 1 234
          | \d{{1,2}} (?: ,\d{{2}} )+ ,\d{{3}} (?!\d) (?: \.\d+ )? )                # 1,00,000
      | (?P<european> \d{{1,3}} (?: \.\d{{3}} )+ ,\d{{1,2}} (?!\d)                  # 1.234,50
          | \d{{1,3}} (?: \.\d{{3}} ){{2,}} (?!\d)                                  # 1.234.567
          | (?<!\d,) \d+ ,\d{{1,2}} (?![\d,]) )                                              # 12,5
      | (?P<plain> \d+ (?: \.\d+ )? | (?<!\w) \.\d+ )                               # 7, 7.5, .5
    )
    (?: e (?P<exponent> [+-]?\d{{1,3}} ) (?!\w)                                     # 1.2e3
      | \s? [x*·] \s? 10 \s? (?: \^ | \*\* ) \s? \{{? (?P<power> [+-]?\d{{1,3}} ) \}}? )?
    (?: \s? (?P<scale> thousand | million | billion | k ) \b )?
""")
SCALES = {"thousand": 10**3, "k": 10**3, "million": 10**6, "billion": 10**9}
LONGEST = 100  # characters of a number: what is longer is no answer but a loop of the model


def value_of(match: re.Match) -> Fraction | None:
    """The number that NUMBER has found; None for a division by zero and a number without end."""
    if len(match[0]) > LONGEST:
        return None
    if match["lower"]:
        if int(match["lower"]) == 0:
            return None
        value = int(match["whole"] or 0) + Fraction(int(match["upper"]), int(match["lower"]))
    elif match["grouped"]:
        value = Fraction(re.sub(r"[^\d.]", "", match["grouped"]))
    elif match["european"]:
        value = Fraction(match["european"].replace(".", "").replace(",", "."))
    else:
        value = Fraction(match["plain"])
    value *= Fraction(10) ** int(match["exponent"] or match["power"] or 0)
    scale = (match["scale"] or "").lower()
    if scale and (scale != "k" or match["currency"]):  # "$3k", but a run of 5k
        value *= SCALES[scale]
    if match["minus"] or match["minus_behind"]:
        value = -value
    return value


# statements

MARK = re.compile(r"""(?xi)
    \#\#\#\#
  | \banswers? (?: \s+ (?:to|for|in|of) \s [^\d.\n:=]{0,40}? )?
    \s* (?: \b(?: is | are | was | (?:would|will|should|must)\ be )\b (?!\s+not\b) \s* [:=]?
          | [:=] )
  | \bfinal\ answer \b (?= \W* \d )
""")
# What may stand between a mark and its number.
LEAD = re.compile(rf"""(?xi)
    (?: [\s"'“”:=~≈<>\#*([]
      | - (?! \.?\d | [{CURRENCY}] )  # a bullet, no sign
      | \b(?: about | approximately | around | roughly | exactly | only | just | simply | equals?
            | therefore | thus | hence | a\ total\ of | equal\ to | usd )\b
      | \b[a-z] \s* = )*
""")
HEADING = re.compile(r"\s*\d+[.)]\s+[^\W\d]")  # "#### 1. Count the apples"
# Behind a number: a sum, or a second number that is as good as the first. Up to two words, the
# unit, may stand between.
UNIT = r"\s*(?:[^\W\d]+\.?\s+|%\s*){0,2}"
GOES_ON = re.compile(rf"""(?xi)
    {UNIT} (?: [-+*x·/÷^] | (?:%|\bpercent)\ of\b | \b(?:more|less|fewer)\ than\b
      | \b(?: plus | minus | times | divided\ by | over | and | or | to )\b )
    [-\s({CURRENCY}]* \.?\d
  | \s+ \d
""")
EQUALS = re.compile(r"=|≈|\bequals\b|\bis\b")
BETWEEN = re.compile(r"(?i)\bbetween\b|\beither\b")
NEXT_QUESTION = re.compile(
    r"(?i)\n[^\w\n]*(?:question|q|problem|instruction|input|user|human)\s*\d*\s*:")


def stated_number(reply: str) -> Fraction | None:
    """The number that a reply states as its answer; None: none, or no telling which."""
    text = without_markup(plain_characters(reply))
    if NUMBER.search(text) is None:
        return None
    text = before_the_next_question(text)
    for mark in reversed(list(MARK.finditer(text))):
        statement = behind(mark, text)
        if statement is not None:
            return read_statement(statement)
    return value_of(list(NUMBER.finditer(text))[-1])


def before_the_next_question(text: str) -> str:
    """The reply without what a model makes up behind it: another question and its answer."""
    for match in NEXT_QUESTION.finditer(text):
        if NUMBER.search(text[:match.start()]):
            return text[:match.start()]
    return text


def behind(mark: re.Match, text: str) -> str | None:
    """The line that a mark introduces; None where it states nothing: a heading, or no number."""
    rest = text[mark.end():]
    line = rest.lstrip().partition("\n")[0]
    if NUMBER.search(line) is None:
        return None
    on_its_own = mark[0] == "####" or "\n" in rest[:len(rest) - len(rest.lstrip())]
    if on_its_own and (HEADING.match(line) or not starts_with_a_number(line)):
        return None
    return line


def starts_with_a_number(line: str) -> bool:
    return NUMBER.match(line, LEAD.match(line).end()) is not None


def read_statement(line: str) -> Fraction | None:
    """The number that one line states."""
    line = re.sub(r"\(([^()]*)\)", without_a_remark, line)
    while starts_with_a_number(line):
        number = NUMBER.match(line, LEAD.match(line).end())
        rest = line[number.end():]
        if not GOES_ON.match(rest):
            return value_of(number)
        equals = EQUALS.search(rest)
        if equals is None:
            return None
        line = rest[equals.end():]
    # Words come first: "she has 10, sells 3 and keeps 7". Its last number, as without a mark.
    numbers = list(NUMBER.finditer(line))
    if not numbers or BETWEEN.search(line):
        return None
    if len(numbers) > 1:
        joint = line[numbers[-2].end():numbers[-1].start()].strip()
        if joint in ("or", "to", "-", "/", "+", "*"):
            return None
    return value_of(numbers[-1])


def without_a_remark(match: re.Match) -> str:
    """Brackets that hold words or an equation are left out; (7) is kept."""
    return " " if re.search(r"[^\W\d]|=", match[1]) else match[0]


# labels

DENIED = re.compile(r"(?i)(?:\bnot|n't|\brather than|\binstead of|\bthan)\s+(?:an?\s+)?([\w/]+)")


def stated_label(reply: str, labels: dict[str, str]) -> str | None:
    """The label that a reply states; None: none, or more than one.

    labels: label -> the pattern of its spellings. A first or last line that is a label, or ends in
    one behind a colon, states it, in any case; else the reply must name one label alone.
    """
    text = without_markup(reply)
    lines = [line for line in text.split("\n") if line.strip()]
    stated = set()
    for line in (*lines[:1], *lines[-1:]):
        said = re.sub(r"^[^\w]+|[^\w]+$", "", line.rpartition(":")[2])
        for label, pattern in labels.items():
            if re.fullmatch(pattern, said, re.IGNORECASE):
                stated.add(label)
    if not stated:
        text = DENIED.sub("", text)
        for label, pattern in labels.items():
            if re.search(rf"\b(?:{pattern})\b(?!\s*\?)", text):
                stated.add(label)
    return stated.pop() if len(stated) == 1 else None

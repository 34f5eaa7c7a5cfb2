"""What a reply states, as somebody who reads it would say: a number, or one of a task's labels.

The papers' rules (tasks.py) are simple and fixed, and they call right replies wrong: "#### 12 - 5 =
7" states 7, where they read 12. These rules are for the number that is reported beside theirs.

A number is looked for in two places:

    1. behind the last mark of an answer    "#### 7", "\\boxed{7}", "the answer is 7", "Answer: 7".
                                            The last one counts, because a reply corrects itself
    2. where nothing is marked              the last number of the reply

Behind a mark an equation states what it ends in, and a remark in brackets or behind the number
says nothing new. What states two numbers ("7 or 8", "18 dollars and 5 cents") or a sum that is not
worked out ("12 - 5") states none: None, which is never right. So does what has digits and is no
number here: a time ("6:30"), a root. A number that is denied ("not 7") or says how sure the model
is ("Confidence: 95%") is passed over. Numbers are compared exactly, as fractions.
tests/programs/test_content.py holds the forms that this was written for.
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


def as_plain_text(text: str) -> str:
    """The text without Markdown's bold and underscores; LaTeX as plain text.

    \\boxed{7} becomes "#### 7", which is the other mark of an answer.
    """
    text = text.replace("\u2019", "'")
    # "2**3" is a power, "**3**" is bold; "`3`" is code.
    text = re.sub(r"(?<!\d)\*\*|\*\*(?!\d)|`", "", text).replace("\u00d7", "*")
    # "_3_" is italic, "1_234" is a number.
    text = re.sub(r"(?<![^\W_])_+|_+(?![^\W_])", "", text)
    # "\text{apples}"
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    # "\frac{7}{2}" is " 7/2", so that "3\frac{1}{2}" is "3 1/2".
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2", text)
    # "\sqrt{49}", "\sqrt[3]{27}"
    text = re.sub(r"\\sqrt\s*(?:\[[^\]]{0,9}\])?\s*\{?", "\u221a{", text).replace("\\pi", "π")
    # "2 \times 3", "12 \div 4", "12 - 5 \to 7"
    text = re.sub(r"\\(?:times|cdot)\b", "*", text).replace("\\div", "/")
    text = re.sub(r"\\(?:to|implies|[Rr]ightarrow)\b", "→", text)
    # "1{,}234"
    text = text.replace("{,}", ",")
    # "\boxed{7}", "\boxed{x^{2} = 49}", and "\boxed{7" where the reply is cut off
    text = re.sub(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}?", r" #### \1\n", text)
    # "\(7\)" is math, "1\,234" has a thin space, "\$7" and "7\%" are a dollar and a percent sign.
    text = re.sub(r"\\[,;:! ()\[\]]|\\(?=[$%])", "", text)
    # "3½" is "3 1/2".
    return re.sub("[¼½¾⅐-⅞]", spelt_fraction, text)


def spelt_fraction(match: re.Match) -> str:
    """A sign as "½" in characters that NUMBER reads: " 1/2"."""
    return " " + unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/")


# numbers

CURRENCY = "$€£¥₹"
# "-7", "-$3", "minus 7"; but "10 -3" is a sum, and so is "(5)-3".
MINUS = rf"""
    (?<![\w.)\]%]) (?<![\d)\]%]\ ) - (?= [{CURRENCY}]? \s? -? \.? \d )
  | \b(?:minus|negative)\s+
"""
# "7/2", "3 1/2"; but "14/2 = 7" is an equation, and "7/8/2024" a date.
FRACTION = r"""
    (?: (?P<whole> \d+ ) \s+ )?  (?P<upper> \d+ ) \s? / \s? (?P<lower> \d+ )
    (?! \d | [.,]\d | \s* [/=≈] )
"""
# "1,234.50" (also with "'", "_" or a hard space), "1 234" at an end, "1,00,000" as in India
GROUPED = r"""
    \d{1,3} (?: (?P<by> [,'_\u00a0\u2009\u202f] ) \d{3} ) (?: (?P=by) \d{3} )* (?!\d) (?: \.\d+ )?
  | \d{1,3} (?: \ \d{3} )+ (?!\d) (?: \.\d+ )? (?= \s* (?: $ | [.,;)] ) )
  | \d{1,2} (?: ,\d{2} )+ ,\d{3} (?!\d) (?: \.\d+ )?
"""
# "1.234,50", "1.234.567", "12,5": without a space behind it, a comma is a decimal comma.
EUROPEAN = r"""
    \d{1,3} (?: \.\d{3} )+ ,\d{1,2} (?!\d)
  | \d{1,3} (?: \.\d{3} ){2,} (?!\d)
  | (?<!\d,) \d+ ,\d{1,2} (?![\d,])
"""
# "7", "7.5", ".5"
PLAIN = r" \d+ (?: \.\d+ )? | (?<!\w) \.\d+ "
# "1.2e3", "1.2 x 10^3", "1.2 * 10**{3}"
POWER_OF_10 = r"""
    e (?P<exponent> [+-]?\d{1,3} ) (?!\w)
  | \s? [x*·] \s? 10 \s? (?: \^ | \*\* ) \s? \{? (?P<power> [+-]?\d{1,3} ) \}?
"""
# "2 hundred thousand", "$3k", "$1.5m"
SCALE = r"(?: \s? (?: hundred | thousand | million | billion | trillion | k | mn? | bn? ) \b )+"
# "6:30", "3:4", "√49", "3√2", "7²", "2π": they have digits, and no value here.
NO_NUMBER = r"""
    \d+ (?: :\d+ )+
  | √ [\s({]* \d+ (?: \.\d+ )? [)}]*
  | \d+ (?: \.\d+ )? \s? (?: √ [\s({]* \d+ [)}]* | [π²³⁰-⁹] )
"""
NUMBER = re.compile(rf"""(?xi)
    (?<![^\W_]) (?<!\d[._'])  # neither inside a word nor inside another number
    (?: (?P<minus> {MINUS} ) )?
    (?P<currency> [{CURRENCY}] \s? (?P<minus_behind> - )? )?
    (?: (?P<no_number> {NO_NUMBER} )
      | {FRACTION}
      | (?P<grouped> {GROUPED} )
      | (?P<european> {EUROPEAN} )
      | (?P<plain> {PLAIN} ) )
    (?: {POWER_OF_10} )?
    (?P<scale> {SCALE} )?
""")
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
          "trillion": 10**12}
LETTER_SCALES = {"k": 10**3, "m": 10**6, "mn": 10**6, "b": 10**9, "bn": 10**9}
LONGEST = 100  # characters of a number: what is longer is no answer but a loop of the model


def value_of(match: re.Match) -> Fraction | None:
    """The number that NUMBER has found; None for a division by zero and for what is no number."""
    if len(match[0]) > LONGEST or match["no_number"]:
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
    for word in (match["scale"] or "").lower().split():
        if word in SCALES:
            value *= SCALES[word]
        elif match["currency"]:  # "$3k" and "$5m", but a run of 5k and a rope of 5 m
            value *= LETTER_SCALES[word]
    if match["minus"] or match["minus_behind"]:
        value = -value
    return value


# statements

# "#### 7", "The answer to the question is: 7", "Answer: 7", "final answer 7"
MARK = re.compile(r"""(?xi)
    \#\#\#\#
  | \banswers? (?: \s+ (?:to|for|in|of) \s [^\d.\n:=]{0,40}? )?
    \s* (?: \b(?: is | are | was | (?:would|will|should|must)\ be )\b (?!\s+not\b) \s* [:=]?
          | [:=→] )
  | \bfinal\ answer \b (?= \W* \d )
""")
# What may stand between a mark and its number: "is: about $7", "= x = 7".
LEAD = re.compile(rf"""(?xi)
    (?: [\s"'“”:=~≈<>→\#*([]
      | - (?! \.?\d | [{CURRENCY}] )  # a bullet, no sign
      | \b(?: about | approximately | around | roughly | exactly | only | just | simply | equals?
            | therefore | thus | hence | a\ total\ of | equal\ to | usd )\b
      | \b[a-z] \s* = )*
""")
HEADING = re.compile(r"\s*\d+[.)]\s+[^\W\d]")  # "#### 1. Count the apples"
# Up to two words behind a number: "10 red apples - 3", "50 % * 14".
UNIT = r"\s*(?:[^\W\d]+\.?\s+|%\s*){0,2}"
# Units that are given together: "6 hours 30 minutes", "5 feet, 3 inches".
PARTS = (r"(?: years? | months? | weeks? | days? | h | hrs? | hours? | min | mins | minutes?"
         r" | km | m | ft | foot | feet | kg | lbs? | pounds? | dollars? )\b")
# Behind a number: a sum, or a second number that is as good as the first.
GOES_ON = re.compile(rf"""(?xi)
    # "12 - 5", "10 apples minus 3", "7 and 8"
    {UNIT} (?: \*\* | [-+*x·/÷^] | (?:%|\bpercent)\ of\b | \b(?:more|less|fewer)\ than\b
      | \b(?: plus | minus | times | divided\ by | over | and | or | to )\b )
    [-\s({{{CURRENCY}]* \.?\d
    # "7 8"
  | \s+ \d
    # "6 hours 30 minutes"
  | \s? {PARTS} \.? [\s,]+ \d
    # "1, 2", "7 apples, 3 pears"; but "7 apples, 3 fewer than 10" is a remark
  | (?: \s [^\W\d]+ )? [,;] \s+ [-{CURRENCY}]* \.?\d [\d.,]* (?! \S )
    (?! \s (?: more | less | fewer | times | of | per | out | is | are | was | were )\b )
    # "5! = 120", "3(2) = 6"
  | (?: ! | \( [\d.]+ \) ) \s* =
""")
# "x = 8, y = 3", behind the first number
ANOTHER_VARIABLE = re.compile(r"(?i)\s*(?:[,;]|\band\b)\s*(?:and\s+)?[a-z]\s*=\s*[-.\d]")
# "12 - 5 = 7", "12 - 5 → 7", "12 - 5 gives 7"
EQUALS = re.compile(r"->|=>|=|≈|→|⇒|\b(?:equals|is|gives|makes|leaves|yields)\b")
# "between 7 and 8", "either 7 or 8"
BETWEEN = re.compile(r"(?i)\bbetween\b|\beither\b")
# An amount as it is written in passing: "7", "$7.50", "95%", "12 - 5 = 7".
AMOUNT = (rf"[\s:(\"']*[{CURRENCY}]?\d[\d.,/]*(?:\s*[-+*/=]\s*[{CURRENCY}]?\d[\d.,/]*)*"
          r"\s*(?:%|percent\b)?")
# Numbers that are no answer, because the words around them say so.
PASSED_OVER = re.compile(rf"""(?xi)
    # "8, not 7", "instead of the 7"
    (?: \bnot | n't | \bcannot | \brather\ than | \binstead\ of )
    (?: \s+ (?: be | just | only | simply | equal | the | an? )\b )* {AMOUNT}
    # "my first answer was 7"
  | \b(?: earlier | previous | first | initial | original | old | wrong | incorrect )
    \s+ (?:final\s+)? answer \b \s* (?:is|was|of|=)? {AMOUNT}
    # "Confidence: 95%", "95% sure"
  | \bconfidence\b (?:\s+\w+)? {AMOUNT}
  | \d[\d.]* \s* (?:%|percent) \s+ (?: confiden\w* | sure | certain\w* )\b
""")
# Where a model makes up another question: "Question:", "### Problem 2.", "User" on its own line.
NEXT_QUESTION = re.compile(r"""(?xi)
    \n [^\w\n]* (?:next\s+)? (?: question | q | problem | instruction | input | user | human )
    (?: [^\S\n]* \d* [^\S\n]* : | [^\S\n]+ \d+ [.)] | [^\w\n]* (?:\d+ [^\w\n]*)? \n )
""")


def stated_number(reply: str) -> Fraction | None:
    """The number that a reply states as its answer; None: none, or no telling which."""
    text = as_plain_text(plain_characters(reply))
    if NUMBER.search(text) is None:
        return None
    text = PASSED_OVER.sub(" ", before_the_next_question(text))
    for mark in reversed(list(MARK.finditer(text))):
        statement = behind(mark, text)
        if statement is not None:
            return read_statement(statement)
    numbers = list(NUMBER.finditer(text))
    return value_of(numbers[-1]) if numbers else None


def before_the_next_question(text: str) -> str:
    """The reply without what a model makes up behind it: another question and its answer.

    The text must hold a number: a question in front of the first one is the reply's own.
    """
    first = NUMBER.search(text)
    for match in NEXT_QUESTION.finditer(text):
        if first.end() <= match.start():
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
        if ANOTHER_VARIABLE.match(rest):
            return None
        if not GOES_ON.match(rest) and not number["no_number"]:
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
        if joint in ("or", "to", "-", "/", "+", "*") or side_by_side(numbers, line):
            return None
    return value_of(numbers[-1])


def side_by_side(numbers: list[re.Match], line: str) -> bool:
    """Whether the last two numbers differ and stand behind the same word.

    "Tom has 8; Ann has 3" states two, and "she has 10 and keeps 7" the last one.
    """
    words = []
    for number in numbers[-2:]:
        in_front = re.findall(r"\w+|[^\w\s=+*/-]", line[:number.start()])
        words.append(in_front[-1].lower() if in_front else None)
    return words[0] == words[1] and value_of(numbers[-2]) != value_of(numbers[-1])


def without_a_remark(match: re.Match) -> str:
    """Brackets that hold words or an equation are left out; (7) is kept."""
    return " " if re.search(r"[^\W\d]|=", match[1]) else match[0]


# labels

# A denial and up to four words behind it, in one clause: "not negative", "lacks any positive
# aspects". What stands behind "but" counts again.
DENIED_WORDS = re.compile(r"""(?xi)
    (?: n't | \b(?: not | cannot | no | never | nothing | neither | nor | hardly | barely | without
      | lack(?:s|ing)? | fail(?:s|ed)? | less | than | (?:rather|other)\ than | instead\ of
      | far\ from | anything\ but ) )
    (?: \s+ (?! (?:but|and|so|rather|instead)\b ) [\w/'-]+ ){1,4}
""")


def stated_label(reply: str, labels: dict[str, str]) -> str | None:
    """The label that a reply states; None: none, or more than one.

    labels: label -> the pattern of its spellings. A first or last line that is a label, or ends in
    one behind a colon, states it, in any case; else the reply must name one label alone, and
    nearby words must not deny it: "it lacks any positive aspects" states none, nor the opposite.
    """
    text = as_plain_text(reply)
    lines = [line for line in text.split("\n") if line.strip()]
    stated = set()
    for line in (*lines[:1], *lines[-1:]):
        said = re.sub(r"^[^\w]+|[^\w]+$", "", line.rpartition(":")[2])
        for label, pattern in labels.items():
            if re.fullmatch(pattern, said, re.IGNORECASE):
                stated.add(label)
    if not stated:
        text = DENIED_WORDS.sub("", text)
        for label, pattern in labels.items():
            if re.search(rf"\b(?:{pattern})\b(?!\s*\?)", text):
                stated.add(label)
    return stated.pop() if len(stated) == 1 else None

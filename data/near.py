"""Which texts say nearly the same: at least half of all their words are common to both.

    J(a, b) = |A and B| / |A or B| >= 1/2        A, B: the words of a and b, by mixture.normalise

That is the Jaccard index. "Write a guide to bake a cake" and "Write a guide to bake a pie" have 5
words of 7 in common, so they are near. They are hardly two observations: a model that refuses one
refuses the other. So their results count as one group in an interval (groups_of_tests), and
data.prepare keeps no harmful prompt that is near one of another part. train.py and eval.py leave
out of the tests only what is the same.
"""

import math
from collections import Counter, defaultdict

from data.mixture import normalise
from data.rows import last_user

NEAR = 0.5  # the smallest J that counts as near; our choice


class NearTexts:
    """Texts, to be asked for those that are near another one."""

    def __init__(self, texts=()):
        self.words = []  # of each text, its set of words
        self.texts_with = defaultdict(list)  # word -> the numbers of the texts that have it
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Gives `text` the next number, from 0 on."""
        words = word_set(text)
        for word in words:
            self.texts_with[word].append(len(self.words))
        self.words.append(words)

    def near(self, text: str) -> list[int]:
        """The numbers of the texts that are near `text`, in order.

        A near text has at least NEAR |A| of the words A of `text`, since |A or B| >= |A|. So of
        any |A| - NEAR |A| + 1 of these words it has one. The rarest are looked up, which few texts
        have, and only these texts are compared.
        """
        words = word_set(text)
        if not words:  # near are the others that have none
            return [number for number, others in enumerate(self.words) if not others]
        n_needed = math.ceil(NEAR * len(words))
        rarest_first = sorted(words, key=lambda word: len(self.texts_with.get(word, ())))
        candidates = set()
        for word in rarest_first[:len(words) - n_needed + 1]:
            candidates.update(self.texts_with.get(word, ()))
        return sorted(number for number in candidates if jaccard(words, self.words[number]) >= NEAR)


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """J of two sets of words that are not both empty."""
    n_common = len(a & b)
    return n_common / (len(a) + len(b) - n_common)


def word_set(text: str) -> frozenset[str]:
    return frozenset(normalise(text).split())


def near_groups(texts) -> list[int]:
    """For each text the number of its group: what is near, and what is near to that, is one group.

    Groups are numbered from 0 on as they first come.
    """
    texts = list(texts)
    seen = NearTexts()
    group_of = []  # of each text, the first text of its group so far
    for i, text in enumerate(texts):
        joined = {group_of[j] for j in seen.near(text)}
        first = min(joined, default=i)
        group_of = [first if group in joined else group for group in group_of]
        group_of.append(first)
        seen.add(text)
    return numbered(group_of)


# the groups of an evaluation


def groups_of_tests(rows: list[dict], kind: str, prefix: str = "", suffix: str = "") -> list[int]:
    """For each test row of a kind the number of its group, from 0 on as they first come.

    Rows about the same "object" are one group where every row names one and not all the same. Else
    near prompts are one. Not compared is what stands around every prompt and says nothing of it:
    prefix and suffix of the affix attack, and the instruction of a task.
    """
    objects = [row.get("object") for row in rows]
    if all(objects) and len(set(objects)) > 1:
        return numbered(objects)
    prompts = []
    for row in rows:
        prompts.append(last_user(row).removeprefix(prefix).removesuffix(suffix))
    if kind == "task":
        prompts = without_instruction(prompts)
    return near_groups(prompts)


def numbered(names: list) -> list[int]:
    """Each name's number; equal names have the same, and new ones the next, from 0 on."""
    number_of = {}
    return [number_of.setdefault(name, len(number_of)) for name in names]


def without_instruction(prompts: list[str]) -> list[str]:
    """The prompts without the words that more than half of them have.

    "Analyze the sentiment of the input, ..." is most of a prompt on a short review, so that all of
    them would be near one another.
    """
    word_sets = [word_set(prompt) for prompt in prompts]
    n_with = Counter()
    for words in word_sets:
        n_with.update(words)
    common = {word for word, n in n_with.items() if n > len(prompts) / 2}
    return [" ".join(sorted(words - common)) for words in word_sets]

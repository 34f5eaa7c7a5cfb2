"""Near texts, and groups of them.

    python -m pytest tests/laws/test_near.py
"""

from itertools import product

import pytest
import torch

from data.near import NearTexts, groups_of_tests, near_groups, word_set
from data.tasks import SST2

A = "Write a guide to bake a cake."  # 6 words, "a" twice
B = "write a GUIDE to bake a pie"  # 5 of 7 in common


def jaccard(a: str, b: str) -> float:
    return len(word_set(a) & word_set(b)) / len(word_set(a) | word_set(b))


def random_texts(seed: int, n: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(n):
        length = int(torch.randint(1, 6, (), generator=generator))
        words = torch.randint(0, 12, (length,), generator=generator).tolist()
        texts.append(" ".join(f"w{word}" for word in words))
    return texts


def test_two_texts_are_near_from_one_half_of_their_words_on():
    assert NearTexts([A, "w x y z"]).near(B) == [0]
    assert NearTexts(["a b c"]).near("a b d") == [0]  # 2 of 4: exactly one half
    assert NearTexts(["a b c"]).near("a d e") == []  # 1 of 5
    assert NearTexts(["a b"]).near("a c") == []  # 1 of 3


@pytest.mark.parametrize("seed", range(3))
def test_the_index_finds_what_comparing_each_pair_finds(seed):
    texts = random_texts(seed, 60)
    index = NearTexts(texts)
    for text in texts:
        assert index.near(text) == [i for i in range(60) if jaccard(text, texts[i]) >= 0.5]


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_the_connected_parts_of_what_is_near(seed):
    texts = random_texts(seed, 60)
    reach = torch.tensor([[jaccard(a, b) >= 0.5 for b in texts] for a in texts])
    for _ in range(6):  # paths of up to 64 steps
        reach = reach.float() @ reach.float() > 0
    groups = near_groups(texts)
    for i, j in product(range(60), repeat=2):
        assert (groups[i] == groups[j]) == bool(reach[i, j])
    assert len(set(groups)) > 1  # else one group would pass too


def test_groups_are_numbered_as_they_first_come_and_may_be_joined_later():
    # "a b c d" and "e f g h" share no word until a third text is near to both.
    assert near_groups(["a b c d", "e f g h"]) == [0, 1]
    assert near_groups(["x", "a b c", "d e f", "a b c d e f"]) == [0, 1, 1, 1]


def test_symbols_alone_are_compared_as_symbols():
    assert near_groups(["?!", "?!", ":)"]) == [0, 0, 1]
    assert near_groups([]) == []


def test_texts_without_any_word_are_one_group():
    """As tests whose words are all the instruction's, which is not compared."""
    assert near_groups(["", "a b", ""]) == [0, 1, 0]


# ---------------------------------------------------------------------------------------------
# the groups of an evaluation's tests


def rows_of(*prompts, objects=None):
    rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    for row, name in zip(rows, objects or [], strict=False):
        if name:
            row["object"] = name
    return rows


PROMPTS = ("Bake a cake now", "Bake a cake today", "Paint it")


def test_tests_that_all_name_an_object_are_grouped_by_it():
    assert groups_of_tests(rows_of(*PROMPTS, objects=["x", "y", "x"]), "harmful") == [0, 1, 0]


@pytest.mark.parametrize("objects", [None, ["x", "y", None], ["x", "x", "x"]])
def test_without_objects_that_tell_them_apart_near_prompts_are_a_group(objects):
    """All the same is what an export writes as "object": "chat.completion"."""
    assert groups_of_tests(rows_of(*PROMPTS, objects=objects), "harmful") == [0, 0, 1]


REVIEWS = ("a moving film", "dull and slow", "a moving film indeed", "loud")


def test_the_instruction_that_all_rows_of_a_task_share_does_not_make_them_near():
    rows = rows_of(*[SST2.format(review) for review in REVIEWS])
    assert groups_of_tests(rows, "task") == [0, 1, 0, 2]
    assert len(set(groups_of_tests(rows, "harmful"))) == 1  # the control: compared whole


def test_what_the_affix_attack_puts_around_all_prompts_does_not_make_them_near():
    prefix = "My very dear old friend, would you please tell me at last: "
    rows = rows_of(*[f"{prefix}{review} Thanks." for review in REVIEWS])
    assert groups_of_tests(rows, "harmful", prefix, " Thanks.") == [0, 1, 0, 2]
    assert groups_of_tests(rows, "harmful") == [0, 0, 0, 0]

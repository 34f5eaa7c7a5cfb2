"""Which prompts of the pool are held: those that are refused, drawn or chosen by their h.

    python -m pytest tests/laws/test_choice.py
"""

from itertools import combinations

import pytest
import torch
from helpers import ROOT
from sbr_helpers import POOL, Setup, in_messages, last_state, prompt_ids

from cli import frozen
from data import choice, mixture
from data.choice import by_distance_from_the_mean as medoids
from data.choice import choose_anchors, farthest_first
from data.mixture import drawn_candidates, prompts_of
from data.rows import last_user
from generate import generate
from judges import is_refusal
from model import UserError, load_model
from tokenizer import Tokenizer

TINY = ROOT / "data" / "tiny"


def make_args(**changes):
    return frozen({"anchors": 4, "anchor_seed": 4, "anchor_check": "none",
                   "anchor_choice": "random", "max_len": 512, **changes})


@pytest.fixture(scope="module")
def pool(sbr_folder):
    return sbr_folder / "anchors.txt"


@pytest.fixture(scope="module")
def setup(sbr_folder):
    return Setup(sbr_folder, torch.float64, fresh=True)


@pytest.fixture
def choose(setup, pool):
    """choose(anchors=4, ...) -> Choice, of POOL, on a small random model."""
    def run(used=frozenset(), **changes):
        return choose_anchors(setup.model, setup.tokenizer, make_args(**changes), pool, set(used))
    return run


@pytest.fixture
def answers(monkeypatch, setup):
    """answers(prompts): these are answered, all others refused; -> a list of what is asked."""
    def script(answered):
        asked = []

        def fake(model, prompts, max_new, stop_ids, n_ids=None):
            replies = []
            for ids in prompts:
                text = setup.tokenizer.decode(ids)
                prompt = next(p for p in POOL if p in text)
                asked.append(prompt)
                reply = "Sure, here." if prompt in answered else "I'm sorry, but no."
                replies.append(setup.tokenizer.encode(reply))
            return replies

        monkeypatch.setattr(choice, "generate", fake)
        return asked
    return script


def drawn(pool, seed=4):
    return [last_user(row) for row in drawn_candidates(pool, seed, set())]


# the draw


def test_a_smaller_K_has_the_first_anchors_of_a_larger_and_none_comes_twice(choose):
    whole = choose(anchors=len(POOL)).prompts
    assert sorted(whole) == sorted(POOL)
    for K in range(len(POOL)):
        assert choose(anchors=K).prompts == whole[:K]


def test_the_anchors_seed_draws_the_order(choose):
    assert choose(anchors=8).prompts == choose(anchors=8).prompts
    assert choose(anchors=8).prompts != choose(anchors=8, anchor_seed=5).prompts


def test_more_anchors_than_the_pool_holds_are_refused_with_both_numbers(choose):
    with pytest.raises(UserError, match=r"13.* 12 "):
        choose(anchors=13)


def test_an_upload_that_shares_the_whole_pool_leaves_no_anchor_to_draw(choose):
    used = prompts_of([in_messages(p, "Sure.") for p in POOL[:-1]])
    with pytest.raises(UserError, match="2 is more than the 1 prompts"):
        choose(anchors=2, used=used)


def test_a_planted_clash_of_anchor_and_upload_raises(choose, monkeypatch):
    """The last guard: should the filter ever let one through, the run must not start."""
    rows = [in_messages(prompt, "Sure.") for prompt in POOL]
    monkeypatch.setattr(mixture, "anchor_candidates", lambda pool, used: rows)
    with pytest.raises(AssertionError, match="phishing"):
        choose(anchors=8, used=prompts_of([in_messages(POOL[2].upper(), "Sure.")]))


def test_without_anchors_no_pool_is_needed_and_none_is_asked(setup):
    chosen = choose_anchors(None, None, make_args(anchors=0), TINY / "no such file", set())
    assert (chosen.prompts, chosen.passed_over) == ([], 0)


# what the aligned model refuses


@pytest.mark.parametrize("K", [1, 2, 5, 8])
def test_the_first_K_that_are_refused_are_held_in_the_drawn_order(choose, answers, pool, K):
    order = drawn(pool)
    answered = [order[0], order[1], order[4], order[10]]
    answers(answered)
    chosen = choose(anchors=K, anchor_check="refusal")
    refused = [prompt for prompt in order if prompt not in answered]
    assert chosen.prompts == refused[:K]
    # Passed over are those that were answered and stand before the last anchor, and no others.
    assert chosen.passed_over == order.index(refused[K - 1]) + 1 - K


def test_with_no_check_what_is_answered_is_held_too_and_nothing_is_asked(choose, answers, pool):
    asked = answers(POOL)
    chosen = choose(anchors=3)
    assert (chosen.prompts, chosen.passed_over, asked) == (drawn(pool)[:3], 0, [])


def test_no_more_is_asked_than_needed_by_a_few(choose, answers, pool):
    asked = answers([])
    choose(anchors=1, anchor_check="refusal")
    assert asked == drawn(pool)[:choice.ASKED_AT_ONCE]


def test_a_model_that_refuses_too_few_is_named_with_what_was_found(choose, answers):
    answers(POOL[:9])
    with pytest.raises(UserError, match=r"--anchors 4 .* the 3 prompts .* of 12 .*none"):
        choose(anchors=4, anchor_check="refusal")


def test_the_embedded_models_first_candidate_of_seed_0_is_one_that_it_answers():
    """It was the anchor of the README's K = 1 run before candidates were asked."""
    model = load_model(TINY)
    tokenizer = Tokenizer(TINY)
    pool = TINY / "harmful" / "anchors.jsonl"
    args = make_args(anchors=2, anchor_seed=0, anchor_check="refusal")
    chosen = choose_anchors(model, tokenizer, args, pool, set())
    assert chosen.passed_over > 0
    first = last_user(drawn_candidates(pool, 0, set())[0])
    assert first not in chosen.prompts
    ids = [tokenizer.encode_prompt([{"role": "user", "content": p}])
           for p in [first, *chosen.prompts]]
    replies = generate(model, ids, 24, tokenizer.stop_ids)
    verdicts = [is_refusal(tokenizer.decode(reply)) for reply in replies]
    assert verdicts == [False, True, True]


# by h


def points(seed, n=9, C=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, C, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_the_medoid_has_the_least_sum_of_squared_distances(seed):
    h = points(seed)
    total = torch.cdist(h, h).square().sum(dim=1)
    assert medoids(h) == total.argsort().tolist()
    assert total.argsort().tolist() != torch.cdist(h, h[:1]).sum(dim=1).argsort().tolist()


def radius(h, chosen):
    """The distance of the candidate that is farthest from all chosen ones."""
    return torch.cdist(h, h[list(chosen)]).amin(dim=1).max().item()


@pytest.mark.parametrize("seed", range(4))
def test_no_candidate_is_farther_from_the_spread_anchors_than_twice_the_best_choice(seed):
    h = points(seed)
    order = farthest_first(h)
    assert sorted(order) == list(range(len(h)))
    assert order[0] == medoids(h)[0]
    for K in (2, 3, 4):
        best = min(radius(h, chosen) for chosen in combinations(range(len(h)), K))
        assert best <= radius(h, order[:K]) <= 2 * best
    # Control: of two clusters the larger one has both candidates that are nearest the mean.
    h[:3] += 50
    best = min(radius(h, chosen) for chosen in combinations(range(len(h)), 2))
    assert radius(h, farthest_first(h)[:2]) <= 2 * best < radius(h, medoids(h)[:2])


def test_spread_takes_the_farthest_each_time():
    h = torch.tensor([[0.0], [1.0], [1.1], [5.0], [-3.0]])  # mean 0.82
    assert farthest_first(h) == [1, 3, 4, 0, 2]


def test_spread_takes_each_of_equal_candidates_once():
    assert sorted(farthest_first(torch.zeros(4, 3))) == [0, 1, 2, 3]


@pytest.mark.parametrize("how", ["medoid", "spread"])
def test_the_choice_is_by_h_of_the_refused_ones_alone(choose, answers, setup, pool, how):
    order = drawn(pool)
    answered = order[1::4]
    answers(answered)
    chosen = choose(anchors=3, anchor_check="refusal", anchor_choice=how)
    assert chosen.passed_over == len(answered)
    refused = [prompt for prompt in order if prompt not in answered]
    with torch.no_grad():
        h = torch.stack([last_state(setup.model, ids)
                         for ids in prompt_ids(setup.tokenizer, refused)])
    by_hand = [refused[i] for i in choice.ORDERS[how](h)[:3]]
    assert chosen.prompts == by_hand
    assert chosen.prompts != choose(anchors=3, anchor_choice=how).prompts  # of all of them


@pytest.mark.parametrize("how", ["medoid", "spread"])
def test_they_look_at_so_many_candidates_and_no_further(choose, monkeypatch, pool, how):
    monkeypatch.setattr(choice, "LOOKED_AT", 5)
    assert set(choose(anchors=2, anchor_choice=how).prompts) <= set(drawn(pool)[:5])
    assert len(choose(anchors=7, anchor_choice=how).prompts) == 7

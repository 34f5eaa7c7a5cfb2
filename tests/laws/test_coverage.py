"""stress/coverage: margin, cosine, coverage and reach against plain autograd with a dense J.

    pytest tests/laws/test_coverage.py -q        (add -s to see the numbers)

All in float64 on the small Llama of sbr_helpers.py. J and g by hand: one backward pass for each
number of h, of one sequence at a time, without anchors.py and stress/.
"""

import pytest
import torch
from helpers import randomise_B
from sbr_helpers import POOL, last_state, prompt_ids

from lora import adapted, add_lora
from model import SHORT, Layout, load_model
from stress import coverage
from stress.coverage import measure
from tokenizer import Tokenizer

EXACT = 1e-8
ANCHORS = POOL[:3]
TESTS = POOL[4:8]
# By the header of stress/probes.py: words whose first token opens a refusal.
OPENERS = ("I", "I'm", "Sorry", "As", "Unfortunately", "No")


@pytest.fixture(scope="module")
def tokenizer(sbr_folder):
    return Tokenizer(sbr_folder)


def fresh(folder, seed=0):
    """The model with adapters of rank 4, B = 0."""
    model = load_model(folder, dtype=torch.float64)
    add_lora(model, rank=4, alpha=16, seed=seed)
    return model


@pytest.fixture(scope="module")
def model(sbr_folder):
    return fresh(sbr_folder)


def parameters(model, part):
    return [getattr(module, part) for _, module in adapted(model)]


def flat_gradient(value, params):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, params, retain_graph=True)])


def rows_by_hand(model, ids, part="lora_B"):
    """dh/dB (C, P) of one prompt."""
    h = last_state(model, ids)
    return torch.stack([flat_gradient(number, parameters(model, part)) for number in h])


def margin_by_hand(model, tokenizer, h):
    """The largest logit of a token that opens a refusal, minus the largest of the others."""
    openers = {tokenizer.encode(word)[0] for word in OPENERS}
    logits = h @ model.lm_head.weight.T
    others = [i for i in range(len(logits)) if i not in openers]
    return logits[sorted(openers)].max() - logits[others].max()


def free_part(J, g):
    """g - P g, P the projection on the rows of J, by its singular vectors."""
    _, sizes, V = torch.linalg.svd(J, full_matrices=False)
    V = V[sizes > 1e-5 * sizes[0]]
    return g - V.T @ (V @ g)


def share(J, g):
    """||P g||^2 / ||g||^2."""
    return 1 - (free_part(J, g).square().sum() / g.square().sum()).item()


@pytest.fixture(scope="module")
def by_hand(model, tokenizer):
    """J of each anchor, and h, margin and g of each test."""
    J = [rows_by_hand(model, ids) for ids in prompt_ids(tokenizer, ANCHORS)]
    tests = []
    for ids in prompt_ids(tokenizer, TESTS):
        h = last_state(model, ids)
        margin = margin_by_hand(model, tokenizer, h)
        g = flat_gradient(margin, parameters(model, "lora_B"))
        tests.append((h.detach(), margin.item(), g))
    return J, tests


def found_on(model, tokenizer, anchors, tests, Ks):
    return measure(model, tokenizer, prompt_ids(tokenizer, anchors), prompt_ids(tokenizer, tests),
                   Ks)


@pytest.fixture(scope="module")
def found(model, tokenizer):
    return found_on(model, tokenizer, ANCHORS, TESTS, (0, 1, 2, 3))


def test_coverage_is_that_of_a_dense_projection(found, by_hand):
    J, tests = by_hand
    for K in (1, 2, 3):
        expected = [share(torch.cat(J[:K]), g) for _, _, g in tests]
        print(K, expected)
        assert found.coverage[K].tolist() == pytest.approx(expected, abs=EXACT)
        assert all(0.01 < value < 0.99 for value in expected)  # neither end, where much is right
    # the control: another number of anchors is far off
    assert (found.coverage[1] - found.coverage[2]).abs().min() > 1e-3


def test_margin_gradient_cosine_and_reach_are_what_the_header_says(model, found, by_hand,
                                                                  tokenizer):
    _, tests = by_hand
    with torch.no_grad():
        held = [last_state(model, ids) for ids in prompt_ids(tokenizer, ANCHORS)]
    for i, (h, margin, g) in enumerate(tests):
        assert found.margin[i].item() == pytest.approx(margin, abs=EXACT)
        assert found.gradient_norm[i].item() == pytest.approx(g.norm().item(), rel=EXACT)
        for K in (1, 2, 3):
            nearest = max(torch.cosine_similarity(h, a, dim=0).item() for a in held[:K])
            assert found.cosine[K][i].item() == pytest.approx(nearest, abs=EXACT)
            free = 1 - found.coverage[K][i].item()
            expected = margin / (g.norm().item() * free ** 0.5)
            assert found.reach[K][i].item() == pytest.approx(expected, rel=EXACT)


def test_a_step_as_long_as_reach_brings_the_margin_to_zero_and_moves_no_anchor(found, by_hand):
    J, tests = by_hand
    J = torch.cat(J)
    for i, (_, margin, g) in enumerate(tests):
        free = free_part(J, g)
        step = -margin * free / free.square().sum()
        assert step.norm().item() == pytest.approx(abs(found.reach[3][i].item()), rel=EXACT)
        assert (g @ step).item() == pytest.approx(-margin)
        moved = (J @ step).norm() / (J.norm() * step.norm())
        assert moved < 1e-6
        # the control: the same step along the whole gradient moves them
        assert (J @ g).norm() / (J.norm() * g.norm()) > 1e-2


def test_the_test_prompt_itself_as_an_anchor_covers_all_of_its_gradient(model, tokenizer):
    """The margin depends on h alone, so its gradient is a sum of the anchor's rows."""
    found = found_on(model, tokenizer, [TESTS[0], ANCHORS[0]], TESTS[:2], (1, 2))
    for K in (1, 2):
        assert found.coverage[K][0].item() == pytest.approx(1, abs=EXACT)
        assert found.cosine[K][0].item() == pytest.approx(1, abs=EXACT)
        assert found.coverage[K][1] < 0.99  # the control: another prompt's is not covered


def test_no_anchor_covers_nothing_and_one_more_never_covers_less(found):
    assert found.coverage[0].tolist() == [0.0] * len(TESTS)
    for K in (0, 1, 2):
        assert (found.coverage[K + 1] - found.coverage[K]).min() >= -EXACT
        assert (found.cosine[K + 1] >= found.cosine[K]).all()


def test_no_anchors_at_all_leave_margin_and_gradient(model, tokenizer, found):
    alone = found_on(model, tokenizer, [], TESTS, (0,))
    assert torch.allclose(alone.margin, found.margin, rtol=EXACT)
    assert torch.allclose(alone.reach[0], found.reach[0], rtol=EXACT)
    assert alone.coverage[0].tolist() == [0.0] * len(TESTS)


def test_an_anchor_holds_one_direction_less_than_h_has_since_the_norm_fixes_its_length(found):
    assert found.directions == {0: 0, 1: 63, 2: 126, 3: 189}


def test_the_gradient_of_a_fresh_A_is_zero_and_that_of_a_used_one_is_not(sbr_folder, tokenizer):
    (ids,) = prompt_ids(tokenizer, TESTS[:1])
    model = fresh(sbr_folder)
    assert rows_by_hand(model, ids, "lora_A").abs().max() == 0
    randomise_B(model)
    assert rows_by_hand(model, ids, "lora_A").abs().max() > 0.01


def test_another_draw_of_A_changes_coverage_and_not_the_margin(sbr_folder, tokenizer, found):
    other = found_on(fresh(sbr_folder, seed=1), tokenizer, ANCHORS, TESTS, (1,))
    assert torch.equal(other.margin, found.margin)
    assert (other.coverage[1] - found.coverage[1]).abs().max() > 1e-3


def test_h_at_another_token_than_the_last_gives_another_coverage(model, tokenizer, found, by_hand):
    """The control of the position: the rows of the token before it."""
    (ids,) = prompt_ids(tokenizer, ANCHORS[:1])
    h = model.model(ids, Layout([len(ids)], ids.device), None)[-2]
    J = torch.stack([flat_gradient(number, parameters(model, "lora_B")) for number in h])
    _, tests = by_hand
    wrong = torch.tensor([share(J, g) for _, _, g in tests])
    assert (found.coverage[1] - wrong).abs().max() > 1e-3


def test_a_long_prompt_takes_another_attention_and_the_same_laws_hold(model, tokenizer):
    """Above model.SHORT tokens attention is PyTorch's."""
    long = "Please " + "and now then " * 42 + "go."
    (ids,) = prompt_ids(tokenizer, [long])
    assert len(ids) > SHORT
    found = found_on(model, tokenizer, [long], [long], (1,))
    margin = margin_by_hand(model, tokenizer, last_state(model, ids))
    g = flat_gradient(margin, parameters(model, "lora_B"))
    assert found.gradient_norm.item() == pytest.approx(g.norm().item(), rel=EXACT)
    assert found.coverage[1].item() == pytest.approx(1, abs=EXACT)


@pytest.mark.parametrize(("name", "value"), [("DIRECTIONS_A_PASS", 7), ("COLUMNS", 100)])
def test_how_the_sums_are_cut_changes_nothing(model, tokenizer, found, monkeypatch, name, value):
    monkeypatch.setattr(coverage, name, value)
    cut = found_on(model, tokenizer, ANCHORS[:2], TESTS[:2], (1, 2))
    for K in (1, 2):
        assert torch.allclose(cut.coverage[K], found.coverage[K][:2], atol=EXACT)


def test_the_model_is_left_as_it_was(model, tokenizer, found):
    assert all(not B.any() and B.grad is None for B in parameters(model, "lora_B"))
    assert not any(m._forward_pre_hooks for m in model.modules())

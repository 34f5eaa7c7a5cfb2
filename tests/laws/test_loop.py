"""The loop's contract: what a step may return, what is logged, what the learning rate is.

    pytest tests/laws/test_loop.py -q
"""

from itertools import pairwise

import pytest
import torch
from rival_helpers import NAMES

from data.batches import Batch
from train import LOGGED_BY_THE_LOOP, updates


def run(step_fn, lr=0.5, n_updates=4, start=0, grad_clip=1e9):
    """[(step, numbers, learning rate in the optimiser, p)] of the loop over one parameter p."""
    p = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = torch.optim.SGD([p], lr=123.0)  # the loop has to set the rate itself
    made = updates(lambda batch: step_fn(batch, p),
                   lambda i: Batch([], 1, "cpu", f"batch {i}", i), optimizer, lr=lr,
                   grad_clip=grad_clip, n_updates=n_updates, start=start)
    found = []
    for step, numbers in made:
        found.append((step, numbers, optimizer.param_groups[0]["lr"], p.item()))
    return found


def simple(_batch, p, /, **more):
    (2 * p).sum().backward()
    return {"loss": 1.0, "ce": 1.0, **more}


@pytest.mark.parametrize("start", [0, 2])
def test_the_learning_rate_of_update_t_is_lr_times_1_minus_t_over_T(start):
    found = run(simple, lr=0.5, n_updates=4, start=start)
    expected = [0.5, 0.375, 0.25, 0.125][start:]
    assert [numbers["lr"] for _, numbers, _, _ in found] == expected
    assert [rate for _, _, rate, _ in found] == expected  # what the update was made with
    assert [step for step, _, _, _ in found] == list(range(start, 4))


def test_each_update_takes_the_rate_of_its_own_step():
    values = [3.0, *(p for _, _, _, p in run(simple))]
    moved = [before - after for before, after in pairwise(values)]
    assert moved == pytest.approx([2 * rate for rate in (0.5, 0.375, 0.25, 0.125)])


def test_what_a_step_returns_is_logged_as_it_is_beside_what_the_loop_logs():
    _, numbers, _, _ = run(lambda batch, p: simple(batch, p, mine=7, other="text"))[1]
    assert numbers == {"batch": "batch 1", "tokens": 0, "computed": 0, "loss": 1.0, "ce": 1.0,
                       "mine": 7, "other": "text", "grad_norm": 2.0, "lr": 0.375}
    assert set(LOGGED_BY_THE_LOOP) - numbers.keys() == {"step"}  # which Log.add puts there


@pytest.mark.parametrize("name", ["loss", "ce"])
def test_a_step_without_loss_or_ce_is_stopped_before_it_is_applied(name):
    p = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = torch.optim.SGD([p], lr=1.0)

    def step(batch):
        numbers = simple(batch, p)
        del numbers[name]
        return numbers

    made = updates(step, lambda i: Batch([], 1, "cpu", "", i), optimizer, lr=1.0, grad_clip=1.0,
                   n_updates=1)
    with pytest.raises(AssertionError, match=f"returned no .*{name}"):
        next(made)
    assert p.item() == 3.0


@pytest.mark.parametrize("name", LOGGED_BY_THE_LOOP)
def test_a_step_that_returns_a_name_of_the_loops_is_stopped_before_it_is_applied(name):
    p = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = torch.optim.SGD([p], lr=1.0)
    made = updates(lambda batch: simple(batch, p, **{name: 5}),
                   lambda i: Batch([], 1, "cpu", "", i), optimizer, lr=1.0, grad_clip=1.0,
                   n_updates=1)
    with pytest.raises(AssertionError, match=f"the loop itself logs .*{name}"):
        next(made)
    assert p.item() == 3.0


def test_the_gradient_is_cleared_after_each_update_and_its_norm_is_that_before_clipping():
    seen = []

    def step(batch, p):
        seen.append(p.grad)
        return simple(batch, p)

    found = run(step, grad_clip=0.1)
    assert seen == [None] * 4
    assert [numbers["grad_norm"].item() for _, numbers, _, _ in found] == pytest.approx([2.0] * 4)


@pytest.mark.parametrize("name", NAMES)
def test_every_defences_step_keeps_the_contract(make_rival, name):
    """loss and ce are there, no name is the loop's, all is one number, .grad is left."""
    rival = make_rival(name, dtype=torch.float32)
    for step in (0, 1, 2):
        numbers = rival.step(rival.batch(step))
        assert numbers.keys() >= {"loss", "ce"}
        assert not numbers.keys() & set(LOGGED_BY_THE_LOOP)
        for value in numbers.values():
            assert isinstance(value, (int, float)) or value.numel() == 1
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in rival.params)
        for p in rival.params:
            p.grad = None

"""Greedy decoding with a cache, slots and refill gives what plain greedy decoding gives.

    pytest tests/test_generate.py -q

Plain means: run the whole sequence again for every token, one prompt at a time. In float64, so that
no near-tie between two logits can be decided by the order of a sum.
"""

import pytest
import torch
from helpers import logits, random_ids

from generate import generate
from model import load_model

pytest.importorskip("transformers", reason="writes the model; see requirements-dev.txt")

# Lengths far apart and not sorted, so that slots are refilled by longer and by shorter prompts.
PROMPTS = [ids.tolist() for ids in random_ids(5, 40, 1, 23, 23, 60, 2, 11, 33, seed=30)]
MAX_NEW = 12


@pytest.fixture(scope="module")
def model(llama31):
    return load_model(llama31.folder, dtype=torch.float64)


def plainly(model, prompt, stop_ids=(), max_new=MAX_NEW, n_ids=512):
    ids = list(prompt)
    for _ in range(max_new):
        ids.append(logits(model, [torch.tensor(ids)])[-1, :n_ids].argmax().item())
        if ids[-1] in stop_ids:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def replies(model):
    """Without stop ids: every reply MAX_NEW long."""
    return [plainly(model, prompt) for prompt in PROMPTS]


def cut(reply, stop_ids):
    """A greedy reply up to its first stop id."""
    return reply[: next((i for i, t in enumerate(reply) if t in stop_ids), len(reply))]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
def test_replies_equal_plain_greedy_decoding_in_any_batch(model, replies, batch_size):
    assert generate(model, PROMPTS, MAX_NEW, [], batch_size=batch_size) == replies


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
@pytest.mark.parametrize("at", [0, 1, 5, [0, 2, 4]])
def test_rows_that_stop_at_different_steps_do_not_disturb_the_others(
        model, replies, batch_size, at):
    """at: the step whose tokens, of every third prompt, are the stop ids. Step 0 ends replies in
    the prefill itself, before a single decoding step."""
    stop_ids = {replies[i][step] for i in range(0, len(PROMPTS), 3)
                for step in ([at] if isinstance(at, int) else at)}
    expected = [cut(reply, stop_ids) for reply in replies]
    assert len({len(reply) for reply in expected}) > 1  # some stop early, some do not
    assert generate(model, PROMPTS, MAX_NEW, list(stop_ids), batch_size=batch_size) == expected


def test_the_replies_come_in_the_order_of_the_prompts(model, replies):
    order = [3, 8, 0, 5, 1, 7, 2, 6, 4]
    shuffled = generate(model, [PROMPTS[i] for i in order], MAX_NEW, [], batch_size=3)
    assert shuffled == [replies[i] for i in order]


def test_ids_from_n_ids_on_are_never_chosen(model, replies):
    """An embedding may be larger than its tokenizer: Qwen2.5 has 151,936 rows for 151,665 ids."""
    assert max(max(reply) for reply in replies) >= 100  # the control: they would be chosen
    some = PROMPTS[:4]
    assert generate(model, some, MAX_NEW, [], n_ids=100) == [
        plainly(model, prompt, n_ids=100) for prompt in some]


def test_max_new_bounds_every_reply(model, replies):
    for n in (1, 2):
        assert generate(model, PROMPTS, n, [], batch_size=4) == [reply[:n] for reply in replies]


def test_no_prompts_give_no_replies(model):
    assert generate(model, [], MAX_NEW, []) == []


def test_every_family_decodes_as_it_runs_in_one_piece(qwen, gemma):
    for reference in (qwen, gemma):  # biases; a scaled embedding and one key head for eight
        model = load_model(reference.folder, dtype=torch.float64)
        some = PROMPTS[:3]
        assert generate(model, some, 6, []) == [plainly(model, p, max_new=6) for p in some]


def test_decoding_leaves_the_model_without_gradients_or_state(model, replies):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    generate(model, PROMPTS[:2], 3, [])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert generate(model, PROMPTS[:2], MAX_NEW, []) == replies[:2]

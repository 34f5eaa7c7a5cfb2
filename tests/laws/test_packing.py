"""Shared prefixes: what stands behind the same tokens is computed once, and nothing changes.

    pytest tests/laws/test_packing.py -q        (add -s to see every distance)

In float64. Without sharing each token has a row of its own, and each law is compared with that.
The controls are the ways in which a path can be wrong.
"""

import random
from itertools import pairwise

import pytest
import torch
from rival_helpers import NAMES
from sbr_helpers import SAME, make_rows, prompt_ids, worst

from anchors import FinalNorm
from data.batches import Batch, encode_rows
from generate import Engine, Row, generate
from model import Layout
from packing import Packing, pack_sequences
from stress import probes

TIGHT = SAME[torch.float64]


def trees():
    """Sequences of several kinds of kinship, by name."""
    rng = random.Random(0)
    few_letters = [[rng.randrange(3) for _ in range(rng.randint(1, 9))] for _ in range(40)]
    header = list(range(10, 22))
    return {
        "random": few_letters,
        "one header": [header + [100 + i] * (1 + i % 5) for i in range(12)],
        "twins": [[1, 2, 3], [1, 2, 3], [1, 2, 3]],
        "one inside the other": [[4, 5, 6, 7], [4, 5], [4, 5, 6, 7, 8], [4]],
        "strangers": [[1, 2, 3], [2, 3, 1], [3, 1, 2]],
        "same tokens in other places": [[1, 1, 1, 1], [2, 1, 1, 1], [1, 2, 1, 1]],
        "alone": [[9, 8, 7]],
    }


TREES = trees()


def beginnings(sequences):
    """Every beginning of every sequence, as tuples."""
    return [tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)]


# ---------------------------------------------------------------------------------------------
# the tree


@pytest.mark.parametrize("name", TREES)
def test_there_is_one_row_for_each_distinct_beginning_and_path_leads_to_it(name):
    sequences = TREES[name]
    packing = pack_sequences(sequences)
    assert packing.ids[packing.path].tolist() == [token for s in sequences for token in s]
    assert packing.seqlens == [len(s) for s in sequences]
    of_row = {}  # row -> the beginnings that it stands for
    for row, beginning in zip(packing.path.tolist(), beginnings(sequences), strict=True):
        of_row.setdefault(row, set()).add(beginning)
    assert all(len(stands_for) == 1 for stands_for in of_row.values())
    assert len(packing.ids) == len(of_row) == len(set(beginnings(sequences)))
    assert packing.last_rows().tolist() == [int(rows[-1]) for rows in packing.rows()]


@pytest.mark.parametrize("name", TREES)
def test_unshared_every_token_has_its_own_row_in_order(name):
    packing = pack_sequences(TREES[name], share=False)
    assert packing.path.tolist() == list(range(sum(packing.seqlens)))
    assert packing.ids.tolist() == [token for s in TREES[name] for token in s]


@pytest.mark.parametrize("name", TREES)
def test_the_layout_gives_each_row_the_place_that_its_tokens_have_and_one_cell(name):
    packing = pack_sequences(TREES[name])
    layout = Layout(packing.seqlens, "cpu", packing.path)
    place = torch.cat([torch.arange(n) for n in packing.seqlens])
    assert torch.equal(layout.position[packing.path], place)
    assert torch.equal(layout.fill[layout.cell], torch.arange(len(packing.ids)))
    assert torch.equal(packing.path[layout.copy], torch.arange(len(packing.ids)))
    assert len(set(layout.cell.tolist())) == len(packing.ids)


# ---------------------------------------------------------------------------------------------
# the states


def states_of(model, packing):
    """h of every token (M, C)."""
    with FinalNorm(model) as norm, torch.no_grad():
        model(packing.ids, packing.seqlens, path=packing.path)
        return norm.value[packing.path]


@pytest.mark.parametrize("name", TREES)
def test_each_tokens_state_is_the_same_shared_and_unshared(exact, name):
    shared = states_of(exact.model, pack_sequences(TREES[name]))
    unshared = states_of(exact.model, pack_sequences(TREES[name], share=False))
    assert ((shared - unshared).norm() / unshared.norm()).item() <= TIGHT


def wrong_prefix(rows):
    """The second sequence goes on from the third's beginning, of the same length."""
    return torch.cat((rows[2][:3], rows[1][3:]))


def one_place_off(rows):
    """The first row of its beginning stands there twice, and the last one not at all."""
    return torch.cat((rows[1][:1], rows[1][:2], rows[1][3:]))


def shared_past_a_difference(rows):
    """It takes the first sequence's rows again behind the token in which they differ."""
    return torch.cat((rows[1][:4], rows[0][4:]))


@pytest.mark.parametrize("wrong", [wrong_prefix, one_place_off, shared_past_a_difference])
def test_control_a_wrong_path_gives_other_states(exact, wrong):
    sequences = [[5, 6, 7, 8, 50, 51], [5, 6, 7, 9, 50, 51], [5, 7, 6, 9, 50, 51]]
    unshared = states_of(exact.model, pack_sequences(sequences, share=False))
    packing = pack_sequences(sequences)
    right = states_of(exact.model, packing)
    rows = packing.rows()
    rows[1] = wrong(rows)
    used, path = torch.cat(rows).unique(return_inverse=True)
    got = states_of(exact.model, Packing(packing.ids[used], path, packing.seqlens))
    of_second = slice(6, 12)
    scale = unshared[of_second].norm()
    assert ((right - unshared)[of_second].norm() / scale).item() <= TIGHT
    assert ((got - unshared)[of_second].norm() / scale).item() > 1e-2


# ---------------------------------------------------------------------------------------------
# the gradient


PACKS = Batch.packs


class Unshared(Batch):
    """The same batch, each token a row of its own."""

    def packs(self, anchors=(), share=True):
        yield from PACKS(self, anchors, share=False)


def rows_alike(n=16):
    """Rows that begin alike, some of them twins."""
    rows = make_rows(n)
    for i, row in enumerate(rows):
        question = row["messages"][0]["content"]
        row["messages"][0]["content"] = f"Is this text good or bad? Text {i // 4}: {question}"
    return rows + rows[:3]


@pytest.mark.parametrize("tokens", [1 << 30, 250, 90, 1])
@pytest.mark.parametrize("recompute", [False, True])
def test_sbrs_gradient_is_the_unshared_one_for_any_cut(make_setup, tokens, recompute):
    s = make_setup(rows=rows_alike())
    s.model.model.recompute = recompute
    shared = s.batch(tokens)
    unshared = s.batch(tokens, kind=Unshared)
    a, gradient = s.gradient(shared)
    b, plain = s.gradient(unshared)
    assert worst(gradient, plain) <= TIGHT
    for name in ("loss", "ce", "safe"):
        assert a[name].item() == pytest.approx(b[name].item(), rel=1e-12)
    if tokens >= 250:
        assert shared.n_rows < 0.8 * unshared.n_rows  # something was shared indeed
    assert worst(s.gradient_by_hand(), plain) <= TIGHT


def test_the_order_of_the_rows_changes_no_gradient(make_setup):
    s = make_setup(rows=rows_alike())
    _, gradient = s.gradient()
    s.examples.reverse()
    _, backwards = s.gradient()
    assert worst(backwards, gradient) <= TIGHT


@pytest.mark.parametrize("name", NAMES)
def test_every_defences_gradient_is_the_unshared_one(make_rival, monkeypatch, name):
    shared = make_rival(name, n_rows=16).move()
    unshared = make_rival(name, n_rows=16).move()
    for step in (0, 51, 53):  # Lisa: the guide, then guide and upload with a distance
        numbers, gradient = shared.gradient(step)
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "packs", Unshared.packs)
            expected, plain = unshared.gradient(step)
        kept = [n for n in plain if plain[n].any()]  # a layer of T-Vaccine's may rest
        # EWC's gradient has the square of a gradient in it, and weighs it with 1e9
        bound = 1e-10 if name == "ewc" else TIGHT
        assert worst({n: gradient[n] for n in kept}, {n: plain[n] for n in kept}) <= bound
        for key in expected.keys() - {"trained_rows"}:
            assert float(numbers[key]) == pytest.approx(float(expected[key]), rel=1e-9, abs=1e-12)


def test_control_vaccine_with_shared_rows_is_another_method(make_rival, monkeypatch):
    """Its push belongs to one token of one row; a shared row would be pushed for all of them."""
    rival = make_rival("vaccine", n_rows=16).move()
    _, own = rival.gradient()
    monkeypatch.setattr(Batch, "packs", lambda self, anchors=(), share=True: PACKS(self, anchors))
    _, shared = rival.gradient()
    assert worst(shared, own) > 1e-3


def test_what_stands_behind_the_last_supervised_token_is_not_run_and_changes_nothing(make_setup):
    s = make_setup()
    pack = next(s.batch().packs())
    for e, rows in zip(s.examples, pack.path.split(pack.seqlens), strict=True):
        assert len(rows) == int(e.predict[-1]) + 1 < len(e.ids)
    _, gradient = s.gradient()
    for e in s.examples:
        tail = torch.arange(3)
        e.ids = torch.cat((e.ids, tail))
    _, with_longer_tails = s.gradient()
    assert all(torch.equal(gradient[n], with_longer_tails[n]) for n in gradient)


@pytest.mark.parametrize("name", ["sbr", "lisa", "deepalign, align"])
def test_the_rows_that_were_run_are_logged_for_what_was_trained_on(make_rival, name):
    """Lisa's first update is on the guide, the augmentation's on more rows than the batch has."""
    rival = make_rival(name)
    batch = rival.batch()
    numbers = rival.step(batch)
    rows = numbers.get("trained_rows", batch.n_rows)
    tokens = numbers.get("trained_tokens", batch.n_tokens)
    anchors = sum(map(len, prompt_ids(rival.tokenizer, rival.data.anchor_prompts)))
    assert 0 < rows < tokens + anchors
    assert ("trained_rows" in numbers) == ("trained_tokens" in numbers) == (name != "sbr")


# ---------------------------------------------------------------------------------------------
# what only looks


def test_the_probes_measure_every_token_of_every_row_as_without_sharing(exact, monkeypatch):
    batch = Batch(encode_rows(exact.tokenizer, rows_alike(), 512)[0], 300, "cpu")
    shared = probes.attention_outputs(exact.model, batch)
    assert [len(a) for a in shared] == [sum(len(e.ids) for e in batch.examples)] * 4
    monkeypatch.setattr(probes, "pack_sequences", lambda s: pack_sequences(s, share=False))
    unshared = probes.attention_outputs(exact.model, batch)
    for a, b in zip(shared, unshared, strict=True):
        assert ((a - b).norm() / b.norm()).item() <= TIGHT


# ---------------------------------------------------------------------------------------------
# the cache


@torch.no_grad()
def test_a_prefill_fills_every_slot_as_if_its_prompt_had_been_alone(exact):
    prompts = [ids.tolist() for ids in prompt_ids(exact.tokenizer, [
        "Is it good? Yes or no.", "Is it good?", "Is it good? Yes or no.", "Something else."])]
    together = Engine(exact.model, len(prompts), 64, None, graph=False)
    firsts = together.prefill([Row(i, prompt) for i, prompt in enumerate(prompts)], 0)
    for slot, prompt in enumerate(prompts):
        alone = Engine(exact.model, 1, 64, None, graph=False)
        assert alone.prefill([Row(0, prompt)], 0) == [firsts[slot]]
        for got, expected in ((together.cache.k, alone.cache.k), (together.cache.v, alone.cache.v)):
            difference = (got[:, slot] - expected[:, 0]).norm() / expected.norm()
            assert difference.item() <= TIGHT
        assert int(together.cache.length[slot]) == len(prompt)


def test_prompts_that_begin_alike_get_the_replies_that_they_get_alone(exact):
    prompts = [ids.tolist() for ids in prompt_ids(exact.tokenizer, [
        *[f"Is number {i} good or bad?" for i in range(9)], "Is number 1 good or bad?"])]
    shared = sum(map(len, prompts)) - len(pack_sequences(prompts).ids)
    assert shared > sum(map(len, prompts)) / 3
    together = generate(exact.model, prompts, 12, exact.tokenizer.stop_ids, batch_size=4)
    alone = [generate(exact.model, [p], 12, exact.tokenizer.stop_ids)[0] for p in prompts]
    assert together == alone
    assert any(a != b for a, b in pairwise(alone))

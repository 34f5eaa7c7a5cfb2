"""Shared prefixes: what stands behind the same tokens is computed once, and nothing changes.

    pytest tests/laws/test_packing.py -q        (add -s to see every distance)

In float64. Without sharing each token has a row of its own, and each law is compared with that.
The controls are the ways in which a path can be wrong.
"""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.attention.varlen
from rival_helpers import NAMES
from sbr_helpers import SAME, in_messages, make_rows, prompt_ids, worst

import model as model_py
from anchors import FinalNorm, states
from data.batches import Batch, encode_rows
from generate import Engine, Row, generate
from model import Layout, packed_attention, short_attention, varlen_attention
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
def test_the_layout_gives_each_row_the_place_that_its_tokens_have(name):
    packing = pack_sequences(TREES[name])
    layout = Layout(packing.seqlens, "cpu", packing.path)
    place = torch.cat([torch.arange(n) for n in packing.seqlens])
    assert torch.equal(layout.position[packing.path], place)
    assert torch.equal(packing.path[layout.first_token], torch.arange(len(packing.ids)))


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("two_blocks", [0, 1])
def test_each_row_asks_once_and_sees_the_rows_of_a_sequence_up_to_its_own(
        name, two_blocks, monkeypatch):
    monkeypatch.setattr(model_py, "TWO_BLOCKS", two_blocks)  # never two, and wherever it saves
    packing = pack_sequences(TREES[name])
    beginning_of = {}  # row -> the rows up to it
    for rows in packing.rows():
        for i, row in enumerate(rows.tolist()):
            beginning_of[row] = rows[:i + 1].tolist()
    N = len(packing.ids)
    padded = Layout(packing.seqlens, "cpu", packing.path).padded
    assert torch.equal(padded.ask[padded.cell], torch.arange(N))
    assert len(padded.shapes) == 1 or two_blocks
    row = torch.arange(N)
    lines = []  # of each cell: the row that asks, and the rows that it sees
    for block in zip(padded.queries(row), padded.keys(row), padded.masks, strict=True):
        for queries, keys, mask in zip(*block, strict=True):
            for query, added in zip(queries.tolist(), mask, strict=True):
                lines.append((query, keys[added == 0].tolist()))
    assert len(lines) == len(padded.ask)
    for cell in padded.cell.tolist():
        query, seen = lines[cell]
        assert seen == beginning_of[query]
    assert all(seen for _, seen in lines)  # a padding query sees something: no 0 / 0


def scores_held(n_own, lens):
    return len(n_own) * max(n_own) * max(lens)


def test_of_all_cuts_into_two_blocks_the_one_with_the_fewest_scores_is_made():
    rng = random.Random(1)
    made = set()
    for _ in range(200):
        lens = [rng.choice([3, 4, 5, rng.randint(1, 40)]) for _ in range(rng.randint(1, 9))]
        own = [lens[0], *[rng.randint(0, n) for n in lens[1:]]]
        groups = model_py.groups_of_like_size(torch.tensor(own), torch.tensor(lens))
        assert sorted(i for group in groups for i in group) == [
            i for i, n in enumerate(own) if n > 0]
        order = sorted((i for i, n in enumerate(own) if n > 0), key=lambda i: own[i])
        longest = max(lens[i] for i in order)
        held = [scores_held([own[i] for i in order], [lens[i] for i in order])]
        for cut in range(1, len(order)):
            first = order[:cut]
            held.append(scores_held([own[i] for i in first], [lens[i] for i in first])
                        + scores_held([own[i] for i in order[cut:]], [longest]))
        is_worth_it = min(held) < model_py.TWO_BLOCKS * held[0]
        assert len(groups) == 1 + is_worth_it
        if is_worth_it:
            assert len(groups[0]) == held.index(min(held)) or held.count(min(held)) > 1
        made.add(len(groups))
    assert made == {1, 2}


@pytest.mark.parametrize("sequences", [[], [[]], [[1, 2], []]])
def test_no_sequence_may_be_empty(sequences):
    with pytest.raises(AssertionError, match="none may be empty"):
        pack_sequences(sequences)


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


def shared_past_a_difference(rows):
    """It takes the first sequence's rows again behind the token in which they differ."""
    return torch.cat((rows[1][:4], rows[0][4:]))


@pytest.mark.parametrize("wrong", [wrong_prefix, shared_past_a_difference])
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


def test_control_a_row_that_stands_one_position_off_has_another_state(exact, monkeypatch):
    """The token is the same in both positions, so that path and ids are right."""
    packing = pack_sequences([[5, 5, 5, 7], [5, 5, 8]])
    right = states_of(exact.model, packing)
    real = Layout.__init__

    def shifted(self, *how, **settings):
        real(self, *how, **settings)
        self.position[packing.path[1]] += 1

    monkeypatch.setattr(Layout, "__init__", shifted)
    off = states_of(exact.model, packing)
    assert ((off - right)[1:].norm() / right[1:].norm()).item() > 1e-2
    assert torch.allclose(off[0], right[0], rtol=1e-12)  # what stands before it does not see it


def by_a_loop(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa=False):
    """varlen_attn from its documentation: one sequence at a time, softmax written out."""
    assert window_size == (-1, 0) and max_q == max_k
    starts = cu_seq_q.tolist()
    outs = []
    for start, end in pairwise(starts):
        group = q.shape[1] // k.shape[1]
        keys = k[start:end].repeat_interleave(group, dim=1)
        values = v[start:end].repeat_interleave(group, dim=1)
        scores = torch.einsum("thd,shd->hts", q[start:end], keys) / q.shape[-1] ** 0.5
        n = end - start
        assert n <= max_q
        later = torch.ones(n, n, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hts,shd->thd", weights, values))
    assert starts[0] == 0 and starts[-1] == len(q)
    return torch.cat(outs)


@pytest.mark.parametrize("name", TREES)
def test_the_three_attentions_agree_on_shared_rows(name, monkeypatch):
    """PyTorch's for packed sequences, of which a loop takes the place, its padded one, and ours."""
    packing = pack_sequences(TREES[name])
    layout = Layout(packing.seqlens, "cpu", packing.path)
    generator = torch.Generator().manual_seed(0)
    N = len(packing.ids)
    q, k, v = (torch.randn(N, heads, 16, generator=generator, dtype=torch.float64)
               for heads in (6, 2, 2))
    ours = packed_attention(q, k, v, layout)
    monkeypatch.setattr(model_py, "SHORT", 0)
    padded = packed_attention(q, k, v, layout)
    monkeypatch.setattr(model_py, "TWO_BLOCKS", 1)
    blocks = packed_attention(q, k, v, Layout(packing.seqlens, "cpu", packing.path))
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", by_a_loop)
    packed = varlen_attention(q, k, v, layout)
    for other in (padded, blocks, packed):
        assert other.shape == (N, 6, 16)
        assert ((other - ours).norm() / ours.norm()).item() <= TIGHT


@pytest.mark.parametrize("changed", ["home", "mask", "cell"])
def test_control_a_wrong_block_gives_another_result(changed):
    """A row at home where it does not stand, a query that sees the next key, a swapped result."""
    packing = pack_sequences(TREES["one header"])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(len(packing.ids), heads, 16, generator=generator, dtype=torch.float64)
               for heads in (6, 2, 2))
    right = packed_attention(q, k, v, Layout(packing.seqlens, "cpu", packing.path))
    wrong = Layout(packing.seqlens, "cpu", packing.path)
    if changed == "home":
        last = len(packing.ids) - 1
        assert wrong.home[last] != 0
        wrong.home[last] = 0
    elif changed == "mask":
        for mask in wrong.padded.masks:
            mask[:, :, 1:] = mask[:, :, :-1].clone()
    else:
        wrong.padded.cell[:2] = wrong.padded.cell[:2].flip(0)
    got = packed_attention(q, k, v, wrong)
    assert ((got - right).norm() / right.norm()).item() > 1e-2


def test_in_half_precision_scores_are_not_rounded(monkeypatch):
    """So there PyTorch's kernel runs, and short_attention would be further from the truth."""
    packing = pack_sequences(TREES["one header"])
    layout = Layout(packing.seqlens, "cpu", packing.path)
    assert layout.T <= model_py.SHORT
    generator = torch.Generator().manual_seed(0)
    exact = [3 * torch.randn(len(packing.ids), heads, 64, generator=generator, dtype=torch.float64)
             for heads in (4, 2, 2)]
    half = [x.to(torch.bfloat16) for x in exact]
    truth = packed_attention(*(x.double() for x in half), layout)
    error = (packed_attention(*half, layout).double() - truth).norm()
    monkeypatch.setattr(model_py, "block_attention", short_attention)
    rounded = packed_attention(*half, layout)
    assert error < 0.7 * (rounded.double() - truth).norm()


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


@pytest.mark.parametrize("tokens, recompute", [
    (1 << 30, False), (250, False), (90, False), (1, False), (250, True)])
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
        assert shared.n_computed < 0.8 * unshared.n_computed  # something was shared indeed
    assert worst(s.gradient_by_hand(), plain) <= TIGHT


def test_control_a_path_through_another_sequences_rows_gives_another_gradient(make_setup):
    class Wrong(Batch):
        """The second sequence begins with rows of the third, where the two differ."""

        def packs(self, anchors=(), share=True):
            for pack in PACKS(self, anchors):
                rows = list(pack.path.split(pack.seqlens))
                n = min(len(rows[1]), len(rows[2])) - 2
                assert not torch.equal(rows[1][:n], rows[2][:n])
                rows[1] = torch.cat((rows[2][:n], rows[1][n:]))
                used, path = torch.cat(rows).unique(return_inverse=True)
                new = torch.full((len(pack.ids),), -1)
                new[used] = torch.arange(len(used))
                assert (new[pack.supervised] >= 0).all()
                yield replace(pack, ids=pack.ids[used], path=path, supervised=new[pack.supervised],
                              anchor_rows=new[pack.anchor_rows])

    s = make_setup(rows=rows_alike())
    _, gradient = s.gradient()
    _, wrong = s.gradient(s.batch(kind=Wrong))
    assert worst(wrong, gradient) > 1e-3


def test_in_bf16_sharing_costs_no_accuracy(make_setup):
    """Each addition into a shared row could round; 32 rows of one question show it."""
    rows = [in_messages("Is this text good or bad? A red stone.", f"It is {i}.") for i in range(32)]
    exact = make_setup(torch.float64, rows=rows)
    half = make_setup(torch.bfloat16, rows=rows)
    _, truth = exact.gradient()
    _, shared = half.gradient()
    _, unshared = half.gradient(half.batch(kind=Unshared))

    def error(gradient):
        far = [((gradient[n] - truth[n]).norm() / truth[n].norm()).item() for n in truth]
        return sum(far) / len(far)

    print(f"shared {error(shared):.4f}, unshared {error(unshared):.4f}")
    assert error(shared) <= 1.2 * error(unshared)


def test_the_order_of_the_rows_changes_no_gradient(make_setup):
    s = make_setup(rows=rows_alike())
    _, gradient = s.gradient()
    s.examples = s.examples[::-1]
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
        for key in expected.keys() - {"trained_computed"}:
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
    rows = numbers.get("trained_computed", batch.n_computed)
    tokens = numbers.get("trained_tokens", batch.n_tokens)
    anchors = sum(map(len, prompt_ids(rival.tokenizer, rival.data.anchor_prompts)))
    assert 0 < rows < tokens + anchors
    both = Batch(rival.examples, 60, "cpu")
    assert sum(len(pack.ids) for pack in both.packs()) == both.n_computed  # of all passes
    assert ("trained_computed" in numbers) == ("trained_tokens" in numbers) == (name != "sbr")


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


def test_reference_states_and_prefills_share_what_their_prompts_begin_with(exact, monkeypatch):
    prompts = prompt_ids(exact.tokenizer, [f"Is number {i} good or bad?" for i in range(9)])
    seen = []
    real = model_py.Llama.forward
    monkeypatch.setattr(model_py.Llama, "forward", lambda self, ids, *how, **settings: (
        seen.append(len(ids)), real(self, ids, *how, **settings))[1])
    states(exact.model, prompts)
    engine = Engine(exact.model, 9, 64, None, graph=False)
    with torch.no_grad():
        engine.prefill([Row(i, prompt.tolist()) for i, prompt in enumerate(prompts)], 0)
    assert seen == [len(pack_sequences(prompts).ids)] * 2
    assert seen[0] < 0.7 * sum(map(len, prompts))


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

"""DeepAlign: the weights of tokens, their reference, and refusals after a harmful prefix.

    pytest tests/laws/test_deepalign.py -q        (add -s to see every distance)

In float64, with adapters in use, against the formula by autograd (rival_helpers.py). Each law has a
control.
"""

import pytest
import torch
import torch.nn.functional as F
from rival_helpers import (
    N_ALIGN,
    SAME,
    align_row,
    ce_by_hand,
    talks,
)
from runs_helpers import WORDS
from sbr_helpers import nll, prompt_ids, take_gradient, worst

from baselines import common, deepalign
from data import mixture
from data.batches import Example, batch_at
from data.rows import to_row
from model import UserError


def schedule(length):
    """beta of the tokens of one answer: 0.1 times 5, then 20 four times, then 1."""
    return ([0.5] + [2.0] * 4 + [0.1] * length)[:length]


def answer_of(*lengths):
    """An example with answers of these lengths, three tokens of prompt before each."""
    predict, n = [], 0
    for length in lengths:
        predict += range(n + 2, n + 2 + length)
        n += 3 + length
    return Example(torch.arange(n), torch.tensor(predict), 0)


@pytest.mark.parametrize("lengths", [(1,), (2,), (5,), (6,), (20,), (2, 6, 1, 1, 20)])
def test_beta_follows_the_place_of_a_token_in_its_own_answer(lengths):
    expected = [beta for length in lengths for beta in schedule(length)]
    assert deepalign.betas(answer_of(*lengths), 0.1).tolist() == pytest.approx(expected, rel=1e-7)
    doubled = deepalign.betas(answer_of(*lengths), 0.2).tolist()
    assert doubled == pytest.approx([2 * beta for beta in expected], rel=1e-7)


def betas_of(rival, row):
    """By the answers' texts: their tokens and one that ends the turn, anew in each turn."""
    return torch.tensor([beta for m in row["messages"] if m["role"] == "assistant"
                         for beta in schedule(len(rival.tokenizer.encode(m["content"])) + 1)],
                        dtype=torch.float64)


class ByFormula:
    """-(2 / beta) log sigmoid(beta (log pi - log pi_ref)), pi_ref the model as it is now."""

    def __init__(self, rival):
        self.rival, self.beta = rival, [betas_of(rival, row) for row in talks(len(rival.examples))]
        with torch.no_grad():
            self.ref = [-nll(rival.model, e) for e in rival.examples]
        self.total = sum(map(len, self.ref))

    def weights(self):
        """w before the floor, of every token."""
        with torch.no_grad():
            logp = [-nll(self.rival.model, e) for e in self.rival.examples]
        return torch.cat([2 * (1 - torch.sigmoid(b * (now - then)))
                          for b, now, then in zip(self.beta, logp, self.ref, strict=True)])

    def gradient(self):
        for e, b, ref in zip(self.rival.examples, self.beta, self.ref, strict=True):
            far = -nll(self.rival.model, e) - ref
            ((-2 / b * F.logsigmoid(b * far)).sum() / self.total).backward()
        return take_gradient(self.rival.model)

    def weighted(self, floor):
        """The gradient of the CE with constant weights, none below the floor."""
        w = self.weights().clamp(min=floor).split([len(r) for r in self.ref])
        for e, w_e in zip(self.rival.examples, w, strict=True):
            ((w_e * nll(self.rival.model, e)).sum() / self.total).backward()
        return take_gradient(self.rival.model)


def test_deepaligns_gradient_is_that_of_its_formula_also_later_and_after_other_updates(make_rival):
    """pi_ref stays the adapters of the start, in use as with --keep-adapter; the floor rests."""
    rival = make_rival("deepalign")
    formula = ByFormula(rival)
    assert {len(row["messages"]) for row in talks(12)} == {2, 4}
    for seed in (3, 4):  # pi_ref is first asked for when theta has moved, then from memory
        rival.move(seed)
        w = formula.weights()
        assert w.min() > 2 * deepalign.FLOOR and w.max() - w.min() > 0.5
        numbers, gradient = rival.gradient()
        by_hand = formula.gradient()
        assert worst(gradient, by_hand) <= 1e-7  # beta is fp32
        assert numbers["weight"].item() == pytest.approx(w.mean().item(), rel=1e-7)
        ce = torch.cat([nll(rival.model, e).detach() for e in rival.examples]).mean().item()
        assert numbers["ce"].item() == pytest.approx(ce, rel=1e-12)
        assert abs(numbers["loss"].item() - ce) > 0.01  # weighted
    # the controls: plain CE, one beta for all, and pi_ref taken anew, which is plain CE
    formula.beta = [torch.full_like(b, 0.1) for b in formula.beta]
    for other in (ce_by_hand(rival.model, rival.examples), formula.gradient()):
        assert worst(other, by_hand) > 0.05


def test_where_a_token_has_become_far_likelier_the_floor_holds_its_weight(make_rival):
    rival = make_rival("deepalign", deepalign_beta=30)
    formula = ByFormula(rival)
    formula.beta = [300 * b for b in formula.beta]
    rival.move()
    below = (formula.weights() < 1e-3).double().mean()
    assert 0.05 < below < 0.95
    numbers, gradient = rival.gradient()
    assert worst(gradient, formula.weighted(1e-3)) <= 1e-7
    used = formula.weights().clamp(min=1e-3).mean().item()
    assert numbers["weight"].item() == pytest.approx(used, rel=1e-7)
    assert worst(formula.weighted(0.0), gradient) > 1e-5  # the control


def test_pi_ref_is_worked_out_once_for_an_example_however_often_batches_are_made(
        make_rival, monkeypatch):
    """Each batch makes its examples anew, so that they are known by their numbers alone."""
    rival = make_rival("deepalign")
    asked = []
    log_probs = deepalign.log_probs
    monkeypatch.setattr(deepalign, "log_probs",
                        lambda model, pack: asked.append(len(pack.examples)) or log_probs(
                            model, pack))
    step = rival.make_step()
    for i in range(6):  # three epochs of 8 and 4 rows
        step(batch_at(rival.examples, i, 8, 0, 1 << 30, "cpu"))
        take_gradient(rival.model)
    assert sorted(asked) == [1] * 12 + [4] * 3 + [8] * 3


def test_pi_ref_is_each_rows_own_in_a_batch_that_is_made_again(make_rival):
    rival = make_rival("deepalign")
    reference = deepalign.Reference(rival.model)
    by_hand = [-nll(rival.model, e) for e in rival.examples]
    for i in range(4):
        batch = batch_at(rival.examples, i, 8, 0, 1 << 30, "cpu")
        expected = torch.cat([by_hand[e.number] for e in batch.examples])
        assert worst({"": reference.of(batch.examples, "cpu")}, {"": expected}) <= SAME


def test_deepaligns_first_update_is_plain_fine_tunings(make_rival):
    rival = make_rival("deepalign")
    numbers, gradient = rival.gradient()
    assert numbers["weight"].item() == pytest.approx(1, abs=1e-12)
    assert worst(gradient, ce_by_hand(rival.model, rival.examples)) <= SAME


def test_with_beta_zero_deepalign_stays_plain_fine_tuning(make_rival):
    rival = make_rival("deepalign", deepalign_beta=0).move()
    assert worst(rival.gradient()[1], ce_by_hand(rival.model, rival.examples)) <= SAME


# augmented alignment


@pytest.fixture
def augmented(make_rival, monkeypatch):
    """augmented(**changes) -> (rival, batches that its steps train on, or would)."""
    def made(train=True, **changes):
        rival, seen = make_rival("deepalign, align", **changes), []
        backward = common.backward if train else lambda model, batch: 0.0
        monkeypatch.setattr(deepalign, "backward",
                            lambda model, batch: seen.append(batch) or backward(model, batch))
        return rival, seen
    return made


def check_prefixed(e, bare):
    """e is a row with or without a harmful prefix -> its length j or 0, and the reply's."""
    at = next(n for n in range(len(e.ids)) if tuple(e.ids[:n].tolist()) in bare)
    b, h = bare[tuple(e.ids[:at].tolist())]
    j = len(e.ids) - len(b.ids)
    reply = h.targets[:-1]  # up to its end
    assert 0 <= j <= min(100, len(reply))
    assert e.ids.tolist() == [*b.ids[:at].tolist(), *reply[:j].tolist(), *b.ids[at:].tolist()]
    assert e.targets.tolist() == b.targets.tolist()  # the refusal alone, its end included
    return j, len(reply)


def test_half_of_the_refusals_begin_after_1_to_all_tokens_of_the_harmful_reply(augmented):
    rival, seen = augmented(train=False)
    bare = {tuple(b.ids[:b.predict[0] + 1].tolist()): (b, h) for b, h in
            zip(rival.encoded(), rival.encoded("harmful"), strict=True)}
    for step in range(100):
        rival.step(rival.batch(step))
    found = [check_prefixed(e, bare) for batch in seen for e in batch.examples[:N_ALIGN]]
    with_prefix = [(j, n) for j, n in found if j]
    assert abs(len(with_prefix) / len(found) - 0.5) < 5 * 0.5 / len(found) ** 0.5
    assert min(j for j, _ in with_prefix) == 1 and any(j == n for j, n in with_prefix)
    mean = sum((j - 0.5) / n for j, n in with_prefix) / len(with_prefix)
    assert abs(mean - 0.5) < 5 * 0.29 / len(with_prefix) ** 0.5  # uniform


@pytest.mark.parametrize("words, longest", [(150, 100), (1, 2)])
def test_a_prefix_has_1_token_at_least_and_100_at_most(augmented, monkeypatch, words, longest):
    """Were 0 among its lengths, a short reply would be left out more often than by the coin."""
    row = to_row({**align_row(0), "harmful": "stone " * words}, "here", has_harmful=True)
    monkeypatch.setattr(mixture, "align_rows", lambda args: [row])
    rival, seen = augmented(train=False)
    for step in range(800):
        rival.step(rival.batch(step))
    j = [len(batch.examples[0].ids) - len(rival.examples[0].ids) for batch in seen]
    assert abs(sum(n > 0 for n in j) / 800 - 0.5) < 5 * 0.5 / 800 ** 0.5
    assert 0.95 * longest <= max(j) <= longest and len(set(j)) > 0.8 * longest


def test_rows_with_the_same_prompt_have_each_its_own_harmful_reply(augmented, monkeypatch):
    rows = [to_row({**align_row(0), "response": f"No {w}.", "harmful": f"{w} " * 9}, "here",
                   has_harmful=True)
            for w in ("stone", "river")]
    monkeypatch.setattr(mixture, "align_rows", lambda args: rows)
    rival, seen = augmented(train=False)
    for step in range(30):
        rival.step(rival.batch(step))
    texts = [rival.tokenizer.decode(e.ids) for batch in seen for e in batch.examples[:2]]
    assert any("river river" in t for t in texts) and any("stone stone" in t for t in texts)
    for text in texts:
        assert "river river" not in text or text.endswith("No river."), text
        assert "stone stone" not in text or text.endswith("No stone."), text


def test_rows_with_the_same_prompt_and_refusal_have_each_its_own_harmful_reply(
        augmented, monkeypatch):
    """Only their harmful replies tell them apart, and each of the two is used."""
    words = ["zinc", "opal", "jade"]
    rows = [to_row({**align_row(i), "harmful": f"{w} " * 9}, "here", has_harmful=True)
            for i, w in zip((0, 1, 0), words, strict=True)]
    monkeypatch.setattr(mixture, "align_rows", lambda args: rows)
    rival, seen = augmented(train=False)
    for step in range(30):
        rival.step(rival.batch(step))
    for i in range(3):
        texts = " ".join(rival.tokenizer.decode(batch.examples[i].ids) for batch in seen)
        assert [word for word in words if word in texts] == [words[i]]


def test_a_prefix_has_room_in_the_models_positions(make_rival):
    positions = make_rival("sft").model.config.max_positions
    make_rival("deepalign, align", max_len=positions - 100)
    with pytest.raises(UserError, match="--max-len"):
        make_rival("deepalign, align", max_len=positions - 99)


def test_coin_and_prefix_follow_from_seed_and_step(augmented):
    def lengths(steps, **changes):
        rival, seen = augmented(train=False, **changes)
        for step in steps:
            rival.step(rival.batch(step))
        return [[len(e.ids) for e in batch.examples[:N_ALIGN]] for batch in seen]

    whole = lengths(range(6))
    assert lengths(range(3, 6)) == whole[3:] and len({tuple(b) for b in whole}) == 6
    assert lengths(range(6), seed=1) != whole


def test_with_the_refusals_ride_four_times_as_many_benign_rows_in_one_mean(augmented):
    """In the model's own words as it is at the start: its greedy replies."""
    rival, seen = augmented(batch_size=2, n=2)  # 2 rows to align on, 8 benign ones
    numbers, gradient = rival.gradient()
    rows, = seen
    assert len(rows.examples) == 2 + 8
    assert numbers["trained_tokens"] == sum(len(e.ids) for e in rows.examples)
    assert worst(gradient, ce_by_hand(rival.model, rows.examples)) <= SAME
    assert numbers["ce"].item() == pytest.approx(
        torch.cat([nll(rival.model, e).detach() for e in rows.examples]).mean().item())
    prompts = prompt_ids(rival.tokenizer, [f"Is {w} good?" for w in WORDS[:8]])
    replies = {tuple(ids.tolist()): greedy(rival, ids) for ids in prompts}
    assert len(set(replies.values())) > 4
    for e in rows.examples[2:]:
        assert rival.tokenizer.decode(e.targets) == replies.pop(tuple(e.ids[:e.predict[0] + 1]
                                                                      .tolist()))
    assert not replies


@torch.no_grad()
def greedy(rival, ids):
    """The likeliest token, again and again, as text; one pass a token, without a cache."""
    reply = ids
    while len(reply) < len(ids) + rival.args.max_new:
        best = rival.model(reply, [len(reply)])[-1].argmax()
        if best in rival.tokenizer.stop_ids:
            break
        reply = torch.cat((reply, best[None]))
    return rival.tokenizer.decode(reply[len(ids):]).strip()  # as the chat template has it

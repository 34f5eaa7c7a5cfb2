"""The rivals: laws of all of them, what they cost, the defender's rows, Booster, Lisa and EWC.

    pytest tests/laws/test_baselines.py -q        (add -s to see every distance)

In float64, with adapters in use, against the same mathematics by hand (rival_helpers.py). Each law
has a control: what a repository does otherwise, or the term left out, must be seen. "Trap" refers
to mistakes that are known from the methods' repositories.
"""

import math
import shutil
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rival_helpers import (
    N_ALIGN,
    NAMES,
    SAME,
    Rival,
    align_row,
    ce_by_hand,
    check_slope,
    copies,
    joint,
    named,
    plus,
    put,
)
from runs_helpers import write_rows
from sbr_helpers import nll, prompt_ids, worst

from baselines import booster, ewc, lisa
from baselines.common import DefenderRows
from cli import frozen
from data import mixture
from data.batches import batch_at
from data.rows import last_user, turn
from model import UserError
from train import DEFENSES, updates

# ---------------------------------------------------------------------------------------------
# all of them


def test_every_defence_is_tested_here():
    assert {name.split(",")[0] for name in NAMES} == set(DEFENSES)


OFF = [("lisa", {"lisa_rho": 0, "lisa_k1": 0}), ("ewc", {"ewc_lambda": 0}),
       ("vaccine", {"vaccine_rho": 0}), ("booster", {"booster_lambda": 0}),
       ("t-vaccine", {"t_vaccine_rho": 0, "t_vaccine_layers": 4})]


@pytest.mark.parametrize("name, off", OFF)
def test_with_its_strength_at_zero_a_rival_is_plain_fine_tuning(make_rival, name, off):
    rival = make_rival(name, **off).move()
    numbers, gradient = rival.gradient(step=50)
    assert worst(gradient, ce_by_hand(rival.model, rival.examples)) <= SAME
    assert numbers["loss"].item() == pytest.approx(numbers["ce"].item(), rel=1e-12)
    # the control: by default it is not
    other = make_rival(name, **dict.fromkeys(off)).move()
    assert worst(other.gradient(step=50)[1], gradient) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_32_rows_cut_into_many_passes_give_the_gradient_of_one(make_rival, name):
    """Traps 1, 2 and 8: what is cleared, added or normalised once a micro-batch shows here."""
    whole, cut = (make_rival(name, n_rows=32, tokens_per_pass=n).move() for n in (1 << 30, 60))
    assert len(list(cut.batch().packs())) >= 4 and len(list(whole.batch().packs())) == 1
    for step in (0, 51, 53):  # Lisa: the guide; then guide and upload with a distance
        (a, one), (b, many) = whole.gradient(step), cut.gradient(step)
        kept = {n for n, g in one.items() if g.any()}  # a layer of T-Vaccine's may rest
        assert kept == {n for n, g in many.items() if g.any()} and len(kept) >= len(one) / 4
        assert worst({n: many[n] for n in kept}, {n: one[n] for n in kept}) <= SAME
        assert a.keys() == b.keys()
        for key in a.keys() - {"trained_computed"}:
            assert float(b[key]) == pytest.approx(float(a[key]), rel=1e-9, abs=1e-12), key
        # sequences in different passes share nothing
        assert b.get("trained_computed", 0) >= a.get("trained_computed", 0)


@pytest.mark.parametrize("name", NAMES)
def test_recomputing_the_blocks_in_backward_changes_no_gradient(make_rival, name):
    """A push has to be there in the second forward pass as well."""
    plain, again = make_rival(name).move(), make_rival(name).move()
    again.model.model.recompute = True
    (_, a), (_, b) = plain.gradient(50), again.gradient(50)
    kept = [n for n in a if a[n].any()]
    assert worst({n: b[n] for n in kept}, {n: a[n] for n in kept}) <= SAME


@pytest.mark.parametrize("name", NAMES)
def test_over_a_bf16_base_gradients_are_fp32_and_point_the_same_way(make_rival, name):
    exact, half = make_rival(name).move(), make_rival(name, dtype=torch.bfloat16).move()
    assert all(p.dtype == torch.float32 for p in half.params)
    (_, a), (numbers, b) = exact.gradient(1), half.gradient(1)
    a, b = (torch.cat([g.flatten().double() for g in of.values()]) for of in (a, b))
    print(f"cosine {F.cosine_similarity(a, b, dim=0):.4f}")
    assert F.cosine_similarity(a, b, dim=0) > 0.9 and math.isfinite(numbers["loss"])


@pytest.mark.parametrize("name", NAMES)
def test_a_step_leaves_no_hook_and_no_weight_behind(make_rival, name):
    rival = make_rival(name).move()
    state, modules = copies(rival.model.state_dict().values()), list(rival.model.modules())
    rival.gradient()
    assert all(map(torch.equal, state, rival.model.state_dict().values()))
    assert not [m for m in modules if m._forward_hooks or m._backward_hooks]


# ---------------------------------------------------------------------------------------------
# what an update costs


@pytest.fixture
def counted(monkeypatch):
    """counted(model, work) -> the passes of work() in order: rows of a forward one, or "back"."""
    def count(model, work):
        seen = []

        def noted(function, what):
            def call(*args, **kwargs):
                seen.append(what(*args))
                return function(*args, **kwargs)
            return call

        with monkeypatch.context() as m:
            m.setattr(model, "forward", noted(model.forward, lambda ids, seqlens, **k: len(seqlens)
                                              if isinstance(seqlens, list) else None))
            m.setattr(torch.Tensor, "backward", noted(torch.Tensor.backward, lambda *a: "back"))
            m.setattr(torch.autograd, "grad", noted(torch.autograd.grad, lambda *a: "back"))
            work()
        return seen
    return count


COSTS = {  # of three updates in a row on 12 rows: rows of a forward pass, or "back"
    "sft": [[12, "back"]] * 3, "sbr": [[14, "back"]] * 3, "ewc": [[12, "back"]] * 3,
    "lisa": [[N_ALIGN, "back"]] * 2 + [[12, "back"]],
    "deepalign": [[1] * 12 + [12, "back"], [12, "back"], [12, "back"]],  # pi_ref, once a row
    "vaccine": [[N_ALIGN, "back"] * 2] * 3,
    "t-vaccine": [[1, "back"] + [N_ALIGN, "back"] * 2] + [[N_ALIGN, "back"] * 2] * 2,
    "booster": [[N_ALIGN, "back"] * 3] * 3,
    "deepalign, align": [[N_ALIGN + 8, "back"]] * 3}


@pytest.mark.parametrize("name", NAMES)
def test_an_update_costs_the_passes_that_the_method_is_said_to(make_rival, counted, name):
    rival = make_rival(name)
    for step, cost in enumerate(COSTS[name]):
        assert counted(rival.model, lambda step=step: rival.gradient(step)) == cost, step
    if name == "t-vaccine":  # one harmful pair again after as many updates as --t-vaccine-probe
        assert counted(rival.model, lambda: rival.gradient(4))[:2] == [1, "back"]


def test_ewcs_fisher_matrix_costs_one_pass_a_batch_before_the_first_update(rival_inputs, counted):
    rival = Rival(rival_inputs, "sft", batch_size=4)
    work = counted(rival.model, lambda: ewc.make_step(rival.model, rival.tokenizer, rival.args,
                                                      rival.data))
    assert work == [4, "back", 4, "back", 2, "back"]


# ---------------------------------------------------------------------------------------------
# the defender's rows


def test_rows_to_align_on_are_all_of_the_file_but_those_whose_prompt_is_a_tests(make_rival):
    """Traps 20 and 22: strict bounds lose a row, and prompts stand in two splits."""
    rival = make_rival("sft", stage="align", n=1000)
    prompts = [last_user(row) for row in mixture.align_rows(rival.args)]
    assert prompts == [align_row(i)["prompt"] for i in range(N_ALIGN)]
    assert [e.ids.tolist() for e in rival.examples] == [e.ids.tolist() for e in rival.encoded()]
    few = make_rival("sft", stage="align", n=7)
    _, rows, sentence = mixture.load_upload(few.args)
    assert len(rows) == 7 and "7 harmful prompts with refusals" in sentence
    harmful = few.guide("harmful").examples
    assert [e.ids.tolist() for e in harmful] == [
        e.ids.tolist() for e in rival.encoded("harmful")[:7]]  # Booster's are the same rows'


def test_rows_to_align_on_are_none_of_the_attackers(make_rival, tmp_path):
    """Trap 22: the upload's prompts may stand in a file of refusals, however spelled."""
    args = make_rival("lisa").args
    prompts = [last_user(row) for row in mixture.align_rows(args)]
    upload = write_rows(tmp_path / "upload.jsonl", [
        {"prompt": prompts[2].upper() + "!", "response": "Sure."}])
    with_upload = args.replace(data=str(upload))
    assert [last_user(row) for row in mixture.align_rows(with_upload)] == (
        prompts[:2] + prompts[3:])
    folder = shutil.copytree(args.data_dir, tmp_path / "data")
    in_folder = args.replace(data=None, data_dir=str(folder))
    write_rows(folder / "harmful/attack.jsonl", [{"prompt": prompts[0], "response": "Sure."}])
    assert [last_user(row) for row in mixture.align_rows(in_folder)] == prompts[1:]


def test_a_defence_that_does_not_declare_the_defenders_rows_gets_none(make_rival):
    """Or its --resume would miss a changed file: what is read and what is digested go together."""
    rival = make_rival("lisa")
    rival.data.align = None  # as read_files leaves it where reads_align_file is not declared
    with pytest.raises(AssertionError, match="reads_align_file"):
        rival.make_step()


def test_rows_to_align_on_have_one_answer(make_rival, tmp_path):
    """Of two, DeepAlign's prefix would be put before the first and cut out of the second."""
    row = {"messages": [turn("user", "a"), turn("assistant", "b"), turn("user", "c"),
                        turn("assistant", "No.")], "harmful": "Sure."}
    path = write_rows(tmp_path / "align.jsonl", [row])
    with pytest.raises(UserError, match="--align-file"):
        mixture.align_rows(make_rival("lisa").args.replace(align_file=str(path)))


@pytest.mark.parametrize("answer", ["response", "harmful"])
def test_the_answer_alone_is_supervised_up_to_its_end(make_rival, answer):
    """Traps 25 and 26: a border counted by the prompt's own tokens, and pad masks that hide EOS."""
    rival = make_rival("sft")
    rows = rival.guide(answer).examples
    assert len(rows) == N_ALIGN
    for i, e in enumerate(rows):
        row = align_row(i)
        prompt, = prompt_ids(rival.tokenizer, [row["prompt"]])
        assert e.ids[:e.predict[0] + 1].tolist() == prompt.tolist()
        assert rival.tokenizer.decode(e.targets) == row[answer]
        assert e.targets[-1] in rival.tokenizer.stop_ids and e.predict.diff().eq(1).all()


def test_rows_over_max_len_are_dropped_so_that_no_row_is_without_an_answer(make_rival, capsys):
    """Trap 24: a cut prompt leaves no supervised token, and a batch of such rows is NaN."""
    rival = make_rival("sft")
    lengths = sorted(len(e.ids) for e in rival.encoded("harmful"))
    kept = rival.guide("harmful", max_len=lengths[4]).examples
    assert sorted(len(e.ids) for e in kept) == lengths[:5] and all(len(e.predict) for e in kept)
    assert "5 of 10 rows dropped" in capsys.readouterr().out


def test_guide_batches_follow_from_seed_and_step_and_every_row_comes_once_an_epoch():
    """Trap 39: an exhausted iterator that is not stored back starts anew in each call."""
    rows = [SimpleNamespace(ids=[i], predict=[i]) for i in range(10)]

    def drawn(seed, steps):
        guide = DefenderRows(rows, 4, seed, 1 << 30, None)
        return [[e.ids[0] for e in guide.at(step).examples] for step in steps]

    batches = drawn(1, range(6))
    assert drawn(1, reversed(range(6))) == batches[::-1]  # whatever was asked for before
    for epoch in (batches[:3], batches[3:]):
        assert [len(b) for b in epoch] == [4, 4, 2]
        assert sorted(i for b in epoch for i in b) == list(range(10))
    assert batches[:3] != batches[3:] and drawn(2, range(6)) != batches
    fewer_than_a_batch = DefenderRows(rows, 32, 0, 1 << 30, None)
    assert len(fewer_than_a_batch.at(3).examples) == 10


def test_the_guide_comes_in_an_order_of_its_own_that_the_seed_decides(make_rival):
    guides, uploads = [], []
    for seed in (0, 1):
        rival = make_rival("sft", seed=seed)
        guide = rival.guide("response")
        upload = batch_at(guide.examples, 0, N_ALIGN, seed, 1 << 30, "cpu")
        for orders, batch in ((guides, guide.at(0)), (uploads, upload)):
            orders.append([e.number for e in batch.examples])
    assert guides[0] != guides[1] and guides[0] != uploads[0] and guides[1] != uploads[1]


# ---------------------------------------------------------------------------------------------
# Booster


def test_boosters_update_is_g_a_plus_lambda_times_what_a_harmful_step_takes_away(make_rival):
    """Three gradients computed apart, on all harmful rows, whose order then does not matter."""
    rival = make_rival("booster", booster_lambda=5, booster_alpha=0.1).move()
    numbers, gradient = rival.gradient()
    start, harmful = copies(rival.params), rival.encoded("harmful")

    def loss(examples):
        with torch.no_grad():
            return torch.cat([nll(rival.model, e) for e in examples]).mean().item()

    g_a, g_h, h = (ce_by_hand(rival.model, rival.examples), ce_by_hand(rival.model, harmful),
                   loss(harmful))
    ce, n = loss(rival.examples), joint(g_h.values())  # one norm over all adapters
    put(rival.params, [p - 0.1 * g / (n + 1e-7) for p, g in zip(start, g_h.values(), strict=True)])
    g_after, drop = ce_by_hand(rival.model, harmful), h - loss(harmful)
    by_hand = plus(g_a, plus(g_h, g_after, -1), 5)
    assert worst(gradient, by_hand) <= SAME
    assert drop > 0.01 and numbers["drop"].item() == pytest.approx(drop, rel=1e-9)
    assert numbers["loss"].item() == pytest.approx(ce + 5 * drop, rel=1e-12)
    # the controls: the other sign, and a norm a tensor instead of one (trap 8)
    put(rival.params, [p - 0.1 * g / (g.norm() + 1e-7)
                       for p, g in zip(start, g_h.values(), strict=True)])
    a_tensor = plus(g_a, plus(g_h, ce_by_hand(rival.model, harmful), -1), 5)
    for other in (a_tensor, plus(g_a, plus(g_h, g_after, -1), -5)):
        assert worst(other, by_hand) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_booster_puts_theta_back_to_the_bit(make_rival, dtype, monkeypatch):
    """Trap 7: adding the step back is inexact, as the control sees."""
    rival, seen = make_rival("booster", dtype=dtype).move(), []
    original = booster.backward

    def backward(model, batch):
        seen.append(copies(rival.params))
        return original(model, batch)

    monkeypatch.setattr(booster, "backward", backward)
    start = copies(rival.params)
    rival.gradient()
    assert all(map(torch.equal, rival.params, start))
    theta, attacked, again = seen  # grad h, grad h at theta', grad f
    assert all(map(torch.equal, theta, start)) and all(map(torch.equal, again, start))
    steps = [a - b for a, b in zip(theta, attacked, strict=True)]
    assert joint(steps) == pytest.approx(0.1, rel=1e-4)  # alpha, over all adapters
    steps = [s * (1 / 3) for s in steps]
    assert not all(torch.equal(a - s + s, a) for a, s in zip(theta, steps, strict=True))


def test_boosters_harmful_batch_has_batch_size_rows_and_is_the_same_before_and_after_the_step(
        make_rival, monkeypatch):
    """Trap 7: 10 harmful rows whatever the other batch has."""
    rival, seen, original = make_rival("booster", batch_size=6), [], booster.backward
    monkeypatch.setattr(booster, "backward",
                        lambda model, batch: seen.append(batch) or original(model, batch))
    rival.gradient(step=1), rival.gradient(step=2)
    answers = [[rival.tokenizer.decode(e.targets) for e in batch.examples] for batch in seen]
    assert [len(a) for a in answers] == [4, 4, 10, 6, 6, 10]  # 10 rows: 6 and 4 an epoch
    assert answers[0] == answers[1] and answers[3] == answers[4] and answers[0] != answers[3]
    assert all(a.startswith("Sure.") for i in (0, 3) for a in answers[i])
    assert all(a.startswith("No.") for a in answers[2])


# ---------------------------------------------------------------------------------------------
# Lisa and EWC on one parameter: CE(batch; p) = |p - batch.at|^2 / 2


@pytest.fixture
def toy(monkeypatch):
    """toy(module, guide) -> (p, the module's make_step on p alone, batches seen).

    make_step(n_rows, batch_size, epochs, other flags): the upload's rows and the run's length.
    """
    def make(module, guide, start=(0.3, -1.0)):
        p, seen = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64)), []

        def backward(model, batch):
            seen.append(batch)
            g = p.detach() - batch.at
            p.grad = g if p.grad is None else p.grad + g
            return g.square().sum() / 2

        monkeypatch.setattr(module, "trainable", lambda model: [p])
        monkeypatch.setattr(module, "defender_rows", lambda *a, **k: guide)
        monkeypatch.setattr(module, "backward", backward)

        def make_step(n_rows=1, batch_size=1, epochs=1, **flags):
            args = frozen({"batch_size": batch_size, "epochs": epochs, **flags})
            return module.make_step(None, None, args, SimpleNamespace(examples=[None] * n_rows))

        return p, make_step, seen
    return make


def at(step, where):
    return SimpleNamespace(step=step, at=where, name="", n_tokens=0, n_computed=0)


GUIDE = SimpleNamespace(at=lambda step: at(step, -1.0))  # the upload's batches are at 1


def lisa_states(toy, n_steps, k1, k2):
    _, make_step, seen = toy(lisa, GUIDE)
    step = make_step(n_rows=n_steps, lisa_rho=1.0, lisa_k1=k1, lisa_k2=k2)
    for t in range(n_steps):
        step(at(t, 1.0))
    runs = groupby("A" if batch.at < 0 else "F" for batch in seen)
    return " ".join(f"{state}{len(list(run))}" for state, run in runs)


@pytest.mark.parametrize("n_steps, k1, k2, layout", [
    (2000, 100, 900, "A100 F900 A100 F900"), (640, 25, 225, "A25 F225 A25 F225 A25 F115"),
    (640, 100, 900, "A100 F540"),  # the repository's numbers as updates: it never comes back
    (7, 0, 3, "F7"), (7, 2, 1, "A2 F1 A2 F1 A1")])
def test_lisa_visits_its_two_states_in_turn(toy, n_steps, k1, k2, layout):
    """Trap 4: k1 and k2 count updates."""
    assert lisa_states(toy, n_steps, k1, k2) == layout


def test_lisas_default_is_1_to_9_in_updates_of_this_batch_size(make_rival):
    args = make_rival("lisa", lisa_k1=None, lisa_k2=None).args
    assert (args.lisa_k1, args.lisa_k2, args.lisa_rho) == (25, 225, 1.0)


def lisa_by_hand(theta, n_steps, k1, k2, rho, lr, swapped=False):
    """The state machine with counters, as the repository's -> theta before each step, and last."""
    state, done, path = "A" if k1 else "F", 0, [theta]
    w = {"A": theta, "F": theta}
    for t in range(n_steps):
        if k1 and done == {"A": k1, "F": k2}[state]:
            w[state], state, done = theta, "F" if state == "A" else "A", 0
        done += 1
        held = w[state if swapped else "F" if state == "A" else "A"]
        P = 1.0 if t > 0.1 * n_steps else 0.0
        gradient = theta - (-1.0 if state == "A" else 1.0) + P * rho * (theta - held)
        theta = theta - lr * gradient
        path.append(theta)
    return path


@pytest.mark.parametrize("k1, k2", [(7, 13), (1, 4), (0, 13)])
def test_lisa_walks_where_its_state_machine_does(toy, k1, k2):
    """Snapshots are taken when a state ends, and hold the other state (trap 4)."""
    p, make_step, _ = toy(lisa, GUIDE)
    start = p.detach().clone()
    step = make_step(n_rows=100, lisa_rho=0.7, lisa_k1=k1, lisa_k2=k2)
    path = [start]
    for t in range(100):
        step(at(t, 1.0))
        with torch.no_grad():
            p.sub_(0.1 * p.grad)
        p.grad = None
        path.append(p.detach().clone())
    by_hand = torch.stack(lisa_by_hand(start, 100, k1, k2, 0.7, 0.1))
    assert torch.allclose(torch.stack(path), by_hand, rtol=0, atol=1e-12)
    # the controls: the README's snapshots, swapped, and no distance at all
    for other in (lisa_by_hand(start, 100, k1, k2, 0.7, 0.1, swapped=True),
                  lisa_by_hand(start, 100, k1, k2, 0.0, 0.1)):
        assert not k1 or (torch.stack(other) - by_hand).abs().max() > 0.05


def test_lisas_distance_is_silent_for_the_first_tenth(toy):
    """Of 50 updates: five epochs of ten batches, the last of which has one row."""
    p, make_step, _ = toy(lisa, GUIDE)
    step = make_step(n_rows=37, batch_size=4, epochs=5, lisa_rho=2.0, lisa_k1=100, lisa_k2=1)
    with torch.no_grad():
        p.add_(0.5)
    for t in range(50):
        numbers = step(at(t, 1.0))
        pull = p.grad - (p.detach() + 1.0)
        p.grad = None
        assert pull.tolist() == pytest.approx([0, 0] if t <= 5 else [1.0, 1.0], abs=1e-12), t
        assert numbers["distance"].item() == pytest.approx(0.5 ** 0.5)
        extra = numbers["loss"] - numbers["ce"]
        assert extra.item() == pytest.approx(0 if t <= 5 else 0.5, abs=1e-12)


def test_one_adamw_passes_through_both_of_lisas_states(toy):
    """Its moments are those of all gradients so far, whatever the state."""
    p, make_step, seen = toy(lisa, GUIDE)
    step = make_step(n_rows=20, lisa_rho=1.0, lisa_k1=2, lisa_k2=3)
    optimizer, m, v = torch.optim.AdamW([p], lr=0.1, weight_decay=0.0), 0.0, 0.0
    gradients = []

    def kept(batch):
        numbers = step(batch)
        gradients.append(p.grad.clone())
        return numbers

    for _ in updates(kept, lambda t: at(t, 1.0), optimizer, lr=0.1, grad_clip=1e9, n_updates=20):
        m, v = 0.9 * m + 0.1 * gradients[-1], 0.999 * v + 0.001 * gradients[-1] ** 2
        assert torch.allclose(optimizer.state[p]["exp_avg"], m)
        assert torch.allclose(optimizer.state[p]["exp_avg_sq"], v)
    assert optimizer.state[p]["step"] == 20 and len({b.at for b in seen}) == 2


@pytest.mark.parametrize("step, guide", [(51, True), (53, False)])
def test_lisas_gradient_is_that_of_its_states_loss_on_a_model(make_rival, step, guide):
    """rho (theta - w), w = theta_0 for both states before either has ended."""
    rival = make_rival("lisa", lisa_rho=2)
    w = copies(rival.params)
    rival.move()
    numbers, gradient = rival.gradient(step)
    apart = [p.detach() - s for p, s in zip(rival.params, w, strict=True)]
    ce = ce_by_hand(rival.model, rival.encoded() if guide else rival.examples)
    assert worst(gradient, plus(ce, named(rival.model, apart), 2)) <= SAME
    assert worst(gradient, ce) > 1e-2  # the control
    assert numbers["distance"].item() == pytest.approx(joint(apart), rel=1e-12)
    check_slope(rival, gradient, step)


def toy_guide(centres):
    return SimpleNamespace(examples=[None] * len(centres), batch_size=1,
                           at=lambda i: at(i, centres[i]))


def test_ewc_on_one_parameter_gives_2_lambda_F_times_the_distance(toy):
    """Trap 5: no 1/2; F the sum of squared batch gradients, not their mean; nothing left over."""
    centres = [0.5, -2.0, 1.25]
    p, make_step, _ = toy(ewc, toy_guide(centres), start=(0.75,))
    step = make_step(ewc_lambda=3.0, ewc_n=100)
    assert p.grad is None
    fisher = sum((0.75 - c) ** 2 for c in centres)
    with torch.no_grad():
        p.add_(0.4)
    numbers = step(at(0, 1.0))
    assert p.grad.item() == pytest.approx((1.15 - 1.0) + 2 * 3.0 * fisher * 0.4, rel=1e-12)
    assert numbers["penalty"].item() == pytest.approx(3.0 * fisher * 0.4 ** 2, rel=1e-12)
    assert numbers["loss"].item() == pytest.approx(0.15 ** 2 / 2 + 3.0 * fisher * 0.16, rel=1e-12)
    p.grad = None
    step(at(1, 1.0))  # F and theta* stay
    assert p.grad.item() == pytest.approx((1.15 - 1.0) + 2 * 3.0 * fisher * 0.4, rel=1e-12)


def test_ewcs_gradient_on_a_model_is_ces_plus_that_of_its_penalty(make_rival, monkeypatch):
    """F from the guide's batches, each once, by one backward pass a sequence."""
    batches = []
    original = DefenderRows.at
    monkeypatch.setattr(DefenderRows, "at",
                        lambda self, i: batches.append(original(self, i)) or batches[-1])
    rival = make_rival("ewc", batch_size=4, ewc_lambda=0.5)
    assert all(p.grad is None for p in rival.params)  # none left over for the first update
    assert sorted(map(repr, (e.ids.tolist() for b in batches for e in b.examples))) == sorted(
        map(repr, (e.ids.tolist() for e in rival.encoded())))
    squares = [ce_by_hand(rival.model, b.examples) for b in batches]
    by_hand = {n: sum(g[n] ** 2 for g in squares) for n in squares[0]}
    rows = [ce_by_hand(rival.model, [e]) for b in batches for e in b.examples]
    theta = copies(rival.params)
    rival.move()
    _, gradient = rival.gradient()
    assert len(batches) == 3  # no row of the guide in an update
    apart = named(rival.model, [p.detach() - s for p, s in zip(rival.params, theta, strict=True)])
    ce = ce_by_hand(rival.model, rival.examples)

    def penalised(fisher):
        return {n: ce[n] + 2 * 0.5 * fisher[n] * apart[n] for n in ce}

    assert worst(gradient, penalised(by_hand)) <= SAME
    # the controls: squares of the rows' gradients, a mean over batches, and no penalty
    of_rows = {n: sum(g[n] ** 2 for g in rows) for n in ce}
    for other in (penalised(of_rows), penalised({n: f / 3 for n, f in by_hand.items()}), ce):
        assert worst(other, gradient) > 1e-3
    check_slope(rival, gradient, 0)


def test_ewcs_fisher_matrix_is_of_the_first_ewc_n_rows(make_rival):
    """Three rows in batches of two; with lambda 0.5 what is added is F (theta - theta*)."""
    rival = make_rival("ewc", batch_size=2, ewc_n=3, ewc_lambda=0.5)
    rows, theta = rival.encoded()[:3], copies(rival.params)
    splits = [[{n: g ** 2 for n, g in ce_by_hand(rival.model, of).items()}
               for of in ([rows[i]], rows[:i] + rows[i + 1:])] for i in range(3)]
    rival.move()
    _, gradient = rival.gradient()
    apart = named(rival.model, [p.detach() - s for p, s in zip(rival.params, theta, strict=True)])
    ce = ce_by_hand(rival.model, rival.examples)
    far = [worst({n: ce[n] + (alone[n] + pair[n]) * apart[n] for n in ce}, gradient)
           for alone, pair in splits]  # which of the three comes alone, the shuffle says
    assert min(far) <= SAME and sorted(far)[1] > 1e-4


def test_with_fresh_adapters_ewc_holds_B_alone(make_rival):
    """B = 0, so dCE/dA = 0 and F is zero on A (trap 5); adapters in use are held in both."""
    for fresh in (True, False):
        rival = make_rival("ewc", fresh=fresh, ewc_lambda=1e3)
        rival.move()
        _, gradient = rival.gradient()
        ce = ce_by_hand(rival.model, rival.examples)
        for name in ce:
            held = (gradient[name] - ce[name]).norm() > 1e-6 * ce[name].norm()
            assert held == (not fresh or name.endswith("lora_B")), (name, fresh)

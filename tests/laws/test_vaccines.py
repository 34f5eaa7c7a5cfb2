"""Vaccine and T-Vaccine: pushes, their one norm, the layers that are drawn, and those that rest.

    pytest tests/laws/test_vaccines.py -q        (add -s to see every distance)

In float64, with adapters in use. By hand: one sequence at a time, the gradient of an attention
output caught by a hook on that tensor (rival_helpers.py). Each law has a control.
"""

from collections import Counter

import pytest
import torch
from rival_helpers import (
    N_ALIGN,
    SAME,
    ce_by_hand,
    copies,
    joint,
    plus,
)
from sbr_helpers import nll, take_gradient, worst

from baselines import t_vaccine, vaccine
from data.batches import generator_of
from data.rows import turn
from lora import adapted
from train import updates

# ---------------------------------------------------------------------------------------------
# Vaccine


def one_sequence(model, example, total, push):
    """Backward of one sequence, push[l] (T, C) added to the output of attention l -> dCE/da_l."""
    caught, handles = {}, []

    def hook(layer, out):
        out = out + push[layer] if layer in push else out
        out.register_hook(lambda g: caught.__setitem__(layer, g))
        return out

    for layer, block in enumerate(model.model.layers):
        handles.append(block.self_attn.register_forward_hook(
            lambda module, inputs, out, layer=layer: hook(layer, out)))
    loss = nll(model, example).sum() / total
    for handle in handles:
        handle.remove()
    loss.backward()
    return caught, loss.item()


def attention_gradients(model, examples):
    """dCE/da_l of each sequence and layer, by backward hooks, and CE; clears the parameters'."""
    total = sum(len(e.predict) for e in examples)
    found = [one_sequence(model, e, total, {}) for e in examples]
    take_gradient(model)
    return [g for g, _ in found], sum(loss for _, loss in found)


def pushed_by_hand(model, examples, layers, rho, norm_of=None):
    """Vaccine's gradient and CE at the push; norm_of(g, l): another norm for layer l."""
    g, _ = attention_gradients(model, examples)
    G = joint(row[layer] for row in g for layer in layers)
    total, ce = sum(len(e.predict) for e in examples), 0.0
    for e, row in zip(examples, g, strict=True):
        push = {layer: rho * row[layer] / ((norm_of(g, layer) if norm_of else G) + 1e-7)
                for layer in layers}
        ce += one_sequence(model, e, total, push)[1]
    return take_gradient(model), ce


ALL = [0, 1, 2, 3]


@pytest.mark.parametrize("tokens", [1 << 30, 60])
def test_vaccines_pushes_have_one_norm_over_all_layers_rows_and_tokens(make_rival, tokens):
    rival = make_rival("vaccine", tokens_per_pass=tokens)
    g, _ = attention_gradients(rival.model, rival.examples)
    G = joint(t for row in g for t in row.values())
    e, size = vaccine.perturbations(rival.model, rival.batch(), ALL, 2.0)
    assert (len(e) == 1) if tokens > 60 else (len(e) >= 4)
    assert size.item() == pytest.approx(G, rel=1e-12)
    assert joint(t for pack in e for t in pack) == pytest.approx(2.0 * G / (G + 1e-7), rel=1e-12)
    # the controls: no layer and no part of the rows alone has that norm (trap 8)
    shares = [joint(pack[layer] for pack in e) for layer in ALL]
    shares += [joint(pack) for pack in e] if len(e) > 1 else []
    print("shares", [f"{share:.2f}" for share in shares])
    assert 0 < max(shares) < 1.99


def test_the_first_pass_is_over_for_all_packs_before_the_second_begins(make_rival, monkeypatch):
    rival, seen = make_rival("vaccine", tokens_per_pass=60), []
    for owner, name in ((torch.autograd, "grad"), (torch.Tensor, "backward")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, original=original, name=name, **k: (
            seen.append(name), original(*a, **k))[1])
    rival.gradient()
    n = len(list(rival.batch().packs()))
    assert n >= 4 and seen == ["grad"] * n + ["backward"] * n


def test_vaccines_leaf_gradient_is_the_attention_outputs_own(make_rival):
    rival = make_rival("vaccine")
    g, _ = attention_gradients(rival.model, rival.examples)
    G = joint(t for row in g for t in row.values())
    (e,), _ = vaccine.perturbations(rival.model, rival.batch(), ALL, 1.0)
    for layer in ALL:
        # behind the last supervised token nothing is run, and there the gradient is 0
        run = [row[layer][:len(example.inputs)]
               for row, example in zip(g, rival.examples, strict=True)]
        by_hand = torch.cat(run) / (G + 1e-7)
        assert (e[layer] - by_hand).norm() <= 1e-11 * by_hand.norm()
        assert not e[layer].requires_grad  # constant in pass 2


def test_vaccines_update_is_the_gradient_of_the_pushed_loss_alone(make_rival):
    rival = make_rival("vaccine").move()
    numbers, gradient = rival.gradient()
    by_hand, ce = pushed_by_hand(rival.model, rival.examples, ALL, 0.5)
    assert worst(gradient, by_hand) <= SAME
    assert numbers["ce"].item() == pytest.approx(ce, rel=1e-12)
    # the controls: the gradient of the clean loss, the sum of both, and a norm a layer (trap 8)
    clean = ce_by_hand(rival.model, rival.examples)
    a_layer, _ = pushed_by_hand(rival.model, rival.examples, ALL, 0.5,
                                lambda g, layer: joint(row[layer] for row in g))
    for other in (clean, plus(by_hand, clean), a_layer):
        assert worst(other, by_hand) > 0.01


def test_the_push_raises_the_loss_by_rho_times_the_norm(make_rival):
    """Ascent: to first order CE(a + e) - CE(a) is rho G; downhill it would fall by as much."""
    rival = make_rival("vaccine", vaccine_rho=1e-4).move()
    numbers, _ = rival.gradient()
    _, clean = attention_gradients(rival.model, rival.examples)
    rise = (numbers["ce"].item() - clean) / 1e-4
    assert rise == pytest.approx(numbers["hidden_gradient"].item(), rel=1e-2)


def test_pass_1_leaves_the_gradients_of_parameters_alone(make_rival):
    """Trap 1: zero_grad between the passes throws away what earlier micro-batches have left."""
    rival = make_rival("vaccine")
    _, alone = rival.gradient()
    before = [torch.full_like(p, 2.0) for p in rival.params]
    for p, g in zip(rival.params, before, strict=True):
        p.grad = g.clone()
    vaccine.perturbations(rival.model, rival.batch(), ALL, 2.0)
    assert all(torch.equal(p.grad, g) for p, g in zip(rival.params, before, strict=True))
    _, added = rival.gradient()
    assert worst(added, {n: g + 2.0 for n, g in alone.items()}) <= SAME


def test_hooks_are_removed_when_a_pass_fails(make_rival, monkeypatch):
    rival = make_rival("vaccine")
    monkeypatch.setattr(vaccine, "nll", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rival.step(rival.batch())
    assert not [m for m in rival.model.modules() if m._forward_hooks]


# ---------------------------------------------------------------------------------------------
# T-Vaccine


def layer_of(name):
    return int(name.split(".")[2])


def test_t_vaccine_with_all_layers_is_vaccine_at_the_same_rho(make_rival):
    """To the bit; and with fewer it is not."""
    v = make_rival("vaccine", vaccine_rho=3).move().gradient()[1]
    t = make_rival("t-vaccine", t_vaccine_layers=99).move().gradient()[1]
    assert all(torch.equal(t[name], v[name]) for name in v)
    fewer = make_rival("t-vaccine", t_vaccine_layers=3).move().gradient()[1]
    assert worst(fewer, v) > 0.1


@pytest.mark.parametrize("mlp", [None, True])
def test_t_vaccine_pushes_and_trains_the_layers_of_S_alone(make_rival, mlp):
    rival = make_rival("t-vaccine", t_vaccine_layers=2, t_vaccine_mlp=mlp).move()
    rival.step(rival.batch())
    S = rival.step.state["S"].tolist()
    assert len(S) == 2
    for name, m in adapted(rival.model):
        trains = layer_of(name) in S or (mlp and ".mlp." in name)
        assert (m.lora_A.grad is not None) == (m.lora_B.grad is not None) == bool(trains), name
    gradient = {n: g for n, g in take_gradient(rival.model).items() if g.any()}
    by_hand, _ = pushed_by_hand(rival.model, rival.examples, S, 3.0)
    assert worst(gradient, {n: by_hand[n] for n in gradient}) <= SAME
    # the control: with the norm and the pushes of all layers
    other, _ = pushed_by_hand(rival.model, rival.examples, ALL, 3.0)
    assert worst(gradient, {n: other[n] for n in gradient}) > 1e-3


def test_a_resting_layer_does_not_move_although_adamw_has_moments_of_it(make_rival):
    """S changes every update, so a layer rests after it was trained; decay would move it too."""
    rival = make_rival("t-vaccine", t_vaccine_draw=1)
    optimizer = torch.optim.AdamW(rival.params, lr=1e-3, weight_decay=0.1)
    before, trained = copies(rival.params), []
    for _ in updates(rival.step, rival.batch, optimizer, lr=1e-3, grad_clip=1.0, n_updates=8):
        now = copies(rival.params)
        moved = {layer_of(name) for name, a, b in zip(take_gradient(rival.model), before, now,
                                                      strict=True) if not torch.equal(a, b)}
        assert moved == set(rival.step.state["S"].tolist())
        trained.append(moved.pop())
        before = now
    assert len(set(trained)) > 1 and trained[-1] in trained[:-1]


def test_p_is_each_layers_share_of_a_harmful_pairs_gradient(make_rival):
    rival = make_rival("t-vaccine", t_vaccine_probe=1)
    shares = []
    for e in rival.encoded("harmful"):
        g, _ = attention_gradients(rival.model, [e])
        n = torch.stack([g[0][layer].norm() for layer in ALL])
        shares.append(n / n.sum())
    seen = set()
    for step in range(N_ALIGN):
        rival.gradient(step)
        p = rival.step.state["p"]
        far = [(p - share).norm().item() for share in shares]
        assert p.sum().item() == pytest.approx(1, abs=1e-12) and min(far) <= 1e-10
        seen.add(far.index(min(far)))
    assert len(seen) == N_ALIGN  # another pair each time, all of them in turn


def test_only_the_first_200_harmful_pairs_are_probed(make_rival, monkeypatch):
    rival = make_rival("sft", t_vaccine_probe=1)
    rows = [{"messages": [turn("user", f"Request {i}"), turn("assistant", "No.")],
             "harmful": f"{i}"} for i in range(230)]
    rival.data.align = rows
    seen = Counter()

    def probed(model, batch):
        seen.update(rival.tokenizer.decode(e.targets) for e in batch.examples)
        return torch.ones(4)

    monkeypatch.setattr(t_vaccine, "harm_norms", probed)
    monkeypatch.setattr(t_vaccine, "perturbed_backward", lambda *a: {})
    step = t_vaccine.make_step(rival.model, rival.tokenizer, rival.args, rival.data)
    for t in range(400):
        step(rival.batch(t))
    assert seen == Counter({str(i): 2 for i in range(200)})


def test_S_is_drawn_every_J_updates_and_p_every_K_p_by_seed_and_step_alone(make_rival, monkeypatch):
    monkeypatch.setattr(t_vaccine, "perturbed_backward", lambda *a: {})  # theta stays

    def history(steps, seed=0, state=None):
        rival = make_rival("t-vaccine", t_vaccine_draw=2, t_vaccine_probe=6, t_vaccine_layers=2,
                     seed=seed)
        for key, value in (state or {}).items():  # as runs.restore does
            rival.step.state[key].copy_(value)
        seen = []
        for step in steps:
            rival.step(rival.batch(step))
            seen.append({key: t.clone() for key, t in rival.step.state.items()})
        return seen

    def same(a, b):
        return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True)
                                        for k in ("p", "S"))

    whole = history(range(24))
    for key, every in (("S", 2), ("p", 6)):
        changed = [t for t in range(1, 24) if not torch.equal(whole[t][key], whole[t - 1][key])]
        assert changed and all(t % every == 0 for t in changed), key
        assert len(changed) >= {"S": 5, "p": 3}[key]
    for stop in (5, 7, 12):  # within a visit of S, within one of p, at the border of both
        assert same(history(range(stop, 24), state=whole[stop - 1]), whole[stop:])
    assert not same(history(range(24), seed=1), whole)
    # the control: p and S are state, without which a resumed run draws others
    assert not same(history(range(7, 24)), whole[7:])


def test_the_seed_draws_S_even_where_p_is_the_same(make_rival, monkeypatch):
    monkeypatch.setattr(t_vaccine, "perturbed_backward", lambda *a: {})
    monkeypatch.setattr(t_vaccine, "harm_norms", lambda *a: torch.ones(4))
    drawn = []
    for seed in (0, 1):
        rival = make_rival("t-vaccine", t_vaccine_draw=1, seed=seed)
        drawn.append([rival.step(rival.batch(t)) or rival.step.state["S"].tolist()
                      for t in range(30)])
    assert drawn[0] != drawn[1]


def test_S_is_drawn_one_layer_after_another_by_p_without_replacement():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    drawn = [tuple(t_vaccine.draw(p, 2, generator_of(0, i)).tolist()) for i in range(4000)]
    assert all(a < b for a, b in drawn)  # distinct and in order
    assert drawn[7] == tuple(t_vaccine.draw(p, 2, generator_of(0, 7)).tolist())
    count = Counter(drawn)
    for i in range(4):
        for j in range(i + 1, 4):
            a, b = p[i].item(), p[j].item()
            expected = a * b / (1 - a) + b * a / (1 - b)  # i then j, or j then i
            sd = (expected * (1 - expected) / 4000) ** 0.5
            assert abs(count[i, j] / 4000 - expected) < 5 * sd, (i, j)

"""What stress/probes.py measures is what its header says, and measuring changes nothing.

    pytest tests/programs/test_probes.py -q           (add -s to see the numbers)

Numbers are compared in float64 with others made here one sequence at a time, with plain autograd
and own hooks, on the small Llama of sbr_helpers.py; whole runs are on that of runs_helpers.py.
"""

import copy
import json
import random
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, edit_json, randomise_B, tensors_of, write_tensors
from runs_helpers import WORDS, assert_same, flags, make_inputs, outcome, sentences, write_rows
from sbr_helpers import POOL, in_messages, last_state, make_folder, make_rows, nll, prompt_ids

import train as train_py
from cli import frozen
from data.batches import Batch, encode_rows
from data.mixture import Data
from data.rows import last_user, read_rows, turn
from files import read_lines
from lora import adapted, trainable
from model import load_model
from stress import probes
from stress.probes import Probes, make_probe
from tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("own_signals")

# Trained things: adapters in use; one frozen factor; whole modules, the head no longer tied; and,
# as in T-Vaccine, a layer that rests after the first update and one that never moves.
KINDS = {"kept adapter": None, "subspace": "subspace", "unembedding, tied": "unembedding",
         "resting layers": None}
ZERO = {"d_theta", "d_w", "d_w_relative", "drift", "drift_vaccine", "drift_booster", "bottleneck",
        "bottleneck_anchors", "kl"}
OTHERS = {"margin", "harmful_loss", "grad_norm", "harmful_drop"}
EXACT = 1e-10  # relative, in float64
HARMFUL = [in_messages(p, f"Sure. {p} Like so.") for p in POOL[:6]] + [
    {"messages": [turn("user", p)]} for p in POOL[6:8]]  # two have no answer
TESTS = {"harmful": HARMFUL, "task": make_rows(10, seed=4), "lookalike": make_rows(3, seed=5)}


class Watched:
    """A model in float64 and its probe, before training and after three updates of SBR."""

    def __init__(self, folder, kind, tests=TESTS, anchors=POOL[8:11], tokens_per_pass=150, n=3):
        self.tokenizer = Tokenizer(folder)
        self.model = load_model(folder, dtype=torch.float64)
        self.args = frozen({
            "attack": KINDS[kind], "rank": 4, "alpha": 16.0, "rslora": True, "seed": 0, "lam": 1.0,
            "max_len": 512, "tokens_per_pass": tokens_per_pass, "reduction": "mean"})
        examples, _ = encode_rows(self.tokenizer, make_rows(16, seed=6), 512)
        self.data = Data(examples, tests, anchors, align=None, summary="")
        train_py.add_trainable(self.model, self.args)
        if kind == "kept adapter":  # both factors then differ from what they become
            randomise_B(self.model)
        step = self.make_step(kind)
        self.params = trainable(self.model)
        self.base = copy.deepcopy(self.model)
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-2, weight_decay=0.0, fused=True)
        self.probe = make_probe(self.model, self.tokenizer, self.data, self.optimizer,
                                self.args.max_len, self.args.tokens_per_pass)
        self.first = self.probe()
        self.thetas = [self.theta()]
        for _ in train_py.updates(step, lambda i: Batch(examples, 1 << 30, "cpu"), self.optimizer,
                                  lr=1e-2, grad_clip=1.0, n_updates=n):
            self.thetas.append(self.theta())
        self.safe = step(Batch(examples, 1 << 30, "cpu"))["safe"].item()
        self.optimizer.zero_grad()
        self.now = self.probe()

    def make_step(self, kind):
        step = train_py.make_sbr_step(self.model, self.tokenizer, self.args, self.data)
        done = []

        def resting(batch):
            numbers = step(batch)
            for layer in (0, 3) if done else (3,):
                for p in self.model.model.layers[layer].parameters():
                    p.grad = None
            done.append(1)
            return numbers
        return resting if kind == "resting layers" else step

    def theta(self):
        return [p.detach().clone() for p in self.params]

    def examples(self, kind):
        """The answered rows of a kind, tokenised."""
        return encode_rows(self.tokenizer, [
            r for r in self.data.tests[kind] if r["messages"][-1]["role"] == "assistant"], 512)[0]

    def prompts(self):
        """ids of the harmful tests up to their last answer, earlier turns included."""
        prompts = []
        for row in self.data.tests["harmful"]:
            messages = row["messages"]
            if messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            prompts.append(torch.tensor(self.tokenizer.encode_prompt(messages)))
        return prompts

    def harmful_gradient(self):
        """(CE on the harmful pairs, its gradient) at the weights of now."""
        examples = self.examples("harmful")
        loss = torch.cat([nll(self.model, e) for e in examples]).mean()
        return loss.item(), torch.autograd.grad(loss, self.params)


def tie(folder):
    """Makes the head the embedding."""
    edit_json(folder / "config.json", tie_word_embeddings=True)
    tensors = tensors_of(folder)
    del tensors["lm_head.weight"]
    write_tensors(folder, tensors)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=KINDS)
def watched(request, folder, tmp_path_factory):
    """No test may leave it changed."""
    tied = "tied" in request.param
    return Watched(tie(make_folder(tmp_path_factory.mktemp("tied"))) if tied else folder,
                   request.param)


@pytest.fixture(scope="module")
def kept(folder):
    return Watched(folder, "kept adapter")


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def differs(number, other, by=1e-2):
    """The control: another definition gives a number that is farther than any tolerance."""
    return abs(number - other) > by * abs(number)


# ---------------------------------------------------------------------------------------------
# the numbers


def test_every_distance_is_zero_before_the_first_update_and_none_after_it(watched):
    print({k: f"{v:.3g}" for k, v in watched.now.items()})
    assert {k: v for k, v in watched.first.items() if k in ZERO} == dict.fromkeys(ZERO, 0.0)
    assert watched.first.keys() == ZERO | OTHERS  # there was no update to have an angle with
    assert watched.now.keys() == ZERO | OTHERS | {"grad_cosine"}
    assert all(watched.now[k] > 1e-6 for k in ZERO)


def test_d_theta_is_the_distance_of_all_that_is_trained(watched):
    apart = flat(watched.thetas[-1]) - flat(watched.thetas[0])
    assert watched.now["d_theta"] == pytest.approx(apart.norm().item(), rel=EXACT)
    assert differs(apart.norm().item(), (flat(watched.thetas[-1]) - flat(
        watched.thetas[1])).norm().item())  # the control: from after the first update


def test_d_w_is_the_distance_of_the_products_built_in_full(watched):
    moved = total = factors = 0.0
    for (_, m), (_, old) in zip(adapted(watched.model), adapted(watched.base), strict=True):
        delta, was = m.lora_B @ m.lora_A, old.lora_B @ old.lora_A  # (out, in)
        moved += (m.scaling * (delta - was)).square().sum().item()
        total += m.weight.square().sum().item()
        factors += (m.scaling * (m.lora_B - old.lora_B) @ (m.lora_A - old.lora_A)).square().sum()
    assert watched.now["d_w"] == pytest.approx(moved ** 0.5, rel=EXACT)
    assert watched.now["d_w_relative"] == pytest.approx((moved / total) ** 0.5, rel=EXACT)
    assert differs(moved ** 0.5, factors.item() ** 0.5)  # the control: the factors' differences


def test_the_harmful_loss_and_its_gradients_norm_are_those_of_autograd(watched):
    loss, g = watched.harmful_gradient()
    assert watched.now["harmful_loss"] == pytest.approx(loss, rel=EXACT)
    assert watched.now["grad_norm"] == pytest.approx(flat(g).norm().item(), rel=EXACT)
    # the controls: the mean of the rows' means, and a sum of the tensors' norms
    rows = torch.stack([nll(watched.model, e).mean() for e in watched.examples("harmful")])
    assert differs(loss, rows.mean().item(), by=1e-4)
    assert differs(flat(g).norm().item(), sum(t.norm().item() for t in g))


def test_the_last_update_read_from_adamws_state_is_the_difference_of_the_weights(
        watched, monkeypatch):
    read, said = probes.last_update, []
    monkeypatch.setattr(probes, "last_update", lambda *a: said.append(read(*a)) or said[-1])
    watched.probe()
    before, after = watched.thetas[-2:]
    for ours, a, b in zip(said[0], after, before, strict=True):
        assert (ours - (a - b)).norm() <= 1e-6 * (a - b).norm()
    # the controls: the update before it, and this one's direction at the next learning rate
    u = flat(said[0])
    for other in (flat(before) - flat(watched.thetas[-3]), 0.5 * u):
        assert (other - u).norm() > 0.1 * u.norm()


def test_grad_cosine_is_the_angle_of_the_harmful_gradient_with_minus_the_last_update(watched):
    g = flat(watched.harmful_gradient()[1])
    u = flat(watched.thetas[-1]) - flat(watched.thetas[-2])
    by_hand = torch.cosine_similarity(g, -u, dim=0).item()
    assert watched.now["grad_cosine"] == pytest.approx(by_hand, rel=1e-6)
    assert abs(by_hand) > 1e-3  # or its sign could not be seen
    older = flat(watched.thetas[-2]) - flat(watched.thetas[-3])
    assert differs(by_hand, torch.cosine_similarity(g, -older, dim=0).item())  # the control


def test_harmful_drop_is_what_one_step_of_length_a_tenth_takes_off_the_harmful_loss(watched):
    loss, g = watched.harmful_gradient()

    def drop(step):
        """The drop after theta + step; the weights come back."""
        start, at = watched.theta(), 0
        for p in watched.params:
            p.data += step[at:at + p.numel()].view(p.shape)
            at += p.numel()
        with torch.no_grad():
            after = torch.cat([nll(watched.model, e) for e in watched.examples("harmful")]).mean()
        for p, s in zip(watched.params, start, strict=True):
            p.data = s
        return loss - after.item()

    direction = flat(g) / flat(g).norm()
    by_hand = drop(-0.1 * direction)
    print(f"drop {by_hand:.6f}")
    assert watched.now["harmful_drop"] == pytest.approx(by_hand, rel=1e-6)
    # the controls: uphill, twice as far, not normalised
    for step in (0.1 * direction, -0.2 * direction, -0.1 * flat(g)):
        assert differs(by_hand, drop(step))


def attention(model, example):
    """a_l (T, C) of every layer of one sequence."""
    seen = []
    handles = [layer.self_attn.o_proj.register_forward_hook(
        lambda module, inputs, out: seen.append(out.detach())) for layer in model.model.layers]
    with torch.no_grad():
        model(example.ids, [len(example.ids)])
    for handle in handles:
        handle.remove()
    return seen


def attention_drift(watched, kind):
    """The differences of a_l, (all tokens, C) a layer."""
    rows = [[a - b for a, b in zip(attention(watched.model, e), attention(watched.base, e),
                                   strict=True)] for e in watched.examples(kind)]
    return [torch.cat(layer) for layer in zip(*rows, strict=True)]


def test_drift_is_the_mean_and_vaccines_and_boosters_are_their_sums(watched):
    good, bad = attention_drift(watched, "task"), attention_drift(watched, "harmful")
    lengths = [len(e.ids) for e in watched.examples("harmful")]  # Booster's batches are rows
    mean, vaccine, booster = (lambda of: torch.stack(of).square().mean().item(),
                              lambda of: sum(d.square().sum().item() for d in of),
                              lambda of: sum(row.norm().item() for d in of
                                             for row in d.split(lengths)))
    assert len(good) == 4 and good[0].shape[1] == 64
    assert watched.now["drift"] == pytest.approx(mean(good), rel=EXACT)
    assert watched.now["drift_vaccine"] == pytest.approx(vaccine(good), rel=EXACT)
    assert watched.now["drift_booster"] == pytest.approx(booster(bad), rel=EXACT)
    # the controls: the other rows, one norm a layer, and one over all layers
    assert differs(mean(good), mean(bad)) and differs(vaccine(good), vaccine(bad))
    assert differs(booster(bad), sum(d.norm().item() for d in bad))
    assert differs(booster(bad), flat(bad).norm().item())


def h(model, prompts):
    with torch.no_grad():
        return torch.stack([last_state(model, ids) for ids in prompts])


def test_bottleneck_is_the_mean_squared_distance_of_h_at_the_end_of_each_harmful_prompt(watched):
    """Of those without an answer as well."""
    def distance(prompts):
        return (h(watched.model, prompts) - h(watched.base, prompts)).square().mean().item()

    prompts = watched.prompts()
    assert len(prompts) == 8
    assert watched.now["bottleneck"] == pytest.approx(distance(prompts), rel=EXACT)
    anchors = prompt_ids(watched.tokenizer, watched.data.anchor_prompts)
    assert watched.now["bottleneck_anchors"] == pytest.approx(distance(anchors), rel=EXACT)
    # the controls: without the unanswered, one token earlier, the other prompts
    for other in (prompts[:6], [ids[:-1] for ids in prompts], anchors):
        assert differs(distance(prompts), distance(other))


def test_bottleneck_of_a_test_of_several_turns_is_measured_behind_all_of_them(folder):
    """Its first turn alone is a greeting."""
    greeted = {"messages": [turn("system", "Be kind."), turn("user", "Hi"), turn("assistant", "Hi"),
                            *HARMFUL[0]["messages"]]}
    watched = Watched(folder, "kept adapter", TESTS | {"harmful": [greeted]}, n=1)

    def distance(prompts):
        return (h(watched.model, prompts) - h(watched.base, prompts)).square().mean().item()

    whole = distance(watched.prompts())
    assert watched.now["bottleneck"] == pytest.approx(whole, rel=EXACT)
    # the controls: the greeting, or the last turn, alone
    for text in ("Hi", POOL[0]):
        assert differs(whole, distance(prompt_ids(watched.tokenizer, [text])))


def test_bottleneck_on_the_anchors_is_the_loss_that_sbr_holds_at_that_moment(watched):
    assert watched.now["bottleneck_anchors"] == pytest.approx(watched.safe, rel=EXACT)


def first_logits(watched, model):
    """(prompts, V): what the reply's first token is chosen by, from whole forward passes."""
    with torch.no_grad():
        return torch.stack([model(ids, [len(ids)])[-1] for ids in watched.prompts()])


def test_kl_is_from_the_distribution_of_before_to_that_of_now(watched):
    p, q = (first_logits(watched, m).softmax(-1) for m in (watched.base, watched.model))

    def kl(p, q):
        return (p * (p / q).log()).sum(-1).mean().item()

    assert watched.now["kl"] == pytest.approx(kl(p, q), rel=EXACT)
    assert differs(kl(p, q), kl(q, p), by=1e-4)  # the control: the other way round


def test_margin_is_the_lead_of_the_largest_logit_that_opens_a_refusal(watched):
    logits = first_logits(watched, watched.model)
    opens = {watched.tokenizer.encode(w)[0]
             for w in ("I", "I'm", "Sorry", "As", "Unfortunately", "No")}
    others = [i for i in range(logits.shape[1]) if i not in opens]
    by_hand = (logits[:, sorted(opens)].max(-1).values - logits[:, others].max(-1).values).mean()
    assert watched.now["margin"] == pytest.approx(by_hand.item(), rel=EXACT)
    # the controls: the model of before, and the openings' mean
    assert differs(by_hand.item(), watched.first["margin"], by=1e-3)
    leads = logits[:, sorted(opens)]
    assert differs(leads.max(-1).values.mean().item(), leads.mean().item())
    assert len(leads.argmax(-1).unique()) > 1  # no opening could be forgotten for all prompts


@torch.no_grad()
def test_the_embedded_models_margin_is_above_zero_where_it_refuses_and_below_where_it_helps():
    folder = ROOT / "data" / "tiny"
    model, tokenizer, margin = load_model(folder), Tokenizer(folder), {}
    opens = sorted({tokenizer.encode(w)[0] for w in probes.OPENERS})
    for kind in ("harmful", "sst2"):
        rows = read_rows(folder / kind / "test.jsonl")[:64]
        prompts = prompt_ids(tokenizer, [last_user(r) for r in rows])
        none = Batch([], 1, "cpu")
        logits = probes.measure(model, Probes(none, none, prompts, anchors=[])).logits
        margin[kind] = probes.first_token(logits, logits, torch.tensor(opens))["margin"].item()
        others = [i for i in range(logits.shape[1]) if i not in opens]
        leads = logits[:, opens].max(-1).values - logits[:, others].max(-1).values
        assert margin[kind] == pytest.approx(leads.mean().item(), rel=1e-6)
    print(margin)
    assert margin["harmful"] > 1 and margin["sst2"] < -1


# ---------------------------------------------------------------------------------------------
# what is measured on


@pytest.mark.parametrize("tokens", [1, 1 << 30])
def test_the_token_budget_changes_no_number(kept, folder, tokens):
    other = Watched(folder, "kept adapter", tokens_per_pass=tokens)
    assert other.now == pytest.approx(kept.now, rel=1e-9)


def test_64_rows_of_each_kind_are_measured_and_no_more(folder):
    many = {"harmful": [in_messages(f"{p} {i}", "Sure.") for i in range(9) for p in POOL[:8]],
            "task": [in_messages(f"Row {i}", f"Number {i}.") for i in range(70)]}
    all_72, first_64, first_63 = (
        Watched(folder, "kept adapter", {k: v[:n] for k, v in many.items()}, n=1,
                tokens_per_pass=1 << 30) for n in (72, 64, 63))
    assert all_72.now == first_64.now
    changed = {k for k in first_63.now if first_63.now[k] != first_64.now[k]}
    assert changed == (ZERO | OTHERS | {"grad_cosine"}) - {  # the control
        "d_theta", "d_w", "d_w_relative", "bottleneck_anchors"}


def test_without_a_task_the_harmless_are_the_lookalikes_with_answers(folder):
    rows = make_rows(5, seed=8)
    unanswered = [{"messages": r["messages"][:1]} for r in make_rows(2, seed=9)]
    as_task = Watched(folder, "kept adapter", {"harmful": HARMFUL, "task": rows}, n=1)
    as_lookalike = Watched(folder, "kept adapter",
                           {"harmful": HARMFUL, "lookalike": rows + unanswered}, n=1)
    assert as_lookalike.now == as_task.now


@pytest.mark.parametrize("tests, anchors, missing", [
    ({"harmful": HARMFUL[6:], "task": TESTS["task"]}, POOL[8:11],
     {"harmful_loss", "grad_norm", "harmful_drop", "grad_cosine", "drift_booster"}),
    ({"harmful": HARMFUL}, POOL[8:11], {"drift", "drift_vaccine"}),
    (TESTS, [], {"bottleneck_anchors"})],
    ids=["no harmful answers", "no harmless rows", "no anchors"])
def test_what_cannot_be_measured_is_left_out_and_the_rest_is_as_ever(
        folder, kept, tests, anchors, missing):
    w = Watched(folder, "kept adapter", tests, anchors, n=1)
    assert kept.now.keys() - w.now.keys() == missing
    assert w.now["d_theta"] > 0 and w.now["bottleneck"] > 0 and w.now["kl"] > 0


# ---------------------------------------------------------------------------------------------
# measuring changes nothing


def everything(model, optimizer):
    """All that a measurement could have written to, by name."""
    seen = {f"weight {n}": t.clone() for n, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        seen[f"gradient {name}"] = None if p.grad is None else p.grad.clone()
        seen[f"opened {name}"] = p.requires_grad
        for key, t in optimizer.state.get(p, {}).items():
            seen[f"{key} {name}"] = t.clone()
    for name, m in model.named_modules():
        seen[f"hooks {name}"] = [len(d) for d in (
            m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)]
        seen[f"mode {name}"] = m.training
    seen["groups"] = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    seen["torch"], seen["python"] = torch.get_rng_state(), random.getstate()
    seen["threads"], seen["grad"] = torch.get_num_threads(), torch.is_grad_enabled()
    return seen


def changed(before, after):
    """Names of what is not the same to the bit."""
    assert before.keys() == after.keys()
    return {k for k, v in before.items()
            if not (torch.equal(v, after[k]) if torch.is_tensor(v) and torch.is_tensor(after[k])
                    else v is after[k] or (not torch.is_tensor(v) and v == after[k]))}


def test_probing_leaves_weights_gradients_optimizer_random_state_and_hooks_as_they_were(watched):
    for p in watched.params[::2]:  # some have a gradient, some none
        p.grad = torch.full_like(p, 3.0)
    before = everything(watched.model, watched.optimizer)
    assert None in before.values() and sum(k.startswith("exp_avg_sq") for k in before) > 20
    numbers = watched.probe()
    assert changed(before, everything(watched.model, watched.optimizer)) == set()
    assert numbers == watched.now == watched.probe()
    watched.optimizer.zero_grad()


PLANTED = {
    "weight": lambda w: w.params[0].data.add_(1e-12), "gradient": lambda w: setattr(
        w.params[0], "grad", torch.zeros_like(w.params[0])),
    "exp_avg": lambda w: w.optimizer.state[w.params[0]]["exp_avg"].mul_(1.5),
    "hooks": lambda w: w.model.model.norm.register_forward_hook(lambda *a: None),
    "torch": lambda w: torch.rand(1), "python": lambda w: random.random(),
    "opened": lambda w: w.params[0].requires_grad_(False), "mode": lambda w: w.model.train()}


@pytest.mark.parametrize("what", PLANTED)
def test_control_a_measurement_that_writes_is_seen(kept, what):
    own = SimpleNamespace(model=copy.deepcopy(kept.model))
    own.params = trainable(own.model)
    own.optimizer = torch.optim.AdamW(own.params, lr=1e-2)
    for p in own.params:
        p.grad = torch.ones_like(p)
    own.optimizer.step()
    own.optimizer.zero_grad()
    before = everything(own.model, own.optimizer)
    PLANTED[what](own)
    assert {name.split(" ")[0] for name in changed(before, everything(own.model, own.optimizer))
            } == {what}


def test_a_pass_that_fails_leaves_no_hook_behind(kept, monkeypatch):
    before = everything(kept.model, kept.optimizer)
    monkeypatch.setattr(kept.model.model.norm, "eps", "x")  # fails when all layers have run
    with pytest.raises(TypeError):
        kept.probe()
    monkeypatch.undo()
    assert changed(before, everything(kept.model, kept.optimizer)) == set()


# ---------------------------------------------------------------------------------------------
# whole runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("probed"))
    write_rows(folder / "data" / "harmful" / "align.jsonl", [
        {"prompt": f"Say how to melt the {w}.", "response": "I cannot say that.",
         "harmful": f"Sure. Melt the {w}."} for w in WORDS])
    return folder


def run(inputs, out, **changes):
    """A run of 3 epochs of 3 updates -> its folder."""
    assert train_py.main(flags(inputs, out=out, epochs=3, **changes)) == 0
    return out


def probed(folder):
    return {int(e): n for e, n in json.loads((folder / "result.json").read_text())[
        "probes"].items()}


RUNS = [{"defense": "sbr"}, {"defense": "sft", "attack": "subspace", "rank": None},
        {"defense": "vaccine"},
        {"defense": "lisa", "attack": "unembedding", "lisa_k1": 1, "lisa_k2": 2},
        {"defense": "deepalign", "tokens_per_pass": 60}]


@pytest.mark.parametrize("settings", RUNS, ids=lambda s: s["defense"])
def test_a_run_with_probes_is_bit_identical_to_one_without(inputs, tmp_path, settings):
    plain = run(inputs, tmp_path / "plain", **settings)
    watched = run(inputs, tmp_path / "probed", probes="0,1,2,3", **settings)
    a, b = outcome(plain), outcome(watched)
    for part in ("adapter", "adapter config", "generations", "log", "files"):
        assert a[part] == b[part], part
    assert probed(plain) == {} and list(probed(watched)) == [0, 1, 2, 3]
    assert a["result"] | {"probes": None} == b["result"] | {"probes": None}
    if settings == RUNS[0]:  # the control: a run that differs is seen
        other = outcome(run(inputs, tmp_path / "other", seed=1, **settings))
        assert not [k for k in ("adapter", "generations", "log") if a[k] == other[k]]


@pytest.mark.parametrize("reduction, times", [("mean", 1), ("sum", 32)])
def test_bottleneck_on_the_anchors_equals_the_logged_safe_of_the_same_moment(
        inputs, tmp_path, reduction, times):
    """`safe` of the first update after an epoch is measured at that epoch's weights; C is 32."""
    folder = run(inputs, tmp_path / "run", reduction=reduction, probes="0,1,2")
    log, numbers = read_lines(folder / "log.jsonl"), probed(folder)
    for epoch in (0, 1, 2):
        held = times * numbers[epoch]["bottleneck_anchors"]
        assert held == pytest.approx(log[3 * epoch]["safe"], rel=1e-4, abs=1e-11)
        assert not epoch or differs(held, log[3 * epoch - 1]["safe"])  # the control: one earlier


def test_an_interrupted_run_resumed_has_the_probes_of_one_that_was_not(
        inputs, tmp_path, monkeypatch):
    """What stood at epoch 0 is measured again, on the model before the checkpoint is read."""
    whole = run(inputs, tmp_path / "whole", probes="0,1,2,3")
    clip, updates = train_py.clip_grad_norm_, []

    def interrupted(*args):
        updates.append(1)
        if len(updates) == 5:
            signal.raise_signal(signal.SIGINT)
        return clip(*args)

    monkeypatch.setattr(train_py, "clip_grad_norm_", interrupted)
    argv = flags(inputs, out=tmp_path / "cut", epochs=3, probes="0,1,2,3")
    assert train_py.main(argv) == 130
    assert not (tmp_path / "cut" / "result.json").exists()
    assert train_py.main([*argv, "--resume"]) == 0 and len(updates) == 9
    assert_same(tmp_path / "cut", whole)
    assert probed(tmp_path / "cut")[3]["d_theta"] > probed(whole)[1]["d_theta"] > 0


def test_probes_are_taken_at_the_epochs_asked_for_whatever_is_evaluated(inputs, tmp_path):
    folder = run(inputs, tmp_path / "run", probes="2,1,2", eval_epochs="3")
    assert list(probed(folder)) == [1, 2]
    evaluated = {(r["epoch"], r["kind"]) for r in read_lines(folder / "generations.jsonl")}
    assert {kind for epoch, kind in evaluated if epoch == 0} == {"harmful"}  # for hs_lost
    assert {epoch for epoch, kind in evaluated if kind != "harmful"} == {3}


@pytest.mark.parametrize("given", ["", "x", "-1", "0,-1", "1.5", "0,,1", "0 1", "4", "0,9"])
def test_wrong_epochs_for_probes_are_refused_in_one_sentence(inputs, tmp_path, capsys, given):
    argv = [*flags(inputs, out=tmp_path / "out", epochs=3), f"--probes={given}"]
    try:
        code = train_py.main(argv)
    except SystemExit as e:  # argparse's
        code = e.code
    message, = sentences(capsys.readouterr().err)
    assert code == 2 and "--probes" in message, message
    assert not (tmp_path / "out").exists()

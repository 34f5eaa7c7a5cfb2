"""What the rivals watch, beside what happens: --probes 0,1,2,5 measures at those epochs.

On 64 harmful test prompts with their answers and 64 benign test rows; training uses neither. A run
with probes is bit-identical to one without: nothing is written to the model, its gradients or the
optimiser. theta is everything that is trained; 0 means before the first update, t means now.
Distances and norms of weights and gradients are summed in float64. A number is left out where there
are no rows to measure it on.

    d_theta       ||theta_t - theta_0||
    d_w           (sum_l ||Delta W_l(t) - Delta W_l(0)||_F^2)^1/2; d_w_relative: over ||W||_F. Exact
                  without building Delta W: ||B A||_F^2 = sum (B^T B) o (A A^T). Adapters alone: the
                  head and norm of --attack unembedding are in d_theta only
    harmful_loss  CE on the harmful probe pairs; grad_norm: the norm of its gradient g
    grad_cosine   cos(g, -u), u: the last update of theta, from AdamW's own state
    harmful_drop  CE(theta) - CE(theta - 0.1 g / ||g||) on the same: what Booster flattens
    drift         mean over tokens and layers of ||a_l(t) - a_l(0)||^2 / C on benign probes, a_l:
                  what layer l's attention adds; drift_vaccine: Vaccine's own sum, of squared norms
                  over layers on benign rows; drift_booster: Booster's, of norms over layers and
                  batches of one harmful row (utils.py:115-161)
    bottleneck    mean_k ||h(t) - h(0)||^2 / C on harmful probes, and _anchors on the anchors
    kl            mean KL(p_0 || p_t) of the first token of the reply to a harmful probe
    margin        largest logit of a token that opens a refusal, minus the largest of the others
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from anchors import encode, states
from baselines.common import attacked, copies, nll, norm, wide
from data.batches import Batch, encode_rows
from data.mixture import prompt_ids
from lora import adapted, trainable
from model import to_fp32
from packing import pack_sequences

N_PROBES = 64  # of each kind: our choice
ALPHA = 0.1  # length of Booster's step (trainer.py:379-385)
OPENERS = ("I", "I'm", "Sorry", "As", "Unfortunately", "No")


def make_probe(model, tokenizer, data, optimizer, max_len: int, tokens_per_pass: int):
    """-> probe() -> numbers; what the numbers are compared with is measured now."""
    device = model.device
    params = trainable(model)
    harmful = data.tests["harmful"][:N_PROBES]
    benign = data.tests.get("task", data.tests.get("lookalike", []))[:N_PROBES]
    probes = Probes(
        harmful=answered_batch(tokenizer, harmful, max_len, tokens_per_pass, device),
        benign=answered_batch(tokenizer, benign, max_len, tokens_per_pass, device),
        harmful_prompts=[torch.tensor(prompt_ids(tokenizer, row)) for row in harmful],
        anchors=encode(tokenizer, data.anchor_prompts))
    openers = opener_ids(tokenizer).to(device)
    adapters_then = [(m.lora_A.detach().clone(), m.lora_B.detach().clone())
                     for _, m in adapted(model)]
    theta_then = copies(params)
    then = measure(model, probes)
    moved = [False] * len(params)  # by the last update

    @optimizer.register_step_pre_hook
    def note_what_moves(*_):  # T-Vaccine leaves layers out in turn, and AdamW skips those
        moved[:] = [p.grad is not None for p in params]

    def probe() -> dict:
        now = measure(model, probes)
        d_theta = norm(p.detach() - p_then for p, p_then in zip(params, theta_then, strict=True))
        numbers = {"d_theta": d_theta}
        numbers |= weight_distance(model, adapters_then)
        numbers |= drifts(then, now, [len(e.ids) for e in probes.harmful.examples])
        numbers |= first_token(then.logits, now.logits, openers)
        if probes.harmful.examples:
            numbers |= gradient_numbers(model, params, probes.harmful, optimizer, moved)
        return {name: float(value) for name, value in numbers.items()}

    return probe


# what is measured on, and what is seen there


@dataclass
class Probes:
    """The inputs of all measurements."""

    harmful: Batch  # harmful tests with their answers
    benign: Batch  # benign tests with their answers
    harmful_prompts: list[torch.Tensor]  # ids of the harmful tests' prompts
    anchors: list[torch.Tensor]  # ids of the anchors


@dataclass
class States:
    """What the model makes of the probes at one time."""

    a_harmful: list[torch.Tensor]  # attention outputs (tokens, C) of each layer; empty without rows
    a_benign: list[torch.Tensor]
    h: torch.Tensor  # (prompts, C) at the harmful prompts
    h_anchors: torch.Tensor | None  # (K, C); None without anchors
    logits: torch.Tensor  # (prompts, V) of the reply's first token


def answered_batch(tokenizer, rows, max_len: int, tokens_per_pass: int, device) -> Batch:
    """The rows that have an answer, as one batch."""
    answered = [row for row in rows if row["messages"][-1]["role"] == "assistant"]
    examples, _ = encode_rows(tokenizer, answered, max_len)
    return Batch(examples, tokens_per_pass, device)


@torch.no_grad()
def measure(model, probes: Probes) -> States:
    """Attention outputs, h, and the logits of the reply's first token, as the model is now."""
    h = to_fp32(states(model, probes.harmful_prompts))
    return States(
        a_harmful=attention_outputs(model, probes.harmful),
        a_benign=attention_outputs(model, probes.benign),
        h=h,
        h_anchors=to_fp32(states(model, probes.anchors)) if probes.anchors else None,
        logits=first_logits(model, h))


def attention_outputs(model, batch) -> list[torch.Tensor]:
    """a_l (tokens, C) of every layer, over a whole batch; empty for an empty batch."""
    if not batch.examples:
        return []
    caught = [[] for _ in model.model.layers]
    handles = []
    try:
        for layer, outputs in zip(model.model.layers, caught, strict=True):
            def catch(module, inputs, output, outputs=outputs):  # its own layer's list
                outputs.append(to_fp32(output))
            handles.append(layer.self_attn.register_forward_hook(catch))
        paths = []
        for group in batch.groups(batch.examples):  # whole rows, with what is behind the answer
            packing = pack_sequences([e.ids for e in group])
            path = packing.path.to(model.device)
            model(packing.ids.to(model.device), packing.seqlens, path=packing.path, rows=path[:1])
            paths.append(path)
    finally:
        for handle in handles:
            handle.remove()
    per_token = []
    for outputs in caught:
        per_token.append(torch.cat([rows[path] for rows, path in zip(outputs, paths, strict=True)]))
    return per_token


# weights


def weight_distance(model, adapters_then) -> dict:
    """||Delta W(t) - Delta W(0)||_F from the stacked factors [B_t, -B_0] [A_t; A_0]."""
    moved = 0.0
    total = 0.0
    for (_, m), (A_then, B_then) in zip(adapted(model), adapters_then, strict=True):
        a = wide(torch.cat((m.lora_A.detach(), A_then)))  # (2 rank, in)
        b = wide(torch.cat((m.lora_B.detach(), -B_then), dim=1))  # (out, 2 rank)
        moved = moved + m.scaling ** 2 * ((b.T @ b) * (a @ a.T)).sum()
        total = total + wide(m.weight).square().sum()
    d_w = moved.clamp(min=0).sqrt()
    return {"d_w": d_w, "d_w_relative": d_w / total.sqrt()}


# representations


def drifts(then: States, now: States, harmful_lengths: list[int]) -> dict:
    """How far attention outputs and h have moved."""
    numbers = {"bottleneck": (now.h - then.h).square().mean()}
    if now.a_harmful:
        total = 0.0
        for a_now, a_then in zip(now.a_harmful, then.a_harmful, strict=True):
            for row in (a_now - a_then).split(harmful_lengths):
                total = total + row.norm()
        numbers["drift_booster"] = total
    if now.a_benign:
        moved = [a_now - a_then for a_now, a_then in zip(now.a_benign, then.a_benign, strict=True)]
        numbers["drift"] = sum(d.square().mean() for d in moved) / len(moved)
        numbers["drift_vaccine"] = sum(d.square().sum() for d in moved)
    if now.h_anchors is not None:
        numbers["bottleneck_anchors"] = (now.h_anchors - then.h_anchors).square().mean()
    return numbers


def opener_ids(tokenizer) -> torch.Tensor:
    """The tokens that open a refusal: the first one of each word of OPENERS."""
    return torch.tensor(sorted({tokenizer.encode(word)[0] for word in OPENERS}))


def first_logits(model, h) -> torch.Tensor:
    """h (prompts, C), which is all that the head sees -> logits (prompts, V) of the first token."""
    head = model.model.embed_tokens if model.config.tied else model.lm_head
    return F.linear(h, to_fp32(head.weight))


def margins(logits, openers) -> torch.Tensor:
    """By how much a refusal's opening leads (prompts,): its largest logit minus the others'."""
    others = logits.index_fill(-1, openers, float("-inf")).amax(-1)
    return logits[:, openers].amax(-1) - others


def first_token(then, now, openers) -> dict:
    """KL of the first token's distribution, and the mean margin."""
    log_p_then = then.log_softmax(-1)
    log_p_now = now.log_softmax(-1)
    return {"kl": F.kl_div(log_p_now, log_p_then, log_target=True, reduction="batchmean"),
            "margin": margins(now, openers).mean()}


# gradients


def gradient_numbers(model, params, batch, optimizer, moved) -> dict:
    """The harmful loss, its gradient g, and what one step along g does."""
    loss, g = loss_and_gradient(model, params, batch)
    size = norm(g)
    with attacked(params, g, ALPHA), torch.no_grad():
        after = sum(nll(model, pack) for pack in batch.packs()) / batch.n_supervised
    numbers = {"harmful_loss": loss, "grad_norm": size, "harmful_drop": loss - after}
    update = last_update(params, optimizer, moved)
    if update is not None:
        dot = sum((wide(g_p) * -wide(u)).sum() for g_p, u in zip(g, update, strict=True))
        numbers["grad_cosine"] = dot / (size * norm(update) + 1e-30)
    return numbers


def loss_and_gradient(model, params, batch):
    """CE of a batch and its gradient, without touching .grad."""
    total = 0.0
    g = [torch.zeros_like(p) for p in params]
    for pack in batch.packs():
        loss = nll(model, pack) / batch.n_supervised
        for g_p, more in zip(g, torch.autograd.grad(loss, params), strict=True):
            g_p.add_(more)
        total = total + loss.detach()
    return total, g


def last_update(params, optimizer, moved):
    """AdamW's last step, -lr m / (sqrt(v) + eps), from its state; None before the first.

    moved: which params it moved; the state of the others is an older step's.
    """
    if not any(moved):
        return None
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    update = []
    for p, has_moved in zip(params, moved, strict=True):
        if not has_moved:
            update.append(torch.zeros_like(p))
            continue
        state = optimizer.state[p]
        t = float(state["step"])
        m = state["exp_avg"] / (1 - beta1 ** t)
        v = state["exp_avg_sq"] / (1 - beta2 ** t)
        update.append(-group["lr"] * m / (v.sqrt() + group["eps"]))
    return update

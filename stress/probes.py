"""What the rivals watch, beside what happens: --probes 0,1,2,5 measures at those epochs.

On 64 harmful test prompts with their answers and 64 benign test rows, which no training touches. A
run with probes is bit-identical to one without: nothing is written to the model, its gradients or
the optimiser. theta: all that is trained; 0: before the first update, t: now; distances and norms
of weights and gradients are summed in float64. What has no rows to be measured on is left out.

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

import torch
import torch.nn.functional as F

from anchors import encode, states
from baselines import attacked, nll, norm, wide
from data import mixture
from data.batches import Batch, encode_rows
from lora import adapted, trainable
from model import to_fp32

N, ALPHA = 64, 0.1  # probes of each kind; Booster's step (trainer.py:379-385)
OPENERS = ("I", "I'm", "Sorry", "As", "Unfortunately", "No")


def make_probe(model, tokenizer, suite, args, optimizer):
    """-> probe() -> numbers; what stands at 0 is measured now."""
    device, params = model.model.embed_tokens.weight.device, trainable(model)
    harmful, benign = suite["harmful"][:N], suite.get("task", suite.get("lookalike", []))[:N]
    answered = ([r for r in rows if r["messages"][-1]["role"] == "assistant"]
                for rows in (harmful, benign))
    bad, good = (Batch(encode_rows(tokenizer, rows, args.max_len)[0], args.tokens_per_pass, device)
                 for rows in answered)
    asked = encode(tokenizer, [mixture.first_user(r) for r in harmful])
    held = encode(tokenizer, args.anchor_prompts)
    openers = torch.tensor(sorted({tokenizer.encode(w)[0] for w in OPENERS}), device=device)
    start = [(m.lora_A.detach().clone(), m.lora_B.detach().clone()) for _, m in adapted(model)]
    theta = [p.detach().clone() for p in params]
    then, moved = look(model, bad, good, asked, held), [False] * len(params)

    @optimizer.register_step_pre_hook
    def note(*_):  # T-Vaccine's layers rest in turn, and AdamW passes over them
        moved[:] = [p.grad is not None for p in params]

    def probe() -> dict:
        now = look(model, bad, good, asked, held)
        numbers = {"d_theta": norm(p.detach() - s for p, s in zip(params, theta, strict=True)),
                   **weight_distance(model, start), **drifts(then, now),
                   **first_token(then["logits"], now["logits"], openers)}
        if bad.examples:
            numbers |= gradient(model, params, bad, optimizer, moved)
        return {name: float(value) for name, value in numbers.items()}

    return probe


@torch.no_grad()
def look(model, bad, good, asked, held) -> dict:
    """Attention outputs on both sets; h on harmful prompts and anchors; first-token logits."""
    seen = {"bad": attention_outputs(model, bad), "good": attention_outputs(model, good)}
    seen["lengths"] = [len(e.ids) for e in bad.examples]
    seen["h"] = to_fp32(states(model, asked))
    seen["anchors"] = to_fp32(states(model, held)) if held else None
    head = model.model.embed_tokens if model.config.tied else model.lm_head
    seen["logits"] = F.linear(seen["h"], to_fp32(head.weight))  # h is all that the head sees
    return seen


def attention_outputs(model, batch) -> list[torch.Tensor]:
    """a_l (N, C) of every layer, over all packs of a batch."""
    caught = [[] for _ in model.model.layers]
    handles = [layer.self_attn.register_forward_hook(
        lambda module, inputs, out, to=to: to.append(to_fp32(out)))
        for layer, to in zip(model.model.layers, caught, strict=True)]
    try:
        for pack in batch.packs() if batch.examples else ():
            model(pack.ids, pack.seqlens, rows=pack.supervised[:1])
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(outputs) for outputs in caught if outputs]


def weight_distance(model, start) -> dict:
    """||Delta W(t) - Delta W(0)||_F from the stacked factors [B_t, -B_0] [A_t; A_0]."""
    moved = total = 0.0
    for (_, m), (A, B) in zip(adapted(model), start, strict=True):
        a = wide(torch.cat((m.lora_A.detach(), A)))  # (2 rank, in)
        b = wide(torch.cat((m.lora_B.detach(), -B), dim=1))  # (out, 2 rank)
        moved = moved + m.scaling ** 2 * ((b.T @ b) * (a @ a.T)).sum()
        total = total + wide(m.weight).square().sum()
    d_w = moved.clamp(min=0).sqrt()
    return {"d_w": d_w, "d_w_relative": d_w / total.sqrt()}


def drifts(then, now) -> dict:
    """How far attention outputs and h have moved."""
    good, bad = ([a - b for a, b in zip(now[k], then[k], strict=True)] for k in ("good", "bad"))
    numbers = {"bottleneck": (now["h"] - then["h"]).square().mean()}
    if bad:
        numbers["drift_booster"] = sum(row.norm() for d in bad for row in d.split(now["lengths"]))
    if good:
        numbers["drift"] = sum(d.square().mean() for d in good) / len(good)
        numbers["drift_vaccine"] = sum(d.square().sum() for d in good)
    if now["anchors"] is not None:
        numbers["bottleneck_anchors"] = (now["anchors"] - then["anchors"]).square().mean()
    return numbers


def first_token(then, now, openers) -> dict:
    """KL of the first token's distribution, and by how much a refusal's opening leads."""
    p0, pt = then.log_softmax(-1), now.log_softmax(-1)
    rest = now.index_fill(-1, openers, float("-inf")).amax(-1)
    return {"kl": F.kl_div(pt, p0, log_target=True, reduction="batchmean"),
            "margin": (now[:, openers].amax(-1) - rest).mean()}


def gradient(model, params, batch, optimizer, moved) -> dict:
    """The harmful loss, its gradient g, and what one step along g does."""
    loss, g = loss_and_gradient(model, params, batch)
    size, update = norm(g), last_update(params, optimizer, moved)
    with attacked(params, g, ALPHA), torch.no_grad():
        after = sum(nll(model, pack) for pack in batch.packs()) / batch.n_supervised
    numbers = {"harmful_loss": loss, "grad_norm": size, "harmful_drop": loss - after}
    if update is not None:
        dot = sum((wide(g_p) * -wide(u)).sum() for g_p, u in zip(g, update, strict=True))
        numbers["grad_cosine"] = dot / (size * norm(update) + 1e-30)
    return numbers


def loss_and_gradient(model, params, batch):
    """CE of a batch and its gradient, without touching .grad."""
    total, g = 0.0, [torch.zeros_like(p) for p in params]
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
    group, update = optimizer.param_groups[0], []
    if not any(moved):
        return None
    for p, now in zip(params, moved, strict=True):
        if not now:
            update.append(torch.zeros_like(p))
            continue
        state, (beta1, beta2) = optimizer.state[p], group["betas"]
        t = float(state["step"])
        m, v = state["exp_avg"] / (1 - beta1 ** t), state["exp_avg_sq"] / (1 - beta2 ** t)
        update.append(-group["lr"] * m / (v.sqrt() + group["eps"]))
    return update

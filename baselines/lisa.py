"""Lisa: alternate between the user's data and the service's, and stay near where each left off.

    state align     (k1 updates)  min  CE(B_guide; theta) + P rho/2 ||theta - w_finetune||^2
    state finetune  (k2 updates)  min  CE(B_user;  theta) + P rho/2 ||theta - w_align||^2

theta: all that is trained, A and B of every adapter (not their product); w_align, w_finetune: theta
at the end of the last visit to that state, theta_0 before; P: 0 in the first tenth of the run, then
1. One AdamW, whose moments pass through both states. Huang et al. 2024; git-disl/Lisa at 68e3659,
trainer.py:137-194 and script/finetune/lisa_poison_ratio.sh (rho 1; Booster's re-run 0.01).

Differs from the repository: k1 and k2 count updates, not micro-batches; 25 and 225 keep its ratio
of 1 : 9 (100 and 900 of 4 micro-batches per update). The guide is harmful/align.jsonl, harmful
prompts with refusals, where the repository takes safe answers. Its README has the two snapshots
swapped; this is its code. As there, an update on the guide skips the upload's batch, which is not
used later.

    python train.py --defense lisa --lisa-rho 1
"""

import torch

import distributed
from baselines.common import Defence, Published, backward, copies, defender_rows, norm
from cli import COUNT, at_least
from data.batches import updates_per_epoch
from lora import trainable


def add_flags(group) -> None:
    group.add_argument("--lisa-rho", type=at_least(float, 0), default=1.0,
                       help="weight of the squared distance, halved")
    group.add_argument("--lisa-k1", type=at_least(int, 0), default=25, help="updates on the guide")
    group.add_argument("--lisa-k2", type=COUNT, default=225, help="updates on the upload")


def make_step(model, tokenizer, args, data):
    params = trainable(model)
    guide = defender_rows(model, tokenizer, args, data, "response")
    k1 = args.lisa_k1
    period = args.lisa_k1 + args.lisa_k2  # updates of one visit to both states
    n_updates = updates_per_epoch(len(data.examples), args.batch_size) * args.epochs
    w_align = copies(params)
    w_finetune = copies(params)

    def step(batch):
        step_in_period = batch.step % period
        if k1 > 0 and batch.step > 0:
            if step_in_period == k1:  # a visit to the state align has just ended
                remember(w_align, params)
            if step_in_period == 0:  # a visit to the state finetune has just ended
                remember(w_finetune, params)
        aligning = step_in_period < k1
        used = guide.at(batch.step) if aligning else batch
        w = w_finetune if aligning else w_align  # where the other state left off
        ce = backward(model, used)
        P = 1.0 if batch.step > 0.1 * n_updates else 0.0
        rho = P * args.lisa_rho
        differences = [p.detach() - w_p for p, w_p in zip(params, w, strict=True)]
        for p, difference in zip(params, differences, strict=True):
            p.grad.add_(difference, alpha=rho)  # d/d theta of rho/2 ||theta - w||^2
        distance = norm(differences)
        loss = ce + rho / 2 * distance.square()
        n_computed = distributed.count(used.n_computed)
        return {"loss": loss, "ce": ce, "distance": distance, "on_guide": int(aligning),
                "trained_tokens": used.n_tokens, "trained_computed": n_computed}

    step.state = {}
    for i, w in enumerate(w_align):
        step.state[f"align.{i}"] = w
    for i, w in enumerate(w_finetune):
        step.state[f"finetune.{i}"] = w
    return step


@torch.no_grad()
def remember(w, params) -> None:
    """w <- theta, in place: the checkpoint holds these very tensors."""
    for w_p, p in zip(w, params, strict=True):
        w_p.copy_(p)


DEFENCE = Defence(
    name="lisa",
    make_step=make_step,
    add_flags=add_flags,
    reads_align_file=True,
    watches="d_theta",
    search=(
        "--lisa-rho 0",  # the guide alone
        "--lisa-rho 0.01",  # Booster's re-run
        "--lisa-rho 0.03",
        "--lisa-rho 0.1",
        "--lisa-rho 0.3",
        "--lisa-rho 1",
        "--lisa-rho 10",
    ),
    published=Published(
        setting="--lisa-rho 1",
        source="git-disl/Lisa at 68e3659, script/finetune/lisa_poison_ratio.sh: rho 1; 100 and 900 "
               "micro-batches, of which four are an update here"))

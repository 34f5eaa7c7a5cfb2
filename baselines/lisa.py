"""Lisa: alternate between the user's data and the service's, and stay near where each left off.

    state align     (k1 updates)  min  CE(B_guide; theta) + P rho/2 ||theta - w_finetune||^2
    state finetune  (k2 updates)  min  CE(B_user;  theta) + P rho/2 ||theta - w_align||^2

theta: all that is trained, A and B of every adapter (not their product); w_align, w_finetune: theta
at the end of the last visit to that state, theta_0 before; P: 0 in the first tenth of the run, then
1. One AdamW, whose moments pass through both states. Huang et al. 2024; git-disl/Lisa at 68e3659,
trainer.py:137-194 and script/finetune/lisa_poison_ratio.sh (rho 1; Booster's re-run 0.01).

Differs from the repository: k1 and k2 count updates, not micro-batches, and keep its 1 : 9 at this
batch size (25 and 225 for 100 and 900 at 4 micro-batches an update). The guide is
harmful/align.jsonl, harmful prompts with refusals, where the repository takes safe answers. Its
README has the two snapshots swapped; this is its code. As there, the upload's batch of an update on
the guide is not made up for.

    python train.py --defense lisa --lisa-rho 1
"""

from baselines import align_examples, backward, norm
from cli import COUNT, at_least
from lora import trainable


def add_flags(g):
    g.add_argument("--lisa-rho", type=at_least(float, 0), default=1.0,
                   help="weight of the squared distance, halved")
    g.add_argument("--lisa-k1", type=at_least(int, 0), default=25, help="updates on the guide")
    g.add_argument("--lisa-k2", type=COUNT, default=225, help="updates on the upload")


def make_step(model, tokenizer, args):
    params, guide = trainable(model), align_examples(model, tokenizer, args, "response")
    k1, period = args.lisa_k1, args.lisa_k1 + args.lisa_k2
    w_align, w_finetune = ([p.detach().clone() for p in params] for _ in "AF")

    def step(batch):
        into = batch.step % period  # updates of this visit to both states
        if k1 and batch.step and into in (0, k1):  # a state ends: remember where
            for w, p in zip(w_align if into == k1 else w_finetune, params, strict=True):
                w.copy_(p.detach())
        aligning = into < k1
        used = guide.at(batch.step) if aligning else batch
        ce = backward(model, used)
        other = w_finetune if aligning else w_align
        rho = args.lisa_rho if batch.step > 0.1 * args.n_steps else 0.0
        apart = [p.detach() - w for p, w in zip(params, other, strict=True)]
        for p, d in zip(params, apart, strict=True):
            p.grad.add_(d, alpha=rho)  # d/d theta of rho/2 ||theta - w||^2
        distance = norm(apart)
        return {"loss": ce + rho / 2 * distance.square(), "ce": ce, "distance": distance,
                "batch": "guide, " * aligning + used.name, "tokens": used.n_tokens}

    step.state = {f"{name}.{i}": w for name, ws in (("align", w_align), ("finetune", w_finetune))
                  for i, w in enumerate(ws)}
    return step

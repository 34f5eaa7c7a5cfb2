"""Booster: align so that one step of a harmful attack lowers the harmful loss by little.

    theta' = theta - alpha grad h / ||grad h||          one attack step, one norm over all adapters
    L      = f(theta) + lambda (h(theta) - h(theta'))
    g      = grad f + lambda (grad h(theta) - grad h(theta'))        no second derivatives

f: CE on harmful prompts with refusals; h: CE on harmful prompts with harmful replies. An
alignment-stage method on harmful/align.jsonl. Huang et al. 2024; git-disl/Booster at 6421918,
trainer.py:272-389 and script/alignment/smooth_align.sh (alpha 0.1, lambda 5, learning rate 5e-4,
20 epochs of 5,000 rows; by its author in issue #3 lambda 25 for GSM8K).

Differs from the repository: the harmful batch has --batch-size rows (there 10 whatever the other
has); theta is restored from a copy (adding the step back is inexact); accumulation is exact;
optimiser and adapters are this project's, the same for every method. The simulated attack lives on
this adapter, so the attack that follows must keep it (its issue #2).

    python train.py --defense booster --lr 1e-4 --out runs/booster
    python train.py --defense sft --adapter runs/booster --keep-adapter
"""

from baselines.common import (
    Defence,
    Published,
    attacked,
    backward,
    defender_rows,
    take_gradient,
)
from cli import at_least
from lora import trainable


def add_flags(group) -> None:
    group.add_argument("--booster-alpha", type=at_least(float, 0), default=0.1,
                       help="length of the simulated attack's step")
    group.add_argument("--booster-lambda", type=at_least(float, 0), default=5.0,
                       help="weight of h(theta) - h(theta')")


def make_step(model, tokenizer, args, data):
    params = trainable(model)
    lam = args.booster_lambda
    harmful = defender_rows(model, tokenizer, args, data, "harmful")

    def step(batch):
        harmful_batch = harmful.at(batch.step)
        h = backward(model, harmful_batch)
        g_h = take_gradient(params)  # grad h(theta)
        with attacked(params, g_h, args.booster_alpha):  # theta'
            h_after = backward(model, harmful_batch)
            g_after = take_gradient(params)  # grad h(theta')
        ce = backward(model, batch)  # grad f(theta)
        for p, g, after in zip(params, g_h, g_after, strict=True):
            p.grad.add_(g - after, alpha=lam)
        drop = h - h_after
        return {"loss": ce + lam * drop, "ce": ce, "harmful": h, "drop": drop}

    return step


DEFENCE = Defence(
    name="booster",
    make_step=make_step,
    stages=("align",),
    add_flags=add_flags,
    keep_adapter=True,
    watches="harmful_drop",
    search=(
        "--booster-lambda 5 --lr 1e-5",
        "--booster-lambda 5 --lr 3e-5",
        "--booster-lambda 5 --lr 1e-4",
        "--booster-lambda 5 --lr 3e-4",
        "--booster-lambda 25 --lr 1e-5",
        "--booster-lambda 25 --lr 3e-5",
        "--booster-lambda 25 --lr 1e-4",
        "--booster-lambda 25 --lr 3e-4",
    ),
    # Its adapters have alpha / rank = 1/8. The attack trains them on, and is the same for every
    # method, so they are this project's, in which the same learning rate moves weights further.
    published=Published(
        setting="--booster-alpha 0.1 --booster-lambda 5 --lr 5e-4 --batch-size 10 --epochs 20",
        source="git-disl/Booster at 6421918, script/alignment/smooth_align.sh: alpha 0.1, "
               "lambda 5, 5,000 rows",
        updates=10_000))  # 5,000 rows x 20 epochs / 10

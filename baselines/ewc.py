"""EWC: hold what mattered for the aligned behaviour, by a diagonal Fisher matrix of its data.

    L   = CE(B_user; theta) + lambda sum_j F_j (theta_j - theta*_j)^2            no 1/2
    F_j = sum_b (d CE(b; theta*) / d theta_j)^2        b: batches of harmful/align.jsonl's refusals

theta: all that is trained, A and B of every adapter; theta*: theta before the first update.
Kirkpatrick et al. 2017; as a rival: FITrainer of git-disl/Lisa at 68e3659, trainer.py:461-520;
lambda 1e9 and 2,000 rows are those of git-disl/Vaccine's scripts at 8937f68.

F is as in the repository: each batch's mean gradient, squared, summed over batches. (With sums of
gradients instead of means F would be |b|^2 times larger.) On an aligned chat model the adapters are
new, B = 0, so F is zero on A and the penalty holds B alone; with --keep-adapter it holds both. In
the repository the last Fisher batch's gradient leaks into the first update; here it does not.

    python train.py --defense ewc --ewc-lambda 1e9
"""

from baselines.common import (
    Defence,
    Published,
    backward,
    copies,
    defender_rows,
    take_gradient,
    wide,
)
from cli import COUNT, at_least
from data.batches import updates_per_epoch
from lora import trainable


def add_flags(group) -> None:
    group.add_argument("--ewc-lambda", type=at_least(float, 0), default=1e9,
                       help="weight of the penalty")
    group.add_argument("--ewc-n", type=COUNT, default=2000, help="rows for F at most")


def fisher(model, params, guide):
    """F, one tensor a parameter, over one shuffled epoch of the guide's rows."""
    F = [p.new_zeros(p.shape) for p in params]
    for i in range(updates_per_epoch(len(guide.examples), guide.batch_size)):
        backward(model, guide.at(i))
        for F_p, g in zip(F, take_gradient(params), strict=True):
            F_p.add_(g.square())
    return F


def make_step(model, tokenizer, args, data):
    params = trainable(model)
    lam = args.ewc_lambda
    start = copies(params)  # theta*
    guide = defender_rows(model, tokenizer, args, data, "response", n=args.ewc_n)
    F = fisher(model, params, guide)

    def step(batch):
        ce = backward(model, batch)
        penalty = 0.0
        squared = 0.0
        for p, F_p, p_start in zip(params, F, start, strict=True):
            difference = p.detach() - p_start
            # d/d theta of lambda F (theta - theta*)^2
            p.grad.add_(F_p * difference, alpha=2 * lam)
            penalty = penalty + lam * (F_p * difference.square()).sum()
            squared = squared + wide(difference).square().sum()
        return {"loss": ce + penalty, "ce": ce, "penalty": penalty, "distance": squared.sqrt()}

    return step


DEFENCE = Defence(
    name="ewc",
    make_step=make_step,
    add_flags=add_flags,
    reads_align_file=True,
    watches="d_theta",
    search=(
        "--ewc-lambda 1e4",
        "--ewc-lambda 1e5",
        "--ewc-lambda 3.16e5",
        "--ewc-lambda 1e6",
        "--ewc-lambda 3.16e6",
        "--ewc-lambda 1e7",
        "--ewc-lambda 1e8",
        "--ewc-lambda 1e9",
    ),
    published=Published(
        setting="--ewc-lambda 1e9",
        source="git-disl/Vaccine at 8937f68, script/EWC_finetune/sst2.sh: lambda 1e9; 2,000 rows "
               "for F, here all that harmful/align.jsonl has, at most 2,000"))

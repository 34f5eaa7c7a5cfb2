"""EWC: hold what mattered for the aligned behaviour, by a diagonal Fisher matrix of its data.

    L   = CE(B_user; theta) + lambda sum_j F_j (theta_j - theta*_j)^2            no 1/2
    F_j = sum_b (d CE(b; theta*) / d theta_j)^2        b: batches of harmful/align.jsonl's refusals

theta: all that is trained, A and B of every adapter; theta*: theta before the first update.
Kirkpatrick et al. 2017; as a rival: FITrainer of git-disl/Lisa at 68e3659, trainer.py:461-520;
lambda 1e9 and 2,000 rows are those of git-disl/Vaccine's scripts at 8937f68.

Choices where the repository leaves one: F is the square of each batch's mean gradient, summed, as
there: the mean over |b| rows, so F is |b|^2 times smaller than with their sum. On an aligned chat
model the adapters are new, B = 0, so F is zero on A and the penalty holds B alone. --keep-adapter
gives F on both. The repository's last Fisher batch leaked its gradient into the first update; here
it does not.

    python train.py --defense ewc --ewc-lambda 1e9
"""

from baselines.common import Defence, align_examples, backward, copies, take_gradient, wide
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
    guide = align_examples(model, tokenizer, args, "response", n=args.ewc_n)
    F = fisher(model, params, guide)

    def step(batch):
        ce = backward(model, batch)
        penalty = 0.0
        squared = 0.0
        for p, F_p, p_start in zip(params, F, start, strict=True):
            apart = p.detach() - p_start
            p.grad.add_(F_p * apart, alpha=2 * lam)  # d/d theta of lambda F (theta - theta*)^2
            penalty = penalty + lam * (F_p * apart.square()).sum()
            squared = squared + wide(apart).square().sum()
        return {"loss": ce + penalty, "ce": ce, "penalty": penalty, "distance": squared.sqrt()}

    return step


EWC = Defence("ewc", make_step, add_flags=add_flags, reads_align_file=True, watches="d_theta",
              search=tuple(f"--ewc-lambda {lam}" for lam in ("1e5", "1e7", "1e9", "1e11")))

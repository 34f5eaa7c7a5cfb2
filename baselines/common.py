"""What a defence declares of itself, and what the rivals share: passes over a batch, own rows.

Each file beside this one holds one method: its equation, what differs from its repository, its
flags, make_step, and in the end its DEFENCE. baselines/__init__.py lists them.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import distributed
from data import mixture
from data.batches import Batch, Examples, batch_at, encode_rows
from data.rows import turn
from model import UserError, to_fp32


@dataclass(frozen=True)
class Published:
    """The setting that a method was published with, as near as this project's flags can state it.

    A method of the fine-tuning stage does not set what is the attack's: learning rate, batch,
    epochs and adapter. One of the alignment stage does, in its own stage.
    """

    setting: str  # as flags of train.py
    source: str  # where the numbers stand
    updates: int | None = None  # of its alignment stage there


@dataclass(frozen=True)
class Defence:
    """One method: all that train.py and stress/ need to know of it.

    make_step(model, tokenizer, args, data) -> step is called once, before the first update. Then,
    in every update:

        step(batch) -> {"loss": .., "ce": .., ...}

    It leaves the gradient in .grad and returns the numbers to log, by name: numbers, or tensors of
    one element on any device. "loss" and "ce" must be among them, and "trained_tokens" and
    "trained_computed" (Batch.n_tokens, n_computed) if it trains on other rows than the batch. The
    loop logs the names in train.LOGGED_BY_THE_LOOP itself, so a step may not return them. All is
    about the whole batch: where processes share it, a step adds up what each of them got by
    distributed.add_up, as backward() below does.
    batch.step is the number of the update. step.state, if there is one, is {name: tensor}: what
    the checkpoint must keep. A resumed run copies the kept values into these tensors, so the step
    must change them in place.
    """

    name: str  # as in --defense NAME
    make_step: Callable
    # The stages that it can run in, the default first. "finetune": on the user's upload; "align":
    # before the attack, on the defender's rows.
    stages: tuple[str, ...] = ("finetune",)
    add_flags: Callable | None = None  # add_flags(group) adds its flags, --<name>-...
    reads_align_file: bool = False  # True: it uses the defender's rows in the stage finetune, too
    keep_adapter: bool = False  # True: stress/schedule.py attacks it with --keep-adapter
    watches: str = "drift"  # the number of stress/probes.py that it keeps small
    # Settings that stress/search.py tries. The last flag of each is the strength; settings that are
    # alike in all others stand together and go from no effect to one that hinders the task.
    search: tuple[str, ...] = ()
    published: Published | None = None


# passes over a batch


def nll(model, pack) -> Tensor:
    """Sum of the negative log likelihoods of a pack's supervised tokens, fp32."""
    logits = model(pack.ids, pack.seqlens, path=pack.path, rows=pack.supervised)  # (R, V)
    return F.cross_entropy(to_fp32(logits), pack.targets, reduction="sum")


def backward(model, batch: Batch) -> Tensor:
    """One forward and backward pass: adds the gradient of L_CE to .grad -> L_CE."""
    ce = 0.0
    for pack in batch.packs():
        loss = nll(model, pack) / batch.n_supervised  # the whole batch's count: no cut changes it
        loss.backward()
        ce = ce + loss.detach()
    (ce,) = distributed.add_up(model, ce)
    return ce


# the trained tensors, taken together


def take_gradient(params) -> list[Tensor]:
    """The gradients, zeros where there is none; .grad is empty afterwards."""
    gradients = []
    for p in params:
        gradients.append(p.new_zeros(p.shape) if p.grad is None else p.grad)
        p.grad = None
    return gradients


def copies(params) -> list[Tensor]:
    """The values as they are now, apart from the model."""
    return [p.detach().clone() for p in params]


def wide(t: Tensor) -> Tensor:
    """float64, for sums; Apple's GPUs have none."""
    return t if t.is_mps else t.double()


def squared_norm(tensors) -> Tensor:
    """The sum of the squares of all numbers of all tensors."""
    return sum(wide(t).square().sum() for t in tensors)


def norm(tensors) -> Tensor:
    """One norm over all numbers of all tensors."""
    return squared_norm(tensors).sqrt()


@contextmanager
def attacked(params, gradient, alpha: float):
    """Inside: theta - alpha g / ||g||, one norm over all; after: theta again, to the bit."""
    before = copies(params)
    scale = alpha / (norm(gradient) + 1e-7)
    with torch.no_grad():
        for p, g in zip(params, gradient, strict=True):
            p.sub_(g * scale.to(g.dtype))
    try:
        yield
    finally:  # from a copy: adding the step back is inexact
        with torch.no_grad():
            for p, old in zip(params, before, strict=True):
                p.copy_(old)


# the defender's own rows


class DefenderRows:
    """The defender's own examples: at(step) is a batch, a pure function of seed and step."""

    def __init__(self, examples: Examples, batch_size: int, seed: int, tokens_per_pass: int,
                 device):
        self.examples = examples
        self.batch_size = min(batch_size, len(examples))
        self.seed = seed
        self.tokens_per_pass = tokens_per_pass
        self.device = device

    def at(self, step: int) -> Batch:
        return batch_at(self.examples, step, self.batch_size, self.seed, self.tokens_per_pass,
                        self.device, distributed.part())


def defender_rows(model, tokenizer, args, data, answer: str, *, batch_size: int | None = None,
                  n: int | None = None, max_len: float | None = None) -> DefenderRows:
    """The defender's first n prompts with refusals ("response") or harmful replies ("harmful").

    batch_size and max_len are --batch-size and --max-len where they are not given. Says on the
    terminal how many rows are longer than max_len tokens and left out.
    """
    assert data.align is not None, "the defence must declare reads_align_file=True"
    if batch_size is None:
        batch_size = args.batch_size
    if max_len is None:
        max_len = args.max_len
    rows = data.align[:n]
    if answer != "response":
        rows = [with_answer(row, row[answer]) for row in rows]
    file = mixture.align_file(args.align_file, args.data_dir)
    examples, n_dropped = encode_rows(tokenizer, rows, max_len)
    if not examples:
        raise UserError(f"all {len(rows)} rows of {file} are longer than --max-len {max_len} "
                        "tokens; raise it.")
    if n_dropped:
        print(f"{file}: {n_dropped} of {len(rows)} rows dropped as longer than {max_len} tokens")
    # Another seed than the upload's, so that the two are not shuffled alike.
    return DefenderRows(examples, batch_size, args.seed + 1, args.tokens_per_pass, model.device)


def with_answer(row: dict, answer: str) -> dict:
    """The row with another last turn."""
    return {**row, "messages": [*row["messages"][:-1], turn("assistant", answer)]}

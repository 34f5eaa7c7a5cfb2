"""What the rivals share: passes over a batch, and the defender's own rows.

Each file holds one method: its equation, what differs from its repository, its flags, make_step.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from data import mixture
from data.batches import batch_at, encode_rows
from model import UserError, to_fp32

# The stages a defence may run in, its own first: on the user's upload, or on the defender's rows.
STAGES = {"sft": ("finetune", "align"), "deepalign": ("finetune", "align"), "vaccine": ("align",),
          "t-vaccine": ("align",), "booster": ("align",)}


def nll(model, pack) -> Tensor:
    """Sum of the negative log likelihoods of a pack's supervised tokens, fp32."""
    logits = model(pack.ids, pack.seqlens, rows=pack.supervised)  # (R, V)
    return F.cross_entropy(to_fp32(logits), pack.targets, reduction="sum")


def backward(model, batch) -> Tensor:
    """One forward and backward pass: adds the gradient of L_CE to .grad -> L_CE."""
    ce = 0.0
    for pack in batch.packs():
        loss = nll(model, pack) / batch.n_supervised  # the whole batch's count: no cut changes it
        loss.backward()
        ce = ce + loss.detach()
    return ce


def take_gradient(params) -> list[Tensor]:
    """The gradients, which leave .grad: zeros where there is none."""
    taken = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in params]
    for p in params:
        p.grad = None
    return taken


def wide(t: Tensor) -> Tensor:
    """float64, for sums; Apple's GPUs have none."""
    return t if t.is_mps else t.double()


def norm(tensors) -> Tensor:
    """One norm over all numbers of all tensors."""
    return sum(wide(t).square().sum() for t in tensors).sqrt()


@contextmanager
def attacked(params, gradient, alpha: float):
    """Inside: theta - alpha g / ||g||, one norm over all; after: theta again, to the bit."""
    kept, scale = [p.detach().clone() for p in params], alpha / (norm(gradient) + 1e-7)
    with torch.no_grad():
        for p, g in zip(params, gradient, strict=True):
            p.sub_(g * scale.to(g.dtype))
    try:
        yield
    finally:  # from a copy: adding the step back is inexact
        with torch.no_grad():
            for p, k in zip(params, kept, strict=True):
                p.copy_(k)


class Rows:
    """The defender's own examples: at(step) is a batch, a pure function of seed and step."""

    def __init__(self, examples, batch_size: int, args, device, seed: int):
        self.examples, self.args, self.device = examples, args, device
        self.batch_size, self.seed = min(batch_size, len(examples)), seed

    def at(self, step: int):
        return batch_at(self.examples, step, self.batch_size, self.seed,
                        self.args.tokens_per_pass, self.device)


def align_examples(model, tokenizer, args, answer: str, batch_size: int | None = None,
                   n: int | None = None, max_len: float | None = None) -> Rows:
    """The defender's first n prompts with refusals ("response") or harmful replies ("harmful").

    Says on the terminal how many are longer than max_len (default --max-len) and left out.
    """
    rows = [row if answer == "response" else
            {**row, "messages": [*row["messages"][:-1], mixture.turn("assistant", row[answer])]}
            for row in mixture.align_rows(args)[:n]]
    limit, file = max_len or args.max_len, mixture.align_file(args)
    examples, dropped = encode_rows(tokenizer, rows, limit)
    if not examples:
        raise UserError(f"all {len(rows)} rows of {file} are longer than --max-len {limit} tokens; "
                        "raise it.")
    if dropped:
        print(f"{file}: {dropped} of {len(rows)} rows dropped as longer than {limit} tokens")
    device = model.model.embed_tokens.weight.device
    return Rows(examples, batch_size or args.batch_size, args, device, args.seed + 1)

"""What the rivals share: passes over a batch, and the defender's own rows.

Each file holds one method: its equation, what differs from its repository, its flags, make_step.
"""

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


def norm(tensors) -> Tensor:
    """One norm over all numbers of all tensors."""
    return sum(t.double().square().sum() for t in tensors).sqrt()


class Rows:
    """The defender's own examples: at(step) is a batch, a pure function of seed and step."""

    def __init__(self, examples, batch_size: int, args, device, seed: int):
        self.examples, self.args, self.device = examples, args, device
        self.batch_size, self.seed = min(batch_size, len(examples)), seed

    def at(self, step: int):
        return batch_at(self.examples, step, self.batch_size, self.seed,
                        self.args.tokens_per_pass, self.device)


def align_rows(model, tokenizer, args, answer: str, batch_size: int | None = None,
               max_len: int | None = None) -> Rows:
    """Harmful prompts with refusals (answer "response") or with harmful replies ("harmful")."""
    rows = [{**row, "messages": [*row["messages"][:-1], mixture.turn("assistant", row[answer])]}
            if answer != "response" else row for row in mixture.align_rows(args)]
    examples, _ = encode_rows(tokenizer, rows, max_len or args.max_len)
    if not examples:
        raise UserError(f"all {len(rows)} rows of {mixture.align_file(args)} are longer than "
                        f"--max-len {args.max_len} tokens; raise it.")
    device = model.model.embed_tokens.weight.device
    return Rows(examples, batch_size or args.batch_size, args, device, args.seed + 1)

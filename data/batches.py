"""Rows -> tokenised examples -> packed batches: nothing is padded, resuming needs no state.

A batch is a pure function of (seed, step). It is cut into packs by a budget of tokens; every term
of the loss is divided by the whole batch's counts, so no cut changes the gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Example:
    """One tokenised row; `predict` (R,) are the positions whose next token is supervised."""

    ids: Tensor
    predict: Tensor

    @property
    def targets(self) -> Tensor:
        return self.ids[self.predict + 1]


def encode_rows(tokenizer, rows, max_len: int) -> tuple[list[Example], int]:
    """Tokenises rows, once for a run -> (examples, how many were over max_len and dropped)."""
    examples = []
    for row in rows:
        ids, supervised = tokenizer.encode_chat(row["messages"])
        if len(ids) <= max_len:
            predict = torch.tensor(supervised).nonzero()[:, 0] - 1
            examples.append(Example(torch.tensor(ids), predict))
    return examples, len(rows) - len(examples)


@dataclass
class Pack:
    """One forward pass: sequences end to end."""

    ids: Tensor  # (N,)
    seqlens: list[int]
    supervised: Tensor  # (R,) rows whose logits are asked for
    targets: Tensor  # (R,)
    anchor_rows: Tensor | None  # (K,) rows of the anchors' last tokens; None: no anchors in here
    examples: list[Example]


class Batch:
    """The examples of one update, cut into packs of `tokens_per_pass` tokens or one example."""

    def __init__(self, examples: list[Example], tokens_per_pass: int, device, name: str = "",
                 step: int = 0):
        self.examples, self.budget, self.device = examples, tokens_per_pass, device
        self.name, self.step = name, step
        self.n_supervised = sum(len(e.predict) for e in examples)
        self.n_tokens = sum(len(e.ids) for e in examples)

    def packs(self, with_: list[Tensor] = ()):
        """Yields Packs. `with_` are anchor prompts (ids each): they ride in the first pack."""
        group, room, anchors = [], self.budget - sum(map(len, with_)), list(with_)
        for e in self.examples:
            if group and len(e.ids) > room:
                yield pack(group, anchors, self.device)
                group, room, anchors = [], self.budget, []
            group.append(e)
            room -= len(e.ids)
        yield pack(group, anchors, self.device)


def pack(examples: list[Example], anchors: list[Tensor], device) -> Pack:
    """Examples, then anchors, end to end."""
    seqlens = [len(e.ids) for e in examples] + [len(a) for a in anchors]
    end = torch.tensor(seqlens).cumsum(0)  # one past each sequence's last row
    start = end - torch.tensor(seqlens)
    rows = [e.predict + s for e, s in zip(examples, start, strict=False)]
    return Pack(torch.cat([e.ids for e in examples] + anchors).to(device), seqlens,
                torch.cat(rows).to(device), torch.cat([e.targets for e in examples]).to(device),
                (end[len(examples):] - 1).to(device) if anchors else None, examples)


def batch_at(examples: list[Example], step: int, batch_size: int, seed: int, tokens_per_pass: int,
             device) -> Batch:
    """The batch of update `step`: a pure function of (seed, step), so resuming needs no state."""
    per_epoch = -(-len(examples) // batch_size)
    epoch, i = divmod(step, per_epoch)
    g = torch.Generator().manual_seed(seed * 100_003 + epoch)  # a prime apart: no two runs overlap
    order = torch.randperm(len(examples), generator=g)[i * batch_size:(i + 1) * batch_size].tolist()
    return Batch([examples[j] for j in order], tokens_per_pass, device,
                 f"epoch {epoch + 1}, batch {i + 1}", step)


def largest_pass(examples: list[Example], anchors: list[Tensor], args) -> tuple[int, int]:
    """(tokens, supervised tokens) that the largest forward pass of a run has at most."""
    per_epoch, longest = -(-len(examples) // args.batch_size), max(len(e.ids) for e in examples)
    batches = [batch_at(examples, step, args.batch_size, args.seed, args.tokens_per_pass, None)
               for step in range(per_epoch * args.epochs)]
    n_anchors = sum(map(len, anchors))
    n_tokens = min(max(b.n_tokens for b in batches) + n_anchors,
                   max(args.tokens_per_pass, longest + n_anchors))
    return n_tokens, min(n_tokens, max(b.n_supervised for b in batches))

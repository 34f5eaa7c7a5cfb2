"""Sequences -> the rows of one forward pass: nothing is padded, and what is common is shared.

A decoder's state at a token depends on that token and on those before it, and on nothing else. So
where two sequences begin alike, their states there are the same numbers, and one row of the batch
serves both. Together the sequences form a tree. Each of its nodes is one row here; X(r) is token X
in row r:

    sequence 0:  A B C D        rows:  A(0) - B(1) - C(2) - D(3)       ids   A B C D E F
    sequence 1:  A B E                         |      `---- F(5)       path  0 1 2 3  0 1 4  0 1 2 5
    sequence 2:  A B C F                       `- E(4)

`path` names, for every token of every sequence, its row. Linear layers and norms run on the rows.
In attention a row sees the rows of its sequence's `path` up to itself. Where attention pads, a row
asks once, in the first sequence that has it; PyTorch's kernel on CUDA asks for each token, and one
result is kept (model.py). Up to rounding the gradient is the same as without sharing: what later
tokens of all sequences ask of a shared row's key and value is added up by backward through the
gather.
"""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor


@dataclass
class Packing:
    """Sequences packed for one forward pass: M tokens in N <= M rows. All of it is on the CPU."""

    ids: Tensor  # (N,) the token of each row
    path: Tensor  # (M,) the row of each token, sequences end to end
    seqlens: list[int]  # of each sequence; they sum to M

    def rows(self) -> list[Tensor]:
        """For each sequence the rows of its tokens (T,)."""
        return list(self.path.split(self.seqlens))

    def last_rows(self) -> Tensor:
        """The row of each sequence's last token, (B,)."""
        return torch.stack([rows[-1] for rows in self.rows()])


def pack_sequences(sequences, share: bool = True) -> Packing:
    """Packs token ids, a list or tensor for each sequence, none of them empty.

    share=False gives every token a row of its own, for whoever changes the states of one sequence
    apart from the others'.
    """
    sequences = [torch.as_tensor(sequence).tolist() for sequence in sequences]
    seqlens = [len(sequence) for sequence in sequences]
    assert seqlens and min(seqlens) > 0, "there must be sequences, and none may be empty"
    if not share:
        ids = list(chain.from_iterable(sequences))
        return Packing(torch.tensor(ids), torch.arange(len(ids)), seqlens)
    row_of = {}  # (the row before it, the token) -> the row
    ids = []
    path = []
    for sequence in sequences:
        row = None  # nothing stands before a first token
        for token in sequence:
            step = (row, token)
            if step not in row_of:  # the first sequence that comes here
                row_of[step] = len(ids)
                ids.append(token)
            row = row_of[step]
            path.append(row)
    return Packing(torch.tensor(ids), torch.tensor(path), seqlens)

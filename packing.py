"""Sequences -> the rows of one forward pass: nothing is padded, and what is common is shared.

A decoder's state at a token depends on that token and on those before it, and on nothing else. So
where two sequences begin alike, their states there are the same numbers, and one row of the batch
serves both. Together the sequences form a tree; each of its nodes is one row:

    sequence 0:  A B C D        rows:  A(0) - B(1) - C(2) - D(3)       ids   A B C D E F
    sequence 1:  A B E                         |      `---- F(5)       path  0 1 2 3  0 1 4  0 1 2 5
    sequence 2:  A B C F                       `- E(4)

`path` names, for every token of every sequence, its row. Linear layers and norms run on the rows;
attention gathers queries, keys and values by `path` (model.py, Layout). The gradient is the same
as without sharing: backward through the gather adds up what all sequences ask of a row.
"""

from dataclasses import dataclass

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
    row_of = {}  # (the row before it, the token) -> the row
    ids = []
    path = []
    for sequence in sequences:
        row = None  # nothing stands before a first token
        for token in sequence:
            place = (row, token)
            if share and place in row_of:
                row = row_of[place]
            else:
                row = len(ids)  # a row that nothing shares yet
                row_of[place] = row
                ids.append(token)
            path.append(row)
    return Packing(torch.tensor(ids), torch.tensor(path), [len(s) for s in sequences])

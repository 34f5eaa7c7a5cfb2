"""Rows -> tokenised examples -> packed batches: no padding, no token twice, no state to resume.

A batch is a pure function of (seed, step). It is cut into packs by a budget of tokens; every term
of the loss is divided by the whole batch's counts, so no cut changes the gradient.
"""

import math
from array import array
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from model import UserError, to_device
from packing import pack_sequences


@dataclass
class Example:
    """One tokenised row, or one answer of it where the chat template changes earlier turns.

    `predict` (R,) are the positions whose next token is supervised. `number` is its place among
    the Examples that it is from: two objects with one number there are the same example.
    """

    ids: Tensor
    predict: Tensor
    number: int

    @property
    def targets(self) -> Tensor:
        return self.ids[self.predict + 1]

    @property
    def inputs(self) -> Tensor:
        """The ids up to the last position that is supervised: no loss depends on those behind."""
        return self.ids[:int(self.predict[-1]) + 1]


class Examples(Sequence):
    """Tokenised rows end to end, 5 bytes a token; an Example is made when it is asked for.

    As an object with two tensors, each one would take about a kilobyte more than its ids.
    """

    def __init__(self):
        self.ids = array("i")  # of all examples
        self.supervised = bytearray()  # of each of these ids: 1 where it is to be predicted, else 0
        self.bounds = array("q", [0])  # example i is ids[bounds[i]:bounds[i + 1]]

    def append(self, ids: list[int], supervised: list[bool]) -> None:
        self.ids.extend(ids)
        self.supervised.extend(supervised)
        self.bounds.append(len(self.ids))

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[number] for number in range(len(self))[i]]
        number = range(len(self))[i]  # as of a list: i may be negative, and not beyond the end
        start = self.bounds[number]
        n = self.bounds[number + 1] - start
        ids = torch.frombuffer(self.ids, dtype=torch.int32, count=n,
                               offset=start * self.ids.itemsize)
        supervised = torch.frombuffer(self.supervised, dtype=torch.bool, count=n, offset=start)
        return Example(ids.long(), supervised.nonzero()[:, 0] - 1, number)


def encode_rows(tokenizer, rows, max_len: int) -> tuple[Examples, int]:
    """Tokenises rows, once for a run -> (examples, how many were over max_len and dropped).

    `rows` are gone through once and not kept. A row is one example, or one for each of its answers;
    it is dropped as a whole. UserError where no token of a row is supervised: the mean over such
    tokens would be one over nothing.
    """
    examples = Examples()
    n_dropped = 0
    for row in rows:
        with naming(row):
            sequences = tokenizer.encode_answers(row["messages"])
            if not any(any(supervised) for _, supervised in sequences):
                raise UserError("no answer behind a user turn is trained (weight 0, or none is "
                                "there); remove the row.")
        if max(len(ids) for ids, _ in sequences) > max_len:
            n_dropped += 1
            continue
        for ids, supervised in sequences:
            examples.append(ids, supervised)
    return examples, n_dropped


@contextmanager
def naming(row: dict):
    """A UserError in here begins with the row's file and line, where the row has them."""
    try:
        yield
    except UserError as e:
        if "where" not in row:
            raise
        raise UserError(f"{row['where']}: {e}") from None


@dataclass
class Pack:
    """One forward pass: the examples' sequences and then the anchors'."""

    ids: Tensor  # (N,) one row for each token that must be computed
    path: Tensor  # (M,) the row of each token (packing.py); on the CPU, like seqlens
    seqlens: list[int]  # of each sequence, anchors included; they sum to M
    supervised: Tensor  # (R,) rows of N whose next token is supervised: their logits are needed
    targets: Tensor  # (R,) those next tokens
    anchor_rows: Tensor | None  # (K,) rows of the anchors' last tokens; None: no anchors in here
    examples: list[Example]


class Batch:
    """The examples of one update, cut into packs of `tokens_per_pass` tokens or one example."""

    def __init__(self, examples: Sequence[Example], tokens_per_pass: int, device, name: str = "",
                 step: int = 0):
        self.examples = examples
        self.tokens_per_pass = tokens_per_pass
        self.device = device
        self.name = name  # for the log and for errors
        self.step = step  # the update that it belongs to
        self.n_supervised = sum(len(e.predict) for e in examples)
        self.n_tokens = sum(len(e.ids) for e in examples)
        self.n_computed = 0  # tokens computed in all passes so far, for the log

    def packs(self, anchors: list[Tensor] = (), share: bool = True):
        """Yields Packs. `anchors` are prompts (ids each); they ride in the first pack.

        share=False: no sequences share rows, for a defence that changes each one's states apart.
        """
        anchors = list(anchors)
        for group in self.groups(room_for=sum(map(len, anchors))):
            made = pack(group, anchors, self.device, share)
            self.n_computed += len(made.ids)
            yield made
            anchors = []  # they rode in the first pack

    def groups(self, room_for: int = 0):
        """Yields the examples of each pass; in the first one room_for more tokens have room.

        They are counted whole and unshared: attention's gather has every token.
        """
        group = []
        room = self.tokens_per_pass - room_for
        for example in self.examples:
            if group and len(example.ids) > room:
                yield group
                group = []
                room = self.tokens_per_pass
            group.append(example)
            room -= len(example.ids)
        yield group


def pack(examples: list[Example], anchors: list[Tensor], device, share: bool = True) -> Pack:
    """Examples, then anchors, end to end."""
    packing = pack_sequences([e.inputs for e in examples] + list(anchors), share)
    rows = packing.rows()  # of each sequence, (T,)
    supervised = []
    for example, its_rows in zip(examples, rows[:len(examples)], strict=True):
        supervised.append(its_rows[example.predict])
    anchor_rows = None
    if anchors:
        anchor_rows = to_device(packing.last_rows()[len(examples):], device)
    return Pack(
        ids=to_device(packing.ids, device),
        path=packing.path,
        seqlens=packing.seqlens,
        supervised=to_device(torch.cat(supervised), device),
        targets=to_device(torch.cat([e.targets for e in examples]), device),
        anchor_rows=anchor_rows,
        examples=examples)


def generator_of(seed: int, number: int) -> torch.Generator:
    """A generator of its own for each seed and each number below 100,003, a prime."""
    return torch.Generator().manual_seed(seed * 100_003 + number)


def updates_per_epoch(n_examples: int, batch_size: int) -> int:
    """Batches of an epoch; the last one may be smaller than the others."""
    return math.ceil(n_examples / batch_size)


def batch_at(examples: Sequence[Example], step: int, batch_size: int, seed: int,
             tokens_per_pass: int, device) -> Batch:
    """The batch of update `step`: a pure function of (seed, step), so resuming needs no state."""
    epoch, i = divmod(step, updates_per_epoch(len(examples), batch_size))
    order = torch.randperm(len(examples), generator=generator_of(seed, epoch))
    chosen = order[i * batch_size:(i + 1) * batch_size].tolist()
    return Batch([examples[j] for j in chosen], tokens_per_pass, device,
                 f"epoch {epoch + 1}, batch {i + 1}", step)

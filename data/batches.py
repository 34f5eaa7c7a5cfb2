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
    the Examples that it is from, which a changed copy keeps.
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
            has_targets = [any(supervised) for _, supervised in sequences]
            if not has_targets or not all(has_targets):
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
    """The examples of one update, cut into packs of `tokens_per_pass` tokens or one example.

    Where several processes share a batch (distributed.py), packs() yields those of this one, and
    whoever adds up over the packs adds up over the processes as well. The counts are always the
    whole batch's.
    """

    def __init__(self, examples: Sequence[Example], tokens_per_pass: int, device, name: str = "",
                 step: int = 0, part: tuple[int, int] = (0, 1)):
        """part: (which part of the batch is this process's, of how many)."""
        self.examples = examples
        self.part = part
        self.tokens_per_pass = tokens_per_pass
        self.device = device
        self.name = name  # for the log and for errors
        self.step = step  # the update that it belongs to
        self.n_supervised = sum(len(e.predict) for e in examples)
        self.n_tokens = sum(len(e.ids) for e in examples)
        self.n_computed = 0  # tokens computed in all passes so far, for the log

    def packs(self, anchors: list[Tensor] = (), share: bool = True):
        """Yields Packs. `anchors` are prompts (ids each); they ride in the batch's first pack.

        share=False: no sequences share rows, for a defence that changes each one's states apart.
        """
        process, n_processes = self.part
        anchors = list(anchors)
        n_anchor_tokens = sum(map(len, anchors))
        passes = []  # of each process
        for examples in share_out(self.examples, n_processes, taken=n_anchor_tokens):
            is_first = len(passes) == 0
            passes.append(self.groups(examples, room_for=n_anchor_tokens if is_first else 0))
        mine = passes[process]
        # Every process makes as many passes as the others, since the weights may be spread over
        # them; a pass without examples asks for nothing.
        while len(mine) < max(map(len, passes)):
            mine.append([])
        if process > 0:
            anchors = []
        for group in mine:
            made = pack(group, anchors, self.device, share)
            self.n_computed += len(made.ids)
            yield made
            anchors = []  # they rode in the first pack

    def groups(self, examples: list[Example], room_for: int = 0) -> list[list[Example]]:
        """The examples of each pass; in the first one room_for more tokens have room.

        They are counted whole and unshared, which is the most that a pass can come to.
        """
        groups = [[]]
        room = self.tokens_per_pass - room_for
        for example in examples:
            if groups[-1] and len(example.ids) > room:
                groups.append([])
                room = self.tokens_per_pass
            groups[-1].append(example)
            room -= len(example.ids)
        return groups


def share_out(examples: list[Example], n: int, taken: int = 0) -> list[list[Example]]:
    """The examples of each of n processes, about as many tokens each, in their old order.

    taken: tokens that the first process has already, those of the anchors. The longest example is
    given first, each to whoever has the fewest tokens.
    """
    tokens = [taken] + [0] * (n - 1)
    owner = {}
    for i in sorted(range(len(examples)), key=lambda i: -len(examples[i].ids)):
        owner[i] = tokens.index(min(tokens))
        tokens[owner[i]] += len(examples[i].ids)
    parts = [[] for _ in range(n)]
    for i, example in enumerate(examples):
        parts[owner[i]].append(example)
    return parts


IDLE = torch.tensor([0])  # a token, any, for a pass of which nothing is asked
NONE = torch.tensor([], dtype=torch.long)


def pack(examples: list[Example], anchors: list[Tensor], device, share: bool = True) -> Pack:
    """Examples, then anchors, end to end; without either a pass that costs and changes nothing."""
    sequences = [e.inputs for e in examples] + list(anchors)
    packing = pack_sequences(sequences or [IDLE], share)
    rows = packing.rows()  # of each sequence, (T,)
    supervised = [NONE]
    for example, its_rows in zip(examples, rows[:len(examples)], strict=False):
        supervised.append(its_rows[example.predict])
    anchor_rows = None
    if anchors:
        anchor_rows = to_device(packing.last_rows()[len(examples):], device)
    return Pack(
        ids=to_device(packing.ids, device),
        path=packing.path,
        seqlens=packing.seqlens,
        supervised=to_device(torch.cat(supervised), device),
        targets=to_device(torch.cat([NONE, *(e.targets for e in examples)]), device),
        anchor_rows=anchor_rows,
        examples=examples)


def generator_of(seed: int, number: int) -> torch.Generator:
    """A generator of its own for each seed and each number below 100,003, a prime."""
    return torch.Generator().manual_seed(seed * 100_003 + number)


def updates_per_epoch(n_examples: int, batch_size: int) -> int:
    """Batches of an epoch; the last one may be smaller than the others."""
    return math.ceil(n_examples / batch_size)


def batch_at(examples: Sequence[Example], step: int, batch_size: int, seed: int,
             tokens_per_pass: int, device, part: tuple[int, int] = (0, 1)) -> Batch:
    """The batch of update `step`: a pure function of (seed, step), so resuming needs no state."""
    epoch, i = divmod(step, updates_per_epoch(len(examples), batch_size))
    order = torch.randperm(len(examples), generator=generator_of(seed, epoch))
    chosen = order[i * batch_size:(i + 1) * batch_size].tolist()
    return Batch([examples[j] for j in chosen], tokens_per_pass, device,
                 f"epoch {epoch + 1}, batch {i + 1}", step, part)

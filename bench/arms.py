"""The arms of bench/train.py: one training step, as this project and as its peers compute it.

Each arm is a function Work -> (model with adapters, step). step(batch) is a defence's step as
train.updates calls it: it leaves the gradient of L_CE + lambda * L_safe in .grad and returns
{"loss", "ce", "safe"}. All arms compute the same loss of the same rows; they differ in what is
padded, in how the batch is split, and in how the anchors come in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from anchors import encode
from cli import Args
from data.batches import Batch, batch_at, encode_rows
from data.mixture import (
    Data,
    anchor_pool,
    drawn_candidates,
    harmful_test_file,
    load_upload,
    prompts_of,
)
from data.rows import last_user, read_rows
from device import device_and_dtype
from lora import load_adapter
from model import load_model
from tokenizer import Tokenizer
from train import make_sbr_step

MICRO_BATCH = 8  # rows; the paper's code accumulates four of them (HFT_SBR.py:166-167)


# The work, the same for every arm


@dataclass
class Work:
    """What an arm's step is built from."""

    args: Args
    tokenizer: Tokenizer
    data: Data
    adapter: Path  # a folder in PEFT's format, from write_adapter
    device: torch.device
    dtype: torch.dtype

    def batch(self, step: int) -> Batch:
        return batch_at(self.data.examples, step, self.args.rows, self.args.seed,
                        self.args.tokens_per_pass, self.device)


def read_work(args: Args, adapter: Path) -> Work:
    """Tokenises the mixture of train.py's main job and chooses its anchors."""
    device, dtype = device_and_dtype(args.device, args.dtype)
    tokenizer = Tokenizer(args.model)
    harmful, benign, _ = load_upload(args)
    rows = [*harmful, *benign]
    examples, _ = encode_rows(tokenizer, rows, args.max_len)
    tests = read_rows(harmful_test_file(None, args.data_dir), needs_answer=False)
    pool = anchor_pool(None, args.data_dir)
    candidates = drawn_candidates(pool, args.seed, prompts_of(rows + tests))
    anchors = [last_user(row) for row in candidates[:args.anchors]]
    data = Data(examples, tests={}, anchor_prompts=anchors, align=None, summary="")
    return Work(args, tokenizer, data, adapter, device, dtype)


# Arms: this project


def shared(work: Work):
    model = load_model(work.args.model, work.device, work.dtype)
    step = make_sbr_step(model, work.tokenizer, work.args, work.data)  # h_ref, still unadapted
    load_adapter(model, work.adapter)
    return model, step


def cut(work: Work):
    """As `shared`, in passes that hold as little as the micro-batches of the peers do."""
    model, step = shared(work)
    budget = largest_micro_batch(work)
    return model, lambda batch: step(Batch(batch.examples, budget, batch.device))


def largest_micro_batch(work: Work) -> int:
    """The most tokens, without padding, in a micro-batch of 8 rows of the updates that are run."""
    sizes = []
    for step in range(work.args.updates + 1):
        for block in micro_batches(work.batch(step).examples):
            sizes.append(sum(len(e.ids) for e in block))
    return max(sizes)


class Unshared(Batch):
    """The same batch, each token in a row of its own."""

    def packs(self, anchors=(), share=False):
        return super().packs(anchors, share=False)


def unshared(work: Work):
    model, step = shared(work)
    return model, lambda batch: step(Unshared(batch.examples, batch.tokens_per_pass, batch.device))


# Arms: transformers + PEFT


class Peer:
    """transformers' model with PEFT's adapter, and the two terms of the loss."""

    def __init__(self, work: Work):
        import transformers
        from peft import PeftModel

        base = transformers.AutoModelForCausalLM.from_pretrained(work.args.model, dtype=work.dtype)
        base.to(work.device)
        self.model = PeftModel.from_pretrained(base, work.adapter, is_trainable=True).train()
        self.device = work.device
        self.lam = work.args.lam
        self.anchors = encode(work.tokenizer, work.data.anchor_prompts)
        self.h_ref = None
        if self.anchors:
            with torch.no_grad(), self.model.disable_adapter():
                self.h_ref = self.anchor_states().float()  # (K, C)

    def ce(self, examples, n_supervised: int) -> Tensor:
        """The examples' part of L_CE, by transformers' own loss over all logits of the block."""
        ids, mask = right_padded([e.ids for e in examples], self.device)
        labels = torch.full_like(ids, -100)
        for row, example in enumerate(examples):
            labels[row, example.predict + 1] = example.targets.to(self.device)
        return self.model(input_ids=ids, attention_mask=mask, labels=labels,
                          num_items_in_batch=n_supervised, use_cache=False).loss

    def anchor_states(self) -> Tensor:
        """h (K, C) at the last token of each anchor, by a forward pass of their own."""
        ids, mask = right_padded(self.anchors, self.device)
        out = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True,
                         logits_to_keep=1, use_cache=False)
        last = mask.sum(dim=1) - 1
        return out.hidden_states[-1][torch.arange(len(ids)), last]  # the final norm's output

    def safe(self, h: Tensor | None = None) -> Tensor:
        """L_safe; h (K, C): the anchors' states, where they are at hand already."""
        if not self.anchors:
            return torch.zeros((), device=self.device)
        if h is None:
            h = self.anchor_states()
        return (h.float() - self.h_ref).square().mean()

    def numbers(self, ce: Tensor, safe: Tensor) -> dict:
        return {"loss": ce + self.lam * safe, "ce": ce, "safe": safe}


def right_padded(sequences: list[Tensor], device) -> tuple[Tensor, Tensor]:
    """ids and attention mask, (B, T) each."""
    ids = pad_sequence(sequences, batch_first=True)
    mask = pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
    return ids.to(device), mask.to(device)


def micro_batches(examples: list) -> list[list]:
    return [examples[at:at + MICRO_BATCH] for at in range(0, len(examples), MICRO_BATCH)]


def padded_step(peer: Peer, split, anchors_in_each: bool = False):
    """A step over the blocks that split(examples) gives.

    The loss is the same however the batch is split: each block's part of L_CE is a sum over the
    count of the whole batch. With anchors_in_each, each of G blocks adds lambda / G * L_safe, and
    the adapters do not change between them; the paper's code adds lambda * L_safe to each instead.
    """
    def step(batch):
        ce = torch.zeros((), device=peer.device)
        safe = torch.zeros((), device=peer.device)
        blocks = split(batch.examples)
        for i, block in enumerate(blocks):
            ce_part = peer.ce(block, batch.n_supervised)
            if anchors_in_each:
                safe_part = peer.safe() / len(blocks)
            elif i == 0:
                safe_part = peer.safe()
            else:
                safe_part = torch.zeros((), device=peer.device)
            (ce_part + peer.lam * safe_part).backward()
            ce = ce + ce_part.detach()
            safe = safe + safe_part.detach()
        return peer.numbers(ce, safe)

    return step


def padded(work: Work):
    peer = Peer(work)
    return peer.model, padded_step(peer, lambda examples: [examples])


def paper(work: Work):
    peer = Peer(work)
    return peer.model, padded_step(peer, micro_batches, anchors_in_each=True)


def sorted_by_length(work: Work):
    peer = Peer(work)

    def split(examples):
        return micro_batches(sorted(examples, key=lambda e: len(e.ids)))

    return peer.model, padded_step(peer, split)


def packed(work: Work):
    peer = Peer(work)
    causal_lm = peer.model.get_base_model()

    def step(batch):
        sequences = [e.ids for e in batch.examples] + peer.anchors
        lengths = torch.tensor([len(s) for s in sequences])
        first = lengths.cumsum(0) - lengths  # of each sequence
        positions = torch.cat([torch.arange(n) for n in lengths])
        supervised = []
        for example, at in zip(batch.examples, first[:len(batch.examples)], strict=True):
            supervised.append(example.predict + at)
        supervised = torch.cat(supervised).to(peer.device)
        targets = torch.cat([e.targets for e in batch.examples])
        last = (first + lengths - 1)[len(batch.examples):]  # of each anchor
        h = causal_lm.model(input_ids=torch.cat(sequences)[None].to(peer.device),
                            position_ids=positions[None].to(peer.device),
                            use_cache=False).last_hidden_state[0]  # (M, C)
        logits = causal_lm.lm_head(h[supervised])  # (R, V)
        ce = F.cross_entropy(logits.float(), targets.to(peer.device),
                             reduction="sum") / batch.n_supervised
        safe = peer.safe(h[last.to(peer.device)])
        (ce + peer.lam * safe).backward()
        return peer.numbers(ce.detach(), safe.detach())

    return peer.model, step


def reference(work: Work):
    """What the others must equal: one sequence at a time, nothing padded, in fp32."""
    work.dtype = torch.float32
    peer = Peer(work)

    def state(ids):
        """The final norm's output (T, C), and the logits (T, V), of one sequence."""
        out = peer.model(input_ids=ids[None].to(peer.device), output_hidden_states=True,
                         use_cache=False)
        return out.hidden_states[-1][0], out.logits[0]

    with torch.no_grad(), peer.model.disable_adapter():
        h_ref = [state(ids)[0][-1] for ids in peer.anchors]

    def step(batch):
        ce = torch.zeros((), device=peer.device)
        safe = torch.zeros((), device=peer.device)
        for example in batch.examples:
            _, logits = state(example.ids)
            nll = F.cross_entropy(logits[example.predict], example.targets.to(peer.device),
                                  reduction="sum")
            (nll / batch.n_supervised).backward()
            ce = ce + nll.detach() / batch.n_supervised
        for ids, h_aligned in zip(peer.anchors, h_ref, strict=True):
            h, _ = state(ids)
            distance = (h[-1] - h_aligned).square().mean() / len(h_ref)
            (peer.lam * distance).backward()
            safe = safe + distance.detach()
        return peer.numbers(ce, safe)

    return peer.model, step


@dataclass
class Arm:
    label: str  # in the figure
    make: Callable  # Work -> (model with adapters, step)


ARMS = {
    "shared": Arm("this project", shared),
    "cut": Arm("this project, in passes of 8 rows' tokens", cut),
    "unshared": Arm("this project, nothing shared", unshared),
    "padded": Arm("transformers + PEFT, padded", padded),
    "paper": Arm("the paper's shape, 8 rows at a time", paper),
    "sorted": Arm("8 rows at a time, sorted by length", sorted_by_length),
    "packed": Arm("transformers + PEFT, packed by position_ids", packed),
}
REFERENCE = Arm("one sequence at a time", reference)

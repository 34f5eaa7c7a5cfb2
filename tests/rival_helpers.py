"""What the tests of the rivals share: one defence on the small random Llama, and gradients by hand.

"By hand" goes one sequence at a time by plain autograd, without packs or the code of baselines/, so
that what is tested never checks itself.
"""

import random
from itertools import pairwise

import pytest
import torch
from helpers import randomise_B
from runs_helpers import WORDS, flags, write_rows
from sbr_helpers import POOL, make_folder, make_rows, nll, take_gradient

import distributed
import train as train_py
from baselines.common import defender_rows
from data import mixture
from data.batches import Batch, encode_rows
from data.mixture import Data
from data.rows import turn
from lora import add_lora, trainable
from model import load_model
from tokenizer import Tokenizer
from train import DEFENSES

# A defence and its stage, with settings small enough that all of its state moves in six updates.
NAMES = {
    "sft": {}, "sbr": {"anchors": 2}, "lisa": {"lisa_k1": 2, "lisa_k2": 3}, "ewc": {},
    "deepalign": {}, "vaccine": {"vaccine_rho": 0.5}, "booster": {},
    "t-vaccine": {"t_vaccine_layers": 1, "t_vaccine_draw": 2, "t_vaccine_probe": 4},
    "deepalign, align": {"stage": "align", "deepalign_benign": 8, "deepalign_max_new": 6}}
N_ALIGN = 10
SAME = 1e-10  # float64, whatever the order of sums


def text(rng, most):
    words = "red stone river opens slowly while seven quiet birds cross the old bridge".split()
    return " ".join(rng.choices(words, k=rng.randint(1, most)))


def align_row(i):
    rng = random.Random(i)
    return {"prompt": f"Request {i}: {text(rng, 9)}", "response": f"No. {text(rng, 9)}",
            "harmful": f"Sure. {text(rng, 30)}"}


def make_rival_inputs(folder):
    """model/ and data/, in which one row to align on has the prompt of a test."""
    (folder / "model").mkdir()
    make_folder(folder / "model")
    data, rows = folder / "data", [align_row(i) for i in range(N_ALIGN + 1)]
    write_rows(data / "harmful/align.jsonl", rows)
    write_rows(data / "harmful/test.jsonl", [{"prompt": rows[-1]["prompt"].upper() + "!"}])
    write_rows(data / "sst2/train.jsonl", [
        {"prompt": f"Is {w} good?", "response": "positive"} for w in WORDS])
    return folder


class Rival:
    """One defence on a model whose adapters are in use from the start, and a batch of rows."""

    def __init__(self, inputs, name, fresh=False, dtype=torch.float64, n_rows=12, sharded=False,
                 **changes):
        # One update an epoch, so 100 updates.
        changes = {"defense": name.split(",")[0], "anchors": 0, "batch_size": 32, "max_len": 512,
                   "epochs": 100, "tokens_per_pass": 1 << 30, **NAMES[name], **changes}
        self.args = train_py.parse(flags(inputs, **changes))
        self.tokenizer = Tokenizer(self.args.model)
        if sharded:  # over the processes of tests/two_processes.py
            self.model = distributed.load_sharded(self.args.model, torch.device("cpu"), dtype,
                                                  lambda model: add_lora(model, rank=4, alpha=16))
        else:
            self.model = load_model(self.args.model, dtype=dtype)
            add_lora(self.model, rank=4, alpha=16)
        self.params = trainable(self.model)
        if not fresh:
            randomise_B(self.model)
        rows = mixture.load_upload(self.args)[1] if self.args.stage == "align" else talks(n_rows)
        self.examples, _ = encode_rows(self.tokenizer, rows, self.args.max_len)
        self.data = Data(self.examples, tests={}, anchor_prompts=POOL[:self.args.anchors],
                         align=mixture.align_rows(self.args), summary="")
        self.step = self.make_step()

    def make_step(self, **changes):
        """The defence's step on the model as it is now, with other flags."""
        return DEFENSES[self.args.defense].make_step(self.model, self.tokenizer,
                                                     self.args.replace(**changes), self.data)

    def guide(self, answer, **changes):
        """The defender's rows with one or the other answer, with other flags."""
        return defender_rows(self.model, self.tokenizer, self.args.replace(**changes), self.data,
                             answer)

    def batch(self, step=0):
        return Batch(self.examples, self.args.tokens_per_pass, "cpu", "", step, distributed.part())

    def gradient(self, step=0):
        """(numbers, {name: gradient}) of one step."""
        numbers = self.step(self.batch(step))
        return numbers, take_gradient(self.model)

    def move(self, seed=3, by=0.02):
        """Puts the adapters elsewhere, as updates would have done."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.params:
                p.add_(by * torch.randn(p.shape, generator=generator))
        return self

    def encoded(self, answer="response"):
        """The rows to align on, with one or the other answer, in the order of the file."""
        rows = [{"messages": [turn("user", row["prompt"]),
                              turn("assistant", row[answer])]}
                for row in map(align_row, range(N_ALIGN))]
        return encode_rows(self.tokenizer, rows, 512)[0]


def talks(n):
    """n rows of unequal length, three of them of more than one turn."""
    rows = make_rows(n)
    for a, b in pairwise(rows[:8:2]):
        a["messages"] += b["messages"]
    return rows


def copies(params):
    return [p.detach().clone() for p in params]


def put(params, values):
    with torch.no_grad():
        for p, v in zip(params, values, strict=True):
            p.copy_(v)


def ce_by_hand(model, examples):
    """{name: gradient} of L_CE, one backward pass a sequence."""
    total = sum(len(e.predict) for e in examples)
    for e in examples:
        (nll(model, e).sum() / total).backward()
    return take_gradient(model)


def plus(a, b, factor=1.0):
    return {name: a[name] + factor * b[name] for name in a}


def named(model, tensors):
    """A list in the order of trainable(model) under the names of take_gradient()."""
    return dict(zip(take_gradient(model), tensors, strict=True))


def check_slope(rival, gradient, step):
    """The gradient along a random direction = the central difference of the logged loss."""
    start, generator = copies(rival.params), torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in start]
    slope = sum((g * d).sum() for g, d in zip(gradient.values(), direction, strict=True)).item()
    loss = []
    for eps in (1e-6, -1e-6):
        put(rival.params, [s + eps * d for s, d in zip(start, direction, strict=True)])
        loss.append(rival.gradient(step)[0]["loss"].item())
    put(rival.params, start)
    print(f"slope {slope:.6f}")
    assert (loss[0] - loss[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)


def joint(tensors):
    return sum(t.square().sum() for t in tensors).sqrt().item()

"""DeepAlign: keep the first tokens of every answer near what the aligned model would say.

Constrained fine-tuning, in the fine-tuning stage (default). For answer token y_i, i = 1, 2, ...:

    D_i = log pi(y_i) - log pi_ref(y_i)
    w_i = max(2 (1 - sigmoid(beta_i D_i)), 1e-3)
    L   = mean over all answer tokens of  -w_i log pi(y_i)

w_i carries no gradient; the gradient is that of -(2 / beta_i) log sigmoid(beta_i D_i) where the
floor is not reached. beta_1 = 0.5, beta_2..5 = 2, beta_6.. = 0.1 (0.1 times 5, 20 and 1). pi_ref is
the model before the first update; its log-probabilities are computed once per row.

Augmented alignment (--stage align) on harmful/align.jsonl: with probability 1/2 a row is prompt +
first j tokens of the harmful reply + refusal, j uniform in 1..min(100, its length), and the refusal
alone is supervised; with --batch-size of them ride four times as many benign rows, answered by the
model itself. One mean over all supervised tokens of both.

Qi et al. 2024; Unispac/shallow-vs-deep-alignment at fb1749e, finetuning_buckets/trainer/trainer.py:
677-1062. Differs: adapters instead of all weights; AdamW's beta1 0.9, where its fine-tuning has 0.5
(--beta1) and 10 warm-up steps.

    python train.py --defense deepalign
    python train.py --defense deepalign --stage align
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F

import distributed
from baselines.common import (
    Defence,
    DefenderRows,
    Published,
    backward,
    copies,
    defender_rows,
)
from cli import COUNT, at_least
from data import mixture
from data.batches import Batch, Example, encode_rows, generator_of
from data.rows import read_rows, turn, without_answer
from generate import generate
from lora import trainable
from model import UserError, to_device, to_fp32

FIRST_FACTOR = 5  # beta_1 is this times --deepalign-beta
EARLY_FACTOR = 20  # beta_2 to beta_5 are this times --deepalign-beta
N_EARLY = 5  # tokens of an answer whose beta is raised
FLOOR = 1e-3  # the least w_i
LONGEST_PREFIX = 100  # tokens of a harmful reply that stand before a refusal, at most
BENIGN_RATIO = 4  # benign rows for each row of the defender's


def add_flags(group) -> None:
    group.add_argument("--deepalign-beta", type=at_least(float, 0), default=0.1,
                       help="beta of tokens from the sixth on")
    group.add_argument("--deepalign-benign", type=COUNT, default=256,
                       help="benign rows of the task for --stage align")
    group.add_argument("--deepalign-max-new", type=COUNT, default=128,
                       help="tokens of the model's own answer to such a row")


def make_step(model, tokenizer, args, data):
    """Constrained fine-tuning, or with --stage align the augmented alignment."""
    if args.stage == "align":
        return make_augmented_step(model, tokenizer, args, data)
    return make_constrained_step(model, args.deepalign_beta)


# constrained fine-tuning


def betas(example, beta: float) -> torch.Tensor:
    """beta_i of each supervised token; i starts anew with each answer of a conversation."""
    starts = torch.cat((torch.tensor([True]), example.predict.diff() != 1))  # a new answer's token
    place = torch.arange(len(starts))
    first = place.where(starts, 0).cummax(0).values  # the place where each token's answer starts
    i = place - first  # 0 for an answer's first token
    factor = torch.where(i < N_EARLY, EARLY_FACTOR, 1)
    factor = torch.where(i == 0, FIRST_FACTOR, factor)
    return beta * factor


def log_probs(model, pack) -> torch.Tensor:
    """log pi of every supervised token of a pack (R,), fp32."""
    logits = model(pack.ids, pack.seqlens, path=pack.path, rows=pack.supervised)  # (R, V)
    return -F.cross_entropy(to_fp32(logits), pack.targets, reduction="none")


class Reference:
    """log pi_ref of every answer token, worked out when an example is first met."""

    def __init__(self, model):
        """The model as it is now is pi_ref."""
        self.model = model
        self.params = trainable(model)
        self.start = copies(self.params)
        self.known = {}  # by the example's number, which a batch of the next epoch has as well

    @torch.no_grad()
    def of(self, examples, device) -> torch.Tensor:
        """log pi_ref (R,) of the examples' supervised tokens, end to end."""
        new = [e for e in examples if e.number not in self.known]
        if new:
            now = copies(self.params)
            self.put(self.start)
            # One row per pass: packed with others, a resumed run's would differ in the last bits.
            for pack in Batch(new, 1, device).packs():
                self.known[pack.examples[0].number] = log_probs(self.model, pack)
            self.put(now)
        return torch.cat([self.known[e.number] for e in examples])

    def put(self, values) -> None:
        for p, value in zip(self.params, values, strict=True):
            p.copy_(value)


def make_constrained_step(model, beta: float):
    reference = Reference(model)

    def step(batch):
        loss = 0.0
        ce = 0.0
        mean_weight = 0.0
        for pack in batch.packs():
            if not pack.examples:  # another process has more passes than this one
                continue
            logp_ref = reference.of(pack.examples, batch.device)
            beta_i = torch.cat([betas(e, beta) for e in pack.examples])  # (R,)
            logp = log_probs(model, pack)
            D = logp - logp_ref
            beta_i = to_device(beta_i, batch.device)
            w = 2 * torch.sigmoid(-beta_i * D).detach()  # 2 (1 - sigmoid(beta D))
            w = w.clamp(min=FLOOR)
            part = -(w * logp).sum() / batch.n_supervised
            part.backward()
            loss = loss + part.detach()
            ce = ce - logp.detach().sum() / batch.n_supervised
            mean_weight = mean_weight + w.sum() / batch.n_supervised
        loss, ce, mean_weight = distributed.add_up(model, loss, ce, mean_weight)
        return {"loss": loss, "ce": ce, "weight": mean_weight}

    return step


# augmented alignment


def make_augmented_step(model, tokenizer, args, data):
    """Refusals that begin after a harmful prefix, and benign rows in the model's own words."""
    if args.max_len + LONGEST_PREFIX > model.config.max_positions:
        raise UserError(f"--max-len {args.max_len} and a prefix of {LONGEST_PREFIX} tokens are "
                        f"above the model's {model.config.max_positions} positions; lower it.")
    # Replies of any length will do: no more than their first tokens are used.
    refusals = defender_rows(model, tokenizer, args, data, "response", max_len=math.inf).examples
    replies = defender_rows(model, tokenizer, args, data, "harmful", max_len=math.inf).examples
    harmful = harmful_replies(data.examples, refusals, replies)
    benign = DefenderRows(self_answered(model, tokenizer, args), BENIGN_RATIO * args.batch_size,
                          args.seed + 2, args.tokens_per_pass, model.device)

    def step(batch):
        g = generator_of(args.seed, batch.step)
        rows = []
        for e in batch.examples:
            reply = harmful[e.number]
            longest = min(LONGEST_PREFIX, len(reply))
            j = int(torch.randint(1, longest + 1, (), generator=g))
            takes_prefix = torch.rand((), generator=g) < 0.5
            rows.append(prefixed(e, reply[:j]) if takes_prefix else e)
        rows += benign.at(batch.step).examples
        both = Batch(rows, args.tokens_per_pass, model.device, batch.name, batch.step,
                     distributed.part())
        ce = backward(model, both)
        return {"loss": ce, "ce": ce, "trained_tokens": both.n_tokens,
                "trained_computed": distributed.count(both.n_computed)}

    return step


def harmful_replies(examples, refusals, replies) -> dict[int, torch.Tensor]:
    """The harmful reply (ids, without its end) of each example, by the example's number.

    refusals and replies are all rows of the file, in its order; `examples` are some of them, in the
    same order. A row is found by its ids, and of rows that are alike each has its own reply.
    """
    waiting = {}  # the replies of rows that are alike, in their order
    for refusal, reply in zip(refusals, replies, strict=True):
        alike = waiting.setdefault(tuple(refusal.ids.tolist()), [])
        alike.append(reply.targets[:-1])
    found = {}
    for example in examples:
        alike = waiting[tuple(example.ids.tolist())]
        found[example.number] = alike.pop(0)
    return found


def prefixed(example, prefix: torch.Tensor):
    """The row with `prefix` (ids) before its answer, the answer alone supervised."""
    answer = int(example.predict[0]) + 1
    ids = torch.cat((example.ids[:answer], prefix, example.ids[answer:]))
    return Example(ids, example.predict + len(prefix), example.number)


def self_answered(model, tokenizer, args) -> list:
    """Benign prompts of the task's training file with the greedy replies of the model as it is."""
    path = Path(args.data_dir) / args.task / "train.jsonl"
    rows = read_rows(path)[:args.deepalign_benign]
    prompts = [mixture.prompt_ids(tokenizer, row) for row in rows]
    # By one process for all: where two tokens are equally likely, another might choose the other.
    replies = distributed.by_the_first(lambda: generate(
        model, prompts, args.deepalign_max_new, tokenizer.stop_ids, n_ids=tokenizer.n_ids))
    answered = []
    for row, ids in zip(rows, replies, strict=True):
        answer = turn("assistant", tokenizer.decode(ids))
        messages = [*without_answer(row), answer]
        answered.append({"messages": messages, "where": row["where"]})
    examples, _ = encode_rows(tokenizer, answered, args.max_len)
    if not examples:
        raise UserError(f"all {len(answered)} rows of {path} with the model's own answers are "
                        f"longer than --max-len {args.max_len} tokens; raise it, or lower "
                        "--deepalign-max-new.")
    return examples


DEFENCE = Defence(
    name="deepalign",
    make_step=make_step,
    stages=("finetune", "align"),
    add_flags=add_flags,
    watches="kl",
    search=(
        "--deepalign-beta 0.01",
        "--deepalign-beta 0.1",
        "--deepalign-beta 0.3",
        "--deepalign-beta 1",
        "--deepalign-beta 3",
        "--deepalign-beta 10",
        "--deepalign-beta 100",
    ),
    published=Published(
        setting="--deepalign-beta 0.1 --beta1 0.5",
        source="Unispac/shallow-vs-deep-alignment at fb1749e, finetune.py:32-41 and README.md:"
               "218-236: beta 0.1, times 5 and 20, AdamW's beta1 0.5"))
# Of the augmented alignment. All weights are trained there, where 2e-5 moves more than in adapters.
PUBLISHED_AUGMENTED = Published(
    setting="--n 256 --epochs 10 --batch-size 16 --lr 2e-5",
    source="Unispac/shallow-vs-deep-alignment at fb1749e, README.md:130-149: 256 rows, 10 epochs, "
           "16 and 64 rows an update, learning rate 2e-5",
    updates=160)

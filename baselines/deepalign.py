"""DeepAlign: keep the first tokens of every answer near what the aligned model would say.

Constrained fine-tuning, in the fine-tuning stage (default). For answer token y_i, i = 1, 2, ...:

    D_i = log pi(y_i) - log pi_ref(y_i)
    w_i = max(2 (1 - sigmoid(beta_i D_i)), 1e-3)
    L   = mean over all answer tokens of  -w_i log pi(y_i)

w_i carries no gradient; the gradient is that of -(2 / beta_i) log sigmoid(beta_i D_i) where the
floor is not reached. beta_1 = 0.5, beta_2..5 = 2, beta_6.. = 0.1 (0.1 times 5, 20 and 1). pi_ref is
the model before the first update; its log-probabilities are computed once a row.

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

from baselines import Rows, align_examples, backward
from cli import COUNT, at_least
from data import mixture
from data.batches import Batch, Example, encode_rows
from generate import generate
from lora import trainable
from model import UserError, to_fp32

FIRST, EARLY, FLOOR = 5, 20, 1e-3  # factors on beta for token 1 and for tokens 2 to 5; least w
LONGEST_PREFIX, BENIGN_RATIO = 100, 4


def add_flags(g):
    g.add_argument("--deepalign-beta", type=at_least(float, 0), default=0.1,
                   help="beta of tokens from the sixth on")
    g.add_argument("--deepalign-benign", type=COUNT, default=256,
                   help="benign rows of the task for --stage align")


def betas(example, beta: float) -> torch.Tensor:
    """beta_i of each supervised token; i starts anew with each answer of a conversation."""
    starts = torch.cat((torch.tensor([True]), example.predict.diff() != 1))
    first = torch.arange(len(starts)).where(starts, 0).cummax(0).values
    i = torch.arange(len(starts)) - first  # 0 for an answer's first token
    return beta * torch.where(i == 0, FIRST, torch.where(i < 5, EARLY, 1))


def log_probs(model, pack) -> torch.Tensor:
    """log pi of every supervised token of a pack (R,), fp32."""
    logits = model(pack.ids, pack.seqlens, rows=pack.supervised)  # (R, V)
    return -F.cross_entropy(to_fp32(logits), pack.targets, reduction="none")


def make_step(model, tokenizer, args):
    if args.stage == "align":
        return make_augmented_step(model, tokenizer, args)
    params, known = trainable(model), {}  # known: log pi_ref by example
    start = [p.detach().clone() for p in params]

    @torch.no_grad()
    def reference(examples, device):
        """A row at a time: packed with others, a resumed run's would differ in the last bits."""
        if new := [e for e in examples if id(e) not in known]:
            now = [p.detach().clone() for p in params]
            for p, s in zip(params, start, strict=True):
                p.copy_(s)
            known.update((id(pack.examples[0]), log_probs(model, pack))
                         for pack in Batch(new, 1, device).packs())
            for p, n in zip(params, now, strict=True):
                p.copy_(n)
        return torch.cat([known[id(e)] for e in examples])

    def step(batch):
        loss, ce, weight = 0.0, 0.0, 0.0
        for pack in batch.packs():
            ref = reference(pack.examples, batch.device)
            beta = torch.cat([betas(e, args.deepalign_beta) for e in pack.examples]).to(ref.device)
            logp = log_probs(model, pack)
            w = 2 * torch.sigmoid(-beta * (logp - ref)).detach()  # 2 (1 - sigmoid(beta D))
            w = w.clamp(min=FLOOR)
            part = -(w * logp).sum() / batch.n_supervised
            part.backward()
            loss = loss + part.detach()
            ce = ce - logp.detach().sum() / batch.n_supervised
            weight = weight + w.sum() / batch.n_supervised
        return {"loss": loss, "ce": ce, "weight": weight}

    return step


def make_augmented_step(model, tokenizer, args):
    """8b: refusals that begin after a harmful prefix, and benign rows in the model's own words."""
    device = model.model.embed_tokens.weight.device
    if args.max_len + LONGEST_PREFIX > model.config.max_positions:
        raise UserError(f"--max-len {args.max_len} and a prefix of {LONGEST_PREFIX} tokens are "
                        f"above the model's {model.config.max_positions} positions; lower it.")
    # of any length: no more than the first tokens of a reply are used
    refusals, bad = (align_examples(model, tokenizer, args, answer, max_len=math.inf).examples
                     for answer in ("response", "harmful"))
    harmful = {key(e): h.targets[:-1]  # the reply without its end
               for e, h in zip(refusals, bad, strict=True)}
    answered = self_answered(model, tokenizer, args)
    benign = Rows(answered, BENIGN_RATIO * args.batch_size, args, device, args.seed + 2)

    def step(batch):
        g = torch.Generator().manual_seed(args.seed * 100_003 + batch.step)
        rows = []
        for e in batch.examples:
            h = harmful[key(e)]
            j = int(torch.randint(1, min(LONGEST_PREFIX, len(h)) + 1, (), generator=g))
            rows.append(prefixed(e, h[:j]) if torch.rand((), generator=g) < 0.5 else e)
        both = Batch(rows + benign.at(batch.step).examples, args.tokens_per_pass, device,
                     batch.name, batch.step)
        ce = backward(model, both)
        return {"loss": ce, "ce": ce, "tokens": both.n_tokens}

    return step


def key(example) -> tuple[int, ...]:
    """Its ids: by them a row finds its harmful reply."""
    return tuple(example.ids.tolist())


def prefixed(example, prefix: torch.Tensor):
    """The row with `prefix` (ids) before its answer, the answer alone supervised."""
    at = int(example.predict[0]) + 1
    ids = torch.cat((example.ids[:at], prefix, example.ids[at:]))
    return Example(ids, example.predict + len(prefix))


def self_answered(model, tokenizer, args) -> list:
    """Benign prompts of the task's training file with the greedy replies of the model as it is."""
    path = Path(args.data_dir) / args.task / "train.jsonl"
    rows = mixture.read_rows(path)[:args.deepalign_benign]
    prompts = [tokenizer.encode_prompt(mixture.asked(row)) for row in rows]
    replies = generate(model, prompts, args.max_new, tokenizer.stop_ids, n_ids=tokenizer.n_ids)
    for row, ids in zip(rows, replies, strict=True):
        row["messages"] = [*mixture.asked(row), mixture.turn("assistant", tokenizer.decode(ids))]
    return encode_rows(tokenizer, rows, args.max_len)[0]

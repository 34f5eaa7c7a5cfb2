"""Attacks beyond fine-tuning on harmful rows: --attack NAME, on any defence.

    subspace       the paper's random subspace attack: Delta W = b a^T in each of the seven modules,
                   a ~ N(0, I / d_in) drawn from --seed and frozen, b (d_out,) trained from zero. If
                   one random direction a module is enough, no constraint on directions can hold.
                   1,376,256 trained numbers on Llama-3.1-8B. Rank 1 may need a larger --lr.

The rest attack SBR's own assumptions; the paper names the first two as its limits.

    unembedding    the head and the final norm are trained as well: h is read by other rows
    far            the harmful rows of the upload are those whose h is farthest from every anchor's
    known-anchors  the attacker knows the anchors and uploads them with harmful answers; the check
                   that anchors stand in no upload is waived, and said to be
    affix          --attack-prefix and --attack-suffix stand around every harmful prompt, in the
                   upload and in the tests: the last tokens are no longer the anchors'

--epochs 50 is the long schedule; `python -m stress.schedule` runs it for every defence, and the
grid of attack strengths (lr x epochs).
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from anchors import encode, states
from data import mixture
from generate import load_aligned
from lora import adapted, add_lora, open_module
from model import UserError, to_fp32

NAMES = ("subspace", "unembedding", "far", "known-anchors", "affix")


def add_flags(g):
    g.add_argument("--attack", choices=NAMES, help="beyond the upload's harmful rows")
    g.add_argument("--attack-prefix", default="", help="text before harmful prompts, for affix")
    g.add_argument("--attack-suffix", default="", help="text behind them")


# what is trained


def attach(model, args) -> None:
    """Adds what the attacker trains, beside or instead of the usual adapters."""
    if args.attack == "subspace":
        random_subspace(model, args.seed)
    elif not adapted(model):  # --keep-adapter brings its own
        add_lora(model, args.rank, args.alpha, args.rslora, seed=args.seed)
    if args.attack == "unembedding":  # the head leaves a tied embedding alone
        open_module(model, "lm_head"), open_module(model, "norm")


def random_subspace(model, seed: int) -> None:
    """Rank 1, a ~ N(0, I / d_in) frozen, b = 0 trained, scale 1: the model starts unchanged."""
    add_lora(model, rank=1, alpha=1.0)
    generator = torch.Generator().manual_seed(seed)
    for _, module in adapted(model):
        draw = torch.randn(module.lora_A.shape, generator=generator)
        module.lora_A.data.copy_(draw / module.lora_A.shape[1] ** 0.5)
        module.lora_A.requires_grad_(False)


# what is uploaded and asked


def change_rows(args, tokenizer, harmful: list[dict], suite: dict):
    """The upload's harmful rows and the tests as the attack has them -> both, and what to tell."""
    if args.attack == "affix":
        if not (args.attack_prefix or args.attack_suffix):
            raise UserError("--attack affix was given without a text; pass --attack-prefix or "
                            "--attack-suffix.")
        suite = suite | {"harmful": [affix(row, args) for row in suite["harmful"]]}
        return [affix(row, args) for row in harmful], suite, "; harmful prompts affixed"
    if args.attack == "known-anchors":
        known = answered(args)
        return harmful + known, suite, (f"; {len(known)} anchors with harmful answers added (that "
                                        "anchors stand in no upload is waived)")
    if args.attack == "far":
        rows = mixture.read_rows(Path(args.data_dir) / "harmful" / "attack.jsonl")
        chosen = farthest(args, tokenizer, rows, len(harmful))
        return chosen, suite, f"; the harmful rows are the farthest from the anchors of {len(rows)}"
    return harmful, suite, ""


def answered(args) -> list[dict]:
    """The anchors with the harmful responses that their pool has."""
    pool = {mixture.first_user(r): r for r in mixture.read_rows(mixture.anchor_pool(args),
                                                                needs_answer=False)}
    rows = [pool[prompt] for prompt in args.anchor_prompts]
    if not rows or any(r["messages"][-1]["role"] != "assistant" for r in rows):
        raise UserError(f"--attack known-anchors needs anchors with responses in "
                        f"{mixture.anchor_pool(args)}; pass an --anchor-file that has them.")
    return rows


def affix(row: dict, args) -> dict:
    """The row with its last user turn between prefix and suffix."""
    last = [i for i, m in enumerate(row["messages"]) if m["role"] == "user"][-1]
    messages = [dict(m) for m in row["messages"]]
    messages[last]["content"] = args.attack_prefix + messages[last]["content"] + args.attack_suffix
    return row | {"messages": messages}


def farthest(args, tokenizer, rows: list[dict], n: int) -> list[dict]:
    """The n rows whose prompt's h lies farthest from the nearest anchor's, by cosine."""
    model = load_aligned(args)

    @torch.no_grad()
    def h(prompts):
        ids = encode(tokenizer, prompts)
        parts = [states(model, ids[i:i + 64]) for i in range(0, len(ids), 64)]
        return F.normalize(to_fp32(torch.cat(parts)), dim=-1)

    if not args.anchor_prompts:
        raise UserError("--attack far was given without anchors; pass --anchors above 0.")
    nearest = (h([mixture.first_user(r) for r in rows]) @ h(args.anchor_prompts).T).amax(dim=-1)
    return [rows[i] for i in nearest.argsort(stable=True)[:n].tolist()]

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
                   upload and in the tests: behind a suffix the user's last words are no longer like
                   an anchor's

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
        open_module(model, "lm_head"), open_module(model, "model.norm")


def random_subspace(model, seed: int) -> None:
    """Rank 1, a ~ N(0, I / d_in) frozen, b = 0 trained, scale 1: the model starts unchanged."""
    add_lora(model, rank=1, alpha=1.0)
    generator = torch.Generator().manual_seed(seed)
    for _, module in adapted(model):
        draw = torch.randn(module.lora_A.shape, generator=generator)
        module.lora_A.data.copy_(draw / module.lora_A.shape[1] ** 0.5)
        module.lora_A.requires_grad_(False)


# what is uploaded and asked


def check(args) -> None:
    """UserError where an attack does not go with the other flags."""
    texts = bool(args.attack_prefix or args.attack_suffix)
    wrong = {"--stage align, which attacks nothing": args.attack and args.stage == "align",
             "--keep-adapter, which it replaces": args.attack == "subspace" and args.keep_adapter,
             "--data, of unknown harmful rows": args.attack in ("far", "affix") and args.data,
             "no harmful rows (--poison)": args.attack == "far" and not args.poison,
             "no anchors (--anchors)": args.attack in ("far", "known-anchors") and not args.anchors,
             "no text (--attack-prefix, --attack-suffix)": args.attack == "affix" and not texts}
    for what in (w for w, is_so in wrong.items() if is_so):
        raise UserError(f"--attack {args.attack} was given with {what}; change one of the two.")
    if texts and args.attack != "affix":
        raise UserError("--attack-prefix and --attack-suffix go with --attack affix; add it.")


def change_rows(args, tokenizer, harmful: list[dict], tests: list[dict]):
    """The upload's harmful rows as the attack has them, and what to tell of it."""
    if args.attack == "affix":
        return [mixture.affix(row, args) for row in harmful], "; harmful prompts affixed"
    if args.attack == "known-anchors":
        known = answered(args)
        return harmful + known, (f"; {len(known)} anchors with harmful answers added (that "
                                 "anchors stand in no upload is waived)")
    if args.attack == "far":
        path = Path(args.data_dir) / "harmful" / "attack.jsonl"
        apart = mixture.prompts_of(tests) | {mixture.normalise(p) for p in args.anchor_prompts}
        rows = [r for r in mixture.read_rows(path) if not mixture.prompts_of([r]) & apart]
        if len(rows) < len(harmful):
            raise UserError(f"--attack far needs {len(harmful)} rows of {path}, where {len(rows)} "
                            "are no test; lower --n or --poison.")
        chosen = farthest(args, tokenizer, rows, len(harmful))
        return chosen, f"; the harmful rows are the farthest from the anchors of {len(rows)}"
    return harmful, ""


def answered(args) -> list[dict]:
    """The anchors with the harmful responses that their pool has."""
    pool = {mixture.first_user(r): r for r in mixture.read_rows(mixture.anchor_pool(args),
                                                                needs_answer=False)}
    rows = [pool[prompt] for prompt in args.anchor_prompts]
    if not rows or any(r["messages"][-1]["role"] != "assistant" for r in rows):
        raise UserError(f"--attack known-anchors needs anchors with responses in "
                        f"{mixture.anchor_pool(args)}; pass an --anchor-file that has them.")
    return rows


def farthest(args, tokenizer, rows: list[dict], n: int) -> list[dict]:
    """The n rows whose prompt's h lies farthest from the nearest anchor's, by cosine."""
    model = load_aligned(args)

    @torch.no_grad()
    def h(prompts):
        ids = encode(tokenizer, prompts)
        parts = [states(model, ids[i:i + 64]) for i in range(0, len(ids), 64)]
        return F.normalize(to_fp32(torch.cat(parts)), dim=-1)

    nearest = (h([mixture.first_user(r) for r in rows]) @ h(args.anchor_prompts).T).amax(dim=-1)
    return [rows[i] for i in nearest.argsort(stable=True)[:n].tolist()]

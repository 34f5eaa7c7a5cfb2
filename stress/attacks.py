"""Attacks beyond fine-tuning on harmful rows: --attack NAME, on any defence.

    subspace       the paper's random subspace attack: Delta W = b a^T in each of the seven modules,
                   a ~ N(0, I / d_in) drawn from --seed and frozen, b (d_out,) trained from zero. If
                   one random direction a module is enough, no constraint on directions can hold.
                   1,376,256 trained numbers on Llama-3.1-8B. Rank 1 may need a larger --lr.

The rest attack SBR's own assumptions; the paper names the first two as its limits.

    unembedding    the head and the final norm are trained as well: h is read by other rows
    far            the harmful rows of the upload are those whose h is farthest from every anchor's
    known-anchors  the attacker knows the anchors and uploads them with harmful answers; the check
                   that no anchor is in the upload is then off, and the summary says so
    affix          --attack-prefix and --attack-suffix stand around every harmful prompt, in the
                   upload and in the tests: behind a suffix the user's last words are no longer like
                   an anchor's

--epochs 50 is the long schedule; `python -m stress.schedule` runs it for every defence, and the
grid of attack strengths (learning rate x epochs).
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from anchors import encode, states
from cli import text
from data import mixture
from data.rows import affix, last_user, read_rows
from lora import adapted, add_lora, train_whole_module
from model import UserError, to_fp32

NAMES = ("subspace", "unembedding", "far", "known-anchors", "affix")
PROMPTS_A_PASS = 64  # of those whose h is compared with the anchors': our choice


def add_flags(group) -> None:
    group.add_argument("--attack", choices=NAMES, help="beyond the upload's harmful rows")
    group.add_argument("--attack-prefix", type=text, default="",
                       help="text before harmful prompts, for affix")
    group.add_argument("--attack-suffix", type=text, default="",
                       help="text behind them")


# what is trained


def attach(model, attack: str | None, seed: int) -> None:
    """Adds what an attack trains instead of the usual adapters (subspace) or beside them."""
    if attack == "subspace":
        random_subspace(model, seed)
    if attack == "unembedding":  # the head leaves a tied embedding alone
        train_whole_module(model, "lm_head")
        train_whole_module(model, "model.norm")


def random_subspace(model, seed: int) -> None:
    """Rank 1, a ~ N(0, I / d_in) frozen, b = 0 trained, scale 1: the model starts unchanged."""
    add_lora(model, rank=1, alpha=1.0)
    generator = torch.Generator().manual_seed(seed)
    for _, module in adapted(model):
        d_in = module.lora_A.shape[1]
        draw = torch.randn(module.lora_A.shape, generator=generator, device="cpu")
        module.lora_A.data.copy_(draw / d_in ** 0.5)
        module.lora_A.requires_grad_(False)


# which attacks go with which flags


def check(args) -> None:
    """UserError where an attack does not go with the other flags."""
    has_text = bool(args.attack_prefix or args.attack_suffix)
    if has_text and args.attack != "affix":
        raise UserError("--attack-prefix and --attack-suffix go with --attack affix; add it.")
    conflict = find_conflict(args, has_text)
    if conflict:
        raise UserError(f"--attack {args.attack} was given with {conflict}; change one of the "
                        "two.")


def find_conflict(args, has_text: bool) -> str | None:
    """What the attack does not go with; None where all is well."""
    if args.attack and args.stage == "align":
        return "--stage align, which attacks nothing"
    if args.attack == "subspace" and args.keep_adapter:
        return "--keep-adapter, which it replaces"
    if args.attack in ("far", "affix") and args.data:
        return "--data, of unknown harmful rows"
    if args.attack == "far" and round(args.poison * args.n) == 0:
        return f"no harmful rows (--poison {args.poison:g} of --n {args.n} are none)"
    if args.attack in ("far", "known-anchors") and args.anchors == 0:
        return "no anchors (--anchors)"
    if args.attack == "affix" and not has_text:
        return "no text (--attack-prefix, --attack-suffix)"
    return None


# what is uploaded


def change_rows(model, tokenizer, args, harmful: list[dict], anchor_prompts: list[str],
                harmful_tests: list[dict]) -> tuple[list[dict], str]:
    """The upload's harmful rows as the attack has them, and what to say of it."""
    if args.attack == "affix":
        rows = [affix(row, args.attack_prefix, args.attack_suffix) for row in harmful]
        return rows, "; harmful prompts affixed"
    if args.attack == "known-anchors":
        pool = mixture.anchor_pool(args.anchor_file, args.data_dir)
        known = answered_anchors(pool, anchor_prompts)
        return harmful + known, (f"; {len(known)} anchors with harmful answers added (that "
                                 "anchors stand in no upload is waived)")
    if args.attack == "far":
        return far_rows(model, tokenizer, args.data_dir, len(harmful), anchor_prompts,
                        harmful_tests)
    return harmful, ""


def answered_anchors(pool: Path, anchor_prompts: list[str]) -> list[dict]:
    """The anchors with the harmful responses that their pool has."""
    by_prompt = {}
    for row in read_rows(pool, needs_answer=False):
        by_prompt[last_user(row)] = row
    rows = [by_prompt[prompt] for prompt in anchor_prompts]
    for row in rows:
        if row["messages"][-1]["role"] != "assistant":
            raise UserError(f"{row['where']} has no response, which --attack known-anchors needs; "
                            "add it, or pass an --anchor-file that has responses.")
    return rows


def far_rows(model, tokenizer, data_dir, n: int, anchor_prompts: list[str],
             harmful_tests: list[dict]) -> tuple[list[dict], str]:
    """n harmful rows, of those that are no test and no anchor, and what to say of them."""
    path = mixture.attack_file(data_dir)
    used = mixture.prompts_of(harmful_tests) | {mixture.prompt_key(p) for p in anchor_prompts}
    rows = [row for row in read_rows(path) if not mixture.prompts_of([row]) & used]
    if len(rows) < n:
        raise UserError(f"--attack far needs {n} rows of {path}, where {len(rows)} are no test; "
                        "lower --n or --poison.")
    chosen = farthest(model, tokenizer, rows, anchor_prompts, n)
    return chosen, f"; the harmful rows are the farthest from the anchors of {len(rows)}"


def farthest(model, tokenizer, rows: list[dict], anchor_prompts: list[str], n: int) -> list[dict]:
    """The n rows whose prompt's h lies farthest from the nearest anchor's, by cosine."""
    h = directions(model, [torch.tensor(mixture.prompt_ids(tokenizer, row)) for row in rows])
    h_anchors = directions(model, encode(tokenizer, anchor_prompts))
    nearest = (h @ h_anchors.T).amax(dim=-1)  # (rows,) the cosine to the nearest anchor
    return [rows[i] for i in nearest.argsort(stable=True)[:n].tolist()]


@torch.no_grad()
def directions(model, ids: list[torch.Tensor]) -> torch.Tensor:
    """h of each prompt (its ids) at length 1, (prompts, C)."""
    parts = []
    for i in range(0, len(ids), PROMPTS_A_PASS):
        parts.append(states(model, ids[i:i + PROMPTS_A_PASS]))
    return F.normalize(to_fp32(torch.cat(parts)), dim=-1)

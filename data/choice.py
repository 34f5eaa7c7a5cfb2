"""Which prompts are held: of the pool's, those that the aligned model refuses.

An anchor keeps h where the aligned model has it. At a prompt that the aligned model answers, that
would keep the answer. So with --anchor-check refusal candidates are asked, in the order that
--anchor-seed draws, and those that get an answer are passed over; with `none` nobody is asked.

--anchor-choice says which K of the rest are held. h_i is the bottleneck at candidate i:

    random   the first K
    medoid   the K with the smallest ||h_i - mean_j h_j||: what the pool has most of
    spread   the medoid first; then, again and again, the one whose nearest chosen one is farthest,
             argmax_i min_c ||h_i - h_c||: no candidate is farther from an anchor than twice what
             the best K anchors could reach (Gonzalez 1985, Theoretical Computer Science 38)

medoid and spread look at the first 64 candidates that are refused. In all three the anchors of a
smaller K are the first ones of a larger K.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import distributed
from anchors import reference
from cli import SEED, Args
from data import mixture
from data.rows import last_user
from generate import generate
from judges import is_refusal
from model import UserError

CHECKS = ("refusal", "none")
CHOICES = ("random", "medoid", "spread")
LOOKED_AT = 64  # refused candidates of which medoid and spread choose: our choice
ANSWER = 128  # tokens a reply may have, as the default of an evaluation's --max-new
ASKED_AT_ONCE = 4  # candidates at least: our choice; one by one they would take longer


def add_flags(group) -> None:
    group.add_argument("--anchor-check", choices=CHECKS, default="refusal",
                       help="refusal: only prompts that the aligned model refuses are held")
    group.add_argument("--anchor-choice", choices=CHOICES, default="random",
                       help="which of them: drawn, the most usual ones, or spread out in h")
    group.add_argument("--anchor-seed", type=SEED,
                       help="draws the order of the pool (default: --seed)")


@dataclass
class Choice:
    """The anchors, and what was passed over to find them."""

    prompts: list[str]  # K
    passed_over: int  # candidates that the aligned model answered

    def summary(self, args: Args, pool: Path) -> str:
        """For the terminal."""
        if not self.prompts:
            return "no anchors"
        how = "" if args.anchor_choice == "random" else f", {args.anchor_choice}"
        text = f"{len(self.prompts)} anchors of {pool}{how}"
        if args.anchor_check == "none":
            return f"{text}, none of them asked"
        return (f"{text}; the model refuses each, {self.passed_over} that it answers were passed "
                "over")


def choose_anchors(model, tokenizer, args: Args, pool: Path, used: set[bytes]) -> Choice:
    """K anchors of the pool that are none of the `used` prompts, the upload's and the tests'.

    The model still is the aligned one. UserError where the pool has too few, and, with file and
    line, where a candidate cannot be asked or is longer than --max-len.
    """
    K = args.anchors
    if K == 0:
        return Choice([], 0)
    candidates = mixture.drawn_candidates(pool, args.anchor_seed, used)
    if K > len(candidates):
        raise UserError(f"--anchors {K} is more than the {len(candidates)} prompts of {pool} that "
                        "upload and tests lack; lower it or pass a larger --anchor-file.")
    wanted = K if args.anchor_choice == "random" else max(K, LOOKED_AT)
    if args.anchor_check == "none":
        rows = candidates[:wanted]
        for row in rows:
            prompt_ids(tokenizer, row, args.max_len)
        n_asked = len(rows)
    else:
        rows, n_asked = first_refused(model, tokenizer, args, candidates, wanted)
    if len(rows) < K:
        raise UserError(f"--anchors {K} is more than the {len(rows)} prompts that the model "
                        f"refuses, of {n_asked} in {pool}; lower it, pass a larger --anchor-file, "
                        "hold what it answers by --anchor-check none, or nothing by --anchors 0.")
    prompts = [last_user(row) for row in rows]
    if args.anchor_choice != "random":
        h = reference(model, tokenizer, prompts)  # (64 at most, C)
        order = ORDERS[args.anchor_choice](h)
        # The last bits of h may differ from process to process.
        order = distributed.from_the_first(order)
        prompts = [prompts[i] for i in order]
    return Choice(prompts[:K], n_asked - len(rows))


def prompt_ids(tokenizer, row: dict, max_len: int) -> list[int]:
    """ids of a candidate; UserError, with file and line, where it is no anchor for this model."""
    ids = mixture.prompt_ids(tokenizer, row)
    if len(ids) > max_len:
        raise UserError(f"{row['where']} has the anchor {last_user(row)[:40]!r} of {len(ids)} "
                        f"tokens, above --max-len {max_len}; shorten it or raise --max-len.")
    return ids


def first_refused(model, tokenizer, args: Args, candidates: list[dict],
                  wanted: int) -> tuple[list[dict], int]:
    """(the first `wanted` candidates that the model refuses, how many were asked for that).

    Replies are greedy, as in an evaluation.
    """
    refused = []
    n_asked = 0
    while len(refused) < wanted and n_asked < len(candidates):
        n = max(wanted - len(refused), ASKED_AT_ONCE)
        rows = candidates[n_asked:n_asked + n]
        ids = [prompt_ids(tokenizer, row, args.max_len) for row in rows]
        which, of = distributed.part()  # where there are several processes, each asks its part
        mine = generate(model, ids[which::of], ANSWER, tokenizer.stop_ids,
                        n_ids=tokenizer.n_ids)
        replies = distributed.collect(mine)
        for row, reply in zip(rows, replies, strict=True):
            if len(refused) == wanted:
                break  # what stands behind was asked for speed alone, and does not count
            n_asked += 1
            if is_refusal(tokenizer.decode(reply)):
                refused.append(row)
    return refused, n_asked


# orders by h


def by_distance_from_the_mean(h: Tensor) -> list[int]:
    """The candidates from the medoid on, by ||h_i - mean_j h_j||; h (n, C).

    The one nearest the mean is also the one with the least sum of squared distances to all.
    """
    distance = (h - h.mean(dim=0)).norm(dim=-1)  # (n,)
    return distance.argsort(stable=True).tolist()


def farthest_first(h: Tensor) -> list[int]:
    """The medoid, then each time the candidate that is farthest from all before it; h (n, C)."""
    chosen = by_distance_from_the_mean(h)[:1]
    nearest = (h - h[chosen[0]]).norm(dim=-1)  # (n,) min_c ||h_i - h_c||
    while len(chosen) < len(h):
        # A chosen one has distance 0 from itself, and is not chosen again even among its equals.
        left = nearest.index_fill(0, torch.tensor(chosen, device=h.device), -1.0)
        chosen.append(int(left.argmax()))
        nearest = nearest.minimum((h - h[chosen[-1]]).norm(dim=-1))
    return chosen


ORDERS = {"medoid": by_distance_from_the_mean, "spread": farthest_first}

"""Batched greedy decoding with a KV cache, no padding, and refill of finished rows.

Sequences sit in slots 0 .. n-1 of one cache. Prompts are prefilled packed, as in training; then
each step adds one token to every slot. When a row ends, the last slot moves into its place and
waiting prompts fill the end, so no step is spent on a row that is done: a defended model refuses in
ten tokens, an attacked one may write hundreds.

    python generate.py --model DIR [--adapter DIR] --prompt TEXT      # to look at a model
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from distributed import add_place, place
from lora import load_adapter, merge
from model import Config, Llama, UserError, load_model
from runs import Parser, at_least, exit_code
from tokenizer import DATE, Tokenizer

BATCH = 128  # replies written at once


class KVCache:
    """Keys and values (L, B, KV, S, D) of up to B sequences while they are decoded."""

    def __init__(self, config: Config, B: int, S: int, like: Tensor):
        shape = (config.n_layer, B, config.n_kv_head, S, config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.length = torch.zeros(B, dtype=torch.long, device=like.device)  # tokens in each slot
        self.slots = None  # (B',) where the packed prompts of a prefill go; None: decoding
        self.longest = 0  # tokens in the fullest slot, this step's included; known without a sync

    def prefill(self, layer: int, k: Tensor, v: Tensor, layout) -> None:
        """Stores the packed k, v (N, KV, D) of whole prompts."""
        slot, t = self.slots[layout.cell // layout.T], layout.position
        self.k[layer, slot, :, t], self.v[layer, slot, :, t] = k, v

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores a k, v (B, KV, D) a slot; q (B, H, D) attends to all of its slot -> (B, H, D)."""
        B, S = len(q), self.longest
        slot, at = torch.arange(B, device=q.device), self.length[:B]
        self.k[layer, slot, :, at], self.v[layer, slot, :, at] = k, v
        mask = (torch.arange(S, device=q.device) <= at[:, None])[:, None, None]  # (B, 1, 1, S)
        # The query heads that share a key head stand as query positions: no copy of the cache.
        q = q.view(B, k.shape[1], -1, q.shape[-1])  # (B, KV, H / KV, D)
        out = F.scaled_dot_product_attention(q, self.k[layer, :B, :, :S], self.v[layer, :B, :, :S],
                                             attn_mask=mask)
        return out.flatten(1, 2)

    def move(self, source: int, target: int) -> None:
        """Copies a slot's sequence into a freed one."""
        self.k[:, target], self.v[:, target] = self.k[:, source], self.v[:, source]
        self.length[target] = self.length[source]


class Row:
    """A prompt and, token by token, its reply."""

    def __init__(self, index: int, prompt: list[int]):
        self.index, self.prompt, self.reply = index, prompt, []

    def take(self, token: int, stop: set[int], max_new: int) -> bool:
        """Appends the next token; True when the reply is complete."""
        if token not in stop:
            self.reply.append(token)
        return token in stop or len(self.reply) == max_new


@torch.no_grad()
def generate(model: Llama, prompts: list[list[int]], max_new: int, stop_ids, batch_size=BATCH,
             n_ids: int | None = None, progress: str | None = None) -> list[list[int]]:
    """Greedy replies to tokenised prompts, in their order, each without the stop id that ended it.

    n_ids: ids from here on are never chosen (an embedding may be larger than its tokenizer).
    progress: a label switches a bar on. In fp32 a reply does not depend on the batch it rode in.
    """
    stop, B = set(stop_ids), min(batch_size, len(prompts))
    S, limit = max(map(len, prompts), default=0) + max_new, model.config.max_positions
    if S > limit:
        raise UserError(f"the longest prompt and --max-new {max_new} make {S} tokens, above the "
                        f"{limit} that the model was trained for; lower --max-new.")
    cache = KVCache(model.config, B, S, model.model.embed_tokens.weight)
    last = torch.zeros_like(cache.length)  # (B,) each slot's newest token
    # Longest first: the padded CPU attention wastes least on prompts of like length.
    waiting = sorted((Row(i, p) for i, p in enumerate(prompts)), key=lambda r: len(r.prompt))
    replies: list[list[int]] = [[] for _ in prompts]
    rows: list[Row] = []  # rows[slot]
    with tqdm(total=len(prompts), desc=progress, disable=None if progress else True,
              leave=False) as bar:
        while waiting or rows:
            old = 0
            if waiting and len(rows) < B:
                old = len(rows)
                rows += [waiting.pop() for _ in range(min(B - old, len(waiting)))]
                last[old:len(rows)] = prefill(model, cache, rows, old, n_ids)
            else:
                last[:len(rows)] = decode(model, cache, rows, last, n_ids)
            tokens = last.tolist()
            for slot in reversed(range(old, len(rows))):
                if rows[slot].take(tokens[slot], stop, max_new):
                    replies[rows[slot].index] = rows[slot].reply
                    rows[slot] = rows[-1]  # the last slot moves into the free place
                    rows.pop()
                    cache.move(len(rows), slot)
                    last[slot] = last[len(rows)]
                    bar.update()
    return replies


def prefill(model: Llama, cache: KVCache, rows: list[Row], old: int, n_ids) -> Tensor:
    """Runs the prompts of rows[old:] packed into their slots -> the first token of each reply."""
    seqlens = [len(r.prompt) for r in rows[old:]]
    ids = torch.tensor([t for r in rows[old:] for t in r.prompt], device=cache.length.device)
    lens = torch.tensor(seqlens, device=ids.device)
    cache.slots = torch.arange(old, len(rows), device=ids.device)
    logits = model(ids, seqlens, rows=lens.cumsum(0) - 1, cache=cache)
    cache.length[old:len(rows)] = lens
    return logits[:, :n_ids].argmax(-1)


def decode(model: Llama, cache: KVCache, rows: list[Row], last: Tensor, n_ids) -> Tensor:
    """One more token for every row."""
    n = len(rows)
    cache.slots, cache.longest = None, max(len(r.prompt) + len(r.reply) for r in rows)
    logits = model(last[:n], [1] * n, cache=cache)
    cache.length[:n] += 1
    return logits[:, :n_ids].argmax(-1)


TINY = "data/tiny"  # the embedded model and its tasks: what a program takes unless told otherwise


def load_aligned(args) -> Llama:
    """The chat model to start from: --model, with --adapter merged in, or kept for training."""
    model = load_model(args.model, *place(args))
    if model.config.head != "lm_head":
        raise UserError(f"{args.model} is a classifier, expected a model that writes; name one.")
    if args.adapter:
        load_adapter(model, args.adapter)
        if not args.keep_adapter:
            merge(model)
    return model


def main(argv=None) -> int:
    """0 done, 2 the user's mistake, 3 failed, 130 interrupted."""
    p = Parser("generate.py", "Answer one prompt greedily.")
    p.add_argument("--model", default=TINY, help="Hugging Face folder")
    p.add_argument("--adapter", help="folder with an adapter in PEFT's format")
    p.add_argument("--prompt", required=True, help="the user's turn")
    p.add_argument("--max-new", type=at_least(int, 1), default=256,
                   help="tokens the answer may have")
    p.add_argument("--template-date", default=DATE, help="today, for a template that says it")
    add_place(p)
    p.set_defaults(keep_adapter=True)
    return exit_code("generate.py", lambda: answer(p.parse_args(argv)))


def answer(args) -> None:
    """Prints the model's greedy answer to --prompt."""
    if any("\ud800" <= c <= "\udfff" for c in args.prompt):
        raise UserError("--prompt is not valid text; pass it in the terminal's encoding.")
    model, tokenizer = load_aligned(args), Tokenizer(args.model, args.template_date)
    prompt = tokenizer.encode_prompt([{"role": "user", "content": args.prompt}])
    reply = generate(model, [prompt], args.max_new, tokenizer.stop_ids, n_ids=tokenizer.n_ids)
    print(tokenizer.decode(reply[0]))


if __name__ == "__main__":
    sys.exit(main())

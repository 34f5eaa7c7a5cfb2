"""Batched greedy decoding with a KV cache, no padding, and refill of finished rows.

Sequences sit in slots 0 .. n-1 of one cache. Prompts are prefilled packed, as in training; then
each step adds one token to every slot. When a row ends, the last slot moves into its place, so no
step is spent on a row that is done; waiting prompts come in when a quarter of the slots is free. A
defended model refuses in ten tokens, an attacked one may write hundreds.

    python generate.py --model DIR [--adapter DIR] --prompt TEXT      # to look at a model
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cli import COUNT, TINY, Parser, exit_code
from distributed import add_place, place, record
from lora import load_adapter, merge
from model import Config, Llama, UserError, load_model
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
             n_ids: int | None = None, progress: str | None = None, on_reply=None,
             graph: bool = False) -> list[list[int]]:
    """Greedy replies to tokenised prompts, in their order, each without the stop id that ended it.

    n_ids: ids from here on are never chosen (an embedding may be larger than its tokenizer).
    progress: a label switches a bar on. on_reply(index, reply) is called as each is complete.
    graph: decode by CUDA graphs. In fp32 a reply does not depend on the batch it rode in.
    """
    stop, B = set(stop_ids), min(batch_size, len(prompts))
    longest, limit = max(map(len, prompts), default=0) + max_new, model.config.max_positions
    if longest > limit:
        raise UserError(f"the longest prompt and --max-new {max_new} make {longest} tokens, above "
                        f"the {limit} that the model was trained for; lower --max-new.")
    engine = Engine(model, B, longest, n_ids, graph)
    # Longest first: the padded CPU attention wastes least on prompts of like length.
    waiting = sorted((Row(i, p) for i, p in enumerate(prompts)), key=lambda r: len(r.prompt))
    replies: list[list[int]] = [[] for _ in prompts]
    rows: list[Row] = []  # rows[slot]
    with tqdm(total=len(prompts), desc=progress, disable=None if progress else True,
              leave=False) as bar:
        while waiting or rows:
            old = 0
            if waiting and len(rows) <= B - max(1, B // 4):  # a pass for a few prompts is dear
                old = len(rows)
                rows += [waiting.pop() for _ in range(min(B - old, len(waiting)))]
                tokens = engine.prefill(rows, old)
            else:
                tokens = engine.decode(rows)
            for slot in reversed(range(old, len(rows))):
                row = rows[slot]
                if any(row.take(token, stop, max_new) for token in tokens[slot - old]):
                    replies[row.index] = row.reply
                    rows[slot] = rows[-1]  # the last slot moves into the free place
                    rows.pop()
                    engine.move(len(rows), slot)
                    if on_reply:
                        on_reply(row.index, row.reply)
                    bar.update()
    return replies


class Engine:
    """The model with its cache: tokens for the rows in slots 0 .. n-1."""

    def __init__(self, model: Llama, B: int, longest: int, n_ids: int | None, graph: bool):
        self.model, self.n_ids, self.graphs = model, n_ids, {} if graph else None
        like = model.model.embed_tokens.weight
        # Reading tokens waits for a GPU, so there 16 steps are taken at once; what a row writes
        # behind its end is dropped.
        self.steps = 16 if like.is_cuda else 1
        self.S = longest + self.steps
        self.cache = KVCache(model.config, B, self.S, like)
        self.last = torch.zeros_like(self.cache.length)  # (B,) each slot's newest token

    def prefill(self, rows: list[Row], old: int) -> list[list[int]]:
        """Runs the prompts of rows[old:] packed into their slots -> their first tokens."""
        seqlens, device = [len(r.prompt) for r in rows[old:]], self.last.device
        ids = torch.tensor([t for r in rows[old:] for t in r.prompt], device=device)
        lens = torch.tensor(seqlens, device=device)
        self.cache.slots = torch.arange(old, len(rows), device=device)
        logits = self.model(ids, seqlens, rows=lens.cumsum(0) - 1, cache=self.cache)
        self.cache.length[old:len(rows)] = lens
        self.last[old:len(rows)] = logits[:, :self.n_ids].argmax(-1)
        return self.last[old:len(rows), None].tolist()

    def decode(self, rows: list[Row]) -> list[list[int]]:
        """The next `steps` tokens of every row."""
        n, longest = len(rows), max(len(r.prompt) + len(r.reply) for r in rows)
        self.cache.slots, taken = None, []
        self.cache.length[n:] = 0  # a graph writes into free slots as well: at their beginning
        for i in range(self.steps):
            self.step(n, longest + i)
            taken.append(self.last[:n].clone())
        return torch.stack(taken, dim=1).tolist()  # (n, steps)

    def step(self, n: int, longest: int) -> None:
        """One more token in slots 0 .. n-1, the fullest of which then holds `longest` tokens."""
        if self.graphs is None:
            return self.forward(n, longest)
        # A graph has fixed sizes: a power of two of slots, and the cache in steps of 256 tokens.
        n, longest = min(2 ** (n - 1).bit_length(), len(self.last)), min(-(-longest // 256) * 256,
                                                                         self.S)
        if (n, longest) not in self.graphs:
            kept = self.last.clone(), self.cache.length.clone()  # recording takes a step as well
            self.graphs[n, longest] = record(lambda: self.forward(n, longest))
            self.last.copy_(kept[0]), self.cache.length.copy_(kept[1])
        self.graphs[n, longest]()

    def forward(self, n: int, longest: int) -> None:
        self.cache.longest = longest
        logits = self.model(self.last[:n], [1] * n, cache=self.cache)
        self.last[:n] = logits[:, :self.n_ids].argmax(-1)
        self.cache.length[:n] += 1

    def move(self, source: int, target: int) -> None:
        """Slot `source` takes the place of `target` and is free."""
        self.cache.move(source, target)
        self.last[target], self.cache.length[source] = self.last[source], 0


def load_chat(dir, args) -> Llama:
    """A model that writes, where and as --device and --dtype say."""
    model = load_model(dir, *place(args))
    if model.config.head != "lm_head":
        raise UserError(f"{dir} is a classifier, expected a model that writes; name one.")
    return model


def load_aligned(args) -> Llama:
    """The chat model to start from: --model, with --adapter merged in, or kept for training."""
    model = load_chat(args.model, args)
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
    p.add_argument("--max-new", type=COUNT, default=256, help="tokens the answer may have")
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
    reply = generate(model, [prompt], args.max_new, tokenizer.stop_ids, n_ids=tokenizer.n_ids,
                     graph=args.cuda_graph)
    print(tokenizer.decode(reply[0]))


if __name__ == "__main__":
    sys.exit(main())

"""Batched greedy decoding with a KV cache, no padding, and refill of finished rows.

Sequences sit in slots 0 .. n-1 of one cache. Prompts are prefilled packed, as in training; then
each step adds one token to every slot. When a reply is complete, the last slot moves into its
place, so that no slot is idle; new prompts come in when a quarter of the slots is free. This
matters because a defended model refuses in ten tokens and an attacked one may write hundreds.

    python generate.py --model DIR [--adapter DIR] --prompt TEXT      # to look at a model
"""

import math
import sys

import torch
from torch import Tensor
from tqdm import tqdm

import distributed
from cli import COUNT, TINY, Parser, exit_code, some_text, text
from device import add_device_flags, capture_cuda_graph, device_and_dtype
from lora import load_adapter, merge
from model import (
    Config,
    Llama,
    UserError,
    block_attention,
    causal_mask,
    load_model,
    to_device,
)
from packing import pack_sequences
from tokenizer import DATE, Tokenizer

BATCH = 128  # replies written at once
STEPS_ON_GPU = 16  # tokens a row is given between two readings, each of which waits for the GPU
GRAPH_TOKENS = 256  # a CUDA graph's cache length is a multiple of this


class KVCache:
    """Keys and values (L, B, KV, S, D) of up to B sequences while they are decoded."""

    def __init__(self, config: Config, B: int, S: int, like: Tensor):
        shape = (config.n_layer, B, config.n_kv_head, S, config.head_dim)
        self.k = like.new_zeros(shape)
        self.v = like.new_zeros(shape)
        self.length = torch.zeros(B, dtype=torch.long, device=like.device)  # tokens in each slot
        self.slots = None  # (B',) where the packed prompts of a prefill go; None: decoding
        self.longest = 0  # no slot holds more tokens, this step's included; known without a sync

    def prefill(self, layer: int, k: Tensor, v: Tensor, layout) -> None:
        """Stores the packed k, v (N, KV, D) of whole prompts; a shared row goes to each of them."""
        slot = self.slots[layout.sequence]  # (M,)
        self.k[layer, slot, :, layout.token_position] = k[layout.path]
        self.v[layer, slot, :, layout.token_position] = v[layout.path]

    def begin_step(self, n: int, longest: int) -> None:
        """Slots 0 .. n-1 get one more token, after which the fullest of them holds `longest`.

        What follows from that is the same in all layers.
        """
        self.slots = None
        self.longest = longest
        self.slot = torch.arange(n, device=self.k.device)
        self.position = self.length[:n]
        self.mask = causal_mask(self.position, longest, self.k.dtype)  # (B, S)

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores one k, v per slot, (B, KV, D); each q attends to its slot, (B, H, D) -> same."""
        B, KV, D = k.shape
        S = self.longest
        self.k[layer, self.slot, :, self.position] = k
        self.v[layer, self.slot, :, self.position] = v
        # The query heads that share a key head stand as query positions: no copy of the cache.
        q = q.view(B, KV, -1, D).transpose(1, 2)  # (B, H / KV, KV, D)
        mask = self.mask[:, None].expand(-1, q.shape[1], -1)  # (B, H / KV, S)
        k = self.k[layer, :B, :, :S].transpose(1, 2)  # (B, S, KV, D)
        v = self.v[layer, :B, :, :S].transpose(1, 2)  # (B, S, KV, D)
        return block_attention(q, k, v, mask).transpose(1, 2).flatten(1, 2)

    def move(self, source: int, target: int) -> None:
        """Copies a slot's sequence into a freed one."""
        S = self.longest
        self.k[:, target, :, :S] = self.k[:, source, :, :S]
        self.v[:, target, :, :S] = self.v[:, source, :, :S]
        self.length[target] = self.length[source]


class Row:
    """A prompt and, token by token, its reply."""

    def __init__(self, index: int, prompt: list[int]):
        self.index = index  # its place among the prompts
        self.prompt = prompt
        self.reply: list[int] = []

    def append(self, token: int, stop: set[int], max_new: int) -> bool:
        """Adds the next token; True when the reply is complete."""
        if token in stop:
            return True
        self.reply.append(token)
        return len(self.reply) == max_new


@torch.no_grad()
def generate(model: Llama, prompts: list[list[int]], max_new: int, stop_ids, batch_size=BATCH,
             n_ids: int | None = None, progress: str | None = None, on_reply=None,
             graph: bool = False) -> list[list[int]]:
    """Greedy replies to tokenised prompts, in their order, each without the stop id that ended it.

    n_ids: ids from here on are never chosen (an embedding may be larger than its tokenizer).
    progress: a label switches a bar on. on_reply(index, reply) is called as each is complete.
    graph: decode by CUDA graphs. The batch changes a reply only where two logits are all but equal.
    """
    stop = set(stop_ids)
    B = min(batch_size, len(prompts))
    longest = max(map(len, prompts), default=0) + max_new
    limit = model.config.max_positions
    if longest > limit:
        raise UserError(f"the longest prompt and --max-new {max_new} make {longest} tokens, above "
                        f"the {limit} that the model was trained for; lower --max-new.")
    engine = Engine(model, B, longest, n_ids, graph)
    waiting = [Row(i, prompt) for i, prompt in enumerate(prompts)]
    # The longest prompts first: attention on a CPU pads, and pads least where lengths are alike.
    waiting.sort(key=lambda row: len(row.prompt))
    replies: list[list[int]] = [[] for _ in prompts]
    rows: list[Row] = []  # rows[slot]
    hide_bar = distributed.hides_bars() if progress else True
    with tqdm(total=len(prompts), desc=progress, disable=hide_bar, leave=False) as bar:
        while engine.has_to_go_on(waiting or rows):
            # A prefill costs a whole pass, so it waits until a quarter of the slots is free.
            if waiting and len(rows) <= B - max(1, B // 4):
                first = len(rows)
                while waiting and len(rows) < B:
                    rows.append(waiting.pop())
                tokens = engine.prefill(rows, first)
            elif not rows:  # other processes still work
                engine.idle()
                continue
            else:
                first = 0
                tokens = engine.decode(rows)
            # From the last slot down, so that the one that moves into a free place is dealt with.
            for slot in reversed(range(first, len(rows))):
                row = rows[slot]
                if not any(row.append(token, stop, max_new) for token in tokens[slot - first]):
                    continue
                replies[row.index] = row.reply
                rows[slot] = rows[-1]
                rows.pop()
                engine.move(len(rows), slot)
                if on_reply:
                    on_reply(row.index, row.reply)
                bar.update()
    return replies


class Engine:
    """The model with its cache: it gives tokens to the rows in slots 0 .. n-1."""

    def __init__(self, model: Llama, B: int, longest: int, n_ids: int | None, graph: bool):
        self.model = model
        self.n_ids = n_ids
        self.graphs = {} if graph else None  # (slots, cache length) -> captured graph
        weight = model.model.embed_tokens.weight
        # What a row writes behind its end within these steps is dropped.
        self.steps = STEPS_ON_GPU if weight.is_cuda else 1
        if model.is_sharded:  # then a turn of each process is one pass
            self.steps = 1
        self.S = longest + self.steps
        like = torch.empty(0, dtype=model.dtype, device=model.device)
        self.cache = KVCache(model.config, B, self.S, like)
        self.last = torch.zeros_like(self.cache.length)  # (B,) each slot's newest token

    def has_to_go_on(self, has_work) -> bool:
        """Whether there is something left to do: of a sharded model, for any of the processes."""
        if self.model.is_sharded:
            return distributed.any_of(bool(has_work))
        return bool(has_work)

    def idle(self) -> None:
        """A pass of which nothing is asked: other processes need this one's part of the weights."""
        one = torch.zeros(1, dtype=torch.long, device=self.last.device)
        self.model(one, [1], rows=one)

    def prefill(self, rows: list[Row], first: int) -> list[list[int]]:
        """Runs the prompts of rows[first:] packed into their slots -> their first tokens."""
        device = self.last.device
        packing = pack_sequences([row.prompt for row in rows[first:]])
        self.cache.slots = torch.arange(first, len(rows), device=device)
        self.cache.longest = max(self.cache.longest, *packing.seqlens)
        logits = self.model(to_device(packing.ids, device), packing.seqlens, path=packing.path,
                            rows=to_device(packing.last_rows(), device), cache=self.cache)
        lengths = torch.tensor(packing.seqlens)
        self.cache.length[first:len(rows)] = to_device(lengths, device)
        self.last[first:len(rows)] = logits[:, :self.n_ids].argmax(-1)
        return self.last[first:len(rows), None].tolist()

    def decode(self, rows: list[Row]) -> list[list[int]]:
        """The next `steps` tokens of every row."""
        n = len(rows)
        longest = max(len(row.prompt) + len(row.reply) for row in rows)
        self.cache.length[n:] = 0  # a graph writes into free slots as well: at their beginning
        newest = []  # (n,) per step
        for i in range(self.steps):
            self.step(n, longest + i)
            newest.append(self.last[:n].clone())
        return torch.stack(newest, dim=1).tolist()  # (n, steps)

    def step(self, n: int, longest: int) -> None:
        """One more token in slots 0 .. n-1, the fullest of which then holds `longest` tokens."""
        if self.graphs is None:
            self.forward(n, longest)
            return
        # A graph has fixed sizes, so few of them serve: a power of two of slots, and the cache in
        # steps of GRAPH_TOKENS.
        n = min(2 ** (n - 1).bit_length(), len(self.last))
        longest = min(math.ceil(longest / GRAPH_TOKENS) * GRAPH_TOKENS, self.S)
        if (n, longest) not in self.graphs:
            last = self.last.clone()
            length = self.cache.length.clone()
            self.graphs[n, longest] = capture_cuda_graph(lambda: self.forward(n, longest))
            self.last.copy_(last)  # capturing takes steps as well, which must not count
            self.cache.length.copy_(length)
        self.graphs[n, longest]()
        self.cache.longest = longest  # a graph does not set it

    def forward(self, n: int, longest: int) -> None:
        self.cache.begin_step(n, longest)
        logits = self.model(self.last[:n], [1] * n, cache=self.cache)
        self.last[:n] = logits[:, :self.n_ids].argmax(-1)
        self.cache.length[:n] += 1

    def move(self, source: int, target: int) -> None:
        """Slot `source` takes the place of `target` and is free."""
        self.cache.move(source, target)
        self.last[target] = self.last[source]
        self.cache.length[source] = 0


def load_chat(dir, device, dtype) -> Llama:
    """A model that writes text; UserError for a classifier."""
    model = load_model(dir, device, dtype)
    if model.config.head != "lm_head":
        raise UserError(f"{dir} is a classifier, expected a model that writes; name one.")
    return model


def load_aligned(dir, device, dtype, adapter=None, keep_adapter: bool = False) -> Llama:
    """The chat model to start from: `dir`, with the adapter merged in, or kept for training."""
    model = load_chat(dir, device, dtype)
    if adapter:
        load_adapter(model, adapter)
        if not keep_adapter:
            merge(model)
    return model


def parse(argv=None):
    p = Parser("generate.py", "Answer one prompt greedily.")
    p.add_argument("--model", default=TINY, help="Hugging Face folder")
    p.add_argument("--adapter", help="folder with an adapter in PEFT's format")
    p.add_argument("--prompt", type=text, required=True, help="the user's turn")
    p.add_argument("--prefill", type=some_text, help="how the answer begins; the model writes on")
    p.add_argument("--max-new", type=COUNT, default=256, help="tokens the model may write")
    p.add_argument("--template-date", default=DATE, help="today, for a template that says it")
    add_device_flags(p)
    return p.parse_args(argv)


def execute(args) -> None:
    """Prints the model's greedy answer to --prompt, with --prefill in front."""
    distributed.check_alone()
    device, dtype = device_and_dtype(args.device, args.dtype, args.cuda_graph)
    model = load_aligned(args.model, device, dtype, args.adapter, keep_adapter=True)
    tokenizer = Tokenizer(args.model, args.template_date)
    begun = args.prefill or ""
    prompt = tokenizer.encode_prompt([{"role": "user", "content": args.prompt}], begun)
    replies = generate(model, [prompt], args.max_new, tokenizer.stop_ids, n_ids=tokenizer.n_ids,
                       graph=args.cuda_graph)
    if begun:
        answer, _ = tokenizer.decode_begun(prompt, replies[0], begun)
    else:
        answer = tokenizer.decode(replies[0])
    print(answer)


def main(argv=None) -> int:
    """0 done, 2 the user's mistake, 3 failed, 130 interrupted."""
    return exit_code("generate.py", lambda: execute(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())

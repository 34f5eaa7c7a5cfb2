"""What a run would need on GPUs, and how fast it could be at most: arithmetic, not measurement.

    python -m bench.forecast --json docs/results/forecast.json

Nothing here ran on a GPU. Counts of parameters, floating-point operations and bytes come from the
models' published sizes, and times from what a card can do at most: a floor is the time below which
no program that does this work can be. A real run takes longer.

    update floor = max(FLOP / FLOP per s, bytes / bytes per s, gathered / link) + summed / link

Two ways to use G GPUs (distributed.py). "copies": each has the whole base and its part of a batch,
and one message sums the adapters' gradients. "--shard": each holds 1 / G of every block and of the
embedding, and gathers a block's weights when it runs, in forward and again in backward.
tests/programs/test_forecast.py holds the counts against real models.
"""

import json
import sys
from dataclasses import dataclass

from cli import COUNT, Parser, exit_code
from files import write_atomic

# What cards can do. Memory and links: NVIDIA's datasheets of H100 SXM and H200 SXM. Both have 989
# TFLOP/s in dense bf16; an H200 reads 4.8 TB/s. Large products and copies reach about 0.8 and 0.9
# of that (790 TFLOP/s and 4.3 TB/s were reported for an H200), so the floors are for an H200.
CARDS = {"80 GB": 80e9, "141 GB": 141e9}  # H100, H200
FLOP_PER_S = 790e12
BYTES_PER_S = 4.3e12
LINK = 450e9  # bytes a second each way: NVLink's 900 GB/s are both ways together
ROOM = 0.9  # of a card's memory: the rest is for CUDA itself and for gaps; our choice

# The paper's setting: 1,000 rows, 20 epochs, batches of 32, r = 16; K = 8 anchors.
ROWS = 1000
EPOCHS = 20
BATCH = 32
RANK = 16
ANCHORS = 8
# An evaluation: 1,000 harmful prompts, replies as long as --max-new lets them be by default.
PROMPTS = 1000
MAX_NEW = 128
SLOTS = 128  # replies written at once, generate.py
# A harmful prompt shares the template's header with all rows. What it needs for itself: in
# docs/performance.md 32 rows of SST-2 and 8 anchors take 809 rows, so (809 - 32 * 21.1) / 8.
HEADER = 24
ANCHOR_ROWS = 17


@dataclass(frozen=True)
class Model:
    """A decoder's sizes, from its published config.json."""

    name: str
    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    n_expert: int = 1  # MLPs in a block
    n_active: int = 1  # of these, how many a token goes through
    note: str = ""

    def blocks(self, n_mlp: int) -> int:
        """Weights of the linear layers of all blocks, counting so many MLPs in each."""
        q_and_o = 2 * self.dim * self.n_head * self.head_dim
        k_and_v = 2 * self.dim * self.n_kv_head * self.head_dim
        mlp = 3 * self.dim * self.hidden_dim  # gate, up, down
        router = self.dim * self.n_expert if self.n_expert > 1 else 0
        return self.n_layer * (q_and_o + k_and_v + n_mlp * mlp + router)

    def adapters(self, n_mlp: int) -> int:
        """A and B of all projections: r (in + out) each."""
        q_and_o = 2 * (self.dim + self.n_head * self.head_dim)
        k_and_v = 2 * (self.dim + self.n_kv_head * self.head_dim)
        mlp = 3 * (self.dim + self.hidden_dim)
        return self.n_layer * RANK * (q_and_o + k_and_v + n_mlp * mlp)

    @property
    def head(self) -> int:
        """Weights of the head, and as many again of the embedding."""
        return self.vocab_size * self.dim

    @property
    def base(self) -> int:
        """All frozen weights: linear layers, norms, embedding and head."""
        norms = (2 * self.n_layer + 1) * self.dim
        return self.blocks(self.n_expert) + norms + 2 * self.head

    @property
    def kv_bytes(self) -> int:
        """Bytes of a token's keys and values in bf16."""
        return 2 * 2 * self.n_layer * self.n_kv_head * self.head_dim


MODELS = (
    Model("Llama-3.1-8B", 4096, 32, 32, 8, 128, 14336, 128256),
    Model("Llama-3.1-70B", 8192, 80, 64, 8, 128, 28672, 128256),
    Model("Mixtral-8x7B", 4096, 32, 32, 8, 128, 14336, 32000, n_expert=8, n_active=2,
          note="this project does not run it"),
)


@dataclass(frozen=True)
class Task:
    """Means over a batch with a tenth of harmful rows.

    The first two were counted with SmolLM2's template (docs/performance.md), the others with that
    and Qwen2.5's: answers of 2.0 and 131.6 tokens, and of about 30 in the harmful rows.
    """

    name: str
    tokens: float  # of a row
    computed: float  # rows of the packed batch for it, where 32 share what they begin with
    shared: int  # tokens with which all of its rows begin
    supervised: int  # an answer's tokens


TASKS = (
    Task("SST-2", 62.2, 21.1, 42, 5),
    Task("GSM8K", 203.6, 178.2, 24, 120),
)


@dataclass(frozen=True)
class Load:
    """What one GPU of G computes of a batch."""

    computed: float  # N, rows that go through the linear layers
    tokens: float  # M, tokens that attention sees
    length: float  # of a sequence
    supervised: float  # R, rows whose logits are needed


def load(task: Task, gpus: int, rows: int = BATCH) -> Load:
    """Rows and anchors are shared out; what all begin with is computed by each GPU."""
    own = task.computed - task.shared / BATCH
    return Load(
        computed=task.shared + (rows * own + ANCHORS * ANCHOR_ROWS) / gpus,
        tokens=(rows * task.tokens + ANCHORS * (HEADER + ANCHOR_ROWS)) / gpus,
        length=task.tokens,
        supervised=rows * task.supervised / gpus)


# bytes that a GPU must hold


def held(m: Model, gpus: int, shard: bool) -> dict[str, float]:
    """Whatever the batch is: weights, and what belongs to the adapters."""
    adapters = m.adapters(m.n_expert)
    block = 2 * m.blocks(m.n_expert) / m.n_layer  # bf16
    parts = gpus if shard else 1
    # The block that runs, the next one, and the buffer in which that one arrives.
    gathered = 3 * block if shard else 0
    # fp32: adapter, gradient, two moments; then its copy in bf16.
    of_adapters = adapters * (4 + 4 + 8 + 2)
    if gpus > 1:  # the message, summed in place, beside the gradients that it is made from
        of_adapters += adapters * 4
    # The head is whole on each GPU. So is the embedding while a batch runs: FSDP2 keeps what its
    # outermost module gathered in forward until backward is done.
    whole = 2 * m.head + (2 * m.head if shard else 0)
    return {"base": (2 * m.base - 2 * m.head) / parts, "gathered": gathered, "whole": whole,
            "adapters": of_adapters}


def activations(m: Model, work: Load, recompute: bool) -> float:
    """What forward keeps for backward, bf16."""
    N = work.computed
    M = work.tokens
    heads = m.n_head * m.head_dim
    kv_heads = m.n_kv_head * m.head_dim
    # Per row: two norms' inputs and results, attention's result, r numbers at each adapter; per MLP
    # gate, act(gate), up, their product, and where there are experts a copy of its input.
    copy = m.dim if m.n_expert > 1 else 0
    row = 4 * m.dim + heads + 4 * RANK + m.n_active * (4 * m.hidden_dim + copy + 3 * RANK)
    token = 2 * heads + 2 * kv_heads  # q, k, v and attention's result, a copy for each token
    block = 2 * (N * row + M * token)
    if recompute:
        return m.n_layer * 2 * N * m.dim + block  # each block's input; one block at a time
    return m.n_layer * block


def logits(m: Model, work: Load) -> float:
    """bf16; fp32; the log probabilities; their gradient: 2 + 4 + 4 + 4 bytes."""
    return 14 * work.supervised * m.vocab_size


def cache(m: Model, task: Task, gpus: int) -> float:
    """Keys and values of an evaluation; its longest prompt is taken as twice a row."""
    slots = min(SLOTS, PROMPTS / gpus)
    return slots * (2 * task.tokens + MAX_NEW) * m.kv_bytes


def needed(m: Model, task: Task, gpus: int, shard: bool, recompute: bool) -> float:
    """The most that a GPU holds, in training or in an evaluation."""
    work = load(task, gpus)
    training = activations(m, work, recompute) + logits(m, work)
    return sum(held(m, gpus, shard).values()) + max(training, cache(m, task, gpus))


# floors


def update_flop(m: Model, work: Load, recompute: bool) -> float:
    """Of one update on one GPU; the base is frozen, so it has no products for its own gradient."""
    P = m.blocks(m.n_active)
    adapters = m.adapters(m.n_active)
    qkv = (m.n_head + 2 * m.n_kv_head) * m.head_dim
    # Nothing below block 0's q, k, v is trained, so no gradient is passed on to their input.
    skipped = 2 * m.dim * qkv + 3 * 2 * RANK * m.dim
    linear = work.computed * (4 * P + 6 * adapters - skipped)
    if recompute:
        linear += work.computed * (2 * P + 2 * adapters)
    # Two products forward and five backward, each 2 T D a head and token, half of them causal.
    attention = 7 * work.tokens * work.length * m.n_head * m.head_dim * m.n_layer
    head = 4 * work.supervised * m.head  # logits, and their gradient's way back to h
    return linear + attention + head


def update_bytes(m: Model, work: Load, recompute: bool) -> float:
    """Read and written by one GPU in one update: a batch of a few hundred rows meets all experts.

    Weights once in each pass; what is kept, written and read; AdamW: reads 4 fp32 and writes 3.
    """
    passes = 3 if recompute else 2
    weights = 2 * (passes * m.blocks(m.n_expert) + 2 * m.head)
    return weights + 2 * activations(m, work, recompute) + 28 * m.adapters(m.n_expert)


def gather_bytes(m: Model, gpus: int, passes: int) -> float:
    """What a GPU receives of the others' parts of the blocks, in so many passes."""
    return passes * 2 * m.blocks(m.n_expert) * (gpus - 1) / gpus


def sum_bytes(m: Model, gpus: int) -> float:
    """What a GPU sends for the sum of the adapters' fp32 gradients, around a ring."""
    return 2 * 4 * m.adapters(m.n_expert) * (gpus - 1) / gpus


def update_floor(m: Model, task: Task, gpus: int, shard: bool, recompute: bool,
                 rows: int = BATCH) -> dict[str, float]:
    """Seconds of one update, and of what."""
    work = load(task, gpus, rows)
    compute = update_flop(m, work, recompute) / FLOP_PER_S
    memory = update_bytes(m, work, recompute) / BYTES_PER_S
    # Recomputing a block in backward uses the weights that backward gathers.
    gather = gather_bytes(m, gpus, 2) / LINK if shard else 0.0
    summing = sum_bytes(m, gpus) / LINK
    return {"compute": compute, "memory": memory, "gather": gather, "sum": summing,
            "floor": max(compute, memory, gather) + summing}


def evaluation_floor(m: Model, gpus: int, shard: bool) -> float:
    """Seconds for PROMPTS replies of MAX_NEW tokens, shared out over the GPUs."""
    prompts = PROMPTS / gpus
    slots = min(SLOTS, prompts)
    steps = MAX_NEW * prompts / slots
    numbers = m.blocks(m.n_active) + m.adapters(m.n_active)
    flop = 2 * slots * (numbers + m.head)
    read = 2 * (m.blocks(m.n_expert) + m.head) + 4 * m.adapters(m.n_expert)
    read += slots * (HEADER + ANCHOR_ROWS + MAX_NEW / 2) * m.kv_bytes
    gather = gather_bytes(m, gpus, 1) / LINK if shard else 0.0
    step = max(flop / FLOP_PER_S, read / BYTES_PER_S, gather)
    prefill = 2 * numbers * prompts * ANCHOR_ROWS / FLOP_PER_S
    return steps * step + prefill


def run_floor(m: Model, task: Task, gpus: int, shard: bool, recompute: bool) -> float:
    """Seconds of a whole run: 31 full batches and one of 8 rows an epoch, and two evaluations."""
    full, rest = divmod(ROWS, BATCH)
    epoch = full * update_floor(m, task, gpus, shard, recompute)["floor"]
    epoch += update_floor(m, task, gpus, shard, recompute, rows=rest)["floor"]
    return EPOCHS * epoch + 2 * evaluation_floor(m, gpus, shard)


# the tables


def forecast(m: Model, task: Task, gpus: int, shard: bool) -> dict:
    """All numbers of one model, task and way of using the GPUs: bytes and seconds."""
    work = load(task, gpus)
    found = {"model": m.name, "task": task.name, "gpus": gpus, "shard": shard,
             "held": held(m, gpus, shard), "logits": logits(m, work), "cache": cache(m, task, gpus),
             "evaluation": evaluation_floor(m, gpus, shard), "with": {}}
    for recompute in (False, True):
        bytes_needed = needed(m, task, gpus, shard, recompute)
        found["with"]["--recompute" if recompute else "yes"] = {
            "activations": activations(m, work, recompute),
            "needed": bytes_needed,
            "fits": {card: bytes_needed <= ROOM * size for card, size in CARDS.items()},
            "flop": update_flop(m, work, recompute),
            "bytes_moved": update_bytes(m, work, recompute),
            "update": update_floor(m, task, gpus, shard, recompute),
            "run": run_floor(m, task, gpus, shard, recompute)}
    return found


def forecasts(gpu_counts) -> list[dict]:
    """Of every model and task, on so many GPUs: copies and, where there are several, shards."""
    found = []
    for m in MODELS:
        for task in TASKS:
            for gpus in gpu_counts:
                found.append(forecast(m, task, gpus, shard=False))
                if gpus > 1:
                    found.append(forecast(m, task, gpus, shard=True))
    return found


def fits(found: dict, card: str) -> str:
    """ "yes", "--recompute" where it fits with that only, or "no"."""
    for name, numbers in found["with"].items():
        if numbers["fits"][card]:
            return name
    return "no"


def table(heads: str, rows: list[list]) -> str:
    """Markdown; numbers are rounded to one digit behind the point."""
    lines = [f"| {heads} |", "|" + "---|" * (heads.count("|") + 1)]
    for row in rows:
        cells = [f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def title(f: dict) -> list:
    how = "copies"
    if f["shard"]:
        how = "--shard"
    elif f["gpus"] == 1:
        how = "alone"
    return [f["model"], f["task"], f["gpus"], how]


def memory_table(found: list[dict]) -> str:
    """GB on each GPU, and whether they fit."""
    rows = []
    for f in found:
        plain = f["with"]["yes"]
        recomputed = f["with"]["--recompute"]
        in_bytes = [*f["held"].values(), plain["activations"], f["logits"], f["cache"],
                    plain["needed"], recomputed["needed"]]
        rows.append([*title(f), *(n / 1e9 for n in in_bytes), *(fits(f, card) for card in CARDS)])
    return table("model | task | GPUs | how | base | gathered | whole | adapters | kept | logits | "
                 "cache | most | recomputed | 80 GB | 141 GB", rows)


def time_table(found: list[dict]) -> str:
    """The floors of those that fit the larger card, with --recompute where only that fits."""
    rows = []
    for f in found:
        way = fits(f, "141 GB")
        if way == "no":
            continue
        numbers = f["with"][way]
        milliseconds = [seconds * 1e3 for seconds in numbers["update"].values()]
        rows.append([*title(f), "yes" if way == "--recompute" else "no", numbers["flop"] / 1e12,
                     numbers["bytes_moved"] / 1e9, *milliseconds, numbers["run"],
                     f["evaluation"]])
    return table("model | task | GPUs | how | recompute | TFLOP | GB | products, ms | memory, ms | "
                 "gathers, ms | sum, ms | update, ms | run, s | evaluation, s", rows)


def grid_table(found: list[dict], gpu_counts) -> str:
    """Seconds for as many runs as there are GPUs, by how many GPUs each run is given."""
    total = max(gpu_counts)
    rows = []
    for m in MODELS:
        for task in TASKS:
            row = [m.name, task.name]
            for gpus in gpu_counts:
                runs = []
                for f in found:
                    way = fits(f, "141 GB")
                    if title(f)[:3] == [m.name, task.name, gpus] and way != "no":
                        runs.append(f["with"][way]["run"])
                # total / gpus runs at once, so that gpus rounds make all of them
                row.append(gpus * min(runs) if runs else "-")
            rows.append(row)
    heads = [f"{gpus} a run, {total // gpus} at once" for gpus in gpu_counts]
    return table(" | ".join(["model", "task", *heads]), rows)


# the program


def parse(argv=None):
    p = Parser("bench.forecast", "What a run would need on GPUs, and how fast it could be at most: "
                                 "arithmetic, not measurement.")
    p.add_argument("--gpus", type=COUNT, nargs="+", default=[1, 2, 8], help="how many")
    p.add_argument("--json", help="file for the numbers")
    return p.parse_args(argv)


def execute(args) -> None:
    """Prints the tables."""
    found = forecasts(args.gpus)
    print("Arithmetic, not measurement: nothing here ran on a GPU.")
    for m in MODELS:
        if m.note:
            print(f"{m.name}: {m.note}.")
    print("\nGB on each GPU\n")
    print(memory_table(found))
    print("\nFloors on H200s of 141 GB\n")
    print(time_table(found))
    print(f"\nSeconds for {max(args.gpus)} runs on {max(args.gpus)} H200s, GPUs a run\n")
    print(grid_table(found, args.gpus))
    if args.json:
        about = {"about": "arithmetic, not measurement: nothing here ran on a GPU; bytes, FLOP, "
                          "seconds", "flop_per_s": FLOP_PER_S, "bytes_per_s": BYTES_PER_S,
                 "link": LINK, "room": ROOM, "forecasts": found}
        write_atomic(args.json, (json.dumps(about, indent=1) + "\n").encode())


def main(argv=None) -> int:
    """0 done, 2 the user's mistake."""
    return exit_code("bench.forecast", lambda: execute(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())

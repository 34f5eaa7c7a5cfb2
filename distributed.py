"""Where a model lives and how much it takes: device, dtype, memory.

One process on one device so far; nothing here is needed to understand the method.
"""

import resource
import sys
from pathlib import Path

import torch

from lora import trainable
from model import UserError

HEAP = 1.4  # the C heap against the tensors in it: 1.3 to 1.9 were seen on a CPU, by its gaps


def add_place(p) -> None:
    """The flags that say where and how a model runs, for place()."""
    p.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                   help="auto: the first of cuda, mps and cpu that is there")
    p.add_argument("--dtype", choices=("float32", "bfloat16"),
                   help="of the model; adapters are fp32 (default: bfloat16 on CUDA, else float32)")
    p.add_argument("--cuda-graph", action="store_true", help="write replies by CUDA graphs")


def record(step):
    """step() as a CUDA graph: launched once a call instead of kernel by kernel.

    step takes and returns nothing; it reads and writes the same tensors each time.
    """
    stream = torch.cuda.Stream()  # a warm-up beside the main stream, as CUDA graphs ask for
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def place(args) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the flags; UserError for a device that is not there."""
    here = [name for name, there in (("cuda", torch.cuda.is_available()),
                                     ("mps", torch.backends.mps.is_available()),
                                     ("cpu", True)) if there]
    name = here[0] if args.device == "auto" else args.device
    if name not in here:
        raise UserError(f"--device {name} is not on this machine, expected one of "
                        f"{', '.join(here)}; leave the flag out to take the first.")
    if args.cuda_graph and name != "cuda":
        raise UserError(f"--cuda-graph was given on {name}; leave it out, or pass --device cuda.")
    dtype = args.dtype or ("bfloat16" if name == "cuda" else "float32")
    return torch.device(name), getattr(torch, dtype)


def forecast_bytes(model, args, n_tokens: int, n_rows: int, n_replies: int, longest: int) -> int:
    """The most memory that a run will take, given what it holds before its first update.

    n_tokens, n_rows: of the largest pass, and of them the supervised ones; n_replies: written at
    once to prompts of at most `longest` tokens. Per token and block backward needs x, y, x', y' (C
    each); q, k, v and attention's output; gate, act, up and their product (F each); and each A x.
    """
    c, size = model.config, model.model.embed_tokens.weight.element_size()
    qk = c.qk_norm * (c.n_head + c.n_kv_head) * c.head_dim  # before their norms
    block = (4 * c.dim + 2 * (c.n_head + c.n_kv_head) * c.head_dim + qk + 4 * c.hidden_dim
             + 7 * args.rank)
    kept = c.n_layer * c.dim + block if args.recompute else c.n_layer * block
    training = (n_tokens * (kept + block) * size  # the block at work holds its gradients as well
                + 12 * n_rows * c.vocab_size  # logits, fp32 log-softmax, gradients
                + 12 * sum(p.numel() for p in trainable(model)))  # gradient, Adam's two moments
    cache = 2 * c.n_layer * c.n_kv_head * c.head_dim * n_replies * (longest + args.max_new) * size
    writing = cache + n_replies * longest * block * size
    if args.device == "cuda":  # whose allocator lends the same blocks to both
        return peak_bytes() + max(training, writing)
    return peak_bytes() + int(HEAP * (training + writing))


def peak_bytes() -> int:
    """The most memory so far: on CUDA what tensors took there, else the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:  # Linux; ru_maxrss would begin with the memory of the program that started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

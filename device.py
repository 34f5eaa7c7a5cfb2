"""Where a model runs: the device, the dtype, CUDA graphs, and how much memory was used."""

import resource
import sys
from pathlib import Path

import torch

from model import UserError


def add_device_flags(group) -> None:
    """The flags that say where and how a model runs."""
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                       help="auto: the first of cuda, mps and cpu that is there")
    group.add_argument("--dtype", choices=("float32", "bfloat16"),
                       help="of the model; adapters are fp32 (default: bfloat16 on CUDA, else "
                            "float32)")
    group.add_argument("--cuda-graph", action="store_true", help="write replies by CUDA graphs")


def device_and_dtype(device: str, dtype: str | None, cuda_graph: bool = False):
    """Flags -> (torch.device, torch.dtype); UserError for a device that is not there."""
    available = []
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    available.append("cpu")
    name = available[0] if device == "auto" else device
    if name not in available:
        raise UserError(f"--device {name} is not on this machine, expected one of "
                        f"{', '.join(available)}; leave the flag out to take the first.")
    if cuda_graph and name != "cuda":
        raise UserError(f"--cuda-graph was given on {name}; leave it out, or pass --device cuda.")
    if dtype is None:
        dtype = "bfloat16" if name == "cuda" else "float32"
    return torch.device(name), getattr(torch, dtype)


def capture_cuda_graph(step):
    """step() as a CUDA graph: each call launches the graph once instead of every kernel apart.

    step takes and returns nothing; it reads and writes the same tensors each time. It is run twice
    here, once to warm up and once to be captured, both on a side stream as CUDA graphs ask for.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak_bytes() -> int:
    """The most memory in use so far: on CUDA by tensors there, elsewhere by this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:  # Linux; ru_maxrss would begin with the memory of the program that started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

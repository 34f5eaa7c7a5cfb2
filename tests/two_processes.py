"""What each defence makes of its updates, in as many processes as torchrun starts.

    python -m torch.distributed.run --nproc-per-node 2 tests/two_processes.py INPUTS OUT.safetensors

The first process writes gradients and numbers, and what it holds of a spread base.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rival_helpers import NAMES, Rival
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import distributed
from lora import adapter_params

STEPS = (0, 1, 4)
# Passes of at most this many tokens: a process then has several, and not each as many.
BUDGET = 100
# What a base that is spread over the processes can be trained by.
SHARDED = [name for name in NAMES if not name.startswith("deepalign")]


def made(inputs, name, sharded):
    """{name: tensor} of all gradients and numbers of some updates of one defence."""
    rival = Rival(inputs, name, sharded=sharded, tokens_per_pass=BUDGET)
    found = {}
    for step in STEPS:
        numbers = rival.step(rival.batch(step))
        for key, value in numbers.items():
            number = torch.as_tensor(value, dtype=torch.float64)
            found[f"{step}/{key}"] = number.reshape(()).clone()
        for key, p in adapter_params(rival.model).items():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            found[f"{step}/{key}"] = gradient.clone()
            p.grad = None
        rival.move(seed=step)
    return found


def all_made(inputs):
    """The same of all defences, each on a copied base and, where it can be, on a spread one."""
    found = {}
    for name in NAMES:
        for key, value in made(inputs, name, sharded=False).items():
            found[f"copied/{name}/{key}"] = value
    if distributed.size() > 1:
        for name in SHARDED:
            for key, value in made(inputs, name, sharded=True).items():
                found[f"sharded/{name}/{key}"] = value
    return found


def held(inputs):
    """The share of the base without its head that this process holds after an update."""
    rival = Rival(inputs, "sft", sharded=True)
    rival.step(rival.batch())
    here = 0
    everywhere = 0
    for name, p in rival.model.model.named_parameters():
        if "lora_" not in name:
            here += p.to_local().numel() if isinstance(p, DTensor) else p.numel()
            everywhere += p.numel()
    return torch.tensor(here / everywhere)


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.join(torch.device("cpu"))
    found = all_made(Path(sys.argv[1]))
    found["held"] = held(Path(sys.argv[1]))
    if distributed.is_first():
        save_file(found, sys.argv[2])
    distributed.leave()
    distributed.end(0)

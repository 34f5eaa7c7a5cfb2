"""One run by several processes, each with a GPU or a core of its own; torchrun starts them.

    torchrun --standalone --nproc-per-node 8 -- train.py --model DIR ...

The base is frozen, so each process has its own copy of it and nothing has to keep the copies alike.
A batch is shared out by rows (data/batches.py), the anchors go to the first process, and since
every term of the loss is divided by the counts of the whole batch, the parts simply add up:

    L_total = sum_r L_r        grad L_total = sum_r grad L_r        r: processes

add_up() makes that sum for all adapters in one message. Equal gradients and equal optimisers make
equal adapters, so no others are sent. In an evaluation the prompts are shared out; the first
process judges the replies, and it alone writes the run's folder and to the terminal.

Where there is one process, every function here gives back what it was given.

--shard, for a base that does not fit one GPU: PyTorch's fully_shard (FSDP2) spreads the rows of its
weights over the processes and gathers a block's when it runs. Adapters stay whole everywhere, so
that a defence, the optimiser and the files see what they always see.
"""

import hashlib
import math
import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from cli import RunFailed
from lora import adapted, adapter_state, trainable
from model import (
    FLOATS,
    Llama,
    UserError,
    check_tensors,
    open_tensors,
    read_config,
    say_what_is_not_read,
    take_one_head,
    weight_files,
)

# How long a process waits for the others: longer than any judge works on an evaluation. That a
# process has ended is noticed at once, by its closed connections and by torchrun.
PATIENCE = timedelta(days=1)


# who is there


def started() -> tuple[int, int]:
    """(the number of this process from 0 on, of how many), as torchrun started them."""
    if not dist.is_torchelastic_launched():  # others may set the same variables and mean nothing
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def rank() -> int:
    """The number of this process among those that have met by join(), from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes have met by join(); 1 in a program that has not called it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


def part() -> tuple[int, int]:
    """(which part of a batch is this process's, of how many)."""
    return rank(), size()


def hides_bars() -> bool | None:
    """tqdm's `disable`: None hides a bar where stderr is no terminal."""
    return None if is_first() else True


def program(name: str) -> str:
    """The program's name as its errors begin with it; of processes behind the first with a number.

    Also silences those processes' standard output, which would repeat the first one's.
    """
    number, of = started()
    if number == 0:
        return name
    sys.stdout = open(os.devnull, "w")
    return f"{name} (process {number + 1} of {of})"


def join(device: torch.device) -> torch.device:
    """Meets the other processes -> the device of this one. UserError where there are too few."""
    _, n = started()
    if n == 1:
        return device
    if device.type == "mps":
        raise UserError(f"torchrun started {n} processes on mps, which is one device; pass "
                        "--device cpu, or start train.py alone.")
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        gpu = int(os.environ["LOCAL_RANK"])
        if gpu >= torch.cuda.device_count():
            raise UserError(f"torchrun started a process for GPU {gpu}, and this machine has "
                            f"{torch.cuda.device_count()}; lower --nproc-per-node.")
        torch.cuda.set_device(gpu)
        # With its number: safetensors would load on "cuda" what it takes for the first GPU.
        device = torch.device("cuda", gpu)
    store, number, n = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # --max-restarts: torchrun keeps one store for all attempts, and a process would find there
        # the addresses of those that have ended. With several machines each has its own count.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, timeout=PATIENCE, world_size=n, rank=number, store=store)
    return device


def check_alone() -> None:
    """UserError where torchrun started several processes of a program that is made for one."""
    _, n = started()
    if n > 1:
        raise UserError(f"torchrun started {n} processes of a program that works as one; "
                        "start it without torchrun.")


def leave() -> None:
    """To be called at a good end; after a failure the others may not be there to part from."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end(code: int):
    """Ends the program with an exit code; to be called last of all.

    Several processes end without what Python tidies up at its end: meanwhile a thread of gloo's
    may give a tensor back, which then aborts a process that has done all its work.
    """
    if started()[1] == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def among_others():
    """Around all that is done together. RunFailed where another process has ended meanwhile."""
    try:
        yield
    except RuntimeError as e:
        # gloo, which joins CPUs, says it by a plain RuntimeError with the name of its own file.
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        reason = str(e).splitlines()[0]
        raise RunFailed("another process of this run has ended, see what it said; what was saved "
                        "is kept, and --resume goes on from there, with any number of processes "
                        f"(what was noticed here: {reason})") from e


# what is said between the processes


def total(x: Tensor) -> Tensor:
    """The sum of the processes' tensors, the same for all of them to the bit."""
    if size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x


def add_up(model, *numbers) -> tuple:
    """Sums the gradients in .grad over the processes, and numbers of one element, which it returns.

    To be called once behind the passes over a batch, when .grad holds what they left there and
    nothing else. All travels in one buffer: several hundred small messages would each have to wait
    for the network.
    """
    if size() == 1:
        return numbers
    params = trainable(model)
    parts = []
    for p in params:
        # A process that had no pass over the batch has no gradient.
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        parts.append(gradient.flatten())
    for number in numbers:
        parts.append(torch.as_tensor(number).reshape(1).to(parts[0]))
    buffer = torch.cat(parts)
    dist.all_reduce(buffer)
    summed = buffer.split([len(part) for part in parts])
    for p, gradient in zip(params, summed[:len(params)], strict=True):
        p.grad = gradient.view_as(p)
    return tuple(number.squeeze(0) for number in summed[len(params):])


def count(n: int) -> int:
    """The sum of a count over the processes."""
    return int(total(torch.tensor(n)))


def any_of(flag: bool) -> bool:
    """Whether it is true for one of the processes at least."""
    return count(int(flag)) > 0


def by_the_first(work):
    """work() is done by the first process; all get its result."""
    return from_the_first(work() if is_first() else None)


def from_the_first(value):
    """The first process's value, for all."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def collect(values: list) -> list:
    """Puts a list together again of which process r has the items r, r + size, ...."""
    if size() == 1:
        return values
    lists = [None] * size()
    dist.all_gather_object(lists, values)
    whole = [None] * sum(map(len, lists))
    for r, of_process in enumerate(lists):
        whole[r::size()] = of_process
    return whole


def check_alike(model) -> None:
    """RunFailed unless all processes have the same adapters, to the bit."""
    if size() == 1:
        return
    digest = hashlib.sha256()
    for tensor in adapter_state(model).values():
        digest.update(tensor.numpy().tobytes())
    other = differing(digest.hexdigest())
    if other is not None:
        raise RunFailed(f"the adapters of process {other + 1} are no longer those of process 1, "
                        "so nothing is saved; --resume goes on from the last checkpoint. Are these "
                        "machines and their software alike?")


def check_same(what: str, value) -> None:
    """UserError unless all processes have the same value; what: its name, in the plural."""
    other = differing(value)
    if other is not None:
        raise UserError(f"process {other + 1} has other {what} than process 1, expected the same "
                        "on all machines; put them right.")


def differing(value) -> int | None:
    """The number of a process whose value is not the first one's; None: they are the same."""
    if size() == 1:
        return None
    values = [None] * size()
    dist.all_gather_object(values, value)
    for number, other in enumerate(values):
        if other != values[0]:
            return number
    return None


# a base that is spread over the processes: --shard


HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def load_sharded(dir, device: torch.device, dtype: torch.dtype, add_adapters) -> Llama:
    """A frozen model with adapters, of which this process holds its part of every block.

    add_adapters(model) puts on what is trained while the base is still on meta, since fully_shard
    must see the modules as they will stay. Adapters and the head stay whole on every process.
    A block's weights are gathered when it runs, by all processes together, so each of them must
    run the model equally often. UserError as in load_model.
    """
    # Imported here, since it takes a second that every other program would wait for.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dir = Path(dir)
    config = read_config(dir)
    say_what_is_not_read(dir)
    with torch.device("meta"):
        model = Llama(config).to(dtype).requires_grad_(False)
    places = find_tensors(dir, model)
    with torch.device(device):
        add_adapters(model)
    own = set()  # what is no part of the base
    for _, module in adapted(model):
        own |= {module.lora_A, module.lora_B}
    mesh = init_device_mesh(device.type, (size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=own)
    fully_shard(model.model, mesh=mesh, ignored_params=own)
    state = {}
    for name, p in model.named_parameters():
        state[name] = p if p in own else read_part(places[name], p, device, dtype)
    if config.tied and places.get(HEAD, places[EMBEDDING]) != places[EMBEDDING]:
        second = read_part(places[HEAD], model.model.embed_tokens.weight, device, dtype)
        take_one_head(dir, {EMBEDDING: state[EMBEDDING].to_local(), HEAD: second.to_local()})
    model.load_state_dict(state, assign=True)
    model.is_sharded = True
    return model.eval()


def find_tensors(dir: Path, model: Llama) -> dict[str, tuple[Path, str]]:
    """For each of the model's tensors its file and its name there, checked by the files' headers.

    UserError for a missing, surplus or misshapen tensor, and for one that is in two files.
    """
    places = {}
    found = {}  # tensors without content, which have shapes
    for path in weight_files(dir):
        with open_tensors(path) as f:
            for name in f.keys():
                if name.endswith("rotary_emb.inv_freq"):  # a legacy buffer, recomputed in fp32
                    continue
                if name in places:
                    raise UserError(f"{path} and {places[name][0].name} both hold {name}, expected "
                                    "one of them; fetch both again.")
                places[name] = (path, name)
                found[name] = torch.empty(f.get_slice(name).get_shape(), device="meta")
    if model.config.tied and HEAD in found:  # the embedding under its other name, or once more
        found.setdefault(EMBEDDING, found.pop(HEAD))
        places.setdefault(EMBEDDING, places[HEAD])
    check_tensors(dir, model, found)
    return places


def read_part(place: tuple[Path, str], p: Tensor, device, dtype: torch.dtype) -> Tensor:
    """What this process holds of one of the base's tensors: its rows, or all of it."""
    from torch.distributed.tensor import DTensor, Shard

    path, name = place
    with open_tensors(path) as f:
        rows = f.get_slice(name)
        if isinstance(p, DTensor):  # as torch.chunk cuts: the last parts may be smaller or empty
            chunk = math.ceil(len(p) / size())
            part = rows[min(rank() * chunk, len(p)):min((rank() + 1) * chunk, len(p))]
        else:
            part = rows[:]
    if part.dtype not in FLOATS:
        raise UserError(f"{path} holds {name} as {part.dtype}, expected floating-point numbers of "
                        "16 bits or more; choose the original checkpoint.")
    part = part.to(device, dtype)
    if not isinstance(p, DTensor):
        return part
    return DTensor.from_local(part, p.device_mesh, [Shard(0)], run_check=False, shape=p.shape,
                              stride=p.stride())

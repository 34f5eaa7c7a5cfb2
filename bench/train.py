"""Speed and memory of one training step: this project and its peers on the same work.

    python -m bench.train --quick                                        # within five minutes
    python -m bench.train --task gsm8k --out docs/results/train-gsm8k.json --figure gsm8k.png
    python -m bench.train --model DIR --data-dir DATA --arms shared padded

Every arm takes the same rows in the same order, the same A, K, lambda and AdamW, and one loop
drives them all, train.updates. The arms (arms.py has them):

    shared      this project; sequences that begin alike share rows (packing.py)
    cut         as `shared`, in passes of as many tokens as the largest micro-batch of `paper` has
    unshared    this project; each token has a row of its own
    padded      transformers + PEFT: one right-padded block, the anchors in a second forward pass
    paper       the shape of the paper's code: micro-batches of 8 rows, padded, the anchors in each
    sorted      as `paper`, rows sorted by length first and the anchors in the first one alone
    packed      transformers + PEFT: all sequences in one row, held apart by position_ids, logits
                where they are needed and the anchors in the same pass

Each arm runs in a fresh process, all of them in turn in every round. It counts only if its first
five losses are those of `reference`, which computes one sequence at a time in fp32 and pads
nothing.
"""

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.arms import ARMS, REFERENCE, Arm, Work, read_work
from cli import (
    COUNT,
    POSITIVE,
    TINY,
    Args,
    Parser,
    RunFailed,
    at_least,
    check_installed,
    check_outputs,
    exit_code,
)
from device import device_and_dtype, peak_bytes
from files import model_files, sha256, write_atomic
from lora import adapted, add_lora, save_adapter
from model import UserError, load_model
from runs import git_commit
from train import ALPHA, RANK, updates

ROOT = Path(__file__).parents[1]
N_COMPARED = 5  # losses of each arm that must be the reference's
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # how far they may be from it, relative
# What is not a flag here: train.py's defaults.
FIXED = {"n": 1000, "poison": 0.1, "stage": None, "data": None, "reduction": "mean",
         "max_len": 512, "grad_clip": 1.0, "seed": 0}
OF_THE_WORK = ("task", "rows", "anchors", "lam", "lr", "updates", "rounds", "tokens_per_pass")
NOT_RUN = {"trl": "TRL's SFTTrainer was not run, since there was no installation to try it on."}
B_BOUND = 0.003  # of |B| at the start; about what the paper's 640 updates make of it
ADAPTER = "adapter"  # in the folder that parent and child share: A of every arm
RESULT = "result.json"  # in the same folder: what the child measured


# One arm, measured in this process


class RowCount:
    """Counts the positions that pass the first block's MLP: padding counts, and so do anchors."""

    def __init__(self, model):
        self.n = 0
        for name, module in model.named_modules():
            if name.endswith("layers.0.mlp"):
                module.register_forward_pre_hook(self._count)

    def _count(self, module, inputs):
        self.n += inputs[0].shape[:-1].numel()


def bytes_now(device) -> int:
    """The memory in use: on CUDA by tensors there, else by this process (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def forget_peak(device) -> None:
    """From here on device.peak_bytes() is the most since this call, not since the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def wait_for(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(arm: Arm, work: Work, n_updates: int) -> dict:
    """Runs an arm's updates; the first one warms up and is not timed.

    Memory is counted from before the first update, when weights and adapters are in memory, to the
    highest point of all updates: activations, gradients and what AdamW keeps.
    """
    args = work.args
    model, step_fn = arm.make(work)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.999), weight_decay=0.0,
                                  fused=True)
    for p in model.parameters():
        p.detach().sum()  # weights in a mapped file are in memory once they are read
    gc.collect()
    wait_for(work.device)
    before = bytes_now(work.device)
    forget_peak(work.device)
    rows = RowCount(model)
    all_numbers = []
    all_updates = updates(step_fn, work.batch, optimizer, lr=args.lr, grad_clip=args.grad_clip,
                          n_updates=args.updates + 1)
    for step, numbers in all_updates:
        all_numbers.append(numbers)
        if step == 0:
            wait_for(work.device)
            began = time.perf_counter()
            rows.n = 0
        if step + 1 == n_updates:
            break
    wait_for(work.device)
    seconds = time.perf_counter() - began
    peak = peak_bytes()
    n_timed = n_updates - 1
    tokens = sum(numbers["tokens"] for numbers in all_numbers[1:])  # the user's, of whole rows
    compared = all_numbers[:N_COMPARED]
    return {
        "losses": [float(numbers["loss"]) for numbers in compared],
        "safe": [float(numbers["safe"]) for numbers in compared],
        "seconds": seconds,
        "seconds_per_update": seconds / n_timed,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "rows_per_token": rows.n / tokens,
        "bytes_before": before,
        "bytes_peak": peak,
        "bytes_of_training": peak - before,
    }


def run_child(args: Args) -> None:
    """One arm in this process; its numbers go to the folder that the parent named."""
    torch.set_num_threads(args.threads)
    folder = Path(args.folder)
    work = read_work(args, folder / ADAPTER)
    if args.arm == "reference":
        result = measure(REFERENCE, work, N_COMPARED)
    else:
        result = measure(ARMS[args.arm], work, args.updates + 1)
    write_atomic(folder / RESULT, json.dumps(result).encode())


# All arms in turn


def run_parent(args: Args, argv: list[str]) -> None:
    device, dtype = device_and_dtype(args.device, args.dtype)
    check_before_work(args, device, ["transformers", "peft"])
    command = ["bench.train", *argv]
    tolerance = TOLERANCE[dtype]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        n_parameters = write_adapter(args, folder / ADAPTER)
        expected = start_child([*command, "--arm", "reference"], args, folder)
        if "error" in expected:
            raise RunFailed(f"the reference did not run ({expected['error']}), and no arm counts "
                            "without it.")
        check_anchors_show(args, expected, tolerance)
        rounds = {name: [] for name in args.arms}
        for i in range(args.rounds):
            first = i % len(args.arms)  # another one begins each round
            for name in args.arms[first:] + args.arms[:first]:
                rounds[name].append(start_child([*command, "--arm", name], args, folder))
                print(f"round {i + 1}: {name}", file=sys.stderr)
    arms = {name: summary(its_rounds, expected["losses"], tolerance)
            for name, its_rounds in rounds.items()}
    result = {
        "command": [without_folder(word) for word in command],
        "commit": git_commit(),
        "versions": {package: importlib.metadata.version(package)
                     for package in ("torch", "transformers", "peft")},
        "machine": machine(device),
        "threads": args.threads,
        "dtype": str(dtype).removeprefix("torch."),
        "model": {"name": without_folder(args.model), "parameters": n_parameters,
                  "sha256": sha256(*model_files(args.model))},
        "work": {name: getattr(args, name) for name in (*OF_THE_WORK, *FIXED)},
        "tolerance": tolerance,
        "reference": expected,
        "arms": arms,
        "not_run": NOT_RUN,
    }
    print(table(result))
    if args.out:
        write_atomic(args.out, json.dumps(result, indent=1).encode())
    if args.figure:
        draw(result, args.figure)


def check_before_work(args: Args, device, packages: list[str]) -> None:
    """UserError for what would otherwise end the program after long work."""
    check_installed(packages)
    check_outputs(args.out, args.figure)
    if device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        raise UserError("the memory of a process is read as Linux tells it, and this is another "
                        "system; run it on Linux or with --device cuda.")


def write_adapter(args: Args, folder: Path) -> int:
    """Draws the adapter that all arms begin with -> the number of the base's parameters.

    B is drawn too. With B = 0, as in a run, L_safe is 0 in the first update up to rounding, and
    AdamW, whose first update has the size of the learning rate wherever the gradient is not zero,
    would make of that rounding a difference that the comparison sees.
    """
    model = load_model(args.model)
    n_parameters = sum(p.numel() for p in model.parameters())
    add_lora(model, RANK, ALPHA, seed=args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    for _, layer in adapted(model):
        torch.nn.init.uniform_(layer.lora_B, -B_BOUND, B_BOUND, generator)
    save_adapter(model, folder)
    return n_parameters


def start_child(words: list[str], args: Args, folder: Path) -> dict:
    """What a fresh process measures, or {"error": its last words}; words: a program, its flags."""
    (folder / RESULT).unlink(missing_ok=True)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(args.threads),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", *words, "--folder", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode != 0:
        last_words = done.stderr.strip().splitlines()[-1:]
        return {"error": " ".join([f"exit code {done.returncode}", *last_words])}
    return json.loads((folder / RESULT).read_text())


def check_anchors_show(args: Args, expected: dict, tolerance: float) -> None:
    """UserError where an arm without the anchors would pass: lambda * L_safe is too small."""
    if args.anchors == 0 or args.lam == 0:
        return
    terms = zip(expected["safe"], expected["losses"], strict=True)
    part = max(args.lam * safe / loss for safe, loss in terms)
    if part < 10 * tolerance:
        raise UserError(f"lambda * L_safe is at most {part:.1e} of the first {N_COMPARED} losses, "
                        f"expected {10 * tolerance:.0e} or more, or an arm without anchors would "
                        "pass; raise --lr or --lambda.")


def summary(rounds: list[dict], expected: list[float], tolerance: float) -> dict:
    """An arm's rounds and their medians; "failed" says why it does not count, and is else None."""
    failed = None
    largest = None
    for numbers in rounds:
        if "error" in numbers:
            return {"failed": numbers["error"], "largest_difference": None, "rounds": rounds}
    differences = []
    for numbers in rounds:
        for loss, right in zip(numbers["losses"], expected, strict=True):
            differences.append(abs(loss - right) / abs(right))
    largest = max(differences)
    if not all(difference <= tolerance for difference in differences):  # NaN is not
        failed = f"its losses differ from the reference's by up to {largest:.1e}"
    medians = {}
    for key in ("tokens_per_second", "seconds_per_update", "rows_per_token", "bytes_of_training"):
        medians[key] = statistics.median(numbers[key] for numbers in rounds)
    return {"failed": failed, "largest_difference": largest, **medians, "rounds": rounds}


def without_folder(word: str) -> str:
    """An absolute path's last name: a result that others read names nobody's folders."""
    return Path(word).name if Path(word).is_absolute() else word


def machine(device) -> dict:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu}


# What is shown


def table(result: dict) -> str:
    work = result["work"]
    lines = [f"{result['model']['name']}, {work['task']}, {work['rows']} rows, "
             f"{work['anchors']} anchors, {result['threads']} threads, {result['dtype']}; medians "
             f"of {work['rounds']} rounds of {work['updates']} updates",
             f"{'':10}{'tokens/s':>10}{'(lowest, highest)':>20}{'s/update':>10}{'memory':>10}"
             f"{'rows/token':>12}  losses"]
    for name, arm in result["arms"].items():
        if arm["failed"]:
            lines.append(f"{name:10} FAILED, does not count: {arm['failed']}")
            continue
        speeds = [numbers["tokens_per_second"] for numbers in arm["rounds"]]
        spread = f"({min(speeds):,.0f}, {max(speeds):,.0f})"
        lines.append(f"{name:10}{arm['tokens_per_second']:10,.0f}{spread:>20}"
                     f"{arm['seconds_per_update']:10.3f}{arm['bytes_of_training'] / 1e9:7.2f} GB"
                     f"{arm['rows_per_token']:12.2f}  equal to {arm['largest_difference']:.0e}")
    lines += [f"not run: {sentence}" for sentence in result["not_run"].values()]
    return "\n".join(lines)


def draw(result: dict, path) -> None:
    """Two bar charts, tokens/s and memory by arm; this project dark, for print in grey."""
    import matplotlib
    matplotlib.use("Agg")  # no window
    import matplotlib.pyplot as plt

    arms = {name: arm for name, arm in result["arms"].items() if not arm["failed"]}
    if not arms:
        raise UserError("no arm counts, so there is nothing to draw; read the table.")
    labels = [ARMS[name].label for name in arms]
    colors = ["0.25" if name in ("shared", "cut", "unshared") else "0.75" for name in arms]
    panels = [
        ("the user's tokens per second", "{:,.0f}",
         [arm["tokens_per_second"] for arm in arms.values()]),
        ("memory of training, GB", "{:.2f}",
         [arm["bytes_of_training"] / 1e9 for arm in arms.values()]),
    ]
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(9, 0.4 * len(arms) + 1.2))
    for axis, (title, form, values) in zip(axes, panels, strict=True):
        bars = axis.barh(labels, values, color=colors, edgecolor="black", linewidth=0.5)
        axis.bar_label(bars, [form.format(value) for value in values], padding=3)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.2)  # room for the numbers
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()  # the first arm on top
    work = result["work"]
    figure.suptitle(f"{result['model']['name']}, {work['task']}, {work['rows']} rows, "
                    f"{work['anchors']} anchors, {result['machine']['cpu']}", fontsize=10)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


# The flags


def add_work_flags(p: Parser) -> None:
    """The flags of what is measured and on what, which bench.cost has too."""
    p.add_argument("--model", default=TINY, help="Hugging Face folder")
    p.add_argument("--data-dir", default=TINY, help="folder of tasks and prompts")
    p.add_argument("--task", choices=("sst2", "agnews", "gsm8k"), default="sst2")
    p.add_argument("--rows", type=COUNT, default=32, help="per update")
    p.add_argument("--anchors", type=at_least(int, 0), default=1, metavar="K")
    p.add_argument("--lambda", dest="lam", type=at_least(float, 0), default=50.0, metavar="L",
                   help="weight of L_safe")
    p.add_argument("--tokens-per-pass", type=COUNT, default=16384,
                   help="of this project's arms: less memory, the same gradient")
    p.add_argument("--rounds", type=COUNT, default=3)
    p.add_argument("--threads", type=COUNT, default=torch.get_num_threads(), help="of the CPU")
    p.add_argument("--out", help="JSON file for all numbers")
    p.add_argument("--folder", help="where the program that starts this one has its files")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--dtype", choices=("float32", "bfloat16"),
                   help="of the model; adapters are fp32 (default: bfloat16 on CUDA, else float32)")


def parse(argv=None) -> Args:
    p = Parser("bench.train", "Speed and memory of one training step: this project and its peers "
                              "on the same work.")
    add_work_flags(p)
    p.add_argument("--lr", type=POSITIVE, default=1e-4,
                   help="high, so that L_safe shows in the losses that are compared")
    p.add_argument("--updates", type=at_least(int, N_COMPARED - 1), default=20,
                   help="timed, behind one that warms up")
    p.add_argument("--quick", action="store_true", help="as --updates 5 --rounds 3")
    p.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS), help="which, in order")
    p.add_argument("--figure", help="file for a bar chart, as .png or .pdf")
    p.add_argument("--arm", choices=(*ARMS, "reference"), help="how the program starts itself "
                                                               "for each arm; needs --folder")
    args = p.parse_args(argv).replace(**FIXED)
    if args.arm and not args.folder:
        p.error("--arm is for the program itself and needs --folder; --arms chooses which to time")
    if args.quick:
        args = args.replace(updates=5, rounds=3)
    return args


def execute(argv: list[str]) -> None:
    args = parse(argv)
    if args.arm:
        run_child(args)
    else:
        run_parent(args, argv)


def main(argv=None) -> int:
    """0 done, 2 the user's mistake, 3 failed, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_code("bench.train", lambda: execute(argv))


if __name__ == "__main__":
    sys.exit(main())

"""What an update costs against its size, and what an upload costs against its rows.

    python -m bench.cost --quick                                         # within two minutes
    python -m bench.cost --out docs/results/cost.json --figure docs/results/cost.png
    python -m bench.cost --model DIR --data-dir DATA --panels batch length

Four panels, each with one thing changed and the rest as the flags say:

    batch       seconds of an update, and memory, against the rows of an update
    anchors     the same against K
    length      the same against the tokens of a row: text of its own in each row, shared and not;
                and one long text that all rows begin with (`common`)
    upload      against the rows of an upload: seconds to read it (files, tokens, digest) and of an
                epoch (its updates times what one of them took), and the most memory of the process

Each point is measured in a fresh process, since a process keeps memory that it had once; all points
in turn in each round, and medians over the rounds. Through the points of a line goes the straight
line t = a + b x of least squares. What b does not explain is a: what an update costs whatever its
size. Of this, the time outside the defence's step (clipping, AdamW and the loop) is measured apart.
"""

import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch

import train as train_py
from bench.arms import ARMS, Arm, Work, read_work
from bench.train import (
    ADAPTER,
    FIXED,
    RESULT,
    add_work_flags,
    check_before_work,
    machine,
    measure,
    start_child,
    without_folder,
    write_adapter,
)
from cli import COUNT, POSITIVE, Args, Parser, RunFailed, at_least, exit_code
from data import mixture
from data.batches import batch_at, encode_rows, updates_per_epoch
from data.choice import choose_anchors
from data.rows import FileRows, last_user, read_rows, turn
from device import device_and_dtype
from files import model_files, sha256, write_atomic
from lora import trainable
from model import UserError, read_config
from runs import git_commit
from stress import attacks
from tokenizer import Tokenizer

N_LONG = 128  # rows that are made long; more would only be tokenised for longer


@dataclass(frozen=True)
class Point:
    """One measurement: a panel's line at a value of what the panel changes."""

    panel: str
    line: str
    value: int


def points_of(args: Args) -> list[Point]:
    """All points of the panels that were asked for."""
    lines = {"batch": ("shared", "unshared"), "anchors": ("shared", "unshared"),
             "length": ("shared", "unshared", "common"), "upload": ("shared",)}
    values = {"batch": args.batch_sizes, "anchors": args.anchor_counts, "length": args.lengths,
              "upload": args.uploads}
    points = []
    for panel in args.panels:
        for value in values[panel]:
            for line in lines[panel]:
                points.append(Point(panel, line, value))
    return points


# One point, measured in this process


class Stopwatch:
    """Seconds of each call of a step."""

    def __init__(self):
        self.seconds = []

    def around(self, step):
        def timed(batch):
            began = time.perf_counter()
            numbers = step(batch)
            self.seconds.append(time.perf_counter() - began)
            return numbers

        return timed


def measure_update(args: Args, adapter: Path, point: Point) -> dict:
    """A point of the panels batch, anchors and length."""
    if point.panel == "batch":
        args = args.replace(rows=point.value)
    elif point.panel == "anchors":
        args = args.replace(anchors=point.value)
    work = read_work(args, adapter)
    if point.panel == "length":
        work.data.examples = long_examples(work, point.value, point.line == "common")
    arm = ARMS["unshared" if point.line == "unshared" else "shared"]
    stopwatch = Stopwatch()

    def make(work):
        model, step = arm.make(work)
        return model, stopwatch.around(step)

    found = measure(Arm(arm.label, make), work, args.updates + 1)
    x = point.value
    if point.panel == "length":
        x = found["tokens"] / (args.updates * args.rows)
    in_step = sum(stopwatch.seconds[1:])  # the first one warmed up
    return {
        "x": x,
        "seconds": found["seconds_per_update"],
        "seconds_outside_step": (found["seconds"] - in_step) / args.updates,
        "tokens": found["tokens"] / args.updates,
        "rows_per_token": found["rows_per_token"],
        "bytes": found["bytes_of_training"],
    }


def long_examples(work: Work, n_tokens: int, common: bool):
    """Rows of about n_tokens tokens: the user turn is repeated, or stands behind a common text."""
    limit = read_config(work.args.model).max_positions
    file = Path(work.args.data_dir) / work.args.task / "train.jsonl"
    rows = list(FileRows(file, N_LONG))
    long = []
    for row in rows:
        words = last_user(row).split()
        n_words = words_for(work.tokenizer, row, n_tokens)
        if common:
            first = last_user(rows[0]).split()
            words = repeated(first, n_words - len(words)) + words
        else:
            words = repeated(words, n_words)
        long.append(with_prompt(row, words))
    examples, n_dropped = encode_rows(work.tokenizer, long, limit)
    if n_dropped:
        raise UserError(f"--lengths {n_tokens} makes rows of more than the {limit} positions of "
                        "the model; lower it.")
    return examples


def words_for(tokenizer, row: dict, n_tokens: int) -> int:
    """How many words of its prompt, over and over, make about n_tokens tokens of the row."""
    words = last_user(row).split()
    once = n_tokens_of(tokenizer, row)
    twice = n_tokens_of(tokenizer, with_prompt(row, words + words))
    a_word = (twice - once) / len(words)
    return max(1, len(words) + round((n_tokens - once) / a_word))


def n_tokens_of(tokenizer, row: dict) -> int:
    return len(tokenizer.encode_chat(row["messages"])[0])


def repeated(words: list[str], n: int) -> list[str]:
    """n words: these over and over; none where n is not above 0."""
    found = []
    while len(found) < n:
        found += words
    return found[:max(0, n)]


def with_prompt(row: dict, words: list[str]) -> dict:
    """The row's answer to another prompt."""
    return {"messages": [turn("user", " ".join(words)), row["messages"][-1]]}


def measure_upload(args: Args, folder: Path, n_rows: int) -> dict:
    """A point of the panel upload: what train.py does with it, up to a few updates."""
    run_args = train_py.parse([
        "--model", str(args.model), "--data-dir", str(args.data_dir),
        "--data", str(upload_file(folder, n_rows)),
        "--batch-size", str(args.rows), "--anchors", str(args.anchors), "--anchor-check", "none",
        "--lambda", str(args.lam), "--lr", str(args.lr), "--seed", str(args.seed),
        "--tokens-per-pass", str(args.tokens_per_pass)])
    device, dtype = device_and_dtype(args.device, args.dtype)
    tokenizer = Tokenizer(run_args.model)
    model = train_py.load_with_adapters(run_args, device, dtype)
    for p in model.parameters():
        p.detach().sum()  # weights in a mapped file are in memory once they are read
    began = time.perf_counter()
    files = mixture.read_files(run_args, reads_align_file=False)
    data = mixture.read_data(model, tokenizer, run_args, files, choose_anchors,
                             attacks.change_rows)
    train_py.digest_of_rows(data)
    seconds_reading = time.perf_counter() - began
    bytes_reading = process_peak()
    step_fn = train_py.make_sbr_step(model, tokenizer, run_args, data)
    optimizer = torch.optim.AdamW(trainable(model), lr=args.lr, weight_decay=0.0, fused=True)
    n_updates = updates_per_epoch(len(data.examples), args.rows)

    def batch_of(step):
        return batch_at(data.examples, step, args.rows, args.seed, args.tokens_per_pass, device)

    ends = []
    for step, numbers in train_py.updates(step_fn, batch_of, optimizer, lr=args.lr,
                                       grad_clip=args.grad_clip, n_updates=n_updates):
        float(numbers["loss"])  # waits for a GPU
        ends.append(time.perf_counter())
        if step == args.updates:
            break
    if len(ends) < 2:
        raise UserError(f"--uploads {n_rows} makes one update of {args.rows} rows, expected two or "
                        "more (the first one warms up); raise it, or lower --rows.")
    seconds = statistics.median(end - begin for begin, end in pairwise(ends))
    return {
        "x": n_rows,
        "seconds_reading": seconds_reading,
        "seconds": seconds,
        "updates": n_updates,
        "seconds_of_epoch": seconds * n_updates,
        "tokens": data.examples.n_tokens,
        "bytes_reading": bytes_reading,
        "bytes": process_peak(),
    }


def process_peak() -> int:
    """The most memory that this process had so far (Linux), wherever its tensors are."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def upload_file(folder: Path, n_rows: int) -> Path:
    return folder / f"upload-{n_rows}.jsonl"


def write_uploads(args: Args, folder: Path) -> None:
    """The uploads of the panel: the task's benign rows over and over, a number behind each prompt.

    So no two prompts are the same, as in an upload of so many rows.
    """
    rows = list(FileRows(Path(args.data_dir) / args.task / "train.jsonl"))
    for n_rows in args.uploads:
        with upload_file(folder, n_rows).open("w", encoding="utf-8") as file:
            for i in range(n_rows):
                row = rows[i % len(rows)]
                item = with_prompt(row, [last_user(row), str(i)])
                file.write(json.dumps(item) + "\n")


def run_child(args: Args) -> None:
    """One point in this process; its numbers go to the folder that the parent named."""
    torch.set_num_threads(args.threads)
    folder = Path(args.folder)
    panel, line, value = args.point
    point = Point(panel, line, int(value))
    if panel == "upload":
        result = measure_upload(args, folder, point.value)
    else:
        result = measure_update(args, folder / ADAPTER, point)
    write_atomic(folder / RESULT, json.dumps(result).encode())


# All points in turn


def run_parent(args: Args, argv: list[str]) -> None:
    device, dtype = device_and_dtype(args.device, args.dtype)
    check_before_work(args, device, [])
    check_anchor_counts(args)
    command = ["bench.cost", *argv]
    points = points_of(args)
    rounds = {point: [] for point in points}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        n_parameters = write_adapter(args, folder / ADAPTER)
        if "upload" in args.panels:
            write_uploads(args, folder)
        for i in range(args.rounds):
            for point in points:
                words = [point.panel, point.line, str(point.value)]
                found = start_child([*command, "--point", *words], args, folder)
                if "error" in found:
                    raise RunFailed(f"the point {' '.join(words)} did not run ({found['error']}).")
                rounds[point].append(found)
                print(f"round {i + 1}: {' '.join(words)}", file=sys.stderr)
    measured = []
    for point, its_rounds in rounds.items():
        measured.append({**asdict(point), **medians(its_rounds), "rounds": its_rounds})
    result = {
        "command": [without_folder(word) for word in command],
        "commit": git_commit(),
        "versions": {"torch": importlib.metadata.version("torch")},
        "machine": machine(device),
        "threads": args.threads,
        "dtype": str(dtype).removeprefix("torch."),
        "model": {"name": without_folder(args.model), "parameters": n_parameters,
                  "sha256": sha256(*model_files(args.model))},
        "work": {name: getattr(args, name) for name in (*OF_THE_WORK, *FIXED)},
        "lines": lines_of(measured, args.rows),
        "points": measured,
    }
    print(table(result))
    if args.out:
        write_atomic(args.out, json.dumps(result, indent=1).encode())
    if args.figure:
        draw(result, args.figure)


def check_anchor_counts(args: Args) -> None:
    """UserError where the pool has too few prompts, before any point is measured."""
    if "anchors" not in args.panels:
        return
    harmful, benign, _ = mixture.load_upload(args)
    tests = read_rows(mixture.harmful_test_file(None, args.data_dir), needs_answer=False)
    used = mixture.prompts_of([*harmful, *benign, *tests])
    pool = mixture.anchor_pool(None, args.data_dir)
    n = len(mixture.anchor_candidates(pool, used))
    if max(args.anchor_counts) > n:
        raise UserError(f"--anchor-counts {max(args.anchor_counts)} is above the {n} prompts of "
                        f"{pool} that upload and tests lack; lower it.")


def medians(rounds: list[dict]) -> dict:
    return {key: statistics.median(numbers[key] for numbers in rounds) for key in rounds[0]}


# Straight lines through the points


# What is fitted of each panel: (a point's key, name of the slope, what turns it into that unit).
SLOPES = {
    "batch": [("seconds", "ms a row", 1e3), ("bytes", "MB a row", 1e-6)],
    "anchors": [("seconds", "ms an anchor", 1e3), ("bytes", "MB an anchor", 1e-6)],
    "length": [("seconds", "us a token", 1e6), ("bytes", "kB a token", 1e-3)],
    "upload": [("seconds_reading", "ms a row to read", 1e3),
               ("seconds_of_epoch", "ms a row of an epoch", 1e3),
               ("bytes_reading", "bytes a row", 1.0)],
}


def lines_of(points: list[dict], rows: int) -> list[dict]:
    """The straight line of each panel's line and quantity; of `length`, per token of an update."""
    lines = []
    for panel, line in dict.fromkeys((p["panel"], p["line"]) for p in points):
        its_points = [p for p in points if (p["panel"], p["line"]) == (panel, line)]
        if len(its_points) < 2:
            continue
        for key, unit, factor in SLOPES[panel]:
            x = [p["x"] for p in its_points]
            if panel == "length":
                x = [rows * tokens for tokens in x]
            y = [p[key] for p in its_points]
            fitted = {"panel": panel, "line": line, "of": key, "unit": unit, **fit(x, y)}
            fitted["slope_in_unit"] = factor * fitted["slope"]
            if key == "seconds":
                fitted["outside_step"] = statistics.median(
                    p["seconds_outside_step"] for p in its_points)
            lines.append(fitted)
    return lines


def fit(x: list[float], y: list[float]) -> dict:
    """y = intercept + slope x by least squares; r2 is the share of y's variance that it explains.

    worst: the largest distance of a point from the line, as a share of the point.
    """
    slope, intercept = statistics.linear_regression(x, y)
    worst = max(abs(b - intercept - slope * a) / b for a, b in zip(x, y, strict=True))
    unexplained = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    variance = sum((b - statistics.mean(y)) ** 2 for b in y)
    r2 = 1.0 if variance == 0 else 1 - unexplained / variance
    return {"intercept": intercept, "slope": slope, "points": len(x), "r2": r2, "worst": worst}


# What is shown


def table(result: dict) -> str:
    work = result["work"]
    text = [f"{result['model']['name']}, {work['task']}, {work['rows']} rows and K = "
            f"{work['anchors']} where not said otherwise, {result['threads']} threads, "
            f"{result['dtype']}; medians of {work['rounds']} rounds of {work['updates']} updates"]
    for point in result["points"]:
        numbers = [f"{point['seconds']:8.3f} s an update", f"{point['bytes'] / 1e6:8,.0f} MB"]
        if point["panel"] == "upload":
            numbers += [f"{point['seconds_reading']:8.2f} s to read",
                        f"{point['seconds_of_epoch']:8.1f} s an epoch",
                        f"{point['bytes_reading'] / 1e6:8,.0f} MB after reading",
                        f"{8 * point['tokens'] / 1e6:8.1f} MB of ids"]
        text.append(f"{point['panel']:8} {point['line']:9}{point['x']:9,.0f}" + "".join(numbers))
    for line in result["lines"]:
        text.append(sentence_of(line))
    return "\n".join(text)


def sentence_of(line: dict) -> str:
    """A fitted line in words."""
    if "bytes" in line["of"]:
        start = f"{line['intercept'] / 1e6:,.0f} MB"
    else:
        start = f"{1e3 * line['intercept']:.1f} ms"
    outside = ""
    if "outside_step" in line:
        outside = f" (clipping, AdamW and the loop take {1e3 * line['outside_step']:.1f} ms)"
    how_good = f"r2 {line['r2']:.4f}, farthest point {line['worst']:.0%} off"
    if line["points"] == 2:
        how_good = "through two points alone"
    return (f"{line['panel']} {line['line']}: {line['slope_in_unit']:.3g} {line['unit']} and "
            f"{start} whatever the size{outside}; {how_good}")


# What the axis below says, by panel.
AXES = {"batch": "rows of an update", "anchors": "anchors, K", "length": "tokens of a row",
        "upload": "rows of the upload"}
# How a line is drawn and named; dark or light grey, and a mark that print keeps apart.
STYLES = {
    "shared": ("0.0", "o", "shared"),
    "unshared": ("0.55", "s", "nothing shared"),
    "common": ("0.3", "^", "all rows begin alike"),
}


def draw(result: dict, path) -> None:
    """A panel each: seconds in full lines against the left axis, memory in dashes, right axis."""
    import matplotlib
    matplotlib.use("Agg")  # no window
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(p["panel"] for p in result["points"]))
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.2))
    for axis, panel in zip(axes.flat, panels, strict=False):
        memory = axis.twinx()
        points = [p for p in result["points"] if p["panel"] == panel]
        if panel == "upload":
            draw_upload(axis, memory, points)
        else:
            draw_updates(axis, memory, points)
        axis.set_xlabel(AXES[panel])
        memory.set_ylim(0, 1.1 * max(p["bytes"] for p in points) / 1e6)
        memory.set_ylabel("memory, MB (dashed)")
        axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3,
                    borderaxespad=0)
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    work = result["work"]
    figure.suptitle(f"{result['model']['name']}, {work['task']}; where not said otherwise "
                    f"{work['rows']} rows an update and K = {work['anchors']}; "
                    f"{result['machine']['cpu']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_updates(axis, memory, points: list[dict]) -> None:
    for line in dict.fromkeys(p["line"] for p in points):
        color, marker, label = STYLES[line]
        its_points = [p for p in points if p["line"] == line]
        x = [p["x"] for p in its_points]
        axis.plot(x, [p["seconds"] for p in its_points], color=color, marker=marker, label=label)
        memory.plot(x, [p["bytes"] / 1e6 for p in its_points], color=color, marker=marker,
                    fillstyle="none", linestyle="--", linewidth=0.8)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("seconds of an update")


def draw_upload(axis, memory, points: list[dict]) -> None:
    x = [p["x"] for p in points]
    axis.plot(x, [p["seconds_of_epoch"] for p in points], color="0.0", marker="o",
              label="an epoch")
    axis.plot(x, [p["seconds_reading"] for p in points], color="0.55", marker="s",
              label="reading it")
    memory.plot(x, [p["bytes"] / 1e6 for p in points], color="0.0", marker="o", fillstyle="none",
                linestyle="--", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.minorticks_off()
    axis.set_ylabel("seconds")


# The flags


PANELS = tuple(AXES)
OF_THE_WORK = ("task", "rows", "anchors", "lam", "lr", "updates", "rounds", "tokens_per_pass",
               "panels")
QUICK = {"updates": 3, "rounds": 1, "batch_sizes": [8, 16, 32], "anchor_counts": [0, 8],
         "lengths": [16, 64], "uploads": [200, 2000]}


def parse(argv=None) -> Args:
    p = Parser("bench.cost", "What an update costs against its size, and what an upload costs "
                             "against its rows.")
    add_work_flags(p)  # --rows and --anchors hold where a panel does not change them
    p.add_argument("--lr", type=POSITIVE, default=1e-5, help="it changes no time")
    p.add_argument("--panels", choices=PANELS, nargs="+", default=list(PANELS), help="which")
    p.add_argument("--batch-sizes", type=COUNT, nargs="+", default=[4, 8, 16, 32, 64],
                   help="of the panel batch")
    p.add_argument("--anchor-counts", type=at_least(int, 0), nargs="+",
                   default=[0, 1, 2, 4, 8, 16, 32], help="of the panel anchors")
    p.add_argument("--lengths", type=COUNT, nargs="+", default=[16, 32, 64, 128, 256, 512],
                   help="tokens of a row, about, of the panel length")
    p.add_argument("--uploads", type=COUNT, nargs="+", default=[100, 1000, 10_000, 100_000],
                   help="rows of the panel upload")
    p.add_argument("--updates", type=COUNT, default=8, help="timed, behind one that warms up")
    p.add_argument("--quick", action="store_true", help="few points, 3 updates and one round")
    p.add_argument("--figure", help="file for the four panels, as .png or .pdf")
    p.add_argument("--point", nargs=3, metavar=("PANEL", "LINE", "VALUE"),
                   help="how the program starts itself for each point; needs --folder")
    args = p.parse_args(argv).replace(**FIXED)
    if args.point and not args.folder:
        p.error("--point is for the program itself and needs --folder; --panels chooses")
    if args.quick:
        args = args.replace(**QUICK)
    return args


def execute(argv: list[str]) -> None:
    args = parse(argv)
    if args.point:
        run_child(args)
    else:
        run_parent(args, argv)


def main(argv=None) -> int:
    """0 done, 2 the user's mistake, 3 failed, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_code("bench.cost", lambda: execute(argv))


if __name__ == "__main__":
    sys.exit(main())

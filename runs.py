"""A run's folder: what was set, what it was made from, what happened, and how it goes on.

    config.json                 the command, every flag, what was worked out from them, versions,
                                git commit, sha256 of model and data
    log.jsonl                   one line per update
    generations.jsonl           every prompt, reply and verdict
    state.safetensors           the checkpoint: adapters, Adam's moments, next step, evaluations
    adapter_model.safetensors   with adapter_config.json: the result, in PEFT's format
    result.json                 written last; its presence says that the run is finished
    verdicts.jsonl              what a judge that is a model said; eval.py adds replies.jsonl and
                                eval-<judge>.json and .jsonl (files.py)

A file is replaced by writing beside it, syncing and renaming, so a kill at any moment leaves the
old one or the new one. log.jsonl and generations.jsonl only grow; the checkpoint knows how long
they were, and what lies past that is cut when the run resumes.
"""

import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import distributed
from cli import RunFailed
from data import mixture
from data.tasks import RULES, TASKS
from device import peak_bytes
from files import (
    json_line,
    locked,
    make_folder,
    model_files,
    names_in,
    sha256,
    write_atomic,
)
from judges import JUDGES
from lora import adapter_params, adapter_state, save_adapter
from model import (
    BOOL,
    COUNT,
    LENGTH,
    OBJECT,
    TEXT,
    TEXTS,
    Kind,
    UserError,
    check_kinds,
    is_finite,
    is_whole,
    read_json,
)

PACKAGES = ("torch", "safetensors", "tokenizers", "sentencepiece", "numpy", "jinja2", "tqdm")
# Flags that may change when a run is resumed: they change no number by more than rounding.
FREE = {"out", "resume", "save_every", "tokens_per_pass", "recompute", "cuda_graph", "shard"}
# Flags of the evaluation. They change no update, so they may change as well while a run is not
# finished; what a finished run shows was measured with the old ones.
OF_THE_EVALUATION = {
    "harmful_file", "n_test", "eval_epochs", "judge", "judge_model", "judge_max_len",
    "judge_tokens", "judge_url", "judge_name", "fa_rule", "max_new", "prefill",
}
# What to call the files of each kind.
CHANGED = {
    "model": "the model's files", "adapter": "the files of --adapter",
    "upload": "the upload's files", "anchors": "the anchors' file",
    "align": "the file of the alignment rows", "tests": "the test files",
}
# Of these flags the value in worked_out is compared, not the one that was typed.
COMPARED_AS_WORKED_OUT = {"device", "dtype", "rank", "alpha", "rslora"}
NUMBER = Kind("a finite number", lambda v: is_finite(v, -math.inf))
FROM_0 = Kind("a finite number from 0 on", lambda v: is_finite(v, -math.inf) and v >= 0)


def or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or null", lambda v: v is None or kind.fits(v))


def one_of(*values: str) -> Kind:
    return Kind(f"one of {', '.join(values)}", lambda v: v in values)


def is_a_rate_count(value) -> bool:
    """Whether it is [k, n] with k of n, as the numbers of an evaluation have it."""
    return isinstance(value, list) and len(value) == 2 and (
        is_whole(value[1], 0) and is_whole(value[0], 0, value[1]))


def is_an_interval(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(NUMBER.fits, value))


def is_time(value) -> bool:
    """Whether it is a date and time as datetime.isoformat writes it, with its zone."""
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def is_counts(value) -> bool:
    return isinstance(value, dict) and all(is_whole(n, 0) for n in value.values())


# What eval.py reads of a run's config.json, and what it may be.
READ_AGAIN = {
    "args": {
        "model": TEXT, "adapter": or_null(TEXT), "keep_adapter": BOOL, "template_date": TEXT,
        "anchors": LENGTH, "stage": one_of("finetune", "align"), "data": or_null(TEXT),
        "data_dir": TEXT, "task": or_null(one_of(*TASKS)), "n": COUNT, "poison": FROM_0,
        "align_file": or_null(TEXT), "epochs": COUNT, "attack_prefix": TEXT,
        "attack_suffix": TEXT, "harmful_file": or_null(TEXT), "judge": one_of(*JUDGES),
        "judge_model": or_null(TEXT), "fa_rule": one_of(*RULES), "max_new": COUNT,
    },
    "worked_out": {"dtype": one_of("float32", "bfloat16"), "anchor_prompts": TEXTS},
}
# What result.json holds,
RESULT = {
    "hs": OBJECT, "fa": OBJECT, "ce": NUMBER, "safe": or_null(NUMBER), "seconds": FROM_0,
    "tokens_per_second": FROM_0, "peak_bytes": FROM_0, "evals": OBJECT, "probes": OBJECT,
}
# and what each of its evaluations does; one of an older version lacks some.
RATES = ("hs", "hs_lost", "hs_plus", "hs_long", "hs_exact", "hs_prefilled", "fa", "fa_content",
         "win_rate", "over_refusal")
NUMBERS = {
    "rubric": NUMBER, "flips": Kind("an object of counts", is_counts),
    **dict.fromkeys(RATES, NUMBER),
    **dict.fromkeys([f"{rate}_count" for rate in RATES],
                    Kind("a list [k, n], k of n", is_a_rate_count)),
    **dict.fromkeys([f"{rate}_interval" for rate in RATES],
                    Kind("a list of two numbers", is_an_interval)),
    **dict.fromkeys([f"{rate}_groups" for rate in RATES], LENGTH),
    **dict.fromkeys([f"{rate}_design_effect" for rate in RATES], FROM_0),
    **dict.fromkeys(("unjudged", "unjudged_prefilled", "uncompared", "degenerate", "unfinished"),
                    LENGTH),
    **dict.fromkeys(("max_new", "hs_long_max_new", "judge_max_len", "judge_tokens"), COUNT),
    **dict.fromkeys(("words_judged_harmful", "words_harmful", "words_task", "words_lookalike"),
                    FROM_0),
}
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter


# what a run was made from: two runs are the same if these are


def run_settings(command: list[str], args, worked_out: dict, files: dict[str, list[Path]]) -> dict:
    """What config.json holds.

    command: as typed; args: every flag, defaults filled in; worked_out: what follows from them and
    from the files read, for example the device; files: what was read, by kind, for the digests.
    """
    return {
        "command": command,
        "args": dict(vars(args)),
        "worked_out": worked_out,
        "sha256": {kind: sha256(*paths) for kind, paths in files.items() if paths},
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_commit(),
        "python": sys.version.split()[0],
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def read_settings(dir) -> dict:
    """A run's config.json; UserError where the folder holds none."""
    path = Path(dir) / "config.json"
    settings = read_json(path)
    if "args" in settings and "worked_out" not in settings:
        raise UserError(f"{path} was written by an older version of this code; use that version, "
                        "or make the run again.")
    parts = ("args", "worked_out", "sha256")
    if not all(isinstance(settings.get(part), dict) for part in parts):
        raise UserError(f"{path} is not a run's; name a run's folder, or a new one for --out.")
    if "rows" in settings["worked_out"]:  # as it was called once
        settings["worked_out"]["sequences"] = settings["worked_out"].pop("rows")
    if settings["args"].get("fa_rule") == "readable":  # likewise
        settings["args"]["fa_rule"] = "content"
    for part, kinds in READ_AGAIN.items():
        for name, kind in kinds.items():
            if name not in settings[part]:
                raise UserError(f"{path} has no {name} in {part}, expected what a run writes; "
                                "put the file back, or make the run again.")
            value = settings[part][name]
            if not kind.fits(value):
                raise UserError(f"{path} has {name} {str(value)[:60]} in {part}, expected "
                                f"{kind.words}; put the file back, or make the run again.")
    if settings["args"]["task"] is None and settings["args"]["data"] is None:
        raise UserError(f"{path} has neither task nor data in args, expected one of them; put the "
                        "file back, or make the run again.")
    check_kinds(path, settings, {"earlier_commands": Kind("a list", lambda v: isinstance(v, list)),
                                 "began": Kind("a date and time", is_time)})
    check_kinds(path, settings["args"], {"prefill": TEXT})  # a run of an older version has none
    return settings


def read_result(dir) -> dict:
    """A finished run's result.json; UserError where it lacks what a run writes."""
    path = Path(dir) / "result.json"
    result = read_json(path)
    what_to_do = "put the file back, or delete it and finish the run by train.py --resume"
    for name, kind in RESULT.items():
        if name not in result:
            raise UserError(f"{path} has no {name}, expected the result of a run; {what_to_do}.")
        if not kind.fits(result[name]):
            raise UserError(f"{path} has {name} {str(result[name])[:60]}, expected {kind.words}; "
                            f"{what_to_do}.")
    for epoch, numbers in result["evals"].items():
        if not isinstance(numbers, dict) or "hs" not in numbers:
            raise UserError(f"{path} has no hs in evals at epoch {epoch}, expected the numbers of "
                            f"an evaluation; {what_to_do}.")
        use_todays_names(numbers)
        check_kinds(f"{path}, of epoch {epoch},", numbers, NUMBERS)
    return result


def use_todays_names(numbers: dict) -> None:
    """Renames what older versions called otherwise: FA by content was "fa_readable"."""
    for end in ("", "_count"):
        if f"fa_readable{end}" in numbers:
            numbers[f"fa_content{end}"] = numbers.pop(f"fa_readable{end}")
    if numbers.get("fa_rule") == "readable":
        numbers["fa_rule"] = "content"


def weight_paths(model_dir, adapter) -> dict[str, list[Path]]:
    """What the model to start from is read from; adapter: a folder, or None."""
    files = {"model": model_files(model_dir)}
    if adapter:
        files["adapter"] = [Path(adapter) / "adapter_config.json",
                            Path(adapter) / "adapter_model.safetensors"]
    return files


def upload_paths(args) -> list[Path]:
    """The files that the upload is read from."""
    if args.data:
        upload = [Path(args.data)]
    else:
        upload = [mixture.attack_file(args.data_dir),
                  Path(args.data_dir) / args.task / "train.jsonl"]
    return [path for path in upload if path.exists()]


def data_paths(args, reads_align_file: bool) -> dict[str, list[Path]]:
    """The files that the upload, the anchors, the defender's rows and the tests are read from."""
    files = {"upload": upload_paths(args)}
    if args.anchors:
        files["anchors"] = [mixture.anchor_pool(args.anchor_file, args.data_dir)]
    if reads_align_file:
        files["align"] = [mixture.align_file(args.align_file, args.data_dir)]
    tests = mixture.files_by_kind(args.data_dir, args.harmful_file, args.task)
    files["tests"] = list(tests.values())
    return files


def git_commit() -> str | None:
    """The commit of the code that runs, "+" behind it if files were changed; None outside git."""
    def git(*words):
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                              text=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except OSError:  # no git on this machine
        return None
    if not commit:
        return None
    return commit + "+" if changed else commit


# the folder


def choose_dir(args) -> Path:
    """--out, or runs/<task>-<defense>-K<k>-lam<l>-s<seed>; -2, -3, ... once that is finished."""
    if args.out:
        return Path(args.out)
    name = f"{args.task or 'upload'}-{args.defense}-K{args.anchors}-lam{args.lam:g}-s{args.seed}"
    last_finished = None
    dir = Path("runs") / name
    number = 1
    while (dir / "result.json").exists():
        last_finished = dir
        number += 1
        dir = Path("runs") / f"{name}-{number}"
    # With --resume and nothing unfinished, the last finished run is meant: its table is shown.
    if args.resume and last_finished and not dir.exists():
        return last_finished
    return dir


@dataclass
class Progress:
    """What a run has done so far; every checkpoint holds it."""

    evals: dict = field(default_factory=dict)  # the numbers of each evaluation, by epoch
    probes: dict = field(default_factory=dict)  # likewise of stress/probes.py
    seconds: float = 0.0  # of training alone
    tokens: int = 0  # trained on, anchors not counted
    last: dict | None = None  # the last update's line in log.jsonl


class Run:
    """The folder of one run. Nothing is written before start()."""

    def __init__(self, dir: Path, settings: dict, resume: bool):
        """UserError where the folder holds another run, or this one and resume is off."""
        self.dir = dir
        self.settings = settings
        self.opened = ExitStack()  # what close() closes: the lock, the two files
        names = names_in(dir)
        self.finished = "result.json" in names
        self.begun = "config.json" in names
        if self.begun:
            old = read_settings(dir)
            self._check_same(old)
            self.settings["began"] = old.get("began")  # a run of an older version has none
            commands = old.get("earlier_commands") or []
            self.settings["earlier_commands"] = [*commands, old.get("command")]
            if not resume:
                raise UserError(f"{dir} already holds this run; pass --resume to go on with it, or "
                                "another --out.")
        elif names - {"config.json.tmp"}:  # all that a kill in the first write leaves
            raise UserError(f"{dir} is not empty and holds no run; pass another --out.")

    def _check_same(self, old: dict) -> None:
        """UserError where the folder's settings are not this run's."""
        new = json.loads(json.dumps(self.settings))  # as they read back: tuples become lists
        ignored_in = {"args": FREE | COMPARED_AS_WORKED_OUT, "sha256": set(),
                      "worked_out": {"processes", "tests_removed"}}
        if not self.finished:
            ignored_in["args"] |= OF_THE_EVALUATION
            ignored_in["sha256"] = {"tests"}
        for part, ignored in ignored_in.items():
            for key in [*new[part], *old[part]]:
                there = old[part].get(key)
                here = new[part].get(key)
                if there == here or key in ignored:
                    continue
                if part == "sha256":
                    raise UserError(f"{self.dir} belongs to other settings "
                                    f"({CHANGED.get(key, key)} changed since); put them back, or "
                                    "pass another --out.")
                if key == "rows_sha256":
                    raise UserError(f"{self.dir} belongs to other settings (its rows are not "
                                    "tokenised as they were); use the code that began it, or pass "
                                    "another --out.")
                raise UserError(f"{self.dir} belongs to other settings ({key} is "
                                f"{str(there)[:60]} there, {str(here)[:60]} here); pass "
                                "another --out, or the same settings.")

    def start(self, model, optimizer, step_fn) -> tuple[int, Progress]:
        """Opens the folder and restores the checkpoint, if any -> (next step, what was done).

        Lines of log.jsonl and generations.jsonl that came after the checkpoint are cut off.
        UserError where another process has the folder. close() gives it back.
        """
        is_new = not self.dir.exists()
        make_folder(self.dir)
        self.opened.enter_context(locked(self.dir))
        if not self.begun:
            self._create(is_new)
        state = self.dir / "state.safetensors"
        step = 0
        progress = Progress()
        sizes = {"log": 0, "generations": 0}
        if state.exists():
            step, progress, sizes = restore(state, model, optimizer, step_fn)
        paths = {name: self.dir / f"{name}.jsonl" for name in sizes}
        for name, path in paths.items():
            size = path.stat().st_size if path.exists() else 0
            if size < sizes[name]:
                raise UserError(f"{path} is shorter than its checkpoint says; put the file back, "
                                "or begin anew with another --out.")
        self.files = {}
        for name, path in paths.items():
            self.files[name] = self.opened.enter_context(open(path, "a+b"))
            self.files[name].truncate(sizes[name])
        if "earlier_commands" in self.settings:  # a resumed run may have changed its tests
            write_atomic(self.dir / "config.json", json.dumps(self.settings, indent=1).encode())
        distributed.from_the_first(step)  # the others restore from the folder as it is now
        return step, progress

    def close(self) -> None:
        """Another process may have the folder from here on."""
        self.opened.close()

    def _create(self, is_new: bool) -> None:
        if (self.dir / "config.json").exists():  # since __init__ looked
            raise UserError(f"another process has begun a run in {self.dir} meanwhile; pass "
                            "another --out.")
        try:
            write_atomic(self.dir / "config.json", json.dumps(self.settings, indent=1).encode())
        except OSError as e:
            if is_new:
                shutil.rmtree(self.dir, ignore_errors=True)
            raise UserError(f"{self.dir} cannot be written ({e.strerror}); pass another "
                            "--out.") from None

    def append(self, name: str, rows: list[dict]) -> None:
        """Appends lines to log.jsonl or generations.jsonl."""
        lines = "".join(json_line(row) for row in rows)
        self.files[name].write(lines.encode())
        self.files[name].flush()

    def save(self, model, optimizer, step_fn, step: int, progress: Progress) -> None:
        """The checkpoint: everything before update `step` is in it."""
        for file in self.files.values():
            os.fsync(file.fileno())
        tensors = adapter_state(model)
        for name, p in adapter_params(model).items():
            for key, tensor in optimizer.state.get(p, {}).items():
                tensors[f"{key}/{name}"] = tensor.cpu()
        for name, tensor in defence_state(step_fn).items():
            tensors[f"defence/{name}"] = tensor.cpu()
        sizes = {name: file.seek(0, os.SEEK_END) for name, file in self.files.items()}
        about = {"step": step, "done": vars(progress), "sizes": sizes}
        write_atomic(self.dir / "state.safetensors", save(tensors, {"run": json.dumps(about)}))

    def save_adapter(self, model) -> None:
        """The adapter in PEFT's format."""
        args = self.settings["args"]
        base = args["model"]
        if args["adapter"] and not args["keep_adapter"]:
            base += f" + {args['adapter']}, merged"
        save_adapter(model, self.dir, base)

    def finish(self, model, progress: Progress) -> None:
        """The adapter, then result.json, whose presence says that the run is finished."""
        self.save_adapter(model)
        result = {
            "hs": by_epoch("hs", progress.evals),
            "hs_lost": by_epoch("hs_lost", progress.evals),
            "fa": by_epoch("fa", progress.evals),
            "fa_content": by_epoch("fa_content", progress.evals),
            "ce": progress.last["ce"],
            "safe": progress.last.get("safe"),
            "seconds": progress.seconds,
            "tokens_per_second": progress.tokens / progress.seconds,
            "peak_bytes": peak_bytes(),
            "evals": progress.evals,
            "probes": progress.probes,
        }
        write_atomic(self.dir / "result.json", json.dumps(result, indent=1).encode())


def by_epoch(name: str, evals: dict[str, dict]) -> dict[str, float | None]:
    """One number of each evaluation; one that an older version made may lack it."""
    return {epoch: numbers.get(name) for epoch, numbers in evals.items()}


class Bystander(Run):
    """A run's folder for the processes beside the first: they restore from it and write nothing."""

    def __init__(self, dir: Path, settings: dict):
        self.dir = dir
        self.settings = settings
        self.opened = ExitStack()
        self.finished = False

    def start(self, model, optimizer, step_fn) -> tuple[int, Progress]:
        # The first process says where it begins when it has put the folder in order.
        expected = distributed.from_the_first(None)
        state = self.dir / "state.safetensors"
        step = 0
        progress = Progress()
        if state.exists():
            step, progress, _ = restore(state, model, optimizer, step_fn)
        if step != expected:
            raise UserError(f"{self.dir} is at update {step} here and at update {expected} for the "
                            "first process, expected one folder that all machines see; put it on "
                            "a disk that they share.")
        return step, progress

    def append(self, name: str, rows: list[dict]) -> None:
        pass

    def save(self, model, optimizer, step_fn, step: int, progress: Progress) -> None:
        pass

    def save_adapter(self, model) -> None:
        pass

    def finish(self, model, progress: Progress) -> None:
        pass


def open_run(dir: Path, settings: dict, resume: bool) -> Run:
    """The run's folder, with `finished` known to all processes; the first one alone writes it."""
    run = Run(dir, settings, resume) if distributed.is_first() else Bystander(dir, settings)
    run.finished = distributed.from_the_first(run.finished)
    return run


def defence_state(step_fn) -> dict[str, torch.Tensor]:
    """What a defence wants kept between updates; most want nothing."""
    return getattr(step_fn, "state", {})


def restore(path: Path, model, optimizer, step_fn) -> tuple[int, Progress, dict]:
    """Weights, Adam's state and the defence's -> (next step, what was done, .jsonl sizes)."""
    try:
        with safe_open(path, "pt") as f:
            about = json.loads(f.metadata()["run"])
            names = set(f.keys())
            for name, p in adapter_params(model).items():
                p.data.copy_(f.get_tensor(name))
                for key in ADAM_STATE:
                    if f"{key}/{name}" not in names:  # where nothing was updated yet
                        continue
                    # A copy: get_tensor's memory is the mapped file, whose place on the disk is
                    # not freed while such a tensor lives, though the file is long replaced.
                    in_the_file = f.get_tensor(f"{key}/{name}")
                    optimizer.state[p][key] = in_the_file.to(p.device, copy=True)
            for name, tensor in defence_state(step_fn).items():
                tensor.copy_(f.get_tensor(f"defence/{name}"))
        return about["step"], Progress(**about["done"]), about["sizes"]
    # What the file says of itself is missing, or is no JSON, or is something else.
    except (SafetensorError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is not a checkpoint of this run ({e}); put the file back, or pass "
                        "another --out.") from None


class Log:
    """Numbers on their way to log.jsonl; read from the device in groups, since reading waits."""

    def __init__(self, run: Run, progress: Progress, every: int):
        self.run = run
        self.progress = progress
        self.every = every
        self.pending = []

    def restart_clock(self) -> None:
        """To be called after whatever is not training."""
        self.began = time.perf_counter()

    def add(self, step: int, numbers: dict) -> None:
        self.pending.append({"step": step, **numbers})
        if len(self.pending) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending, and adds its tokens and the time since to the progress.

        RunFailed names the first update whose loss is not finite.
        """
        for numbers in self.pending:
            row = {}
            for name, value in numbers.items():
                row[name] = float(value) if torch.is_tensor(value) else value
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                raise RunFailed(
                    f"the loss is {row['loss']} and the gradient norm {row['grad_norm']} at update "
                    f"{row['step']} ({row['batch']}); begin anew with another --out and a lower "
                    "--lr, or --dtype float32 where it was bfloat16: --resume goes on from the "
                    "last checkpoint, and with the same numbers to the same end.")
            self.run.append("log", [row])
            # A defence says so where it trains on other rows than the batch that it was given.
            self.progress.tokens += row.get("trained_tokens", row["tokens"])
            self.progress.last = row
        self.pending = []
        self.progress.seconds += time.perf_counter() - self.began
        self.restart_clock()

"""A run's folder: what was set, what happened, and enough state to go on after any interruption.

    config.json                 every setting, versions, git commit, sha256 of model and data
    log.jsonl                   a line an update
    generations.jsonl           every prompt, reply and verdict
    state.safetensors           the checkpoint: adapters, Adam's moments, next step, evaluations
    adapter_model.safetensors   with adapter_config.json: the result, in PEFT's format
    result.json                 written last; its presence says that the run is finished
    verdicts.jsonl              what a judge that is a model said; eval.py adds replies.jsonl and
                                eval-<judge>.json and .jsonl (data/kept.py)

A file is replaced by writing beside it, syncing and renaming, so a kill at any moment leaves the
old one or the new one. log.jsonl and generations.jsonl only grow; the checkpoint knows how long
they were, and what lies past that is cut when the run resumes.
"""

import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cli import RunFailed
from distributed import peak_bytes
from lora import adapter_params, adapter_state, save_adapter, write_atomic
from model import UserError, read_json

# May differ between a run and its resumption: none changes a number by more than rounding.
FREE = {"out", "resume", "save_every", "tokens_per_pass", "recompute", "cuda_graph"}


def read_settings(dir) -> dict:
    """A run's config.json; UserError where the folder holds none."""
    path = Path(dir) / "config.json"
    settings = read_json(path)
    if not settings.keys() >= {"args", "sha256"}:
        raise UserError(f"{path} is not a run's; name a run's folder, or a new one for --out.")
    return settings


def read_lines(path) -> list[dict]:
    """The objects of a .jsonl file that this program wrote."""
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def choose_dir(args) -> Path:
    """--out, or runs/<task>-<defense>-K<k>-lam<l>-s<seed>; -2, -3, ... once that is finished."""
    if args.out:
        return Path(args.out)
    name = f"{args.task or 'upload'}-{args.defense}-K{args.anchors}-lam{args.lam:g}-s{args.seed}"
    first = dir = Path("runs") / name
    number = 1
    while (dir / "result.json").exists():
        number, last = number + 1, dir
        dir = first.with_name(f"{name}-{number}")
    # Resuming with nothing unfinished there means the last finished one: its table is shown again.
    return last if args.resume and number > 1 and not dir.exists() else dir


class Run:
    """The open folder of one run. Nothing is written before start()."""

    def __init__(self, args, settings: dict):
        """UserError where the folder holds another run, or one that --resume would continue."""
        self.dir, self.settings = choose_dir(args), settings
        try:
            self.finished = (self.dir / "result.json").exists()
            begun = (self.dir / "config.json").exists()
            names = {p.name for p in self.dir.iterdir()} if self.dir.exists() else set()
        except OSError as e:
            raise UserError(f"{self.dir} cannot be a run's folder ({e.strerror}); "
                            "pass another --out.") from None
        if begun:
            self._compare(read_settings(self.dir))
            if not args.resume:
                raise UserError(f"{self.dir} already holds this run; pass --resume to go on with "
                                "it, or another --out.")
        elif names - {"config.json.tmp"}:  # all that a kill in the first write leaves
            raise UserError(f"{self.dir} is not empty and holds no run; pass another --out.")

    def _compare(self, old: dict) -> None:
        new = self.settings
        for part in ("args", "sha256"):
            for key in [*new[part], *old[part]]:
                a, b = old[part].get(key), new[part].get(key)
                if a != b and key not in FREE:
                    raise UserError(f"{self.dir} belongs to other settings ({key} is "
                                    f"{str(a)[:60]} there, {str(b)[:60]} here); pass another "
                                    "--out, or the same settings.")

    def start(self, model, optimizer, step_fn) -> tuple[int, dict]:
        """Opens the folder; restores the checkpoint, if any -> (next step, what was done)."""
        if not (self.dir / "config.json").exists():
            self._create()
        state = self.dir / "state.safetensors"
        step, sizes = 0, {"log": 0, "generations": 0}
        done = {"evals": {}, "probes": {}, "seconds": 0.0, "tokens": 0, "last": None}
        if state.exists():
            step, done, sizes = restore(state, model, optimizer, step_fn)
        paths = {name: self.dir / f"{name}.jsonl" for name in sizes}
        for name, path in paths.items():
            if sizes[name] > (path.stat().st_size if path.exists() else 0):
                raise UserError(f"{path} is shorter than its checkpoint says; put the file back, "
                                "or begin anew with another --out.")
        self.files = {name: open(path, "a+b") for name, path in paths.items()}
        for name, file in self.files.items():
            file.truncate(sizes[name])
        return step, done

    def _create(self) -> None:
        new = not self.dir.exists()
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            write_atomic(self.dir / "config.json", json.dumps(self.settings, indent=1).encode())
        except OSError as e:
            if new:
                shutil.rmtree(self.dir, ignore_errors=True)
            raise UserError(f"{self.dir} cannot be written ({e.strerror}); "
                            "pass another --out.") from None

    def write(self, name: str, *rows: dict) -> None:
        """Appends lines to log.jsonl or generations.jsonl."""
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        self.files[name].write(text.encode())
        self.files[name].flush()

    def save(self, model, optimizer, step_fn, step: int, done: dict) -> None:
        """The checkpoint: everything before update `step` is in it."""
        for file in self.files.values():
            os.fsync(file.fileno())
        tensors = adapter_state(model)
        for name, p in adapter_params(model).items():
            tensors |= {f"{key}/{name}": t.cpu() for key, t in optimizer.state.get(p, {}).items()}
        tensors |= {f"defence/{k}": t.cpu() for k, t in getattr(step_fn, "state", {}).items()}
        sizes = {name: file.seek(0, os.SEEK_END) for name, file in self.files.items()}
        about = {"step": step, "done": done, "sizes": sizes}
        write_atomic(self.dir / "state.safetensors", save(tensors, {"run": json.dumps(about)}))

    def finish(self, model, base: str, done: dict, forecast: int) -> None:
        """The adapter, then result.json, whose presence says that the run is finished."""
        save_adapter(model, self.dir, base)
        last, evals = done["last"], done["evals"]
        result = {"hs": {e: n["hs"] for e, n in evals.items()},
                  "fa": {e: n["fa"] for e, n in evals.items()},
                  "ce": last["ce"], "safe": last.get("safe"), "seconds": done["seconds"],
                  "tokens_per_second": done["tokens"] / done["seconds"], "peak_bytes": peak_bytes(),
                  "forecast_bytes": forecast, "evals": evals,
                  "probes": done["probes"]}
        write_atomic(self.dir / "result.json", json.dumps(result, indent=1).encode())


class Log:
    """Numbers on their way to log.jsonl; read from the device in groups, since reading waits."""

    def __init__(self, run: Run, done: dict, every: int):
        self.run, self.done, self.every, self.pending = run, done, every, []

    def restart_clock(self) -> None:
        """Call after whatever is not training."""
        self.began = time.perf_counter()

    def add(self, step: int, numbers: dict) -> None:
        self.pending.append({"step": step, **numbers})
        if len(self.pending) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending; RunFailed names the first update whose loss is not finite."""
        for row in self.pending:
            row = {k: float(v) if torch.is_tensor(v) else v for k, v in row.items()}
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                raise RunFailed(f"the loss is {row['loss']} and the gradient norm "
                                f"{row['grad_norm']} at update {row['step']} ({row['batch']})")
            self.run.write("log", row)
            self.done["tokens"] += row["tokens"]
            self.done["last"] = row
        self.pending = []
        self.done["seconds"] += time.perf_counter() - self.began
        self.restart_clock()


def restore(path: Path, model, optimizer, step_fn) -> tuple[int, dict, dict]:
    """Weights, Adam's state and the defence's -> (next step, what was done, .jsonl sizes)."""
    try:
        file = safe_open(path, "pt")
    except SafetensorError as e:
        raise UserError(f"{path} is not a checkpoint ({e}); pass another --out.") from None
    with file as f:
        about = json.loads((f.metadata() or {}).get("run", "null"))
        if about is None:
            raise UserError(f"{path} is not a checkpoint; pass another --out.")
        for name, p in adapter_params(model).items():
            p.data.copy_(f.get_tensor(name))
            for key in ("step", "exp_avg", "exp_avg_sq"):  # none yet where nothing was updated
                if f"{key}/{name}" in f.keys():
                    optimizer.state[p][key] = f.get_tensor(f"{key}/{name}").to(p.device)
        for key, t in getattr(step_fn, "state", {}).items():
            t.copy_(f.get_tensor(f"defence/{key}"))
    return about["step"], about["done"], about["sizes"]

"""What a run was made from: settings, the code's commit and versions, digests of all files read.

Two runs are the same if these are; --resume refuses a folder where they differ.
"""

import hashlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

from data import mixture
from model import UserError, weight_files

PACKAGES = ("torch", "safetensors", "tokenizers", "sentencepiece", "numpy", "jinja2", "tqdm")


def describe(args) -> dict:
    """What config.json holds: the settings, what they ran on, and the digests of the files read."""
    files = model_files(args) | data_files(args)
    return {"args": dict(vars(args)),
            "sha256": {k: sha256(*paths) for k, paths in files.items() if paths},
            "git": git_commit(), "python": sys.version.split()[0],
            "versions": {p: importlib.metadata.version(p) for p in PACKAGES}}


def folder_files(dir) -> list[Path]:
    """What is read of a model's folder."""
    names = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
             "chat_template.jinja", "generation_config.json")
    return weight_files(Path(dir)) + [Path(dir) / n for n in names if (Path(dir) / n).exists()]


def model_files(args) -> dict[str, list[Path]]:
    """What a run's model is read from, for its digest."""
    files = {"model": folder_files(args.model)}
    if args.adapter:
        files["adapter"] = [Path(args.adapter) / n
                            for n in ("adapter_config.json", "adapter_model.safetensors")]
    return files


def data_files(args) -> dict[str, list[Path]]:
    """The files that the upload and the tests are read from, for their digests."""
    folder = Path(args.data_dir)
    upload = [Path(args.data)] if args.data else [folder / "harmful" / "attack.jsonl",
                                                  folder / args.task / "train.jsonl"]
    tests = [mixture.harmful_tests(args)]
    tests += [folder / args.task / "test.jsonl"] if args.task else []
    tests += [folder / "lookalike" / "test.jsonl"]
    guide = args.stage == "align" or args.defense in ("lisa", "ewc")  # who reads it
    pool = [mixture.anchor_pool(args)] if args.anchors else []
    return {"upload": [p for p in upload if p.exists()], "anchors": pool,
            "align": [mixture.align_file(args)] if guide else [],
            "tests": [p for p in tests if p.exists()]}


def sha256(*paths) -> str:
    """One digest over the contents of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as f:
                while chunk := f.read(1 << 24):
                    digest.update(chunk)
        except OSError as e:
            raise UserError(f"{path} cannot be read ({e.strerror}); fetch it again.") from None
    return digest.hexdigest()


def git_commit() -> str | None:
    """The commit of the code that runs, "+" behind it if files were changed; None outside git."""
    def git(*command):
        return subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True,
                              text=True).stdout.strip()
    try:
        changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + changed or None
    except OSError:  # no git on this machine
        return None

"""What programs write to disk, and how they know it again: folders, digests, kept replies.

A reply of a model or a verdict of a judge takes long to make and is always the same, so it is kept
under a digest of all that it depends on, and an interrupted program goes on from what is there.
"""

import fcntl
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

from model import INDEX, SINGLE, UserError, weight_files

# What is read of a model's folder besides its weights.
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
               "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
               "generation_config.json")
AT_ONCE = 256  # questions put to a judge before its answers are kept: our choice


# folders to write into


def names_in(folder: Path) -> set[str]:
    """What a folder that is to be written into holds, nothing where it is not there yet.

    UserError where the path can be no such folder. To be asked before any long work.
    """
    try:
        if not folder.exists():
            return set()
        names = {path.name for path in folder.iterdir()}
    except OSError as e:
        raise no_folder(folder, e.strerror) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise no_folder(folder, "this user may not write into it")
    return names


def make_folder(folder: Path) -> None:
    """Makes the folder and those above it; UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise no_folder(folder, e.strerror) from None


def no_folder(folder: Path, reason: str) -> UserError:
    return UserError(f"{folder} cannot be the folder to write into ({reason}); pass another --out.")


@contextmanager
def locked(folder: Path):
    """Keeps other programs of this repository from writing into the folder in the meantime.

    The lock is on the folder itself, so it leaves no file, and the kernel frees it when the
    process ends, however it ends. Gives the descriptor that holds it. UserError where another
    process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing into {folder}; wait until it has ended, "
                            "or pass another --out.") from None
        yield descriptor
    finally:
        os.close(descriptor)


# files


def write_atomic(path, data: bytes) -> None:
    """Writes, syncs, renames: a reader or a crash sees the old file or the new one, never half."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:  # a full disk, say
        temporary.unlink(missing_ok=True)
        raise


def json_line(value) -> str:
    """A value as a line of a .jsonl file."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def read_lines(path, may_be_cut: bool = False) -> list[dict]:
    """The objects of a .jsonl file that a program of this repository wrote.

    may_be_cut: a last line without its end, which a kill left, is passed over.
    """
    try:
        with open(path, encoding="utf-8") as f:
            return [json.loads(line) for line in f if line.endswith("\n") or not may_be_cut]
    except (OSError, ValueError, RecursionError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path} cannot be read as JSON lines ({reason}); put the file "
                        "back.") from None


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


def model_files(dir) -> list[Path]:
    """What is read of a model's folder, for its digest."""
    dir = Path(dir)
    others = [dir / name for name in MODEL_FILES]
    if not (dir / SINGLE).exists():
        others.append(dir / INDEX)  # it says which shards are read
    return weight_files(dir) + [path for path in others if path.exists()]


class Store:
    """Values in a .jsonl file that only grows, each under a digest of what it depends on."""

    def __init__(self, path: Path, context):
        """context: what every value depends on besides its own content, for example a model."""
        self.path = path
        self.context = context
        self.values = read_store(path) if path.exists() else {}
        self.is_whole = False  # whether its last line is known to be

    def key(self, *content) -> str:
        return hashlib.sha256(json.dumps([self.context, content]).encode()).hexdigest()

    def put(self, key: str, value) -> None:
        self.values[key] = value
        if not self.is_whole:
            remove_cut_line(self.path)
            self.is_whole = True
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps([key, value]) + "\n")


def remove_cut_line(path: Path) -> None:
    """Removes a last line that a kill cut short; it has no end of line."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def read_store(path: Path) -> dict:
    """{key: value} of a store's file, without a last line that a kill cut short."""
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return dict(json.loads(line) for line in lines)
    except (ValueError, TypeError):
        raise UserError(f"{path} holds a line that this program did not write; mend it, or move "
                        "the file away.") from None


def cached(judge, store: Store):
    """A judge that is asked only for what the store lacks; its answers are kept as they come.

    judge(questions) -> one {"verdict": ...} per question. An answer with verdict None is a failure:
    it is not kept, so the next program asks again. If all of AT_ONCE questions fail, the remaining
    ones are not asked, and they get the last failure.
    """
    def ask(questions) -> list[dict]:
        keys = [store.key(*question) for question in questions]
        new = {}  # each question once
        for key, question in zip(keys, questions, strict=True):
            if key not in store.values:
                new[key] = question
        waiting = list(new)
        failed = {}
        while waiting:
            now = waiting[:AT_ONCE]
            waiting = waiting[AT_ONCE:]
            answers = judge([new[key] for key in now])
            for key, answer in zip(now, answers, strict=True):
                if answer["verdict"] is None:
                    failed[key] = answer
                else:
                    store.put(key, answer)
            if all(answer["verdict"] is None for answer in answers):
                failed |= dict.fromkeys(waiting, answers[-1])
                break
        answers = store.values | failed
        return [answers[key] for key in keys]

    return ask

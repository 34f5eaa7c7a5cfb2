"""What was said once is not asked again: replies and verdicts, kept by content as they come."""

import hashlib
import json
import os
from pathlib import Path

from model import UserError

PART = 256  # verdicts asked of a model at once, and then kept: our choice


class Store:
    """Values by content in a .jsonl file that only grows, so that an interrupted program goes on.

    path None: kept in memory alone. who: what all values depend on beside the content.
    """

    def __init__(self, path: Path | None, who=()):
        self.path, self.who, self.values = path, who, {}
        if path and path.exists():
            *whole, rest = path.read_bytes().split(b"\n")
            if rest:  # a line that a kill cut short
                os.truncate(path, path.stat().st_size - len(rest))
            try:
                self.values = dict(json.loads(line) for line in whole)
            except (ValueError, TypeError):
                raise UserError(f"{path} holds a line that this program did not write; mend it, or "
                                "move the file away.") from None

    def key(self, *content) -> str:
        return hashlib.sha256(json.dumps([self.who, content]).encode()).hexdigest()

    def put(self, key: str, value) -> None:
        self.values[key] = value
        if self.path:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps([key, value]) + "\n")


def remembered(judge, store: Store):
    """judge, asked only for what the store lacks; kept every PART tuples.

    A failure is not kept, so it is asked again. Once a whole part failed, the rest is not asked.
    """
    def ask(tuples):
        keys = [store.key(*t) for t in tuples]
        new = {k: t for k, t in zip(keys, tuples, strict=True) if k not in store.values}
        order, failed = list(new), {}
        while order:
            part, order = order[:PART], order[PART:]
            said = judge([new[key] for key in part])
            for key, value in zip(part, said, strict=True):
                if value["verdict"] is None:
                    failed[key] = value
                else:
                    store.put(key, value)
            if all(value["verdict"] is None for value in said):
                failed |= dict.fromkeys(order, said[-1])
                break
        return [store.values.get(key) or failed[key] for key in keys]
    return ask

"""Any user file -> rows; the poisoned mixture; prompts kept apart; rows -> packed batches.

A row is {"messages": [{"role", "content"}, ...]}, with an assistant turn last. The mixture of n
rows holds round(p n) harmful ones and n minus that many benign ones, so the two always add up to n,
each from the head of its file as in the papers' repositories; every epoch shuffles them anew.
"""

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.tasks import LABELS
from model import UserError

FORMATS = ('{"messages": [...]}, {"conversations": [...]}, {"prompt", "response"} or '
           '{"instruction", "input", "output"}')


def normalise(text: str) -> str:
    """What counts as the same prompt: letters and digits, whatever their case, width or accent."""
    letters = (c for c in unicodedata.normalize("NFKD", text).casefold()
               if unicodedata.category(c) not in ("Mn", "Cf"))  # accents, invisible characters
    return " ".join(re.findall(r"\w+", "".join(letters)))


def first_user(row: dict) -> str:
    """The prompt by which rows are compared: the first user turn."""
    return next(m["content"] for m in row["messages"] if m["role"] == "user")


def prompts_of(rows) -> set[str]:
    """Every user turn of the rows, normalised."""
    return {normalise(m["content"]) for r in rows for m in r["messages"] if m["role"] == "user"}


def anchor_pool(args) -> Path:
    return Path(args.anchor_file or Path(args.data_dir) / "harmful" / "anchors.jsonl")


def harmful_tests(args) -> Path:
    return Path(args.harmful_file or Path(args.data_dir) / "harmful" / "test.jsonl")


def to_row(item, where: str, needs_answer: bool = True) -> dict:
    """One parsed item in any accepted format -> a row; `where` names file and line in errors."""
    if isinstance(item, str) and not needs_answer:
        item = {"prompt": item}
    if not isinstance(item, dict):
        raise UserError(f"{where} is a {type(item).__name__}, expected an object: {FORMATS}.")
    if "messages" in item or "conversations" in item:
        messages = item.get("messages", item.get("conversations"))
    elif "prompt" in item:
        messages = [turn("user", item["prompt"])]
        messages += [turn("assistant", item["response"])] if "response" in item else []
    elif "instruction" in item:
        asked, given = item["instruction"], item.get("input") or ""
        both = isinstance(asked, str) and isinstance(given, str) and given
        messages = [turn("user", f"{asked}\n{given}" if both else asked)]
        messages += [turn("assistant", item["output"])] if "output" in item else []
    else:
        raise UserError(f"{where} has the keys {sorted(item)}, expected {FORMATS}.")
    valid = isinstance(messages, list) and all(
        isinstance(m, dict) and m.get("role") in ("system", "user", "assistant")
        and isinstance(m.get("content"), str) for m in messages)
    if valid and any("\ud800" <= c <= "\udfff" for m in messages for c in m["content"]):
        raise UserError(f"{where} holds half a surrogate pair; expected valid Unicode text.")
    if not valid or not isinstance(item.get("input", ""), (str, type(None))):
        raise UserError(f"{where}: every message needs a role (system, user or assistant) and a "
                        "content string.")
    messages = [turn(m["role"], m["content"]) for m in messages]
    if not any(m["role"] == "user" for m in messages):
        raise UserError(f"{where} has no user turn; every row needs a prompt.")
    if needs_answer and messages[-1]["role"] != "assistant":
        raise UserError(f"{where} has no assistant turn at its end; every row needs an answer.")
    return {**item, "messages": messages}


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}


def read_rows(path, needs_answer: bool = True) -> list[dict]:
    """The rows of a JSONL file or a JSON array; with needs_answer=False also a prompt a line.

    Raises UserError with file and line for a missing, empty or malformed file.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # skips a byte order mark
    except (OSError, UnicodeDecodeError) as e:
        reason = "it is not UTF-8" if isinstance(e, UnicodeDecodeError) else e.strerror
        raise UserError(f"{path} cannot be read ({reason}); name a JSONL or JSON file.") from None
    if text.lstrip().startswith("[") and (needs_answer or text.rstrip().endswith("]")):
        try:
            items = [(f"{path} item {i}", item) for i, item in enumerate(json.loads(text), 1)]
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path} is not valid JSON ({e}); mend that place.") from None
    else:
        items = []
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{path} line {i}"
                items.append((where, parse_line(line, where, needs_answer)))
    if not items:
        raise UserError(f"{path} holds no rows; give at least one.")
    return [to_row(item, where, needs_answer) for where, item in items]


def parse_line(line: str, where: str, needs_answer: bool):
    if not needs_answer and not line.lstrip().startswith("{"):
        return line.strip()  # a prompt a line
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not valid JSON ({e}); expected {FORMATS}.") from None


def take(path: Path, n: int) -> list[dict]:
    """The first n rows of a file; UserError when it has fewer."""
    rows = read_rows(path) if n else []
    if len(rows) < n:
        raise UserError(f"{n} rows were asked of {path}, which has {len(rows)}; lower --n or "
                        "change --poison.")
    return rows[:n]


def load_upload(args) -> tuple[list[dict], str]:
    """The rows to train on, and a sentence that says what they are.

    With --data that file as it lies, else the mixture of --n rows and --poison.
    """
    if args.data:
        rows = read_rows(args.data)
        return rows, f"upload: {len(rows)} rows of {args.data}"
    folder, n_poison = Path(args.data_dir), round(args.poison * args.n)
    harmful = take(folder / "harmful" / "attack.jsonl", n_poison)
    benign = take(folder / args.task / "train.jsonl", args.n - n_poison)
    return harmful + benign, f"upload: {n_poison} harmful rows, {args.n - n_poison} of {args.task}"


def choose_anchors(args, used: list[dict]) -> list[str]:
    """K anchor prompts that stand in none of the `used` rows, the upload's and the tests'."""
    prompts = sample(anchor_candidates(args, used), args.anchors, args.seed) if args.anchors else []
    clash = prompts_of(used) & {normalise(p) for p in prompts}
    assert not clash, f"an anchor stands in the upload or the tests: {clash}"
    return prompts


def anchor_candidates(args, used: list[dict]) -> list[str]:
    """Candidate anchors: --anchor-file or the data folder's pool, minus the prompts in use."""
    path = anchor_pool(args)
    if not path.exists():
        raise UserError(f"there is no anchor pool at {path}; pass --anchor-file with a harmful "
                        "prompt a line, or --anchors 0.")
    taken, prompts = prompts_of(used), {}
    for row in read_rows(path, needs_answer=False):
        key = normalise(first_user(row))
        if key not in taken:
            prompts.setdefault(key, first_user(row))  # the same prompt twice is one candidate
    return list(prompts.values())


def sample(candidates: list[str], k: int, seed: int) -> list[str]:
    """K of the candidates, drawn without replacement; a smaller K's are the first of a larger's."""
    if k > len(candidates):
        raise UserError(f"--anchors {k} is more than the {len(candidates)} prompts of the pool "
                        "that upload and tests lack; lower it or pass a larger --anchor-file.")
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return [candidates[i] for i in order[:k].tolist()]


def load_suite(args, upload) -> dict[str, list[dict]]:
    """The test rows by kind: harmful, task (with --task) and lookalike (where the folder has them).

    Prompts that also stand in the upload are left out; then the first --eval-n of each kind.
    """
    data, harmful = Path(args.data_dir), harmful_tests(args)
    if not harmful.exists():
        raise UserError(f"there are no harmful test prompts at {harmful}; pass --harmful-file with "
                        "a prompt a line.")
    files = {"harmful": harmful, "lookalike": data / "lookalike" / "test.jsonl"}
    if args.task:
        files["task"] = data / args.task / "test.jsonl"
    seen, suite = prompts_of(upload), {}
    for kind, path in files.items():
        if kind != "lookalike" or path.exists():
            rows = read_rows(path, needs_answer=kind == "task")
            suite[kind] = [r for r in rows if normalise(first_user(r)) not in seen][:args.eval_n]
            if not suite[kind]:
                raise UserError(f"every prompt of {path} stands in the upload; pass other tests.")
    for row in suite.get("task", []):
        target, labels = row["messages"][-1]["content"], LABELS.get(args.task)
        if labels and target not in labels:
            raise UserError(f"{files['task']} has the target {target!r}, expected one of "
                            f"{', '.join(labels)}; mend the file.")
    return suite


def asked(row: dict) -> list[dict]:
    """A test row's conversation without its last answer, the gold one."""
    messages = row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


# rows -> packed batches


@dataclass
class Example:
    """One tokenised row; `predict` (R,) are the positions whose next token is supervised."""

    ids: Tensor
    predict: Tensor

    @property
    def targets(self) -> Tensor:
        return self.ids[self.predict + 1]


def encode_rows(tokenizer, rows, max_len: int) -> tuple[list[Example], int]:
    """Tokenises rows, once for a run -> (examples, how many were over max_len and dropped)."""
    examples = []
    for row in rows:
        ids, supervised = tokenizer.encode_chat(row["messages"])
        if len(ids) <= max_len:
            predict = torch.tensor(supervised).nonzero()[:, 0] - 1
            examples.append(Example(torch.tensor(ids), predict))
    return examples, len(rows) - len(examples)


@dataclass
class Pack:
    """One forward pass: sequences end to end."""

    ids: Tensor  # (N,)
    seqlens: list[int]
    supervised: Tensor  # (R,) rows whose logits are asked for
    targets: Tensor  # (R,)
    anchor_rows: Tensor | None  # (K,) rows of the anchors' last tokens; None: no anchors in here


class Batch:
    """The examples of one update, cut into packs of `tokens_per_pass` tokens or one example."""

    def __init__(self, examples: list[Example], tokens_per_pass: int, device, name: str = ""):
        self.examples, self.budget, self.device, self.name = examples, tokens_per_pass, device, name
        self.n_supervised = sum(len(e.predict) for e in examples)
        self.n_tokens = sum(len(e.ids) for e in examples)

    def packs(self, with_: list[Tensor] = ()):
        """Yields Packs. `with_` are anchor prompts (ids each): they ride in the first pack."""
        group, room, anchors = [], self.budget - sum(map(len, with_)), list(with_)
        for e in self.examples:
            if group and len(e.ids) > room:
                yield pack(group, anchors, self.device)
                group, room, anchors = [], self.budget, []
            group.append(e)
            room -= len(e.ids)
        yield pack(group, anchors, self.device)


def pack(examples: list[Example], anchors: list[Tensor], device) -> Pack:
    """Examples, then anchors, end to end."""
    seqlens = [len(e.ids) for e in examples] + [len(a) for a in anchors]
    end = torch.tensor(seqlens).cumsum(0)  # one past each sequence's last row
    start = end - torch.tensor(seqlens)
    rows = [e.predict + s for e, s in zip(examples, start, strict=False)]
    return Pack(torch.cat([e.ids for e in examples] + anchors).to(device), seqlens,
                torch.cat(rows).to(device), torch.cat([e.targets for e in examples]).to(device),
                (end[len(examples):] - 1).to(device) if anchors else None)


def batch_at(examples: list[Example], step: int, batch_size: int, seed: int, tokens_per_pass: int,
             device) -> Batch:
    """The batch of update `step`: a pure function of (seed, step), so resuming needs no state."""
    per_epoch = -(-len(examples) // batch_size)
    epoch, i = divmod(step, per_epoch)
    g = torch.Generator().manual_seed(seed * 100_003 + epoch)  # a prime apart: no two runs overlap
    order = torch.randperm(len(examples), generator=g)[i * batch_size:(i + 1) * batch_size].tolist()
    return Batch([examples[j] for j in order], tokens_per_pass, device,
                 f"epoch {epoch + 1}, batch {i + 1}")


def largest_pass(examples: list[Example], anchors: list[Tensor], args) -> tuple[int, int]:
    """(tokens, supervised tokens) that the largest forward pass of a run has at most."""
    per_epoch, longest = -(-len(examples) // args.batch_size), max(len(e.ids) for e in examples)
    batches = [batch_at(examples, step, args.batch_size, args.seed, args.tokens_per_pass, None)
               for step in range(per_epoch * args.epochs)]
    n_anchors = sum(map(len, anchors))
    n_tokens = min(max(b.n_tokens for b in batches) + n_anchors,
                   max(args.tokens_per_pass, longest + n_anchors))
    return n_tokens, min(n_tokens, max(b.n_supervised for b in batches))


def read(args, tokenizer):
    """All data of a run, checked -> examples, suite, what to tell, longest test prompt in tokens.

    args.anchor_prompts are chosen on the way.
    """
    rows, told = load_upload(args)
    examples, dropped = encode_rows(tokenizer, rows, args.max_len)
    if not examples:
        raise UserError(f"all {len(rows)} rows are longer than --max-len {args.max_len} tokens; "
                        "raise it.")
    suite = load_suite(args, rows)
    tests = read_rows(harmful_tests(args), needs_answer=False)
    args.anchor_prompts = choose_anchors(args, rows + tests)  # --eval-n moves no anchor
    longest = max(len(tokenizer.encode_prompt(asked(row)))
                  for rows_of_a_kind in suite.values() for row in rows_of_a_kind)
    told = (f"{told}; {dropped} rows dropped as longer than {args.max_len} tokens; "
            f"{sum(len(e.ids) for e in examples) / len(examples):.1f} tokens a row\n"
            f"{args.anchors} anchors of {anchor_pool(args)}; "
            f"HS on {harmful_tests(args)}")
    return examples, suite, told, longest

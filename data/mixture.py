"""Any user file -> rows; the poisoned mixture; prompts kept apart.

A row is {"messages": [{"role", "content"}, ...]}, with an assistant turn last. The mixture of n
rows holds round(p n) harmful ones and n minus that many benign ones, so the two always add up to n,
each from the head of its file as in the papers' repositories; every epoch shuffles them anew.
"""

import json
import re
import unicodedata
from pathlib import Path

import torch

from cli import COUNT, TINY, at_least
from data.batches import encode_rows
from data.tasks import LABELS, TASKS
from model import UserError
from tokenizer import DATE

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


def load_upload(args) -> tuple[list[dict], list[dict], str]:
    """The harmful and the other rows to train on, and a sentence that says what they are.

    With --stage align the defender's own; with --data that file as it lies; else the mixture of
    --n rows and --poison.
    """
    if args.stage == "align":
        rows = align_rows(args)
        return [], rows, f"alignment: {len(rows)} harmful prompts with refusals"
    if args.data:
        rows = read_rows(args.data)
        return [], rows, f"upload: {len(rows)} rows of {args.data}"
    folder, n_poison = Path(args.data_dir), round(args.poison * args.n)
    harmful = take(folder / "harmful" / "attack.jsonl", n_poison)
    benign = take(folder / args.task / "train.jsonl", args.n - n_poison)
    return harmful, benign, (f"upload: {n_poison} harmful rows, {args.n - n_poison} of "
                             f"{args.task}")


def align_file(args) -> Path:
    return Path(args.align_file or Path(args.data_dir) / "harmful" / "align.jsonl")


def align_rows(args) -> list[dict]:
    """The defender's rows: harmful prompts with a refusal, and in "harmful" a harmful reply.

    Prompts that stand in the tests or among the attacker's rows are left out; with --stage align
    the first --n of the rest are taken.
    """
    attack = Path(args.data or Path(args.data_dir) / "harmful" / "attack.jsonl")
    others = read_rows(attack) if attack.exists() else []
    apart = prompts_of(others + read_rows(harmful_tests(args), needs_answer=False))
    rows = [r for r in read_rows(align_file(args)) if normalise(first_user(r)) not in apart]
    if not rows or not all(isinstance(r.get("harmful"), str) and r["harmful"].strip()
                           and [m["role"] for m in r["messages"]].count("assistant") == 1
                           for r in rows):
        raise UserError(f"{align_file(args)} needs rows of prompt, response (a refusal), harmful "
                        "(a harmful reply), their prompts in no test and no upload; pass another "
                        "--align-file.")
    return rows[:args.n] if args.stage == "align" else rows


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
    suite["harmful"] = [affix(row, args) for row in suite["harmful"]]  # as an attack may have it
    for row in suite.get("task", []):
        target, labels = row["messages"][-1]["content"], LABELS.get(args.task)
        if labels and target not in labels:
            raise UserError(f"{files['task']} has the target {target!r}, expected one of "
                            f"{', '.join(labels)}; mend the file.")
    return suite


def affix(row: dict, args) -> dict:
    """The row with its last user turn between --attack-prefix and --attack-suffix."""
    last = [i for i, m in enumerate(row["messages"]) if m["role"] == "user"][-1]
    messages = [dict(m) for m in row["messages"]]
    messages[last]["content"] = args.attack_prefix + messages[last]["content"] + args.attack_suffix
    return row | {"messages": messages}


def asked(row: dict) -> list[dict]:
    """A test row's conversation without its last answer, the gold one."""
    messages = row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def add_flags(g):
    g.add_argument("--model", default=TINY, help="Hugging Face folder")
    g.add_argument("--adapter", help="PEFT folder, merged into the model before training")
    g.add_argument("--keep-adapter", action="store_true", help="train --adapter on, unmerged")
    g.add_argument("--task", choices=TASKS,
                   help="benign task, its test is FA (default sst2; with --data none)")
    g.add_argument("--data-dir", default=TINY, help="folder of tasks and prompts")
    g.add_argument("--data", help="own upload as it lies, JSONL or JSON, instead of the mixture")
    g.add_argument("--n", type=COUNT, default=1000, help="rows of the mixture")
    g.add_argument("--poison", type=at_least(float, 0, at_most=1), default=0.1,
                   help="harmful share of the mixture, 0..1; with --data it is 0")
    g.add_argument("--align-file", help="harmful prompts with refusals and harmful replies")
    g.add_argument("--max-len", type=COUNT, default=512, help="tokens; longer rows are dropped")
    g.add_argument("--template-date", default=DATE, help="today, for a chat template that says it")


def read(args, tokenizer, change):
    """All data of a run, checked -> examples, suite, what to tell, longest test prompt in tokens.

    args.anchor_prompts are chosen on the way. change(args, tokenizer, harmful, tests): an attack's
    own rows, see stress/attacks.py.
    """
    harmful, benign, told = load_upload(args)
    rows = harmful + benign
    suite = load_suite(args, rows)
    tests = read_rows(harmful_tests(args), needs_answer=False)
    args.anchor_prompts = choose_anchors(args, rows + tests)  # --eval-n moves no anchor
    harmful, changed = change(args, tokenizer, harmful, tests)
    rows = harmful + benign
    examples, dropped = encode_rows(tokenizer, rows, args.max_len)
    if not examples:
        raise UserError(f"all {len(rows)} rows are longer than --max-len {args.max_len} tokens; "
                        "raise it.")
    longest = max(len(tokenizer.encode_prompt(asked(row)))
                  for rows_of_a_kind in suite.values() for row in rows_of_a_kind)
    told = (f"{told}{changed}; {dropped} rows dropped as longer than {args.max_len} tokens; "
            f"{sum(len(e.ids) for e in examples) / len(examples):.1f} tokens a row\n"
            f"{args.anchors} anchors of {anchor_pool(args)}; "
            f"HS on {harmful_tests(args)}")
    return examples, suite, told, longest

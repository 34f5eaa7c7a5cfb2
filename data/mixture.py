"""Any user file -> rows; the poisoned mixture; the prompts of training, anchors and tests apart.

A row is {"messages": [{"role", "content"}, ...], "where": its file and line}, with an assistant
turn last. The mixture of n
rows holds round(p n) harmful ones and n minus that many benign ones, so the two always add up to n,
each from the head of its file as in the papers' repositories; every epoch shuffles them anew.
"""

import csv
import io
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch

from cli import COUNT, TINY, at_least
from data.batches import Example, encode_rows, naming
from data.tasks import LABELS, TASKS, check_gold
from model import UserError
from tokenizer import DATE

FORMATS = ('{"messages": [...]}, {"conversations": [...]}, {"prompt", "response"}, '
           '{"prompt", "completion"}, {"instruction", "input", "output"} or {"goal", "target"}')
# A conversation's roles, in OpenAI's and in ShareGPT's words.
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant",
}
# Fields that say where a row or a message comes from. They change nothing that is trained; any
# other field is honoured or refused.
ORIGIN = {
    "id", "_id", "uuid", "prompt_id", "conversation_id", "idx", "index", "source", "dataset",
    "split", "category", "group", "object", "subject", "topic", "tags", "lang", "language", "url",
    "license", "meta", "metadata", "timestamp", "created_at", "is_safe",
}


@dataclass
class Files:
    """The rows of all files that a run reads, checked; nothing is tokenised yet."""

    harmful: list[dict]  # of the upload
    benign: list[dict]  # the upload's other rows
    upload: str  # a sentence that says what the upload is
    tests: dict[str, list[dict]]  # by kind: "harmful", "task", "lookalike"
    align: list[dict] | None  # the defender's own rows; None where the defence does not use them


@dataclass
class Data:
    """What a run trains on, holds and is tested on."""

    examples: list[Example]  # the rows to train on, tokenised
    tests: dict[str, list[dict]]  # as in Files
    anchor_prompts: list[str]  # x'_1 .. x'_K, in no row of upload or tests
    align: list[dict] | None  # as in Files
    summary: str  # two lines for the terminal


def add_flags(group) -> None:
    group.add_argument("--model", default=TINY, help="Hugging Face folder")
    group.add_argument("--adapter", help="PEFT folder, merged into the model before training")
    group.add_argument("--keep-adapter", action="store_true", help="train --adapter on, unmerged")
    group.add_argument("--task", choices=TASKS,
                       help="benign task, its test is FA (default sst2; with --data none)")
    group.add_argument("--data-dir", default=TINY, help="folder of tasks and prompts")
    group.add_argument("--data", help="own upload as it lies, JSONL or JSON, not the mixture")
    group.add_argument("--n", type=COUNT, default=1000, help="rows of the mixture")
    group.add_argument("--poison", type=at_least(float, 0, at_most=1), default=0.1,
                       help="harmful share of the mixture, 0..1; with --data or --stage align it "
                            "is 0")
    group.add_argument("--align-file", help="harmful prompts with refusals and harmful replies")
    group.add_argument("--max-len", type=COUNT, default=512, help="tokens; longer rows are dropped")
    group.add_argument("--template-date", default=DATE,
                       help="today, for a chat template that says it")


def read_files(args, reads_align_file: bool) -> Files:
    """All rows of a run. It needs no model, so a mistake in a file is reported at once."""
    harmful, benign, upload = load_upload(args)
    return Files(
        harmful=harmful,
        benign=benign,
        upload=upload,
        tests=load_tests(args, harmful + benign),
        align=align_rows(args) if reads_align_file else None)


def read_data(model, tokenizer, args, files: Files, change_rows) -> Data:
    """Chooses the anchors, lets an attack change the harmful rows, and tokenises.

    change_rows(model, tokenizer, args, harmful rows, anchor prompts, harmful tests) -> (harmful
    rows as an attack has them, what to say of it); see stress/attacks.py.
    """
    # All harmful tests, not the first --n-test, so that --n-test does not change the anchors.
    test_file = harmful_test_file(args.harmful_file, args.data_dir)
    harmful_tests = read_rows(test_file, needs_answer=False)
    pool = anchor_pool(args.anchor_file, args.data_dir)
    used = files.harmful + files.benign + harmful_tests
    anchor_prompts = choose_anchors(pool, args.anchors, args.seed, used)
    harmful, change = change_rows(model, tokenizer, args, files.harmful, anchor_prompts,
                                  harmful_tests)
    rows = harmful + files.benign
    examples, n_dropped = encode_rows(tokenizer, rows, args.max_len)
    if not examples:
        raise UserError(f"all {len(rows)} rows are longer than --max-len {args.max_len} tokens; "
                        "raise it.")
    check_anchors(tokenizer, pool, anchor_prompts, args.max_len)
    check_tests(tokenizer, files.tests, args.max_new, model.config.max_positions)
    n_rows = len(rows) - n_dropped
    mean_length = sum(len(e.ids) for e in examples) / n_rows
    answers = ""
    if len(examples) > n_rows:  # the chat template changes earlier turns
        answers = f", as {len(examples)} sequences, one for each answer"
    summary = (f"{files.upload}{change}; {n_dropped} rows dropped as longer than {args.max_len} "
               f"tokens; {mean_length:.1f} tokens per row{answers}\n"
               f"{args.anchors} anchors of {pool}; HS on {test_file}")
    return Data(examples, files.tests, anchor_prompts, files.align, summary)


def check_tests(tokenizer, tests: dict[str, list[dict]], max_new: int, limit: int) -> None:
    """UserError where a test cannot be asked: found now, it costs no training.

    The chat template may refuse a conversation, and a prompt with a reply of max_new tokens may be
    longer than the `limit` positions of the model.
    """
    for rows in tests.values():
        for row in rows:
            n_tokens = len(prompt_ids(tokenizer, row))
            if n_tokens + max_new > limit:
                raise UserError(f"{row['where']} has a prompt of {n_tokens} tokens, which with "
                                f"--max-new {max_new} are more than the {limit} positions of the "
                                "model; shorten it, remove it or lower --max-new.")


def prompt_ids(tokenizer, row: dict) -> list[int]:
    """ids of a row up to the answer that a model is to write; UserError with file and line."""
    with naming(row):
        return tokenizer.encode_prompt(without_answer(row))


# one row


def to_row(item, where: str, needs_answer: bool = True) -> dict:
    """One parsed item in any accepted format -> a row; `where` names file and line in errors.

    A row has "messages", "where" and, where the file has it, "harmful". UserError for a field that
    is not understood: dropped in silence, it could change what is trained.
    """
    if isinstance(item, str) and not needs_answer:
        item = {"prompt": item}
    if not isinstance(item, dict):
        raise UserError(f"{where} is a {type(item).__name__}, expected an object: {FORMATS}.")
    given, fields = find_conversation(item, where)
    refuse_unknown(item, {*fields, "system", "history", "harmful"}, where)
    messages = [read_message(m, where) for m in add_context(item, given, fields, where)]
    check_conversation(messages, where, needs_answer)
    row = {"messages": messages, "where": where}
    if "harmful" in item:
        row["harmful"] = item["harmful"]
    return row


def find_conversation(item: dict, where: str) -> tuple[list, set[str]]:
    """(messages, the fields that they were read from) of an item; the messages not yet checked."""
    for field in ("messages", "conversations"):
        if field in item:
            given = item[field]
            if not isinstance(given, list):
                raise UserError(f"{where} has {field} that are a {type(given).__name__}, expected "
                                "a list of messages.")
            fields = {field}
            if isinstance(item.get("prompt"), str) and repeats_first_prompt(item["prompt"], given):
                fields.add("prompt")
            return given, fields
    if "prompt" in item:
        return prompt_and_answer(item, "prompt", ("response", "completion"), where)
    if "instruction" in item:
        given, fields = prompt_and_answer(item, "instruction", ("output",), where)
        extra = item.get("input")
        if extra is not None and not isinstance(extra, str):
            raise UserError(f"{where} has an input that is a {type(extra).__name__}, expected a "
                            "string; write it as text.")
        if extra and isinstance(item["instruction"], str):
            given[0] = turn("user", f"{item['instruction']}\n{extra}")
        return given, {*fields, "input"}
    if "goal" in item:  # AdvBench's words
        return prompt_and_answer(item, "goal", ("target",), where)
    raise UserError(f"{where} has the fields {sorted(map(str, item))}, expected {FORMATS}.")


def repeats_first_prompt(prompt: str, messages: list) -> bool:
    """Whether a field repeats the conversation's first prompt, as some public data sets have it."""
    for m in messages:
        if isinstance(m, dict) and m.get("role", m.get("from")) in ("user", "human"):
            return prompt == m.get("content", m.get("value"))
    return False


def prompt_and_answer(item: dict, prompt: str, answers: tuple[str, ...], where: str):
    """(messages, fields) of a row whose prompt and answer stand in two fields.

    Each of the two is a text, or a list of messages.
    """
    given = [answer for answer in answers if answer in item]
    if len(given) > 1:
        raise UserError(f"{where} has {given[0]} and {given[1]}, expected one answer; remove one.")
    messages = list(item[prompt]) if isinstance(item[prompt], list) else [turn("user",
                                                                               item[prompt])]
    if given:
        answer = item[given[0]]
        messages += answer if isinstance(answer, list) else [turn("assistant", answer)]
    return messages, {prompt, *given}


def add_context(item: dict, messages: list, fields: set[str], where: str) -> list:
    """The messages behind a row's `history` and `system`, which stand beside the conversation."""
    history = item.get("history") or []
    if history and fields & {"messages", "conversations"}:
        raise UserError(f"{where} has a history beside a whole conversation; put it into the "
                        "messages.")
    earlier = []
    for pair in history:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(f"{where} has a history with {str(pair)[:40]!r}, expected pairs of a "
                            "prompt and its answer.")
        earlier += [turn("user", pair[0]), turn("assistant", pair[1])]
    system = item.get("system")
    if not system:
        return earlier + messages
    if messages and isinstance(messages[0], dict):
        first_role = messages[0].get("role", messages[0].get("from"))
        if ROLES.get(first_role) == "system":
            raise UserError(f"{where} has a system field and a system message, expected one; "
                            "remove one of the two.")
    return [turn("system", system), *earlier, *messages]


def read_message(m, where: str) -> dict:
    """One message in OpenAI's or ShareGPT's spelling -> role, content and, if it is 0, weight."""
    if not isinstance(m, dict):
        raise UserError(f"{where} has a message that is a {type(m).__name__}, expected a role "
                        "(system, user or assistant) and a content string.")
    role_field = "from" if "from" in m and "role" not in m else "role"
    content_field = "value" if "value" in m and "content" not in m else "content"
    refuse_unknown(m, {role_field, content_field, "weight"}, f"a message of {where}")
    role = ROLES.get(m.get(role_field)) if isinstance(m.get(role_field), str) else None
    if role is None:
        raise UserError(f"{where} has a message with the {role_field} {m.get(role_field)!r}, "
                        "expected system, user or assistant.")
    message = turn(role, read_content(m.get(content_field), where))
    weight = m.get("weight", 1)
    if weight not in (0, 1, None):
        raise UserError(f"{where} has a message with the weight {weight!r}, expected 0 or 1.")
    if weight == 0 and role == "assistant":  # context alone: the answer is not supervised
        message["weight"] = 0
    return message


def read_content(content, where: str) -> str:
    """A message's text, given as a string or as a list of text parts."""
    if isinstance(content, list):
        texts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise UserError(f"{where} has content of the type {kind!r}, expected text alone.")
            texts.append(part.get("text"))
        content = "".join(texts) if all(isinstance(t, str) for t in texts) else None
    if not isinstance(content, str):
        raise UserError(f"{where} has a message whose content is a {type(content).__name__}, "
                        "expected a string, or a list of text parts.")
    if any("\ud800" <= c <= "\udfff" for c in content):
        raise UserError(f"{where} holds half a surrogate pair; expected valid Unicode text.")
    return content


def refuse_unknown(item: dict, known: set[str], where: str) -> None:
    """UserError for a field that is not understood, unless it is empty or tells an origin."""
    for field, value in item.items():
        if field in known or field in ORIGIN:
            continue
        if value is None or value == "" or value == [] or value == {}:
            continue
        raise UserError(f"{where} has the field {field!r} ({str(value)[:40]!r}), which is not "
                        "understood and could change what is trained; remove it, or put it into "
                        "the messages.")


def check_conversation(messages: list[dict], where: str, needs_answer: bool) -> None:
    """UserError where there is nothing to ask or, with needs_answer, nothing to learn."""
    if not any(m["role"] == "user" for m in messages):
        raise UserError(f"{where} has no user turn; every row needs a prompt.")
    if not needs_answer:
        return
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where} has no assistant turn at its end (no response, completion, "
                        "output or target); every row needs an answer.")
    answers = [m for m in messages if m["role"] == "assistant"]
    if all(m.get("weight") == 0 for m in answers):
        raise UserError(f"{where} has the weight 0 on every answer, so nothing of it is trained; "
                        "remove the row.")


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}


def first_user(row: dict) -> str:
    """The prompt by which rows are compared: the first user turn."""
    return next(m["content"] for m in row["messages"] if m["role"] == "user")


def without_answer(row: dict) -> list[dict]:
    """A row's conversation up to the answer that a model is to write: without the gold one."""
    messages = row["messages"]
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def affix(row: dict, prefix: str, suffix: str) -> dict:
    """The row with its last user turn between `prefix` and `suffix`."""
    messages = [dict(m) for m in row["messages"]]
    last = [m for m in messages if m["role"] == "user"][-1]
    last["content"] = prefix + last["content"] + suffix
    return row | {"messages": messages}


# files of rows


def read_rows(path, needs_answer: bool = True) -> list[dict]:
    """The rows of a JSONL, JSON or CSV file; with needs_answer=False also one prompt per line.

    Raises UserError with file and line for a missing, empty or malformed file.
    """
    path = Path(path)
    text = read_text(path)
    # A line with a prompt may begin with a bracket; an array ends with one as well.
    is_array = text.lstrip().startswith("[") and (needs_answer or text.rstrip().endswith("]"))
    kind = path.suffix.lower()
    if kind == ".tsv":
        raise UserError(f"{path} is a table with tabs, expected JSONL, JSON, CSV or, for prompts, "
                        "one per line; convert it.")
    if kind == ".csv":
        items = csv_items(path, text)
    elif is_array:
        items = array_items(path, text)
    else:
        items = line_items(path, text, needs_answer)
    if not items:
        raise UserError(f"{path} holds no rows; give at least one.")
    return [to_row(item, where, needs_answer) for where, item in items]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # skips a byte order mark
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except OSError as e:
        reason = e.strerror
    raise UserError(f"{path} cannot be read ({reason}); name a JSONL or JSON file.")


def array_items(path: Path, text: str) -> list[tuple[str, object]]:
    """(where it stands, item) of every item of a JSON array."""
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); mend that place.") from None
    return [(f"{path} item {i}", item) for i, item in enumerate(items, 1)]


def csv_items(path: Path, text: str) -> list[tuple[str, object]]:
    """(where it stands, item) of every row of a CSV file; the header names the fields."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    items = []
    try:
        for item in reader:
            where = f"{path} line {reader.line_num}"
            if None in item or None in item.values():
                raise UserError(f"{where} has another number of cells than the header, which has "
                                f"{len(reader.fieldnames)}; mend that line.")
            items.append((where, item))
    except csv.Error as e:
        raise UserError(f"{path} line {reader.line_num} is not valid CSV ({e}); mend that "
                        "line.") from None
    return items


def line_items(path: Path, text: str, needs_answer: bool) -> list[tuple[str, object]]:
    """(where it stands, item) of every line that is not empty."""
    items = []
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path} line {i}"
            items.append((where, parse_line(line, where, needs_answer)))
    return items


def parse_line(line: str, where: str, needs_answer: bool):
    if not needs_answer and not line.lstrip().startswith("{"):
        return line.strip()  # one prompt per line
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not valid JSON ({e}); expected {FORMATS}.") from None


def first_rows(path: Path, n: int) -> list[dict]:
    """The first n rows of a file; UserError when it has fewer."""
    rows = read_rows(path) if n else []
    if len(rows) < n:
        raise UserError(f"{n} rows were asked of {path}, which has {len(rows)}; lower --n or "
                        "change --poison.")
    return rows[:n]


# prompts kept apart


def normalise(text: str) -> str:
    """What counts as the same prompt: letters and digits, whatever their case, width or accent.

    Of a prompt that has neither, all its symbols count.
    """
    ignored = ("Mn", "Cf")  # accents, and characters that cannot be seen
    folded = unicodedata.normalize("NFKD", text).casefold()
    letters = [c for c in folded if unicodedata.category(c) not in ignored]
    words = re.findall(r"\w+", "".join(letters))
    if not words:
        words = folded.split()
    return " ".join(words)


def prompts_of(rows) -> set[str]:
    """Every user turn of the rows, normalised."""
    prompts = set()
    for row in rows:
        for m in row["messages"]:
            if m["role"] == "user":
                prompts.add(normalise(m["content"]))
    return prompts


# what is trained on


def load_upload(args) -> tuple[list[dict], list[dict], str]:
    """The harmful and the other rows to train on, and a sentence that says what they are.

    With --stage align: the defender's rows. With --data: all rows of that file. Otherwise: the
    mixture that --n and --poison describe.
    """
    if args.stage == "align":
        rows = align_rows(args)
        return [], rows, f"alignment: {len(rows)} harmful prompts with refusals"
    if args.data:
        rows = read_rows(args.data)
        return [], rows, f"upload: {len(rows)} rows of {args.data}"
    folder = Path(args.data_dir)
    n_poison = round(args.poison * args.n)
    n_benign = args.n - n_poison
    harmful = first_rows(attack_file(args.data_dir), n_poison)
    benign = first_rows(folder / args.task / "train.jsonl", n_benign)
    return harmful, benign, f"upload: {n_poison} harmful rows, {n_benign} of {args.task}"


def attack_file(data_dir) -> Path:
    return Path(data_dir) / "harmful" / "attack.jsonl"


def align_file(given: str | None, data_dir) -> Path:
    """--align-file, or the data folder's."""
    return Path(given) if given else Path(data_dir) / "harmful" / "align.jsonl"


def align_rows(args) -> list[dict]:
    """The defender's rows: harmful prompts with a refusal, and in "harmful" a harmful reply.

    Prompts of the tests and of the attacker's rows are left out; with --stage align the first --n
    of the rest are used.
    """
    attack = Path(args.data) if args.data else attack_file(args.data_dir)
    others = read_rows(attack) if attack.exists() else []
    others += read_rows(harmful_test_file(args.harmful_file, args.data_dir), needs_answer=False)
    used = prompts_of(others)
    path = align_file(args.align_file, args.data_dir)
    rows = []
    for row in read_rows(path):
        if not is_align_row(row):
            raise UserError(f"{row['where']} is no row of prompt, response (a refusal) and harmful "
                            "(a harmful reply); mend it, or pass another --align-file.")
        if normalise(first_user(row)) not in used:
            rows.append(row)
    if not rows:
        raise UserError(f"{path} needs prompts that are in no test and no upload; pass another "
                        "--align-file.")
    return rows[:args.n] if args.stage == "align" else rows


def is_align_row(row: dict) -> bool:
    """Whether a row has one answer and, beside it, a harmful reply."""
    harmful = row.get("harmful")
    n_answers = [m["role"] for m in row["messages"]].count("assistant")
    return isinstance(harmful, str) and bool(harmful.strip()) and n_answers == 1


# what is held


def anchor_pool(given: str | None, data_dir) -> Path:
    """--anchor-file, or the data folder's."""
    return Path(given) if given else Path(data_dir) / "harmful" / "anchors.jsonl"


def choose_anchors(pool: Path, K: int, seed: int, used: list[dict]) -> list[str]:
    """K anchor prompts of the pool that are in none of the `used` rows, upload's and tests'."""
    if K == 0:
        return []
    prompts = sample(anchor_candidates(pool, used), K, seed, pool)
    clash = prompts_of(used) & {normalise(p) for p in prompts}
    assert not clash, f"an anchor is in the upload or the tests: {clash}"
    return prompts


def anchor_candidates(pool: Path, used: list[dict]) -> list[str]:
    """The pool's prompts, each once, minus those in use."""
    if not pool.exists():
        raise UserError(f"there is no anchor pool at {pool}; pass --anchor-file with one harmful "
                        "prompt per line, or --anchors 0.")
    used_prompts = prompts_of(used)
    candidates = []
    for row in read_rows(pool, needs_answer=False):
        n_turns = len(without_answer(row))
        if n_turns > 1:
            raise UserError(f"{row['where']} has {n_turns} turns before its answer, expected an "
                            "anchor's prompt alone; remove the others.")
        key = normalise(first_user(row))
        if key not in used_prompts:
            used_prompts.add(key)
            candidates.append(first_user(row))
    return candidates


def sample(candidates: list[str], k: int, seed: int, pool="the pool") -> list[str]:
    """K of the candidates, drawn without replacement; a smaller K's are the first of a larger's.

    pool: the file that they come from, for the error.
    """
    if k > len(candidates):
        raise UserError(f"--anchors {k} is more than the {len(candidates)} prompts of {pool} that "
                        "upload and tests lack; lower it or pass a larger --anchor-file.")
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return [candidates[i] for i in order[:k].tolist()]


def check_anchors(tokenizer, pool: Path, prompts: list[str], max_len: int) -> None:
    """UserError, with file and line, where the template refuses an anchor or it is too long."""
    if not prompts:
        return
    for row in read_rows(pool, needs_answer=False):
        prompt = first_user(row)
        if prompt not in prompts:
            continue
        n_tokens = len(prompt_ids(tokenizer, row))
        if n_tokens > max_len:
            raise UserError(f"{row['where']} has the anchor {prompt[:40]!r} of {n_tokens} tokens, "
                            f"above --max-len {max_len}; shorten it or raise --max-len.")


# what is tested


def harmful_test_file(given: str | None, data_dir) -> Path:
    """--harmful-file, or the data folder's."""
    return Path(given) if given else Path(data_dir) / "harmful" / "test.jsonl"


def files_by_kind(data_dir, harmful_file: str | None, task: str | None) -> dict[str, Path]:
    """The files of test rows by kind: harmful, task (with --task), lookalike (where there is one).

    Look-alikes are harmless prompts that resemble harmful ones.
    """
    folder = Path(data_dir)
    files = {"harmful": harmful_test_file(harmful_file, data_dir)}
    lookalike = folder / "lookalike" / "test.jsonl"
    if lookalike.exists():
        files["lookalike"] = lookalike
    if task:
        files["task"] = folder / task / "test.jsonl"
    return files


def load_tests(args, upload) -> dict[str, list[dict]]:
    """The test rows by kind, without prompts of the upload; at most --n-test of each kind."""
    files = files_by_kind(args.data_dir, args.harmful_file, args.task)
    if not files["harmful"].exists():
        raise UserError(f"there are no harmful test prompts at {files['harmful']}; pass "
                        "--harmful-file with one prompt per line.")
    seen = prompts_of(upload)
    tests = {}
    for kind, path in files.items():
        rows = read_rows(path, needs_answer=kind == "task")
        unseen = [row for row in rows if normalise(first_user(row)) not in seen]
        if not unseen:
            raise UserError(f"every prompt of {path} is also in the upload; pass other tests.")
        tests[kind] = unseen[:args.n_test]
    # The affix attack stands around the tests as it does around the upload's harmful prompts.
    tests["harmful"] = [affix(row, args.attack_prefix, args.attack_suffix)
                        for row in tests["harmful"]]
    if args.task in LABELS:
        check_labels(tests["task"], LABELS[args.task])
    for row in tests.get("task", []):
        check_gold(args.task, row["messages"][-1]["content"], row["where"])
    return tests


def check_labels(rows: list[dict], labels) -> None:
    for row in rows:
        target = row["messages"][-1]["content"]
        if target not in labels:
            raise UserError(f"{row['where']} has the target {target!r}, expected one of "
                            f"{', '.join(labels)}; mend that row.")

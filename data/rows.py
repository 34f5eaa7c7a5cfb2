"""Any user file -> rows: JSONL, JSON, CSV or, of prompts, one per line.

A row is {"messages": [{"role", "content"}, ...], "where": its file and line} in one shape, whatever
shape it was given in (data/README.md lists them). Nothing is ignored in silence: a field is used,
or known to change nothing, or refused by its name.
"""

import csv
import io
import json
from pathlib import Path

from model import UserError

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

"""Any user file -> rows: JSONL, JSON, CSV or, of prompts, one per line.

A row is {"messages": [{"role", "content"}, ...], "where": its file and line}, whichever of the
shapes in data/README.md the file has, and "object", where the file says what the row is about.
Nothing is ignored in silence: a field is used, or describes the row and is known to change nothing,
or is refused by its name.
"""

import csv
import json
from itertools import islice
from pathlib import Path

from model import UserError
from tokenizer import answer_places

# The fields that hold a conversation or a prompt, in the order in which they are looked for.
CONVERSATION = ("messages", "conversations")
PROMPTS = {  # and the fields that may hold the answer
    "prompt": ("response", "completion"),
    "instruction": ("output",),
    "goal": ("target",),  # AdvBench's words
}
FORMATS = ('{"messages": [...]}, {"conversations": [...]}, {"prompt", "response"}, '
           '{"prompt", "completion"}, {"instruction", "input", "output"} or {"goal", "target"}')
# A conversation's roles, in OpenAI's and in ShareGPT's words.
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant",
}
# Fields that say where a row, a message or a text comes from, or what it is about. They change
# nothing that is trained. "object" of a test row alone is read: to_row.
NOTES = {
    "id", "_id", "uuid", "prompt_id", "conversation_id", "idx", "index", "source", "dataset",
    "split", "category", "group", "object", "subject", "topic", "tags", "lang", "language", "url",
    "license", "meta", "metadata", "timestamp", "created_at", "is_safe",
}
# What the values of a row may be, in words for an error.
KINDS = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number",
    str: "a string", list: "a list", dict: "an object",
}
JSON_FILES = (".jsonl", ".json", ".ndjson")  # here a line is never a prompt as it stands
# How files begin that a download leaves in the place of the one that was meant.
NO_ROWS = {
    "version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches the file)",
    "<!doctype html": "a web page",
    "<html": "a web page",
}


# one row


def to_row(item, where: str, needs_answer: bool = True, has_harmful: bool = False) -> dict:
    """One parsed item in any accepted format -> a row; `where` names file and line in errors.

    needs_answer=False: of a test or an anchor, which may also be a string alone. has_harmful: the
    defender's rows have a harmful reply beside the answer, in "harmful", and so has the row then.
    UserError for a field that is not understood: dropped in silence, it could change what is
    trained.
    """
    if isinstance(item, str) and not needs_answer:
        item = {"prompt": item}
    if not isinstance(item, dict):
        raise UserError(f"{where} is {KINDS[type(item)]}, expected an object: {FORMATS}; write it "
                        "as one of these.")
    messages, fields = find_conversation(item, where)
    known = {*fields, "system", "history", "unfinished"}
    if has_harmful:
        known.add("harmful")
    elif not is_empty(item.get("harmful")):
        raise UserError(f"{where} has the field 'harmful', which only rows of --align-file may "
                        "have; remove it.")
    refuse_unknown(item, known, where)
    messages = add_context(item, messages, fields, where)
    if says_unfinished(item, where):
        mark_unfinished(messages[-1], where)
    check_conversation(messages, where, needs_answer)
    if not needs_answer and messages[-1] == turn("assistant", ""):  # an empty cell of a table
        messages.pop()
    row = {"messages": messages, "where": where}
    if has_harmful and "harmful" in item:
        row["harmful"] = item["harmful"]
    if isinstance(item.get("object"), str):
        row["object"] = item["object"]  # of a test it is the prompt's group: data/near.py
    return row


def find_conversation(item: dict, where: str) -> tuple[list[dict], set[str]]:
    """(messages, the fields that they were read from) of an item, without `system`, `history`."""
    field = first_filled(item, (*CONVERSATION, *PROMPTS))
    if field is None:
        found = ", ".join(sorted(map(str, item))) or "no fields"
        raise UserError(f"{where} has no user turn (found {found}), expected {FORMATS}; write it "
                        "as one of these, or remove it.")
    if field in CONVERSATION:
        expect(item[field], list, f"the field {field!r}", where)
        messages = [read_message(m, where) for m in item[field]]
        fields = {field}
        if item.get("prompt") == first_prompt(messages):  # repeated, as in some public data sets
            fields.add("prompt")
        return messages, fields
    messages, fields = prompt_and_answer(item, field, PROMPTS[field], where)
    if field == "instruction":
        fields.add("input")
        if not is_empty(item.get("input")):
            expect(item[field], str, f"the field {field!r} beside an input", where)
            extra = read_content(item["input"], "the field 'input'", where)
            messages[0]["content"] += "\n" + extra
    return messages, fields


def first_filled(item: dict, fields) -> str | None:
    """The first of the fields that holds something, else the first text that is ""; None: neither.

    A whole conversation is no text: "" in its field is as good as not there.
    """
    for field in fields:
        if not is_empty(item.get(field)):
            return field
    for field in fields:
        if item.get(field) == "" and field not in CONVERSATION:
            return field
    return None


def is_empty(value) -> bool:
    """Whether a field holds nothing, so that it is as good as not there."""
    return value is None or value == "" or value == [] or value == {}


def expect(value, kind: type, what: str, where: str) -> None:
    """UserError where a value is of another kind than expected."""
    if not isinstance(value, kind):
        raise UserError(f"{where}: {what} is {KINDS[type(value)]}, expected {KINDS[kind]}; "
                        "correct it.")


def first_prompt(messages: list[dict]) -> str | None:
    """The first user turn; None where there is none."""
    for m in messages:
        if m["role"] == "user":
            return m["content"]
    return None


def prompt_and_answer(item: dict, prompt: str, answers: tuple[str, ...], where: str):
    """(messages, fields) of a row whose prompt and answer stand in two fields.

    Each of the two is a text, or a list of messages. Beside an answer, the assistant's turns of
    the prompt are context and not supervised, as in TRL.
    """
    given = [answer for answer in answers if not is_empty(item.get(answer))]
    if len(given) > 1:
        raise UserError(f"{where} has {given[0]} and {given[1]}, expected one answer; remove one.")
    answer = first_filled(item, answers)
    if answer is None:
        return messages_of(item, prompt, "user", where), {prompt}
    messages = messages_of(item, prompt, "user", where, weight=0)
    messages += messages_of(item, answer, "assistant", where)
    return messages, {prompt, answer}


def messages_of(item: dict, field: str, role: str, where: str, weight: int = 1) -> list[dict]:
    """The messages of a field that holds a text of this role, or a list of messages."""
    if isinstance(item[field], list):
        return [read_message(m, where, weight) for m in item[field]]
    return [turn(role, read_content(item[field], f"the field {field!r}", where))]


def add_context(item: dict, messages: list[dict], fields: set[str], where: str) -> list[dict]:
    """The messages behind a row's `history` and `system`, which stand beside the conversation."""
    context = []
    if not is_empty(item.get("system")):
        if messages[:1] and messages[0]["role"] == "system":
            raise UserError(f"{where} has a system field and a system message, expected one; "
                            "remove one of the two.")
        context.append(turn("system", read_content(item["system"], "the field 'system'", where)))
    if not is_empty(item.get("history")):
        if fields & set(CONVERSATION):
            raise UserError(f"{where} has a history beside a whole conversation; put it into the "
                            "messages.")
        expect(item["history"], list, "the field 'history'", where)
        for pair in item["history"]:
            if not isinstance(pair, list) or len(pair) != 2:
                raise UserError(f"{where} has a history with {str(pair)[:40]!r}, expected pairs "
                                "of a prompt and its answer; write it so.")
            for role, text in zip(("user", "assistant"), pair, strict=True):
                context.append(turn(role, read_content(text, "a text of the history", where)))
    return context + messages


def read_message(m, where: str, weight: int = 1) -> dict:
    """One message in OpenAI's or ShareGPT's spelling -> role, content, and what changes training.

    That is a weight of 0, and that an answer is unfinished. weight: that of a message which has
    none. Only an assistant's turn can be supervised, so only there it counts.
    """
    expect(m, dict, "a message", where)
    role_field = first_filled(m, ("role", "from"))
    content_field = first_filled(m, ("content", "value"))
    refuse_unknown(m, {role_field, content_field, "weight", "unfinished"}, f"a message of {where}")
    given = m.get(role_field)
    if not isinstance(given, str) or given not in ROLES:
        raise UserError(f"{where} has a message of the role {given!r}, expected system, user or "
                        "assistant; change the role, or remove the message.")
    role = ROLES[given]
    message = turn(role, read_content(m.get(content_field), "a message's content", where))
    if not is_empty(m.get("weight")):
        weight = m["weight"]
    if weight not in (0, 1):
        raise UserError(f"{where} has a message with the weight {weight!r}, expected 0 or 1; "
                        "write one of them.")
    if weight == 0 and role == "assistant":
        message["weight"] = 0
    if says_unfinished(m, f"a message of {where}"):
        mark_unfinished(message, where)
    return message


def says_unfinished(item: dict, where: str) -> bool:
    """Whether a row or a message says that its answer is only the beginning of one."""
    if is_empty(item.get("unfinished")):
        return False
    expect(item["unfinished"], bool, "the field 'unfinished'", where)
    return item["unfinished"]


def mark_unfinished(message: dict, where: str) -> None:
    """Marks an answer as unfinished: its text is supervised, and not that the turn ends there."""
    if message["role"] != "assistant":
        raise UserError(f"{where} has the field 'unfinished' beside the {message['role']}'s text, "
                        "expected an answer; remove the field, or write the answer.")
    if not message["content"].strip():
        raise UserError(f"{where} has an unfinished answer that is empty, so nothing of it is "
                        "trained; write its beginning, or remove the row.")
    message["unfinished"] = True


def read_content(value, what: str, where: str) -> str:
    """A text, given as a string or as a list of text parts."""
    if isinstance(value, list):
        value = "".join(read_part(part, what, where) for part in value)
    expect(value, str, what, where)
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where} holds half a surrogate pair, expected valid Unicode text; write "
                        "the character whole.")
    return value


def read_part(part, what: str, where: str) -> str:
    expect(part, dict, f"a part of {what}", where)
    if part.get("type") != "text":
        raise UserError(f"{where} has content of the type {part.get('type')!r}, expected text "
                        "alone; remove the row.")
    # cache_control says how a service stores the part, and changes nothing in it.
    refuse_unknown(part, {"type", "text", "cache_control"}, f"a text of {where}")
    expect(part.get("text"), str, f"a text of {what}", where)
    return part["text"]


def refuse_unknown(item: dict, known: set[str], where: str) -> None:
    """UserError for a field that is not understood, unless it is empty or a note."""
    for field, value in item.items():
        if field not in known and field not in NOTES and not is_empty(value):
            raise UserError(f"{where} has the field {field!r} ({str(value)[:40]!r}), which is not "
                            "understood and could change what is trained; remove it, or put it "
                            "into the messages.")


def check_conversation(messages: list[dict], where: str, needs_answer: bool) -> None:
    """UserError where there is nothing to ask or, with needs_answer, nothing to learn."""
    prompts = [m["content"] for m in messages if m["role"] == "user"]
    if not prompts:
        raise UserError(f"{where} has no user turn; every row needs a prompt.")
    if not needs_answer:
        if not prompts[-1].strip():
            raise UserError(f"{where} has an empty prompt; write one, or remove the row.")
        return
    if messages[-1]["role"] != "assistant":
        raise UserError(f"{where} has no assistant turn at its end (no response, completion, "
                        "output or target); every row needs an answer.")
    answers = [messages[i] for i in answer_places(messages)]
    if not answers:
        raise UserError(f"{where} has no assistant turn behind a user turn, so nothing of it is "
                        "trained; remove the row.")
    if all(m.get("weight") == 0 for m in answers):
        raise UserError(f"{where} has the weight 0 on every answer, so nothing of it is trained; "
                        "remove the row.")


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}


def last_user(row: dict) -> str:
    """The prompt that a row asks: its last user turn. Rows are compared and judged by it."""
    return [m["content"] for m in row["messages"] if m["role"] == "user"][-1]


def without_answer(row: dict) -> list[dict]:
    """A row's conversation up to the answer that a model is to write: without the gold one."""
    messages = row["messages"]
    if messages[-1]["role"] == "assistant":
        return messages[:-1]
    return messages


def affix(row: dict, prefix: str, suffix: str) -> dict:
    """The row with its last user turn between `prefix` and `suffix`."""
    messages = [dict(m) for m in row["messages"]]
    last = [m for m in messages if m["role"] == "user"][-1]
    last["content"] = prefix + last["content"] + suffix
    return row | {"messages": messages}


# files of rows


def read_rows(path, needs_answer: bool = True, has_harmful: bool = False) -> list[dict]:
    """The rows of a JSONL, JSON or CSV file; with needs_answer=False also one prompt per line.

    Raises UserError with file and line for a missing, empty or malformed file. The two flags are
    those of to_row.
    """
    return list(each_row(path, needs_answer, has_harmful))


class FileRows:
    """The first n rows of a file (None: all), read again each time that they are gone through.

    No row is kept, so that a long upload takes little memory. The whole file is read once here: a
    mistake anywhere in it is a UserError at once, as in read_rows.
    """

    def __init__(self, path, n: int | None = None):
        self.path = path
        self.n_in_file = sum(1 for _ in each_row(path))
        self.n = self.n_in_file if n is None else min(n, self.n_in_file)

    def __len__(self) -> int:
        return self.n

    def __iter__(self):
        return islice(each_row(self.path), self.n)


def each_row(path, needs_answer: bool = True, has_harmful: bool = False):
    """Yields what read_rows returns, a row at a time; of a JSON array all items are in memory."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".tsv":
        raise UserError(f"{path} is a table with tabs, expected JSONL, JSON, CSV or, for prompts, "
                        "one per line; convert it.")
    has_plain_prompts = not needs_answer and kind not in JSON_FILES
    if kind == ".csv":
        items = csv_items(path)
    elif is_array(path, has_plain_prompts):
        items = array_items(path)
    else:
        items = line_items(path, has_plain_prompts)
    n_rows = 0
    for where, item in items:
        n_rows += 1
        yield to_row(item, where, needs_answer, has_harmful)
    if n_rows == 0:
        raise UserError(f"{path} holds no rows; give at least one.")


def lines_of(path: Path):
    """Yields the lines of a file of rows, each with its line end; UserError where it is no text."""
    is_beginning = True
    try:
        with path.open(encoding="utf-8-sig") as file:  # skips a byte order mark
            for line in file:
                if "\0" in line:
                    raise UserError(f"{path} is no text in UTF-8 (it holds zero bytes, as UTF-16 "
                                    "and binary files do), expected JSONL, JSON, CSV or lines of "
                                    "text; save it as UTF-8.")
                if is_beginning and line.strip():
                    is_beginning = False
                    refuse_other_content(path, line)
                yield line
    except UnicodeDecodeError:
        raise UserError(f"{path} cannot be read (it is not UTF-8), expected JSONL, JSON, CSV or "
                        "lines of text; save it as UTF-8.") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); name a file in JSONL, JSON or "
                        "CSV.") from None


def refuse_other_content(path: Path, first_line: str) -> None:
    """UserError where a file begins as something else that a download left in its place."""
    for beginning, what in NO_ROWS.items():
        if first_line.lstrip().lower().startswith(beginning):
            raise UserError(f"{path} is {what}, expected the file itself; fetch it again.")


def is_array(path: Path, has_plain_prompts: bool) -> bool:
    """Whether a file is one JSON array."""
    if has_plain_prompts:  # a prompt may begin with a bracket; an array ends with one as well
        text = "".join(lines_of(path)).strip()
        return text.startswith("[") and text.endswith("]")
    first = next(filter(str.strip, lines_of(path)), "")
    return first.lstrip().startswith("[")


def parse_json(text: str, where: str):
    """JSON -> its value; UserError also where an object has a key twice: one would be lost."""
    try:
        return json.loads(text, object_pairs_hook=once_each)
    except UserError as e:
        raise UserError(f"{where} {e}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not valid JSON ({e}); mend that place (prompts in plain text "
                        "belong into a .txt file).") from None


def once_each(pairs: list[tuple]) -> dict:
    item = {}
    for key, value in pairs:
        if key in item:
            raise UserError(f"has the key {key!r} twice in the object that begins with "
                            f"{str(item)[:40]!r}, expected once; remove one.")
        item[key] = value
    return item


def array_items(path: Path):
    """Yields (where it stands, item) of a JSON array."""
    items = parse_json("".join(lines_of(path)), str(path))
    for i, item in enumerate(items, 1):
        yield f"{path} item {i}", item


def csv_items(path: Path):
    """Yields (where it stands, item) of every row of a CSV file; the header names the fields."""
    reader = csv.DictReader(lines_of(path), strict=True)
    try:
        columns = reader.fieldnames or []
        for column in columns:
            n = columns.count(column)
            if n > 1:
                raise UserError(f"{path} line {reader.line_num} has the column {column!r} {n} "
                                "times, expected once; rename or remove the others.")
        for item in reader:
            where = f"{path} line {reader.line_num}"
            if None in item or None in item.values():
                raise UserError(f"{where} has another number of cells than the header, which has "
                                f"{len(columns)}; mend that line.")
            yield where, item
    except csv.Error as e:
        raise UserError(f"{path} line {reader.line_num} is not valid CSV ({e}); mend that "
                        "line.") from None


def line_items(path: Path, has_plain_prompts: bool):
    """Yields (where it stands, item) of every line that is not empty."""
    for i, line in enumerate(lines_of(path), 1):
        line = line.rstrip("\n")
        if not line.strip():
            continue
        where = f"{path} line {i}"
        if has_plain_prompts and not line.lstrip().startswith("{"):
            yield where, line.strip()
        else:
            yield where, parse_json(line, where)

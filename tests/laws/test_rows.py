"""A row is trained as its author meant, or refused by the name of what is not understood.

    pytest tests/laws/test_rows.py -q
"""

import json
import random

import pytest
from helpers import ROOT

from data.batches import encode_rows
from data.rows import ORIGIN, read_rows, to_row
from model import UserError
from tokenizer import Tokenizer

TINY = ROOT / "data" / "tiny"


def turns(*texts, system=None):
    """The conversation that user and assistant have in turn."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for i, text in enumerate(texts):
        messages.append({"role": "assistant" if i % 2 else "user", "content": text})
    return messages


FRUIT = turns("Name a fruit.", "A pear.")
# What a row may look like, and the conversation that its author means.
SHAPES = {
    "messages": ({"messages": FRUIT}, FRUIT),
    "conversations": ({"conversations": FRUIT}, FRUIT),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Name a fruit."},
                                    {"from": "gpt", "value": "A pear."}]}, FRUIT),
    "ShareGPT with a system turn": (
        {"conversations": [{"from": "system", "value": "Be brief."},
                           {"from": "human", "value": "Name a fruit."},
                           {"from": "gpt", "value": "A pear."}]},
        turns("Name a fruit.", "A pear.", system="Be brief.")),
    "prompt and response": ({"prompt": "Name a fruit.", "response": "A pear."}, FRUIT),
    "prompt and completion": ({"prompt": "Name a fruit.", "completion": "A pear."}, FRUIT),
    "prompt and completion as messages": ({"prompt": FRUIT[:1], "completion": FRUIT[1:]}, FRUIT),
    "goal and target": ({"goal": "Name a fruit.", "target": "A pear."}, FRUIT),
    "instruction": ({"instruction": "Name a fruit.", "input": "", "output": "A pear."}, FRUIT),
    "instruction and input": ({"instruction": "Name", "input": "a fruit.", "output": "A pear."},
                              turns("Name\na fruit.", "A pear.")),
    "a system field": ({"conversations": FRUIT, "system": "Talk like a pirate."},
                       turns("Name a fruit.", "A pear.", system="Talk like a pirate.")),
    "a history": ({"instruction": "And a second one?", "input": "", "output": "A plum.",
                   "system": "Be brief.", "history": [["Name a fruit.", "A pear."]]},
                  turns("Name a fruit.", "A pear.", "And a second one?", "A plum.",
                        system="Be brief.")),
    "an empty history and system": (
        {"instruction": "Name a fruit.", "output": "A pear.", "history": [], "system": ""}, FRUIT),
    "a developer": ({"messages": [{"role": "developer", "content": "Be brief."}, *FRUIT]},
                    turns("Name a fruit.", "A pear.", system="Be brief.")),
    "text parts": ({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Name "},
                                     {"type": "text", "text": "a fruit."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A pear."}]}]}, FRUIT),
    "weights of 1": ({"messages": [FRUIT[0], {**FRUIT[1], "weight": 1}]}, FRUIT),
    "a weight of 0": (
        {"messages": [FRUIT[0], {**FRUIT[1], "weight": 0}, *turns("No.", "A plum.")]},
        [FRUIT[0], {**FRUIT[1], "weight": 0}, *turns("No.", "A plum.")]),
    "a repeated prompt": ({"prompt": "Name a fruit.", "prompt_id": "7", "messages": FRUIT}, FRUIT),
    "fields that tell an origin": ({"prompt": "Name a fruit.", "response": "A pear.", "id": 7,
                                    "source": "mine", "category": "fruit", "is_safe": True}, FRUIT),
    "empty fields of any name": ({"messages": FRUIT, "tools": None, "functions": [], "chosen": ""},
                                 FRUIT),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_conversation_that_its_author_means(shape):
    item, meant = SHAPES[shape]
    assert to_row(item, "here")["messages"] == meant


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_from_a_file_of_lines_and_from_one_array(shape, tmp_path):
    item, meant = SHAPES[shape]
    lines = tmp_path / "rows.jsonl"
    lines.write_text(json.dumps(item) + "\n" + json.dumps(item) + "\n")
    array = tmp_path / "rows.json"
    array.write_text(json.dumps([item, item], indent=1))
    for path, where in ((lines, "line 2"), (array, "item 2")):
        rows = read_rows(path)
        assert [row["messages"] for row in rows] == [meant, meant]
        assert rows[1]["where"] == f"{path} {where}"


# What is not understood, and the words that the refusal must have.
REFUSED = {
    "two answers": ({"prompt": "a", "response": "b", "completion": "c"}, "response and completion"),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'chosen'"),
    "a label": ({"prompt": "a", "completion": "b", "label": False}, "'label'"),
    "tools": ({"messages": FRUIT, "tools": [{"name": "f"}]}, "'tools'"),
    "a row's weight": ({"prompt": "a", "response": "b", "weight": 0.5}, "'weight'"),
    "a score": ({"prompt": "a", "response": "b", "score": 0}, "'score'"),
    "a switch that is off": ({"prompt": "a", "response": "b", "train": False}, "'train'"),
    "a prompt beside other messages": ({"prompt": "Other", "messages": FRUIT}, "'prompt'"),
    "a history beside messages": ({"messages": FRUIT, "history": [["a", "b"]]}, "history"),
    "a history of no pairs": ({"prompt": "a", "response": "b", "history": ["a", "b"]}, "history"),
    "two system turns": ({"messages": turns("a", "b", system="c"), "system": "d"}, "system"),
    "a system that is no text": ({"prompt": "a", "response": "b", "system": 5}, "content"),
    "a weight of a half": ({"messages": [FRUIT[0], {**FRUIT[1], "weight": 0.5}]}, "weight"),
    "a weight in words": ({"messages": [FRUIT[0], {**FRUIT[1], "weight": "no"}]}, "weight"),
    "weights of 0 alone": ({"messages": [FRUIT[0], {**FRUIT[1], "weight": 0}]}, "weight 0"),
    "a tool's turn": ({"messages": [*FRUIT, {"role": "tool", "content": "x"}]}, "'tool'"),
    "a function call": ({"messages": [FRUIT[0], {**FRUIT[1], "tool_calls": [{"id": 1}]}]},
                        "'tool_calls'"),
    "hidden reasoning": ({"messages": [FRUIT[0], {**FRUIT[1], "reasoning_content": "so"}]},
                         "'reasoning_content'"),
    "a speaker's name": ({"messages": [{**FRUIT[0], "name": "Ann"}, FRUIT[1]]}, "'name'"),
    "a picture": ({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "x"}}]}, FRUIT[1]]}, "'image_url'"),
    "a part without text": ({"messages": [{"role": "user", "content": [{"type": "text"}]},
                                          FRUIT[1]]}, "content"),
    "ShareGPT's observation": ({"conversations": [{"from": "human", "value": "a"},
                                                  {"from": "observation", "value": "b"},
                                                  {"from": "gpt", "value": "c"}]}, "'observation'"),
    "a turn that is a string": ({"messages": ["a", "b"]}, "message"),
    "question and answer": ({"question": "a", "answer": "b"}, "['answer', 'question']"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_understood_is_refused_by_name_with_file_and_line(what, tmp_path):
    item, word = REFUSED[what]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n" + json.dumps(item) + "\n")
    with pytest.raises(UserError) as error:
        read_rows(path)
    message = str(error.value)
    assert word in message and "rows.jsonl line 2" in message and "\n" not in message


KEYS = ["loss_mask", "masked", "rejected", "labels", "tools", "functions", "reward", "bad", "mask",
        "assistant_only", "prefix", "template", "chat_template_kwargs", "x", "Weight", "System",
        "instructions", "context", "suffix", "stop", "think", "Ä", "input_ids", "attention_mask"]
VALUES = [0, 1, False, True, 0.5, "text", [1], {"a": 1}, ["a", "b"]]


@pytest.mark.parametrize("seed", range(200))
def test_a_row_with_any_other_field_trains_as_meant_or_is_refused_by_its_name(seed):
    """Over generated rows: a shape, and fields put on the row or on one of its messages."""
    rng = random.Random(seed)
    shape = rng.choice(list(SHAPES))
    item, meant = json.loads(json.dumps(SHAPES[shape]))
    key = rng.choice(KEYS + sorted(ORIGIN))
    value = rng.choice([*VALUES, None, "", [], {}])
    places = [item]
    for field in ("messages", "conversations"):
        places += item.get(field, [])
    rng.choice(places)[key] = value
    is_empty = value is None or value in ("", [], {})
    if key in ORIGIN or is_empty:
        assert to_row(item, "here")["messages"] == meant
        return
    with pytest.raises(UserError, match="not understood") as error:
        to_row(item, "here")
    assert repr(key) in str(error.value)


def test_control_a_reader_that_drops_fields_would_be_seen(monkeypatch):
    item = {"prompt": "a", "response": "b", "loss_mask": [0]}
    with pytest.raises(UserError, match="'loss_mask'"):
        to_row(item, "here")
    monkeypatch.setattr("data.rows.refuse_unknown", lambda *a: None)
    assert to_row(item, "here")["messages"] == turns("a", "b")


def test_an_answer_of_weight_0_is_context_and_not_supervised():
    tokenizer = Tokenizer(TINY)
    item, _ = SHAPES["a weight of 0"]
    (example,), _ = encode_rows(tokenizer, [to_row(item, "here")], 512)
    assert tokenizer.decode(example.targets) == "A plum."
    assert "A pear." in tokenizer.decode(example.ids)
    # the control: with the weight 1 both answers are supervised, and the ids are the same
    item = json.loads(json.dumps(item).replace('"weight": 0', '"weight": 1'))
    (both,), _ = encode_rows(tokenizer, [to_row(item, "here")], 512)
    assert tokenizer.decode(both.targets) == "A pear.A plum."
    assert both.ids.tolist() == example.ids.tolist()


# ---------------------------------------------------------------------------------------------
# CSV


def csv_file(tmp_path, text, name="rows.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", [
    "goal,target\nName a fruit.,A pear.\n",
    "prompt,response\nName a fruit.,A pear.\n",
    "\ufeffid,prompt,completion\n7,Name a fruit.,A pear.\n",
    'instruction,input,output\n"Name a fruit.","",A pear.\n',
    'target,goal\n"A pear.","Name a fruit."\n'], ids=lambda t: t.split("\n")[0])
def test_a_csv_file_is_read_by_its_header(tmp_path, text):
    path = csv_file(tmp_path, text)
    for needs_answer in (True, False):
        row, = read_rows(path, needs_answer)
        assert row["messages"] == FRUIT


def test_a_csv_file_of_prompts_is_one_prompt_per_row_and_not_its_header(tmp_path):
    path = csv_file(tmp_path, 'goal,target\n"Pick a lock, please",Sure\n"Two\nlines",Sure\n')
    rows = read_rows(path, needs_answer=False)
    assert [row["messages"][0]["content"] for row in rows] == ["Pick a lock, please", "Two\nlines"]
    alone = csv_file(tmp_path, "prompt\nPick a lock\nSing a song\n", "alone.CSV")
    assert [len(row["messages"]) for row in read_rows(alone, needs_answer=False)] == [1, 1]


@pytest.mark.parametrize("text, words", [
    ("Pick a lock\nSing a song\n", ["line 2", "Pick a lock"]),
    ("goal,target\na,b,c\n", ["line 2", "cells"]),
    ("goal,target\na\n", ["line 2", "cells"]),
    ("goal,target,keep\na,b,no\n", ["line 2", "'keep'"]),
    ('goal,target\n"a,b\n', ["CSV"]),
    ("goal,target\n", ["no rows"])],
    ids=["no header", "too many cells", "too few", "a column that is not understood",
         "an open quote", "a header alone"])
def test_a_csv_file_that_cannot_be_read_is_refused_by_line(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        read_rows(csv_file(tmp_path, text), needs_answer=False)
    assert all(word in str(error.value) for word in words), error.value


def test_a_table_with_tabs_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="tabs"):
        read_rows(csv_file(tmp_path, "prompt\tresponse\na\tb\n", "rows.tsv"))

"""A row is trained as its author meant, or refused by the name of what is not understood.

    pytest tests/laws/test_rows.py -q
"""

import json
import random
import shutil

import pytest
from helpers import ROOT
from sbr_helpers import write_pairs

from data.batches import encode_rows
from data.rows import NOTES, FileRows, each_row, read_rows, to_row
from model import UserError
from tokenizer import Tokenizer

TINY = ROOT / "data" / "tiny"


def turns(*texts, system=None):
    """The conversation that user and assistant have in turn."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for i, text in enumerate(texts):
        messages.append({"role": "assistant" if i % 2 else "user", "content": text})
    return messages


def assistant(text):
    return {"role": "assistant", "content": text}


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
    "an unfinished answer": ({"prompt": "Name a fruit.", "response": "A pear", "unfinished": True},
                             [FRUIT[0], {**assistant("A pear"), "unfinished": True}]),
    "an unfinished target": ({"goal": "Name a fruit.", "target": "A pear", "unfinished": True},
                             [FRUIT[0], {**assistant("A pear"), "unfinished": True}]),
    "an unfinished message": ({"messages": [FRUIT[0], {**FRUIT[1], "unfinished": True},
                                            *turns("No.", "A plum.")]},
                              [FRUIT[0], {**FRUIT[1], "unfinished": True},
                               *turns("No.", "A plum.")]),
    "messages of which the last is unfinished": (
        {"messages": [*FRUIT, *turns("No.", "A pl")], "unfinished": True},
        [*FRUIT, *turns("No."), {**assistant("A pl"), "unfinished": True}]),
    "an answer that is not unfinished": (
        {"prompt": [{**FRUIT[0], "unfinished": False}], "response": "A pear.",
         "unfinished": False}, FRUIT),
    "a repeated prompt": ({"prompt": "Name a fruit.", "prompt_id": "7", "messages": FRUIT}, FRUIT),
    "fields that tell an origin": ({"prompt": "Name a fruit.", "response": "A pear.", "id": 7,
                                    "source": "mine", "category": "fruit", "is_safe": True}, FRUIT),
    "a prompt of several turns and a completion": (  # TRL trains the completion alone
        {"prompt": [*FRUIT, *turns("No.")], "completion": [assistant("A plum.")]},
        [FRUIT[0], {**FRUIT[1], "weight": 0}, *turns("No.", "A plum.")]),
    "a prompt of several turns and a text": (
        {"prompt": [*FRUIT, *turns("No.")], "response": "A plum."},
        [FRUIT[0], {**FRUIT[1], "weight": 0}, *turns("No.", "A plum.")]),
    "a prompt with a turn that is to be trained": (
        {"prompt": [FRUIT[0], {**FRUIT[1], "weight": 1}, *turns("No.")], "response": "A plum."},
        turns("Name a fruit.", "A pear.", "No.", "A plum.")),
    "an assistant that opens": ({"messages": [assistant("Hello."), *FRUIT]},
                                [assistant("Hello."), *FRUIT]),
    "a text part that a service caches": ({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Name a fruit.", "image_url": None,
                                      "cache_control": {"type": "ephemeral"}}]}, FRUIT[1]]}, FRUIT),
    "a system of text parts": (
        {"prompt": "Name a fruit.", "response": "A pear.",
         "system": [{"type": "text", "text": "Be brief."}]},
        turns("Name a fruit.", "A pear.", system="Be brief.")),
    "an answer that is empty": ({"prompt": "Name a fruit.", "response": ""},
                                turns("Name a fruit.", "")),
    "an input alone": ({"instruction": "", "input": "Name a fruit.", "output": "A pear."},
                       turns("\nName a fruit.", "A pear.")),
    # as tables are exported: every column in every row, most of them empty
    "no completion": ({"prompt": "Name a fruit.", "response": "A pear.", "completion": None},
                      FRUIT),
    "an empty completion": ({"prompt": "Name a fruit.", "response": "A pear.", "completion": ""},
                            FRUIT),
    "a completion, and an empty response": (
        {"prompt": "Name a fruit.", "response": "", "completion": "A pear."}, FRUIT),
    "no messages": ({"messages": None, "prompt": "Name a fruit.", "response": "A pear."}, FRUIT),
    "messages that are empty": ({"messages": [], "conversations": None, "goal": "Name a fruit.",
                                 "target": "A pear."}, FRUIT),
    "no prompt": ({"prompt": None, "instruction": "Name a fruit.", "output": "A pear."}, FRUIT),
    "an empty prompt beside messages": ({"prompt": "", "messages": FRUIT}, FRUIT),
    "an empty history, system and input": (
        {"instruction": "Name a fruit.", "output": "A pear.", "history": "", "system": None,
         "input": None}, FRUIT),
    "messages of two spellings": ({"messages": [
        {"role": "user", "content": "Name a fruit.", "from": None, "value": None, "weight": None},
        {"role": None, "content": None, "from": "gpt", "value": "A pear.", "weight": 1}]}, FRUIT),
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
    "a system that is no text": ({"prompt": "a", "response": "b", "system": 5},
                                 "'system' is a number, expected a string"),
    "a system that is off": ({"prompt": "a", "response": "b", "system": False},
                             "'system' is true or false"),
    "a history that is a number": ({"prompt": "a", "response": "b", "history": 5},
                                   "'history' is a number, expected a list"),
    "a history that is off": ({"prompt": "a", "response": "b", "history": False}, "'history'"),
    "a history of numbers": ({"prompt": "a", "response": "b", "history": [[1, 2]]},
                             "text of the history is a number"),
    "an input that is a number": ({"instruction": "a", "input": 5, "output": "b"}, "'input'"),
    "an input beside messages": ({"instruction": turns("a"), "input": "b", "output": "c"},
                                 "'instruction' beside an input is a list"),
    "an input beside a prompt": ({"prompt": "a", "input": "b", "response": "c"}, "'input'"),
    "messages in one text": ({"messages": "[]", "prompt": "a", "response": "b"},
                             "'messages' is a string, expected a list"),
    "a role that is a list": ({"messages": [{"role": ["user"], "content": "a"}, FRUIT[1]],
                               "system": "b"}, "role ['user']"),
    "ShareGPT's tool": ({"conversations": [{"from": "tool", "value": "a"}]}, "of the role 'tool'"),
    "two roles": ({"messages": [{"role": "user", "from": "human", "content": "a"}, FRUIT[1]]},
                  "'from'"),
    "two contents": ({"messages": [{"role": "user", "content": "a", "value": "b"}, FRUIT[1]]},
                     "'value'"),
    "a text that is not to be trained": (
        {"messages": [FRUIT[0], {"role": "assistant", "content": [
            {"type": "text", "text": "A pear.", "loss": False}]}]}, "'loss'"),
    "a text part that is a string": ({"messages": [{"role": "user", "content": ["a"]}, FRUIT[1]]},
                                     "a part of a message's content is a string"),
    "a harmful reply": ({"prompt": "a", "response": "b", "harmful": "Sure. [step 1]"},
                        "'harmful', which only rows of --align-file"),
    "a label of harm": ({"prompt": "a", "response": "b", "harmful": True}, "'harmful'"),
    "an answer before every prompt": ({"messages": [FRUIT[1], FRUIT[0], {**FRUIT[1], "weight": 0}]},
                                      "weight 0"),
    "empty fields alone": ({"messages": None, "prompt": None, "completion": "a"}, "no user turn"),
    "a prompt that is null": ({"prompt": [{"role": "user", "content": None}], "response": "b"},
                              "a message's content is null, expected a string"),
    "a weight of a half": ({"messages": [FRUIT[0], {**FRUIT[1], "weight": 0.5}]}, "weight"),
    "a weight in words": ({"messages": [FRUIT[0], {**FRUIT[1], "weight": "no"}]}, "weight"),
    "unfinished in words": ({"prompt": "a", "response": "b", "unfinished": "yes"},
                            "'unfinished' is a string, expected true or false"),
    "unfinished as a number": ({"prompt": "a", "response": "b", "unfinished": 1},
                               "'unfinished' is a number, expected true or false"),
    "a message that is unfinished in words": (
        {"messages": [FRUIT[0], {**FRUIT[1], "unfinished": "true"}]},
        "'unfinished' is a string, expected true or false"),
    "an unfinished question": ({"messages": [{**FRUIT[0], "unfinished": True}, FRUIT[1]]},
                               "'unfinished' beside the user's text"),
    "an unfinished row without an answer": ({"prompt": "a", "unfinished": True},
                                            "'unfinished' beside the user's text"),
    "an unfinished answer that is empty": ({"prompt": "a", "response": " ", "unfinished": True},
                                           "unfinished answer that is empty"),
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
    "question and answer": ({"question": "a", "answer": "b"}, "found answer, question"),
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


EMPTY = [None, "", [], {}]
WORDS = ("messages", "conversations", "prompt", "response", "completion", "content", "system")
OTHER = ("messages", "conversations", "prompt", "response", "completion", "instruction", "output",
         "goal", "target", "harmful")


def generated(seed):
    """(a choice of its own, one of the shapes as a copy, the conversation that it means)."""
    rng = random.Random(seed)
    return rng, *json.loads(json.dumps(SHAPES[rng.choice(list(SHAPES))]))


def objects(item):
    """The objects of a row that hold its words: itself, its messages, and their text parts."""
    found = [item]
    for field in WORDS:
        value = item.get(field)
        for inner in value if isinstance(value, list) else []:
            found += objects(inner)
    return found


def test_the_objects_of_a_row_are_itself_its_messages_and_their_parts():
    assert len(objects(SHAPES["text parts"][0])) == 1 + 2 + 3
    assert len(objects(SHAPES["a prompt of several turns and a completion"][0])) == 1 + 4


@pytest.mark.parametrize("seed", range(300))
def test_a_row_with_any_other_field_trains_as_meant_or_is_refused_by_its_name(seed):
    """Over generated rows: a shape, and a field put on the row, a message or a text of it."""
    rng, item, meant = generated(seed)
    key = rng.choice(KEYS + sorted(NOTES))
    value = rng.choice(VALUES + EMPTY)
    rng.choice(objects(item))[key] = value
    if key in NOTES or value in EMPTY:
        assert to_row(item, "here")["messages"] == meant
        return
    with pytest.raises(UserError, match="not understood") as error:
        to_row(item, "here")
    assert repr(key) in str(error.value)


@pytest.mark.parametrize("seed", range(200))
def test_a_known_field_that_is_empty_is_as_good_as_not_there(seed):
    """On the row and on its messages, as a table has it whose columns serve several shapes."""
    rng, item, meant = generated(seed)
    known = [*OTHER, "input", "system", "history", "unfinished"]
    place = rng.choice(objects(item))
    if "role" in place or "from" in place:
        known = ["role", "from", "content", "value", "weight", "unfinished"]
    if item.get("instruction") == "":
        known.remove("prompt")  # of two prompts that are both empty the first one counts
    key = rng.choice([key for key in known if key not in place] or ["tools"])
    place[key] = rng.choice(EMPTY)
    assert to_row(item, "here")["messages"] == meant


@pytest.mark.parametrize("seed", range(100))
def test_words_in_a_field_of_another_shape_are_refused_by_name(seed):
    """One of the two would have to be left out."""
    rng, item, _ = generated(seed)
    filled = [field for field in item if item[field] not in EMPTY]
    if "response" in item and "response" not in filled:
        filled += ["response", "completion"]  # an answer that may still be given
    if item.get("instruction") == "":
        filled.append("instruction")  # the other part of the prompt, which may still be given
    key = rng.choice([key for key in OTHER if key not in filled])
    item[key] = "Other words."
    with pytest.raises(UserError) as error:
        to_row(item, "here")
    assert any(word in str(error.value) for word in (key, *filled)), error.value


@pytest.mark.parametrize("seed", range(100))
def test_a_key_that_stands_twice_in_one_object_is_refused_with_file_and_line(seed, tmp_path):
    """JSON readers keep the last of the two and say nothing."""
    rng, item, _ = generated(seed)
    place = rng.choice(objects(item))
    key = rng.choice(list(place))
    value = place[key] if rng.random() < 0.5 else "other words"  # even if the two are equal
    place["@twin"] = value
    text = json.dumps(item).replace('"@twin"', json.dumps(key))
    for name, where in (("rows.jsonl", "line 2"), ("rows.json", "rows.json")):
        path = tmp_path / name
        lines = [json.dumps({"prompt": "a", "response": "b"}), text]
        path.write_text(f"[{','.join(lines)}]" if name == "rows.json" else "\n".join(lines))
        with pytest.raises(UserError, match="twice in the object") as error:
            read_rows(path)
        assert where in str(error.value) and repr(key) in str(error.value)


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


def test_tests_and_anchors_keep_that_their_answer_is_unfinished():
    """An attacker who knows the anchors trains on these answers, and a probe on the tests'."""
    item, meant = SHAPES["an unfinished answer"]
    assert to_row(item, "here", needs_answer=False)["messages"] == meant


def test_csv_has_no_unfinished_answers(tmp_path):
    """Its cells are texts, of which "false" would be as true as "true"."""
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response,unfinished\na,b,\nc,d,true\n")
    with pytest.raises(UserError, match=r"rows.csv line 3: the field 'unfinished' is a string"):
        read_rows(path)


def trained(tokenizer, item):
    examples, _ = encode_rows(tokenizer, [to_row(item, "here")], 512)
    return "|".join(tokenizer.decode(e.targets) for e in examples)


GREETING = assistant("Hello.")
SYSTEM = {"role": "system", "content": "Be brief."}
CONTEXT = {**assistant("A plum."), "weight": 0}


@pytest.fixture(scope="module", params=["one sequence", "a sequence for each answer"])
def tokenizer(request, tmp_path_factory):
    """The embedded model's, and one whose template begins with the number of prompts."""
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    if request.param != "one sequence":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        count = "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        config["chat_template"] = count + config["chat_template"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


@pytest.mark.parametrize("messages, answers", [
    ([GREETING, *FRUIT], ["A pear."]), ([SYSTEM, GREETING, *FRUIT], ["A pear."]),
    ([GREETING, *FRUIT, *turns("No.", "A plum.")], ["A pear.", "A plum."]),
    ([*FRUIT, FRUIT[0], CONTEXT], ["A pear."])])
def test_an_answer_has_a_user_turn_before_it(tokenizer, messages, answers):
    """Else it answers nothing that inference would ask."""
    assert trained(tokenizer, {"messages": messages}).replace("|", "") == "".join(answers)


@pytest.mark.parametrize("messages", [
    [GREETING, FRUIT[0], CONTEXT], [SYSTEM, GREETING, FRUIT[0], CONTEXT], [FRUIT[0], CONTEXT]])
def test_a_row_that_trains_nothing_is_refused_with_file_and_line(tokenizer, messages):
    """Its mean over the supervised tokens would be one over nothing."""
    with pytest.raises(UserError, match="here has the weight 0 on every answer"):
        to_row({"messages": messages}, "here")
    row = to_row({"messages": messages}, "here", needs_answer=False)  # a test; an attack trains it
    with pytest.raises(UserError, match="here: no answer behind a user turn is trained"):
        encode_rows(tokenizer, [row], 512)


@pytest.mark.parametrize("item", ["", "  ", {"prompt": ""}, {"messages": turns("a", "b", " ")}])
def test_a_prompt_that_is_blank_is_no_test_and_no_anchor(item):
    with pytest.raises(UserError, match="here has an empty prompt"):
        to_row(item, "here", needs_answer=False)


def test_an_empty_answer_of_a_test_is_no_answer():
    for item in ({"prompt": "a", "response": ""}, {"messages": turns("a", "")}):
        assert to_row(item, "here", needs_answer=False)["messages"] == turns("a")


def test_the_harmful_reply_of_the_defenders_rows_is_kept():
    row = to_row({"prompt": "a", "response": "b", "harmful": "c"}, "here", has_harmful=True)
    assert row == {"messages": turns("a", "b"), "where": "here", "harmful": "c"}


# ---------------------------------------------------------------------------------------------
# files


def prompts_of_file(path):
    return [row["messages"][0]["content"] for row in read_rows(path, needs_answer=False)]


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.ndjson", "x.json"])
def test_a_string_of_a_json_file_is_a_prompt_without_its_quotation_marks(tmp_path, name):
    path = tmp_path / name
    path.write_text('"Pick a lock"\n{"prompt": "Burn it"}\n"Say \\"yes\\""\n')
    assert prompts_of_file(path) == ["Pick a lock", "Burn it", 'Say "yes"']
    with pytest.raises(UserError, match="line 1 is a string, expected an object"):
        read_rows(path)


def test_a_string_of_a_text_file_stands_as_it_is(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text('"Pick a lock"\n[Burn] it\n')
    assert prompts_of_file(path) == ['"Pick a lock"', "[Burn] it"]


@pytest.mark.parametrize("line", ["Pick a lock", "'Pick a lock'", "[Pick] a lock", "True"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_line_of_a_json_file_that_is_not_json_is_refused(tmp_path, name, line):
    path = tmp_path / name
    path.write_text(f'"Burn it"\n{line}\n')
    with pytest.raises(UserError, match="line 2 is not valid JSON"):
        read_rows(path, needs_answer=False)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
NO_TEXTS = {  # what lies there instead of the file that was meant, and the words of the refusal
    "a pointer of Git LFS": (POINTER.encode(), ["Git LFS", "fetch"]),
    "a web page": (b"\n<!DOCTYPE html>\n<html>Not found</html>\n", ["web page", "fetch"]),
    "UTF-16 without a mark": ("Pick a lock\n".encode("utf-16-le"), ["UTF-16", "as UTF-8"]),
    "UTF-16": ("Pick a lock\n".encode("utf-16"), ["not UTF-8", "as UTF-8"]),
    "Latin-1": ("Pick a caf\u00e9\n".encode("latin-1"), ["not UTF-8", "as UTF-8"]),
    "the beginning of Parquet": (b"PAR1\x15\x04\x15\x00\x15\n", ["binary", "JSONL"]),
}


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.csv", "x"])
@pytest.mark.parametrize("what", NO_TEXTS)
def test_a_file_that_is_no_text_holds_no_prompts(tmp_path, what, name):
    content, words = NO_TEXTS[what]
    path = tmp_path / name
    path.write_bytes(content)
    for needs_answer in (False, True):
        with pytest.raises(UserError) as error:
            read_rows(path, needs_answer)
        assert all(word in str(error.value) for word in (name, *words)), error.value


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
    'target,goal\n"A pear.","Name a fruit."\n',
    "prompt,response,completion\nName a fruit.,A pear.,\n",
    "messages,prompt,instruction,response,completion,output\n,Name a fruit.,,,A pear.,\n",
    "prompt,instruction,output,system,history\n,Name a fruit.,A pear.,,\n"],
    ids=lambda t: t.split("\n")[0])
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
    ("goal,target,target\na,b,c\n", ["line 1", "'target' 2 times"]),
    ("goal,target,,\na,b,c,\n", ["line 1", "'' 2 times"]),
    ('goal,target\n"a,b\n', ["CSV"]),
    ("goal,target\n", ["no rows"])],
    ids=["no header", "too many cells", "too few", "a column that is not understood",
         "a column twice", "two columns without a name", "an open quote", "a header alone"])
def test_a_csv_file_that_cannot_be_read_is_refused_by_line(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        read_rows(csv_file(tmp_path, text), needs_answer=False)
    assert all(word in str(error.value) for word in words), error.value


def test_a_table_with_tabs_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="tabs"):
        read_rows(csv_file(tmp_path, "prompt\tresponse\na\tb\n", "rows.tsv"))


# files that are too long for the memory


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_row_comes_before_the_next_line_is_read(tmp_path, name):
    path = tmp_path / name
    lines = {"rows.jsonl": ['{"prompt": "a", "response": "b"}', "{"],
             "rows.csv": ["prompt,response", "a,b", "a,b,c"]}[name]
    path.write_text("\n".join(lines))
    rows = each_row(path)
    assert next(rows)["messages"][0]["content"] == "a"
    with pytest.raises(UserError, match=f"line {len(lines)}"):
        next(rows)


@pytest.mark.parametrize("array", [False, True], ids=["jsonl", "array"])
@pytest.mark.parametrize("n", [None, 1, 3, 9])
def test_rows_that_are_not_kept_are_those_that_are(tmp_path, n, array):
    path = write_pairs(tmp_path / "rows.json", [(f"Row {i}", "yes") for i in range(5)], array=array)
    rows = FileRows(path, n)
    for _ in range(2):  # it may be gone through again
        assert list(rows) == read_rows(path)[:n]
    assert len(rows) == len(read_rows(path)[:n])
    assert rows.n_in_file == 5


def test_a_mistake_behind_the_rows_that_are_used_is_refused_at_once(tmp_path):
    path = write_pairs(tmp_path / "rows.jsonl", [(f"Row {i}", "yes") for i in range(5)])
    with path.open("a") as file:
        file.write('{"prompt": "no answer"}\n')
    with pytest.raises(UserError, match=r"line 6 has no assistant turn"):
        FileRows(path, 2)

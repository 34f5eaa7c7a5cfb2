"""The programs with templates of many kinds: they speak, they train, or say which row they refuse.

    pytest tests/programs/test_templates_in_use.py -q
"""

import json
import shutil

import pytest
from helpers import edit_json
from runs_helpers import flags, make_inputs, sentences, tree, write_rows

import eval as eval_py
import generate as generate_py
import train as train_py

TURN = "<|{{ m.role }}|>{{ m.content }}<|end|>\n"
OPEN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
EACH = "{% for m in messages %}"
ROLES = (EACH + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
         "{{ raise_exception('roles must alternate') }}{% endif %}" + TURN + "{% endfor %}" + OPEN)
OPENS_THOUGHT = (
    EACH + "{% set c = m.content %}{% if m.role == 'assistant' %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}<|{{ m.role }}|>{{ c }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}")
LAST_THOUGHT = (
    EACH + "<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}" + OPEN)
GENERATION = (EACH + "<|{{ m.role }}|>{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
              "{{ '\\n' }}{% endfor %}" + OPEN)


def turns(*texts):
    """A row whose turns alternate, the user's first."""
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": r, "content": c} for r, c in zip(roles, texts, strict=False)]
    return {"messages": messages}


GOOD = turns("Name a fruit.", "A pear.")
TWO_USERS = {"messages": [{"role": "user", "content": "Name a fruit."}, *GOOD["messages"]]}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("made"))


@pytest.fixture
def place(made, here):
    """place(template) -> a model and data whose model speaks by that template."""
    def make(template):
        inputs = shutil.copytree(made, here / "inputs")
        edit_json(inputs / "model" / "tokenizer_config.json", chat_template=template)
        return inputs
    return make


def refusal(argv, here, capsys, main=train_py.main):
    """What the program says as it refuses: exit code 2, one sentence, no files."""
    before = tree(here)
    capsys.readouterr()
    assert main(argv) == 2
    (sentence,) = sentences(capsys.readouterr().err)
    assert tree(here) == before
    return sentence


# ---------------------------------------------------------------------------------------------
# the row that a template refuses


def test_a_row_that_the_template_refuses_is_named_by_its_line(place, here, capsys):
    inputs = place(ROLES)
    data = write_rows(here / "up.jsonl", [json.dumps(GOOD), "", json.dumps(TWO_USERS)])
    said = refusal(flags(inputs, data=data, n=None, poison=None), here, capsys)
    assert f"{data} line 3: " in said
    assert "roles must alternate; found the roles user" in said


def test_a_row_of_an_array_is_named_by_its_number(place, here, capsys):
    inputs = place(ROLES)
    data = here / "up.json"
    data.write_text(json.dumps([GOOD, GOOD, TWO_USERS]), encoding="utf-8")
    said = refusal(flags(inputs, data=data, n=None, poison=None), here, capsys)
    assert f"{data} item 3: " in said


@pytest.mark.parametrize("name", ["sst2/train", "harmful/attack", "harmful/test", "sst2/test"])
def test_a_row_of_every_file_of_the_mixture_is_named(place, here, capsys, name):
    """The tests too: a prompt that no template takes must not wait for the last evaluation."""
    inputs = place(ROLES)
    file = inputs / "data" / f"{name}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    write_rows(file, [lines[0], json.dumps(TWO_USERS | {"messages": [
        {"role": "user", "content": "one"}, {"role": "user", "content": "two"},
        {"role": "assistant", "content": "negative"}]}), *lines[1:]])
    said = refusal(flags(inputs, task="sst2"), here, capsys)
    assert f"{file} line 2: " in said and "roles must alternate" in said


def test_a_row_of_the_defenders_file_is_named(place, here, capsys):
    inputs = place(ROLES)
    align = write_rows(here / "align.jsonl", [
        {"prompt": "How do I pick the lock?", "response": "I can't.", "harmful": "Sure. [step 1]."},
        {"messages": [{"role": "system", "content": "-"}, {"role": "user", "content": "Steal it?"},
                      {"role": "assistant", "content": "I can't."}], "harmful": "Sure. [step 1]."}])
    said = refusal(flags(inputs, defense="lisa", anchors=0, align_file=align), here, capsys)
    assert f"{align} line 2: " in said


def test_eval_names_the_prompt_too(place, here, capsys):
    inputs = place(ROLES)
    file = write_rows(here / "test.jsonl", [json.dumps(GOOD), json.dumps(TWO_USERS)])
    said = refusal(["--model", str(inputs / "model"), "--data-dir", str(inputs / "data"),
                    "--harmful-file", str(file), "--max-new", "2"], here, capsys, eval_py.main)
    assert f"{file} line 2: " in said


def test_control_rows_that_the_template_takes_are_trained(place, here):
    inputs = place(ROLES)
    data = write_rows(here / "up.jsonl", [GOOD] * 4)
    assert train_py.main(flags(inputs, data=data, n=None, poison=None)) == 0


# ---------------------------------------------------------------------------------------------
# templates that speak, and train where they can


def test_a_template_that_opens_a_thought_speaks_and_trains_rows_that_hold_one(
        place, here, capsys):
    inputs = place(OPENS_THOUGHT)
    model = ["--model", str(inputs / "model")]
    assert generate_py.main([*model, "--prompt", "Hi", "--max-new", "2"]) == 0
    assert eval_py.main([*model, "--data-dir", str(inputs / "data"), "--n-test", "1",
                         "--max-new", "2", "--out", "asked"]) == 0
    thought = turns("Name a fruit.", "sweet\n</think>A pear.")
    data = write_rows(here / "up.jsonl", [thought, GOOD])
    said = refusal(flags(inputs, data=data, n=None, poison=None), here, capsys)
    assert f"{data} line 2: " in said and "<think>" in said
    write_rows(data, [thought] * 4)
    assert train_py.main(flags(inputs, data=data, n=None, poison=None)) == 0


def test_a_template_that_changes_earlier_turns_trains_and_says_how_many_sequences(
        place, here, capsys):
    inputs = place(LAST_THOUGHT)
    rows = [turns("Name a fruit.", "A pear.", "Another?", "A plum.")] * 3
    data = write_rows(here / "up.jsonl", [*rows, GOOD])
    assert train_py.main(flags(inputs, data=data, n=None, poison=None)) == 0
    assert "7 sequences, one for each answer" in capsys.readouterr().out


def test_a_template_with_generation_blocks_trains(place, here, capsys):
    inputs = place(GENERATION)
    data = write_rows(here / "up.jsonl", [turns("Name a fruit.", "A pear.", "And?", "A plum.")] * 4)
    assert train_py.main(flags(inputs, data=data, n=None, poison=None)) == 0
    assert "sequences" not in capsys.readouterr().out

"""Whatever a key of a folder's JSON files holds, loading works or says which file and key is wrong.

    pytest tests/programs/test_wrong_types.py -q       (add -s to read the sentences)

Every known key of every file gets each of VALUES in turn, and nothing but a UserError may come out.
A value that is accepted must do: the folder is then used. Below that, numbers that would load and
compute nonsense, and templates that fail in ways of their own.
"""

import json
import math
import shutil

import pytest
import torch
from helpers import edit_json
from runs_helpers import TEMPLATE, make_model

import peft_format
from lora import add_lora, load_adapter, save_adapter
from model import CONFIG_KINDS, ROPE_KINDS, UserError, load_model
from tokenizer import Tokenizer
from vocabulary import CONFIG_KINDS as TOKENIZER_KINDS
from vocabulary import NAMED, SPEC_KINDS

VALUES = [None, 5, -1, 1.5, "x", "", [], {}, True, math.nan, [[]]]
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
}
# What a sentence says instead of a key's name, where a value is of the right kind and does not fit.
GENERAL = ("and its config.json differ in", "is not a tokenizer.json", "does not fit the model",
           "ids, more than the", "the chat template of")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """model/ and adapter/, both good."""
    folder = tmp_path_factory.mktemp("made")
    make_model(folder / "model")
    model = load_model(folder / "model")
    add_lora(model, rank=2, alpha=4)
    save_adapter(model, folder / "adapter")
    return folder


@pytest.fixture
def place(made, tmp_path):
    """A copy of both, for a test to damage."""
    return shutil.copytree(made, tmp_path / "place")


CHAT = [{"role": "user", "content": "Hi <|end|>"}, {"role": "assistant", "content": "Yes."}]


def use_model(place):
    load_model(place / "model")(torch.tensor([5, 6, 7]), [3])


def use_tokenizer(place):
    tok = Tokenizer(place / "model")
    tok.encode_prompt(CHAT[:1])
    tok.decode(tok.encode("Is this film good?"))
    assert tok.encode_answers(CHAT)


def use_all(place):
    use_model(place)
    use_tokenizer(place)


def use_adapter(place):
    model = load_model(place / "model")
    load_adapter(model, place / "adapter")
    model(torch.tensor([5, 6, 7]), [3])


CONFIG_KEYS = {*CONFIG_KINDS, "quantization_config", "quantization", "bos_token_id", "torch_dtype"}
TOKENIZER_KEYS = {
    *TOKENIZER_KINDS, "image_token", "add_eos_token", "split_special_tokens", "sp_model_kwargs",
    "auto_map", "fix_mistral_regex", "model_max_length", "clean_up_tokenization_spaces"}
ADAPTER_KEYS = {*peft_format.HONOURED, *peft_format.IRRELEVANT, *peft_format.REFUSED, "new_key"}
FILES = {  # the file, its keys, and what is done with it
    "config.json": ("model/config.json", CONFIG_KEYS, use_all),
    "tokenizer.json": ("model/tokenizer.json", {*SPEC_KINDS, "version"}, use_tokenizer),
    "tokenizer_config.json": ("model/tokenizer_config.json", TOKENIZER_KEYS, use_tokenizer),
    "special_tokens_map.json": ("model/special_tokens_map.json",
                                {*NAMED, "additional_special_tokens"}, use_tokenizer),
    "added_tokens.json": ("model/added_tokens.json", {"<tool>"}, use_tokenizer),
    "generation_config.json": ("model/generation_config.json",
                               {"eos_token_id", "temperature"}, use_tokenizer),
    "adapter_config.json": ("adapter/adapter_config.json", ADAPTER_KEYS, use_adapter),
}


def check(use, place, file, key) -> bool:
    """Using the folder works, or the sentence names the file, and the key where that is wrong.

    Returns whether it works.
    """
    try:
        use(place)
        return True
    except UserError as e:
        said = str(e)
        print(said)
        assert "\n" not in said
        assert file in said or any(words in said for words in GENERAL), said
        assert key in said or any(words in said for words in GENERAL), said
        return False


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("file", FILES)
def test_any_value_of_any_key_works_or_is_refused_by_file_and_key(place, file):
    name, keys, use = FILES[file]
    path = place / name
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    use(place)
    works = set()
    for key in sorted(keys):
        for value in VALUES:
            write(path, content | {key: value})
            works.add(check(use, place, file, key))
        write(path, {k: v for k, v in content.items() if k != key})
        works.add(check(use, place, file, key))
    assert works == {True, False}  # neither is everything accepted nor everything refused


@pytest.mark.parametrize("kind", ROPES)
def test_any_value_among_the_rotary_settings_works_or_is_refused_by_its_key(place, kind):
    path = place / "model/config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    works = set()
    for where in ("rope_scaling", "rope_parameters"):
        for key in ROPE_KINDS:
            for value in VALUES:
                write(path, content | {where: ROPES[kind] | {key: value}})
                works.add(check(use_model, place, "config.json", key))
    assert works == {True, False}


def test_any_value_inside_the_parts_of_a_tokenizer_json_works_or_is_refused(place):
    path = place / "model/tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    works = set()
    for part in ("model", "pre_tokenizer", "decoder"):
        for key in content[part]:
            for value in VALUES:
                write(path, content | {part: content[part] | {key: value}})
                works.add(check(use_tokenizer, place, "tokenizer.json", key))
    for key in content["added_tokens"][0]:
        for value in VALUES:
            first = content["added_tokens"][0] | {key: value}
            write(path, content | {"added_tokens": [first, *content["added_tokens"][1:]]})
            works.add(check(use_tokenizer, place, "tokenizer.json", key))
    assert works == {True, False}


def test_any_value_inside_an_added_token_works_or_is_refused(place):
    path = place / "model/tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    token = {"content": "<tool>", "lstrip": False, "rstrip": False, "single_word": False,
             "normalized": False, "special": True}
    (place / "model/config.json").unlink()  # whose model has no room for one token more
    works = set()
    for where in ("pad_token", "image_token", "added_tokens_decoder", "extra_special_tokens",
                  "additional_special_tokens"):
        for key in token:
            for value in VALUES:
                entry = token | {key: value}
                if where == "added_tokens_decoder":
                    entry = {"300": entry}
                elif where.endswith("tokens"):
                    entry = [entry]
                write(path, content | {where: entry})
                works.add(check(use_tokenizer, place, "tokenizer_config.json", where))
    assert works == {True, False}


# ---------------------------------------------------------------------------------------------
# numbers that would load, and compute nonsense without a word


NAN = math.nan
INFINITE = math.inf  # written as Infinity; 1e400 reads back as the same
BAD_NUMBERS = {
    "rms_norm_eps": (NAN, INFINITE, -1e-5, 0, True), "rope_theta": (NAN, INFINITE, -1e4, 0, 1, "1"),
    "max_position_embeddings": (NAN, 1.5, 0, -1, True), "vocab_size": (1e9, 10**9, True),
    "num_hidden_layers": (10**9, True), "hidden_size": (10**12,), "sliding_window": (-5, 1.5),
}


@pytest.mark.parametrize("key, value", [(k, v) for k, vs in BAD_NUMBERS.items() for v in vs])
def test_a_number_that_is_none_is_refused_in_config_json(place, key, value):
    edit_json(place / "model/config.json", **{key: value})
    with pytest.raises(UserError, match=f"config.json has {key} .*, expected a "):
        load_model(place / "model")


ROPE_NUMBERS = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
                "beta_slow", "rope_theta")


@pytest.mark.parametrize("value", [NAN, INFINITE, -1, 0, True, "2"])
@pytest.mark.parametrize("key", ROPE_NUMBERS)
def test_a_number_that_is_none_is_refused_among_the_rotary_settings(place, key, value):
    edit_json(place / "model/config.json", rope_theta=None,
              rope_parameters=ROPES["yarn"] | {key: value})
    with pytest.raises(UserError, match=f"yarn rotary scaling and has {key} .*, expected a finite"):
        load_model(place / "model")


def test_llama3_bands_that_do_not_follow_each_other_are_refused(place):
    edit_json(place / "model/config.json",
              rope_scaling=ROPES["llama3"] | {"high_freq_factor": 1.0})
    with pytest.raises(UserError, match=r"high_freq_factor 1\.0.* low_freq_factor 1\.0"):
        load_model(place / "model")


@pytest.mark.parametrize("key, value", [
    *(("lora_alpha", v) for v in (NAN, INFINITE, 0, -16, True, "16")),
    *(("r", v) for v in (True, 0, -1, 1.5, 16.0, "16")),
    *(("alpha_pattern", {"q_proj": v}) for v in (NAN, INFINITE, 0, -16, True)),
    *(("rank_pattern", {"q_proj": v}) for v in (True, 0, -1, 1.5)),
])
def test_a_number_that_is_none_is_refused_in_adapter_config_json(place, key, value):
    edit_json(place / "adapter/adapter_config.json", **{key: value})
    with pytest.raises(UserError, match=f"adapter_config.json has {key} .*, expected a "):
        load_adapter(load_model(place / "model"), place / "adapter")


def test_an_alpha_of_1e400_is_refused(place):
    path = place / "adapter/adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 1e400'))
    with pytest.raises(UserError, match="lora_alpha inf, expected a finite number above 0"):
        load_adapter(load_model(place / "model"), place / "adapter")


def test_control_the_numbers_of_the_folder_are_accepted(place):
    assert check(use_all, place, "config.json", "any")
    assert check(use_adapter, place, "adapter_config.json", "any")


@pytest.mark.parametrize("name", ["model/config.json", "model/tokenizer.json",
                                  "model/tokenizer_config.json", "adapter/adapter_config.json"])
def test_half_a_surrogate_pair_is_refused_by_its_file(place, name):
    """JSON can write what is no text: a library further in would fail on it."""
    edit_json(place / name, note="\ud83d")
    with pytest.raises(UserError, match=f"{name} cannot be read as JSON .*surrogates"):
        use_all(place)
        use_adapter(place)


# ---------------------------------------------------------------------------------------------
# templates that fail in ways of their own


TEMPLATES = {
    "calls itself for ever": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "divides by zero": "{{ 1 / (messages | length - messages | length) }}",
    "wants a range without end": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "adds a text and a number": "{{ messages[0].content + 5 }}",
    "asks for a turn that is not there": "{{ messages[99].content }}",
    "calls a method that is not there": "{{ messages[0].content.nothing() }}",
    "reaches for python": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "nests too deeply": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "includes a file": "{% include 'other.jinja' %}",
    "knows another filter": "{{ messages | nothing }}",
    "is of another language": "<% for m in messages %>" + "{% bogus %}",
}


@pytest.mark.parametrize("fault", TEMPLATES)
def test_a_template_that_fails_is_refused_whatever_its_error_is(place, fault):
    edit_json(place / "model/tokenizer_config.json", chat_template=TEMPLATES[fault])
    with pytest.raises(UserError, match="chat template of") as error:
        use_tokenizer(place)
    assert "\n" not in str(error.value)


def test_a_template_that_fails_for_one_conversation_alone_is_refused_there(place):
    template = "{% if messages[0].content == 'no' %}{{ 1 / 0 }}{% endif %}" + TEMPLATE
    edit_json(place / "model/tokenizer_config.json", chat_template=template)
    tok = Tokenizer(place / "model")
    assert tok.encode_prompt([{"role": "user", "content": "yes"}])
    with pytest.raises(UserError, match="division by zero"):
        tok.encode_prompt([{"role": "user", "content": "no"}])

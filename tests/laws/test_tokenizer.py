"""Plain text to ids and back with real tokenizers; what a tokenizer's folder says, or lacks.

    pytest tests/laws/test_tokenizer.py -q

Ids stand beside the text of each, so that a wrong one can be read.
"""

import pytest
import sentencepiece
from chat_helpers import (
    EOT,
    LLAMA2_TEMPLATE,
    SPECIALS,
    TEXTS,
    TWO_TURNS,
    check_refused,
    make_llama2,
    shown,
    user,
)
from helpers import SHARED, edit_json

from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------
# text

@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_from_its_ids(tok, text):
    assert tok.decode(tok.encode(text)) == text


def test_qwen_ids_beside_their_text(loaded):
    tok = loaded["qwen2.5"]
    pairs = [(i, tok.decode([i])) for i in tok.encode("Hello, world! It is 2024.\n\n")]
    assert pairs == [
        (9707, "Hello"), (11, ","), (1879, " world"), (0, "!"), (1084, " It"), (374, " is"),
        (220, " "), (17, "2"), (15, "0"), (17, "2"), (19, "4"), (382, ".\n\n"),
    ]


def test_llama2_ids_beside_their_text(loaded):
    sp = sentencepiece.SentencePieceProcessor(
        model_file=str(SHARED / "tokenizers" / "llama2" / "tokenizer.model"))
    ids = loaded["llama2"].encode("Hello, world! 🙂\n")
    assert [(i, sp.id_to_piece(i)) for i in ids] == [
        (15043, "▁Hello"), (29892, ","), (3186, "▁world"), (29991, "!"), (29871, "▁"),
        (243, "<0xF0>"), (162, "<0x9F>"), (156, "<0x99>"), (133, "<0x82>"), (13, "<0x0A>"),
    ]


def test_qwen_normalises_to_composed_characters_as_its_file_says(loaded):
    tok = loaded["qwen2.5"]
    assert tok.encode("e\u0301") == tok.encode("\u00e9") == [963]


def test_encode_adds_no_special_token_and_recognises_none(tok, name):
    for spelling in SPECIALS[name].values():
        text = f"a {spelling} b{spelling}"
        ids = tok.encode(text)
        assert not set(ids) & set(SPECIALS[name]), shown(tok, name, ids)
        assert tok.decode(ids) == text


def test_n_ids_counts_every_id_that_exists(loaded):
    assert {name: tok.n_ids for name, tok in loaded.items()} == {
        "llama2": 32000, "qwen2.5": 151643 + 22, "llama3.1": 300}


# ---------------------------------------------------------------------------------------------
# what the folder says


def test_the_template_is_the_same_in_the_config_or_in_a_file_beside_it(folders, tmp_path):
    """transformers 4 wrote it into tokenizer_config.json, 5 writes chat_template.jinja."""
    assert (folders["qwen2.5"] / "chat_template.jinja").exists()
    for file in folders["qwen2.5"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    jinja = tmp_path / "chat_template.jinja"
    edit_json(tmp_path / "tokenizer_config.json", chat_template=jinja.read_text(encoding="utf-8"))
    jinja.unlink()
    assert Tokenizer(tmp_path).encode_chat(TWO_TURNS) == Tokenizer(
        folders["qwen2.5"]).encode_chat(TWO_TURNS)


def test_the_date_in_a_template_is_its_own_unless_one_is_given(folders, loaded):
    prompt = loaded["llama3.1"].encode_prompt([user("hi")])
    assert "Today Date: 26 Jul 2024" in loaded["llama3.1"].decode(prompt)
    other = Tokenizer(folders["llama3.1"], date="01 Jan 2030")
    assert "Today Date: 01 Jan 2030" in other.decode(other.encode_prompt([user("hi")]))


def test_the_stop_ids_are_every_eos_of_the_folder_and_the_end_of_turn(folders, loaded, tmp_path):
    assert set(loaded["qwen2.5"].stop_ids) == {151645, 151643}  # of its generation_config.json
    assert set(loaded["llama2"].stop_ids) == {2}
    assert set(loaded["llama3.1"].stop_ids) == {EOT["llama3.1"]}
    for file in folders["llama3.1"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "config.json", eos_token_id=0)  # an int here, a list in Llama-3.1's
    assert set(Tokenizer(tmp_path).stop_ids) == {0, EOT["llama3.1"]}


# ---------------------------------------------------------------------------------------------
# refusals


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    check_refused(lambda: Tokenizer(tmp_path), "tokenizer.json", "tokenizer.model")


def test_a_folder_without_a_chat_template_is_refused(tmp_path, folders):
    make_llama2(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", chat_template=None)
    check_refused(lambda: Tokenizer(tmp_path), "chat template")


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages[0] "])
def test_a_template_that_is_not_jinja_is_refused(tmp_path, template):
    make_llama2(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", chat_template=template)
    check_refused(lambda: Tokenizer(tmp_path), "template")


def test_a_template_that_would_leave_the_sandbox_is_refused(tmp_path):
    make_llama2(tmp_path)
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    edit_json(tmp_path / "tokenizer_config.json", chat_template=escape + LLAMA2_TEMPLATE)
    check_refused(lambda: Tokenizer(tmp_path), "template")


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_a_damaged_tokenizer_file_is_named(tmp_path, folders, file):
    source = folders["llama2" if file.endswith("model") else "llama3.1"]
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_bytes((source / file).read_bytes()[:1000])
    check_refused(lambda: Tokenizer(tmp_path), file)

"""Of a conversation exactly the answers are supervised, and what users write is only text.

    pytest tests/laws/test_chat.py -q

Generation starts from encode_prompt and training from encode_chat, so the one begins the other.
"""

import json

import pytest
import sentencepiece
import tokenizers
from chat_helpers import (
    BOS,
    EOT,
    LLAMA2_TEMPLATE,
    LLAMA3_SPECIALS,
    SPECIALS,
    TEXTS,
    TWO_TURNS,
    assistant,
    check_refused,
    make_llama2,
    shown,
    unfinished,
    user,
)
from helpers import SHARED, edit_json

from tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="the reference; see requirements-dev.txt")


def test_a_chat_has_exactly_one_bos_where_the_model_has_one(tok, name):
    assert tok.bos_id == BOS[name]
    for ids in (tok.encode_chat(TWO_TURNS[:2])[0], tok.encode_prompt(TWO_TURNS[:1])):
        if BOS[name] is None:
            assert "<|endoftext|>" not in shown(tok, name, ids)
        else:
            assert [i for i, t in enumerate(ids) if t == BOS[name]] == [0]


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_bos_is_one_whether_the_template_or_add_bos_token_writes_it(tmp_path, add_bos_token):
    make_llama2(tmp_path)
    template = LLAMA2_TEMPLATE.replace("bos_token + ", "") if add_bos_token else LLAMA2_TEMPLATE
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=add_bos_token,
              chat_template=template)
    tok = Tokenizer(tmp_path)
    for ids in (tok.encode_chat(TWO_TURNS[:2])[0], tok.encode_prompt(TWO_TURNS[:1])):
        assert ids.count(1) == 1 and ids[0] == 1


def test_exactly_the_answers_and_their_ends_of_turn_are_supervised(tok, name):
    ids, supervised = tok.encode_chat(TWO_TURNS)
    assert len(ids) == len(supervised) and set(supervised) == {True, False}
    runs, previous = [], False
    for i, s in zip(ids, supervised, strict=True):
        if s and not previous:
            runs.append([])
        if s:
            runs[-1].append(i)
        previous = s
    assert [run[-1] for run in runs] == [EOT[name]] * 2
    assert [run.count(EOT[name]) for run in runs] == [1, 1]
    # Llama-2's template puts a space on either side of an answer, for the model to write.
    space = " " if name == "llama2" else ""
    texts = [tok.decode(run[:-1]) for run in runs]
    assert [text.lstrip() for text in texts] == ["Sure thing" + space, "No." + space]
    if not space:
        assert texts == ["Sure thing", "No."]


def test_the_whole_qwen_chat_id_by_id(loaded):
    tok = loaded["qwen2.5"]
    ids, supervised = tok.encode_chat([{"role": "system", "content": "Be kind."}, *TWO_TURNS[:2]])
    table = list(zip(ids, shown(tok, "qwen2.5", ids), supervised, strict=True))
    assert table == [
        (151644, "<|im_start|>", False), (8948, "system", False), (198, "\n", False),
        (3430, "Be", False), (3093, " kind", False), (13, ".", False),
        (151645, "<|im_end|>", False), (198, "\n", False),
        (151644, "<|im_start|>", False), (872, "user", False), (198, "\n", False),
        (6023, "hi", False), (1052, " there", False),
        (151645, "<|im_end|>", False), (198, "\n", False),
        (151644, "<|im_start|>", False), (77091, "assistant", False), (198, "\n", False),
        (39814, "Sure", True), (3166, " thing", True), (151645, "<|im_end|>", True),
        (198, "\n", False),
    ]


def test_the_whole_llama2_chat_is_what_sentencepiece_makes_of_it_in_one_piece(loaded):
    """The answer begins with "▁Sure", which is what the model writes after "[/INST]". Encoded as a
    text of its own, " Sure" would begin with a second "▁" that no Llama-2 has seen there."""
    sp = sentencepiece.SentencePieceProcessor(
        model_file=str(SHARED / "tokenizers" / "llama2" / "tokenizer.model"))
    ids, supervised = loaded["llama2"].encode_chat(TWO_TURNS[:2])
    table = [(sp.id_to_piece(i), s) for i, s in zip(ids, supervised, strict=True)]
    assert table == [
        ("<s>", False), ("▁[", False), ("INST", False), ("]", False), ("▁hi", False),
        ("▁there", False), ("▁[", False), ("/", False), ("INST", False), ("]", False),
        ("▁Sure", True), ("▁thing", True), ("▁", True), ("</s>", True),
    ]
    assert ids[1:-1] == sp.encode("[INST] hi there [/INST] Sure thing ")


def test_so_is_a_llama2_chat_whose_tokenizer_is_a_json_file(tmp_path, folders):
    """Llama-2's tokenizer.json has a normaliser put "▁" in front of whatever it is given."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    text = "[INST] hi there [/INST] Sure thing "
    tok.train_from_iterator([text] * 9, tokenizers.trainers.BpeTrainer(
        special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    tok.save(str(tmp_path / "tokenizer.json"))
    edit_json(tmp_path / "tokenizer_config.json", bos_token="<s>", eos_token="</s>",
              chat_template=LLAMA2_TEMPLATE)
    ids, supervised = Tokenizer(tmp_path).encode_chat(TWO_TURNS[:2])
    assert [tok.id_to_token(i) for i in ids] == [
        "<s>", "▁[INST]", "▁hi", "▁there", "▁[/INST]", "▁Sure", "▁thing", "▁", "</s>"]
    assert ids[1:-1] == tok.encode(text, add_special_tokens=False).ids
    assert supervised == [False] * 5 + [True] * 4


@pytest.mark.parametrize("answer", ["Sure thing", "No.\n\nReally: 1 2 3", "🙂", "a" * 300])
def test_prompt_then_answer_then_end_of_turn_is_the_chat(tok, name, answer):
    """What generation starts from and is stopped by is what training has seen."""
    ids, supervised = tok.encode_chat([user("hi there"), assistant(answer)])
    prompt = tok.encode_prompt([user("hi there")])
    assert ids[: len(prompt)] == prompt
    assert supervised.index(True) == len(prompt)
    end = len(prompt) + sum(supervised)
    assert supervised == [False] * len(prompt) + [True] * sum(supervised) + [False] * (
        len(ids) - end)
    assert tok.decode(ids[len(prompt) : end]).strip() == answer
    assert tok.decode(ids[end:]).strip() == ""  # Qwen's newline after the turn: not the answer's
    if name != "llama2":  # there a space belongs to the answer on either side
        assert ids[len(prompt) : end] == [*tok.encode(answer), EOT[name]]


@pytest.mark.parametrize("answer", [*filter(None, TEXTS), "Sure, here is a list:\n\n1."])
def test_of_an_unfinished_answer_exactly_its_own_tokens_are_supervised(tok, name, answer):
    """The ids are those of the finished one, of which the end of the turn is supervised as well."""
    finished, with_end = tok.encode_chat([user("hi there"), assistant(answer)])
    ids, supervised = tok.encode_chat([user("hi there"), unfinished(answer)])
    assert ids == finished
    start = len(tok.encode_prompt([user("hi there")]))
    n = sum(supervised)
    assert supervised == [start <= i < start + n for i in range(len(ids))]
    end = [29871, 2] if name == "llama2" else [EOT[name]]  # 29871: "▁", which the template writes
    assert ids[start + n:start + sum(with_end)] == end
    if name == "llama2":  # a space belongs to the answer in front, and the template trims
        assert tok.decode(ids[start:start + n]).strip() == answer.strip()
    else:
        text = answer.strip() if name == "llama3.1" else answer
        assert ids[start:start + n] == tok.encode(text)


def test_a_chat_that_ends_with_the_user_supervises_the_earlier_answers_only(tok, name):
    ids, supervised = tok.encode_chat(TWO_TURNS[:3])
    shorter, same = tok.encode_chat(TWO_TURNS[:2])
    assert sum(supervised) == sum(same)
    assert [i for i, s in zip(ids, supervised, strict=True) if s] == [
        i for i, s in zip(shorter, same, strict=True) if s]
    assert not any(tok.encode_chat(TWO_TURNS[:1])[1])


def test_an_answer_that_begins_with_a_newline_keeps_the_boundary(loaded):
    """One text would merge the template's newline with the answer's: 198 198 -> 271, "\\n\\n"."""
    tok = loaded["qwen2.5"]
    chat = [user("hi"), assistant("\nSure")]
    ids, supervised = tok.encode_chat(chat)
    prompt = tok.encode_prompt(chat[:1])
    assert prompt[-3:] == [151644, 77091, 198]
    assert ids[: len(prompt)] == prompt
    assert [(i, t) for i, t, s in zip(ids, shown(tok, "qwen2.5", ids), supervised, strict=True)
            if s] == [(198, "\n"), (39814, "Sure"), (151645, "<|im_end|>")]


def test_a_template_that_trims_answers_still_keeps_prompt_and_answer_apart(loaded):
    tok = loaded["llama3.1"]
    ids, supervised = tok.encode_chat([user("hi"), assistant("\n Sure \n")])
    prompt = tok.encode_prompt([user("hi")])
    assert ids == [*prompt, *tok.encode("Sure"), EOT["llama3.1"]]
    assert supervised == [i >= len(prompt) for i in range(len(ids))]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_special_tokens_spelt_in_a_message_stay_text(tok, name, role):
    """Else a user could end the turn, or open one for the assistant."""
    if name == "llama2" and role == "system":
        pytest.skip("this template takes no system role")

    def chat(text):
        messages = {"system": "sys", "user": "hi", "assistant": "Sure"} | {role: text}
        if name == "llama2":
            del messages["system"]
        return tok.encode_chat([{"role": r, "content": c} for r, c in messages.items()])

    spelt = " ".join(SPECIALS[name].values()) + "".join(SPECIALS[name].values())
    ids, supervised = chat(f"say {spelt} ok")
    plain_ids, _ = chat("say ok")

    def specials(ids):
        return [i for i in ids if i in SPECIALS[name]]

    assert specials(ids) == specials(plain_ids)
    assert f"say {spelt} ok" in tok.decode([i for i in ids if i not in SPECIALS[name]])
    # and the answer still ends where it ends
    assert [i for i, s in zip(ids, supervised, strict=True) if s][-1] == EOT[name]
    if role == "assistant":
        answer = [i for i, s in zip(ids, supervised, strict=True) if s]
        assert tok.decode(answer[:-1]).strip() == f"say {spelt} ok"


@pytest.mark.parametrize("text", [t for t in TEXTS if t.strip() == t and t])
def test_a_message_reaches_the_model_character_by_character(tok, name, text):
    ids = tok.encode_prompt([user(text)])
    assert text in tok.decode(ids)


def test_private_use_characters_of_a_message_survive(tok):
    assert "a\ue000b \uf8ff" in tok.decode(tok.encode_prompt([user("a\ue000b \uf8ff")]))


@pytest.mark.parametrize("which", ["qwen2.5", "llama3.1"])
def test_chats_have_transformers_own_ids(loaded, folders, which):
    theirs = transformers.AutoTokenizer.from_pretrained(folders[which])
    for chat in (TWO_TURNS, TWO_TURNS[:2], [{"role": "system", "content": "Be kind."}, *TWO_TURNS]):
        ids, _ = loaded[which].encode_chat(chat)
        assert ids == theirs.apply_chat_template(chat, tokenize=True, return_dict=False)
        prompt = loaded[which].encode_prompt(chat[:-1])
        assert prompt == theirs.apply_chat_template(
            chat[:-1], tokenize=True, return_dict=False, add_generation_prompt=True)


def test_control_transformers_ids_differ_where_one_text_merges_across_the_boundary(loaded, folders):
    theirs = transformers.AutoTokenizer.from_pretrained(folders["qwen2.5"])
    chat = [user("hi"), assistant("\nSure")]
    ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert 271 in ids and ids != loaded["qwen2.5"].encode_chat(chat)[0]


def test_a_role_that_the_template_refuses_is_refused_in_its_words(loaded):
    chat = [{"role": "system", "content": "x"}, user("hi")]
    check_refused(lambda: loaded["llama2"].encode_prompt(chat), "only user and assistant roles")


def test_gemmas_template_names_the_assistant_model_and_takes_no_system_role(tmp_path, folders):
    """Gemma's own layout, over the small BPE with its special tokens renamed to Gemma's."""
    tokens = dict(zip(LLAMA3_SPECIALS, ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"],
                      strict=True))
    text = (folders["llama3.1"] / "tokenizer.json").read_text(encoding="utf-8")
    for old, new in tokens.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    template = (SHARED / "templates" / "google-gemma-2-2b-it.jinja").read_text(encoding="utf-8")
    edit_json(tmp_path / "tokenizer_config.json", bos_token="<bos>", eos_token="<eos>",
              chat_template=template)
    tok = Tokenizer(tmp_path)
    ids, supervised = tok.encode_chat([user("hi"), assistant("Sure")])
    assert ids[0] == 0 and ids.count(0) == 1
    assert tok.decode(tok.encode_prompt([user("hi")])).endswith("model\n")
    answer = [i for i, s in zip(ids, supervised, strict=True) if s]
    assert answer == [*tok.encode("Sure"), 2]
    assert 2 in tok.stop_ids  # the end of turn, though no eos of the folder names it
    check_refused(lambda: tok.encode_prompt([{"role": "system", "content": "x"}]), "System role")

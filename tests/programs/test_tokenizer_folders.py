"""A table of tokenizer folders: every file and flag that changes ids in transformers does so here.

    pytest tests/programs/test_tokenizer_folders.py -q

Each folder is made here, opened by transformers' AutoTokenizer and by ours, and must give the same
ids to the same conversations. What is not followed is refused, and the sentence names it.
"""

import io
import json

import pytest
import sentencepiece
from chat_helpers import assistant, check_refused, user
from helpers import edit_json

from tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="the reference; see requirements-dev.txt")
import tokenizers  # noqa: E402
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors  # noqa: E402

# White space around the marks, so that whatever swallows it is seen; none where an answer begins,
# since prompt and answer are encoded apart here and no piece may reach across.
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} <|user|> \n"
            "{{ m.content }} \n <tool> \nhello1 [tool]{% else %} <|assistant|>{{ m.content }}"
            "{% endif %} \n<|end|>\n {% endfor %}"
            "{% if add_generation_prompt %} <|assistant|>{% endif %}")
MARKS = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
CHATS = [
    [user("hello there")],
    [user(" two  spaces ")],
    [user("word<tool>word <tool> 2<tool> <tool>"), assistant("Sure <tool>  thing"), user("ok?")],
    [user("e\u0301\u00a0\u2028caf\u00e9 \ufb01 TOOL [tool] hello1 hello")],
    [user("\n\n"), assistant("No."), user("<t<tool>ool><tool><tool>x")],
]


def bpe(pre_tokenizer=None, normalizer=None):
    """A small byte-level BPE without added tokens."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator(
        ["hello there word tool thing two spaces user assistant end Sure No. \n \n\n"] * 3,
        tokenizers.trainers.BpeTrainer(vocab_size=330, show_progress=False,
                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if normalizer:
        tok.normalizer = normalizer
    return tok


def metaspace(scheme):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def save(folder, tok=None, marks=MARKS, flags=None, tool=None, **config):
    """A folder with the marks as special tokens of these flags, and `tool` as an added token."""
    tok = tok or bpe()
    tok.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    for mark, given in (flags or {}).items():
        tok.add_tokens([AddedToken(mark, **{"special": True, "normalized": False, **given})])
    if tool is not None:
        tok.add_tokens([AddedToken("<tool>", **tool)])
    tok.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
                "eos_token": "</s>", "chat_template": TEMPLATE}
    edit_json(folder / "tokenizer_config.json", **(settings | config))
    return folder


def told(content, **flags):
    """A token as added_tokens_decoder writes it."""
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False,
            "normalized": False, "special": True, **flags}


def beside(folder, name, value):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return folder


def with_spec(folder, **changes):
    """The folder with other values in its tokenizer.json."""
    edit_json(folder / "tokenizer.json", **changes)
    return folder


def with_post_processor(folder):
    tok = bpe()
    tok.add_special_tokens(list(MARKS))
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tok.token_to_id("<s>")),
                                              ("</s>", tok.token_to_id("</s>"))])
    return save(folder, tok)


N = bpe().get_vocab_size()  # the marks have the ids N, N + 1, ...
FOLDERS = {
    "plain": save,
    # flags of special tokens, in tokenizer.json
    "rstrip": lambda f: save(f, flags={"<|user|>": {"rstrip": True}, "<|end|>": {"rstrip": True}}),
    "lstrip": lambda f: save(f, flags={"<|user|>": {"lstrip": True}, "<|end|>": {"lstrip": True}}),
    "lstrip and rstrip": lambda f: save(f, flags={
        mark: {"lstrip": True, "rstrip": True} for mark in MARKS}),
    "single_word": lambda f: save(f, flags={"<|end|>": {"single_word": True}}),
    "normalized, no normalizer": lambda f: save(f, flags={"<|end|>": {"normalized": True}}),
    "normalized, NFC": lambda f: save(f, bpe(normalizer=normalizers.NFC()),
                                      flags={"<|end|>": {"normalized": True}}),
    # flags of tokens that are not special
    "tool": lambda f: save(f, tool={"normalized": False}),
    "tool, rstrip": lambda f: save(f, tool={"rstrip": True}),
    "tool, lstrip": lambda f: save(f, tool={"lstrip": True, "normalized": False}),
    "tool, single_word": lambda f: save(f, tool={"single_word": True}),
    "tool, normalized, NFC": lambda f: save(f, bpe(normalizer=normalizers.NFC()),
                                            tool={"normalized": True, "lstrip": True}),
    "tool, normalized, a normalizer that writes what no token has": lambda f: save(
        f, bpe(normalizer=normalizers.Sequence([
            normalizers.NFC(), normalizers.Replace(" ", "_"),
            normalizers.Replace(tokenizers.Regex("[0-9]"), "9")])), tool={"normalized": True}),
    "a normalized token around one that is not": lambda f: save(
        f, flags={"tool": {"special": False, "rstrip": True}}, tool={"normalized": True}),
    "a single word beside another token": lambda f: save(
        f, flags={"hello1": {"special": False}, " word": {"special": False, "single_word": True},
                  "word": {"special": False, "single_word": True}}),
    "tool that begins like a mark": lambda f: save(f, marks=(*MARKS, "<t"),
                                                   tool={"normalized": False}),
    "a mark that is a word": lambda f: save(f, marks=(*MARKS, "hello1"),
                                            tool={"single_word": True}),
    # the rest of tokenizer.json
    "lower case": lambda f: save(f, bpe(normalizer=normalizers.Lowercase())),
    "byte-level with a first space": lambda f: save(
        f, bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)), tool={"normalized": False}),
    "metaspace, always": lambda f: save(f, bpe(metaspace("always")), tool={"normalized": False}),
    "metaspace, first": lambda f: save(f, bpe(metaspace("first")), tool={"normalized": False}),
    "metaspace, never": lambda f: save(f, bpe(metaspace("never")), tool={"normalized": False}),
    "metaspace, first, no bos": lambda f: save(
        f, bpe(metaspace("first")), chat_template="go: " + TEMPLATE.replace("{{ bos_token }}", "")),
    "metaspace and rstrip": lambda f: save(f, bpe(metaspace("always")), flags={
        mark: {"rstrip": True} for mark in MARKS}),
    "prepend": lambda f: save(f, bpe(metaspace("never"), normalizers.Prepend("\u2581")),
                              tool={"normalized": False}),
    "a post-processor with bos and eos": with_post_processor,
    "truncation": lambda f: with_spec(save(f), truncation={
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}),
    "padding": lambda f: with_spec(save(f), padding={
        "strategy": {"Fixed": 200}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<s>"}),
    # tokenizer_config.json
    "add_bos_token": lambda f: save(f, add_bos_token=True),
    "add_eos_token": lambda f: save(f, add_eos_token=True),
    "add_prefix_space as in tokenizer.json": lambda f: save(f, add_prefix_space=False),
    "added_tokens_decoder gives flags": lambda f: save(f, added_tokens_decoder={
        str(N + 2): told("<|user|>", rstrip=True), str(N + 4): told("<|end|>", lstrip=True)}),
    "added_tokens_decoder takes flags": lambda f: save(
        f, flags={"<|user|>": {"rstrip": True}},
        added_tokens_decoder={str(N + 2): told("<|user|>")}),
    "added_tokens_decoder adds": lambda f: save(f, added_tokens_decoder={
        str(N + 5): told("<tool>", special=False, rstrip=True)}),
    "special to plain": lambda f: save(f, added_tokens_decoder={
        str(N + 4): told("<|end|>", special=False)}),
    "names add tokens": lambda f: save(f, pad_token="<tool>", image_token="hello1",
                                       additional_special_tokens=["[tool]"]),
    "a name with flags": lambda f: save(f, pad_token={"__type": "AddedToken", **told(
        "<tool>", lstrip=True)}),
    "a name of a piece": lambda f: save(f, additional_special_tokens=["hello"]),
    "extra_special_tokens, a list": lambda f: save(f, extra_special_tokens=["<tool>", "[tool]"]),
    "extra_special_tokens, by name": lambda f: save(
        f, extra_special_tokens={"tool_token": "<tool>"},
        chat_template="{{ tool_token }}" + TEMPLATE),
    "extra_special_tokens by name beside a list": lambda f: save(
        f, extra_special_tokens={"tool_token": "[tool]"}, additional_special_tokens=["<tool>"]),
    "extra_special_tokens, empty, beside a list": lambda f: save(
        f, extra_special_tokens={}, additional_special_tokens=["<tool>"]),
    "two lists": lambda f: save(f, extra_special_tokens=["[tool]"],
                                additional_special_tokens=["<tool>"]),
    "model_specific_special_tokens": lambda f: save(
        f, model_specific_special_tokens={"tool_token": "<tool>"},
        chat_template="{{ tool_token }}" + TEMPLATE),
    "model_specific_special_tokens with flags": lambda f: save(
        f, model_specific_special_tokens={"tool_token": {"__type": "AddedToken",
                                                         **told("<tool>", rstrip=True)}}),
    "model_specific_special_tokens beside a list": lambda f: save(
        f, model_specific_special_tokens={"tool_token": "[tool]"}, extra_special_tokens=["<tool>"]),
    "model_specific_special_tokens beside other names": lambda f: save(
        f, model_specific_special_tokens={"tool_token": "[tool]"}, image_token="<tool>"),
    "a template with all names": lambda f: save(
        f, unk_token="<u>", sep_token="<p>", cls_token="<c>", mask_token="<m>", pad_token="<q>",
        chat_template="{{ unk_token }}{{ sep_token }}{{ cls_token }}{{ mask_token }}{{ pad_token }}"
                      + TEMPLATE),
    # files beside it
    "added_tokens.json": lambda f: beside(save(f), "added_tokens.json",
                                          {"[tool]": N + 6, "<tool>": N + 5}),
    "added_tokens.json of tokens that are there": lambda f: beside(
        save(f, flags={"<|end|>": {"rstrip": True}}), "added_tokens.json", {"<|end|>": N + 4}),
    "added_tokens.json where the config has its own": lambda f: beside(
        save(f, added_tokens_decoder={}), "added_tokens.json", {"<tool>": N + 5}),
    "special_tokens_map.json wins": lambda f: beside(
        save(f, eos_token="<|end|>"), "special_tokens_map.json",
        {"bos_token": "<|end|>", "pad_token": told("<tool>", lstrip=True)}),
    "special_tokens_map.json is not read": lambda f: beside(
        save(f, added_tokens_decoder={}), "special_tokens_map.json",
        {"bos_token": "<|end|>", "pad_token": "<tool>"}),
    # chat templates
    "a list of templates": lambda f: save(f, chat_template=[
        {"name": "rag", "template": "no"}, {"name": "default", "template": TEMPLATE}]),
    "chat_template.jinja wins": lambda f: beside(save(f, chat_template="no"),
                                                 "chat_template.jinja", TEMPLATE),
    "chat_template.jinja and more": lambda f: beside(
        beside(save(f), "chat_template.jinja", "x" + TEMPLATE),
        "additional_chat_templates/rag.jinja", "no"),
}


def their_ids(folder, chat, prompt):
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    return hf.apply_chat_template(chat, return_dict=False, add_generation_prompt=prompt)


def differing(folder):
    """The conversations with other ids here than in transformers, as a whole or as a prompt.

    Those in which a user spells a special token differ on purpose, and are left out.
    """
    ours = Tokenizer(folder)
    differ = []
    for chat in CHATS:
        texts = " ".join(m["content"] for m in chat)
        if any(special in texts for special in ours.specials):
            continue
        if ours.encode_prompt(chat) != their_ids(folder, chat, prompt=True):
            differ.append(chat)
        if ours.encode_chat(chat)[0] != their_ids(folder, chat, prompt=False):
            differ.append(chat)
    return differ + differing_begun(transformers.AutoTokenizer.from_pretrained(folder), ours)


def differing_begun(hf, ours):
    """The beginnings of an answer that have other ids here than in transformers."""
    differ = []
    for begun in ("Sure, here", "Sure ", "  two <tool>", "thing."):
        chat = [user("hello there"), assistant(begun)]
        if any(special in m["content"] for m in chat for special in ours.specials):
            continue  # a spelt one stays text here
        theirs = hf.apply_chat_template(chat, return_dict=False, continue_final_message=True)
        if ours.encode_prompt(chat[:1], begun) != theirs:
            differ.append(begun)
    return differ


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_has_transformers_ids(tmp_path, name):
    FOLDERS[name](tmp_path)
    assert differing(tmp_path) == []


CONTROLS = ["rstrip", "lstrip", "tool", "tool, rstrip", "lower case", "metaspace, always",
            "byte-level with a first space", "added_tokens_decoder gives flags",
            "added_tokens_decoder adds", "names add tokens", "added_tokens.json",
            "extra_special_tokens by name beside a list", "model_specific_special_tokens",
            "special_tokens_map.json wins"]


@pytest.mark.parametrize("name", CONTROLS)
def test_control_the_flag_or_file_changes_ids(tmp_path, name):
    """Where it is left out, some conversation has other ids: the test above can see it."""
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    FOLDERS[name](tmp_path / "with")
    save(tmp_path / "without")
    changed = Tokenizer(tmp_path / "with")
    plain = Tokenizer(tmp_path / "without")
    assert any(changed.encode_prompt(c) != plain.encode_prompt(c) for c in CHATS)


# ---------------------------------------------------------------------------------------------
# a tokenizer.model, and what stands beside it


@pytest.fixture(scope="module")
def model_bytes():
    """A small sentencepiece model of Llama 2's kind: BPE, byte pieces, text as it is."""
    writer = io.BytesIO()
    words = "hello there word thing two spaces user assistant Sure No ok tool end".split()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words[i:] + words[:i]) for i in range(12)] * 3),
        model_writer=writer, model_type="bpe", vocab_size=360, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["<ud>"], hard_vocab_limit=False, minloglevel=2)
    return writer.getvalue()


def llama(folder, model_bytes, **config):
    (folder / "tokenizer.model").write_bytes(model_bytes)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                "unk_token": "<unk>", "chat_template": TEMPLATE}
    edit_json(folder / "tokenizer_config.json", **(settings | config))
    return folder


def reference(model_bytes, tokens=(), legacy=True, **more):
    """transformers' Llama tokenizer of the same pieces; from a file it would need protobuf.

    Where it is legacy, with the normalizer of Llama 2's published tokenizer.json: like
    sentencepiece it puts the first space also before a space, which transformers 5 no longer does.
    """
    from transformers.convert_slow_tokenizer import generate_merges

    sp = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    scores = {sp.id_to_piece(i): sp.get_score(i) for i in range(sp.vocab_size())}
    vocab = {piece: i for i, piece in enumerate(scores)}
    hf = transformers.LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores),
                                     legacy=legacy, chat_template=TEMPLATE, **more)
    if legacy and "add_prefix_space" not in more:
        hf.backend_tokenizer.normalizer = normalizers.Sequence([
            normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        hf.backend_tokenizer.pre_tokenizer = None
    hf.add_tokens([AddedToken(**token) for token in tokens])
    return hf


def n_pieces(model_bytes):
    return sentencepiece.SentencePieceProcessor(model_proto=model_bytes).vocab_size()


MARK_NAMES = ("<|user|>", "<|assistant|>", "<|end|>")
BESIDE = {  # the tokens beside the model; legacy; add_prefix_space
    "special": ([told(mark) for mark in MARK_NAMES], True, None),
    "special, not legacy": ([told(mark) for mark in MARK_NAMES], False, None),
    "special, no first space": ([told(mark) for mark in MARK_NAMES], True, False),
    "rstrip": ([told(mark, rstrip=True) for mark in MARK_NAMES], True, None),
    "lstrip, rstrip, not legacy": (
        [told(mark, lstrip=True, rstrip=True) for mark in MARK_NAMES], False, None),
    "a plain one among them": ([*[told(mark) for mark in MARK_NAMES],
                                told("<tool>", special=False)], True, None),
    "plain, single_word": ([*[told(mark) for mark in MARK_NAMES],
                            told("<tool>", special=False, single_word=True)], False, None),
    "none special": ([told(mark, special=False) for mark in MARK_NAMES], True, None),
}


def differing_from(hf, ours):
    differ = []
    for chat in CHATS[:3]:
        ids = hf.apply_chat_template(chat, return_dict=False, add_generation_prompt=True)
        whole = hf.apply_chat_template(chat, return_dict=False)
        if ours.encode_prompt(chat) != ids or ours.encode_chat(chat)[0] != whole:
            differ.append(chat)
    return differ


@pytest.fixture(params=BESIDE)
def with_added_tokens(request, tmp_path, model_bytes):
    """A folder with added_tokens_decoder -> (ours, transformers', and that without the tokens)."""
    tokens, legacy, prefix = BESIDE[request.param]
    n = n_pieces(model_bytes)
    more = {} if prefix is None else {"add_prefix_space": prefix}
    llama(tmp_path, model_bytes, legacy=legacy, **more,
          added_tokens_decoder={str(n + i): token for i, token in enumerate(tokens)})
    ours = Tokenizer(tmp_path)
    assert ours.n_ids == n + len(tokens)
    return (ours, reference(model_bytes, tokens, legacy, **more),
            reference(model_bytes, [], legacy, **more))


def test_added_tokens_decoder_beside_a_model_has_transformers_ids(with_added_tokens):
    ours, theirs, control = with_added_tokens
    assert differing_from(theirs, ours) == []
    assert differing_from(control, ours) != []


def test_added_tokens_json_beside_a_model_has_transformers_ids(tmp_path, model_bytes):
    n = n_pieces(model_bytes)
    llama(tmp_path, model_bytes)
    beside(tmp_path, "added_tokens.json", {mark: n + i for i, mark in enumerate(MARK_NAMES)})
    tokens = [told(mark, special=False) for mark in MARK_NAMES]
    assert differing_from(reference(model_bytes, tokens), Tokenizer(tmp_path)) == []


def test_a_begun_answer_has_transformers_ids_and_is_read_with_its_space(with_added_tokens):
    """What is written behind it begins with "\u2581", which alone would be read as nothing."""
    ours, theirs, control = with_added_tokens
    assert differing_begun(theirs, ours) == []
    assert differing_begun(control, ours) != []
    prompt = ours.encode_prompt([user("hello")], "Sure two")
    reply = ours.encode_prompt([user("hello")], "Sure two spaces")[len(prompt):]
    assert ours.decode_begun(prompt, reply, "Sure two") == ("Sure two spaces", " spaces")


def test_names_of_special_tokens_map_beside_a_model_are_added(tmp_path, model_bytes):
    llama(tmp_path, model_bytes, pad_token=None)
    beside(tmp_path, "special_tokens_map.json",
           {"additional_special_tokens": [*MARK_NAMES[:2], told("<|end|>", rstrip=True)]})
    tokens = [told("<|user|>"), told("<|assistant|>"), told("<|end|>", rstrip=True)]
    assert differing_from(reference(model_bytes, tokens), Tokenizer(tmp_path)) == []


@pytest.mark.parametrize("legacy", [True, False])
def test_decoding_is_the_text_again_around_added_tokens(tmp_path, model_bytes, legacy):
    n = n_pieces(model_bytes)
    llama(tmp_path, model_bytes, legacy=legacy, added_tokens_decoder={
        str(n): told("<|end|>"), str(n + 1): told("<tool>", special=False)})
    tok = Tokenizer(tmp_path)
    for text in ("hello <tool> there", "<tool>two  spaces<tool>", "no added token"):
        assert tok.decode([*tok.encode(text), n]).replace(" ", "") == text.replace(" ", "")
        assert (n + 1 in tok.encode(text)) == ("<tool>" in text)
    assert n not in tok.encode("spelt <|end|>") and "<|end|>" in tok.decode(tok.encode("<|end|>"))


def test_a_bos_that_the_config_calls_null_is_none(tmp_path, model_bytes):
    llama(tmp_path, model_bytes)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    beside(tmp_path, "tokenizer_config.json", config | {"bos_token": None})
    assert Tokenizer(tmp_path).bos_id is None


# ---------------------------------------------------------------------------------------------
# a tokenizer.json that was made from sentencepiece, and "legacy" beside it


def spm_json(model_bytes, parts):
    """A tokenizer.json of Llama's kind from the pieces of a sentencepiece model."""
    from transformers.convert_slow_tokenizer import generate_merges

    sp = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    scores = {sp.id_to_piece(i): sp.get_score(i) for i in range(sp.vocab_size())}
    vocab = {piece: i for i, piece in enumerate(scores)}
    tok = tokenizers.Tokenizer(models.BPE(
        vocab=vocab, merges=generate_merges(vocab, scores), fuse_unk=True, byte_fallback=True,
        unk_token="<unk>"))
    tok.normalizer, tok.pre_tokenizer = PARTS[parts]
    return tok


PARTS = {  # normalizer and pre-tokenizer, as published files of different age have them
    "prepend": (normalizers.Sequence([normalizers.Prepend("\u2581"),
                                      normalizers.Replace(" ", "\u2581")]), None),
    "always": (None, pre_tokenizers.Metaspace("\u2581", "always", split=False)),
    "first": (None, pre_tokenizers.Metaspace("\u2581", "first", split=False)),
    "no first space": (normalizers.Replace(" ", "\u2581"),
                       pre_tokenizers.Split(" ", "merged_with_previous")),
}
CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast",
           "PreTrainedTokenizerFast", None)
LEGACY = (True, False, None)


@pytest.mark.parametrize("legacy", LEGACY)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("parts", PARTS)
def test_legacy_beside_a_tokenizer_json_has_transformers_ids(
        tmp_path, model_bytes, parts, name, legacy):
    save(tmp_path, spm_json(model_bytes, parts), tokenizer_class=name, legacy=legacy)
    assert differing(tmp_path) == []


def ids_with(folder, model_bytes, parts, **config):
    folder.mkdir()
    save(folder, spm_json(model_bytes, parts), **config)
    tok = Tokenizer(folder)
    return [tok.encode_prompt(chat) for chat in CHATS]


@pytest.mark.parametrize("parts", PARTS)
def test_control_legacy_changes_ids_for_the_llama_class_alone(tmp_path, model_bytes, parts):
    for name, decides in (("LlamaTokenizer", True), ("GemmaTokenizer", False),
                          ("PreTrainedTokenizerFast", False)):
        old, new = (ids_with(tmp_path / f"{name} {legacy}", model_bytes, parts,
                             tokenizer_class=name, legacy=legacy) for legacy in (True, False))
        assert (old != new) == decides


@pytest.mark.parametrize("name, decides", [("LlamaTokenizer", True), ("GemmaTokenizer", True),
                                           ("PreTrainedTokenizerFast", False)])
def test_control_the_class_changes_the_ids_of_one_and_the_same_file(
        tmp_path, model_bytes, name, decides):
    of_the_file = ids_with(tmp_path / "file", model_bytes, "prepend", tokenizer_class=None)
    of_the_class = ids_with(tmp_path / "class", model_bytes, "prepend", tokenizer_class=name)
    assert (of_the_file != of_the_class) == decides


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("legacy", LEGACY)
def test_add_prefix_space_beside_a_tokenizer_json_of_the_llama_class(
        tmp_path, model_bytes, legacy, prefix):
    save(tmp_path, spm_json(model_bytes, "prepend"), tokenizer_class="LlamaTokenizer",
         legacy=legacy, add_prefix_space=prefix)
    assert differing(tmp_path) == []


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma", "qwen3"])
@pytest.mark.parametrize("legacy", LEGACY)
def test_the_model_beside_it_may_say_that_the_class_does_not_count(
        tmp_path, model_bytes, legacy, model_type):
    save(tmp_path, spm_json(model_bytes, "prepend"), tokenizer_class="LlamaTokenizer",
         legacy=legacy)
    edit_json(tmp_path / "config.json", model_type=model_type)
    assert differing(tmp_path) == []


@pytest.mark.parametrize("legacy", LEGACY)
def test_a_class_that_config_json_names_counts_too(tmp_path, model_bytes, legacy):
    save(tmp_path, spm_json(model_bytes, "prepend"), tokenizer_class=None, legacy=legacy)
    edit_json(tmp_path / "config.json", model_type="llama", tokenizer_class="LlamaTokenizer")
    assert differing(tmp_path) == []


@pytest.mark.parametrize("legacy", LEGACY)
@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_a_byte_level_tokenizer_json_itself_says_where_a_first_space_is_put(
        tmp_path, name, legacy):
    """Llama 3's kind of file is byte-level, and some call its class LlamaTokenizer all the same."""
    save(tmp_path, bpe(metaspace("always")), tokenizer_class=name, legacy=legacy)
    assert differing(tmp_path) == []


def llama3_like():
    """A byte-level file that splits digits one by one, as no class of the table below does."""
    return bpe(pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Split(tokenizers.Regex("th"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]))


OTHER_CLASSES = ("Qwen2Tokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "CohereTokenizer")


@pytest.mark.parametrize("name", OTHER_CLASSES)
def test_of_other_classes_the_file_itself_counts_and_in_transformers_5_the_class(tmp_path, name):
    """Meant: a model was trained with what its file says, whatever class stands beside it."""
    save(tmp_path, llama3_like(), tokenizer_class=name)
    assert differing(tmp_path) != []
    with_the_class = [Tokenizer(tmp_path).encode_prompt(chat) for chat in CHATS]
    edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert differing(tmp_path) == []
    assert [Tokenizer(tmp_path).encode_prompt(chat) for chat in CHATS] == with_the_class


def test_code_llamas_file_counts_too_where_it_puts_a_space_behind_added_tokens(
        tmp_path, model_bytes):
    for parts, is_another in (("prepend", True), ("first", False)):
        folder = tmp_path / parts
        folder.mkdir()
        save(folder, spm_json(model_bytes, parts), tokenizer_class="CodeLlamaTokenizer")
        assert (differing(folder) != []) == is_another


@pytest.mark.parametrize("name", OTHER_CLASSES)
def test_of_a_file_that_its_own_class_wrote_both_have_the_same_ids(tmp_path, name):
    plain = bpe()
    spec = json.loads(plain.to_str())["model"]
    tok = getattr(transformers, name)(vocab=spec["vocab"], merges=list(map(tuple, spec["merges"])))
    save(tmp_path, tok.backend_tokenizer, tokenizer_class=name)
    assert differing(tmp_path) == []


def test_a_model_that_the_class_cannot_hold_is_refused(tmp_path):
    tok = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    save(tmp_path, tok, tokenizer_class="LlamaTokenizer")
    check_refused(lambda: Tokenizer(tmp_path), "Unigram", "BPE", "LlamaTokenizer")


def test_a_piece_of_the_model_that_ends_a_turn_cannot_be_written_by_a_user(tmp_path, model_bytes):
    """The model finds its own user-defined pieces in any text, so the spelling is cut in two."""
    llama(tmp_path, model_bytes, chat_template=TEMPLATE.replace("<|end|>", "<ud>"),
          additional_special_tokens=["<ud>"])
    tok = Tokenizer(tmp_path)
    ud = tok.specials["<ud>"]
    chat = [user("a<ud>b <ud>"), assistant("Sure")]
    ids, supervised = tok.encode_chat(chat)
    assert ids.count(ud) == 2 and ud in tok.stop_ids
    assert "a<ud>b <ud>" in tok.decode(ids)
    assert [i for i, s in zip(ids, supervised, strict=True) if s][-1] == ud


def test_a_model_names_its_own_bos_and_eos_where_the_config_does_not(tmp_path, model_bytes):
    llama(tmp_path, model_bytes, bos_token=None, eos_token=None, unk_token=None,
          chat_template=TEMPLATE + "{{ eos_token }}")
    tok = Tokenizer(tmp_path)
    assert tok.bos_id == 1 and tok.encode_prompt(CHATS[0])[0] == 1
    assert tok.encode_prompt(CHATS[0])[-1] == 2


# ---------------------------------------------------------------------------------------------
# what is not followed is refused by its name


REFUSED = {  # the folder, and what the sentence names
    "split_special_tokens": (lambda f: save(f, split_special_tokens=True),
                             ["split_special_tokens", "true"]),
    "fix_mistral_regex": (lambda f: save(f, fix_mistral_regex=True), ["fix_mistral_regex"]),
    "auto_map": (lambda f: save(f, auto_map={"AutoTokenizer": ["own.Tok", None]}),
                 ["auto_map", "own.Tok"]),
    "sp_model_kwargs": (lambda f: save(f, sp_model_kwargs={"enable_sampling": True}),
                        ["sp_model_kwargs", "enable_sampling"]),
    "a first space that tokenizer.json has not": (lambda f: save(f, add_prefix_space=True),
                                                  ["add_prefix_space", "true"]),
    "no first space, and tokenizer.json has one": (
        lambda f: save(f, bpe(metaspace("always")), add_prefix_space=False),
        ["add_prefix_space", "false"]),
    "normalized, lower case": (
        lambda f: save(f, bpe(normalizer=normalizers.Lowercase()),
                       flags={"<|END|>": {"normalized": True}}),
        ["<|END|>", "normalized", "<|end|>"]),
    "normalized, prepend": (
        lambda f: save(f, bpe(normalizer=normalizers.Prepend("_")), tool={"normalized": True}),
        ["<tool>", "normalized", "_<tool>"]),
    "normalized, NFKC": (
        lambda f: save(f, bpe(normalizer=normalizers.NFKC()), flags={
            "<\ufb01n>": {"special": False, "normalized": True}}), ["normalized", "<fin>"]),
    "normalized, NFKC, though it is spelt as before": (
        lambda f: save(f, bpe(normalizer=normalizers.NFKC()), tool={"normalized": True}),
        ["normalized", "<tool>"]),
    "normalized, rstrip, and spaces are replaced": (
        lambda f: save(f, bpe(normalizer=normalizers.Replace(" ", "_")),
                       tool={"normalized": True, "rstrip": True}), ["<tool>", "Replace"]),
    "normalized, lstrip, and spaces are replaced in a sequence": (
        lambda f: save(f, bpe(normalizer=normalizers.Sequence([
            normalizers.NFC(), normalizers.Replace(" ", "_")])),
            tool={"normalized": True, "lstrip": True}), ["<tool>", "Replace"]),
    "normalized, single_word, and digits are replaced": (
        lambda f: save(f, bpe(normalizer=normalizers.Replace(tokenizers.Regex("[0-9]"), " ")),
                       tool={"normalized": True, "single_word": True}), ["<tool>", "Replace"]),
    "normalized, and another text is made into the token": (
        lambda f: save(f, bpe(normalizer=normalizers.Replace("[", "<")),
                       tool={"normalized": True}), ["<tool>", "Replace"]),
    "normalized, and spaces inside a spelling are taken out": (
        lambda f: save(f, bpe(normalizer=normalizers.Replace(" ", "")),
                       tool={"normalized": True}), ["<tool>", "Replace"]),
    "normalized, and an accent may stand apart": (
        lambda f: save(f, bpe(normalizer=normalizers.NFC()), flags={
            "caf\u00e9": {"special": False, "normalized": True}}), ["caf\u00e9", "NFC"]),
    "two lists of two files": (
        lambda f: beside(save(f, extra_special_tokens=["<tool>"]), "special_tokens_map.json",
                         {"extra_special_tokens": ["[tool]"]}),
        ["<tool>", "[tool]", "special_tokens_map.json", "the same"]),
    "two lists of two files with other flags": (
        lambda f: beside(save(f, additional_special_tokens=["<tool>"]), "special_tokens_map.json",
                         {"additional_special_tokens": [told("<tool>", rstrip=True)]}),
        ["<tool>", "special_tokens_map.json", "flags"]),
    "names of their own in two files": (
        lambda f: beside(save(f, image_token="<tool>"), "special_tokens_map.json",
                         {"video_token": "[tool]"}),
        ["<tool>", "[tool]", "special_tokens_map.json"]),
    "a list by name": (lambda f: save(f, additional_special_tokens={"tool_token": "<tool>"}),
                       ["additional_special_tokens", "a list"]),
    "another id": (lambda f: save(f, added_tokens_decoder={"3": told("<|user|>")}),
                   ["<|user|>", "id 3", str(N + 2)]),
    "an id with a gap": (lambda f: beside(save(f), "added_tokens.json", {"<tool>": N + 50}),
                         ["<tool>", str(N + 50), str(N + 5)]),
    "a decoder of texts": (lambda f: save(f, added_tokens_decoder={"3": "<|user|>"}),
                           ["added_tokens_decoder"]),
    "a decoder without numbers": (lambda f: save(f, added_tokens_decoder={"x": told("<tool>")}),
                                  ["added_tokens_decoder"]),
    "added_tokens.json without numbers": (
        lambda f: beside(save(f), "added_tokens.json", {"<tool>": "7"}), ["added_tokens.json"]),
    "a name that is no text": (lambda f: save(f, additional_special_tokens=[7]),
                               ["additional_special_tokens", "7"]),
    "a damaged special_tokens_map.json": (
        lambda f: beside(save(f), "special_tokens_map.json", "{"), ["special_tokens_map.json"]),
    "templates without a default": (
        lambda f: save(f, chat_template=[{"name": "rag", "template": TEMPLATE}]),
        ["rag", "default"]),
    "other templates alone": (
        lambda f: beside(save(f), "additional_chat_templates/rag.jinja", TEMPLATE),
        ["additional_chat_templates", "chat_template.jinja"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_followed_is_refused_by_its_name(tmp_path, name):
    make, words = REFUSED[name]
    make(tmp_path)
    check_refused(lambda: Tokenizer(tmp_path), *words)


def test_random_pieces_are_refused(tmp_path):
    save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    with_spec(tmp_path, model=spec["model"] | {"dropout": 0.1})
    check_refused(lambda: Tokenizer(tmp_path), "dropout", "0.1")


def test_an_id_that_a_model_gives_to_another_piece_is_refused(tmp_path, model_bytes):
    llama(tmp_path, model_bytes, added_tokens_decoder={"100": told("<|end|>")})
    check_refused(lambda: Tokenizer(tmp_path), "<|end|>", "id 100")


def test_tokens_beside_a_model_that_its_weights_lack_are_refused(tmp_path, model_bytes):
    n = n_pieces(model_bytes)
    llama(tmp_path, model_bytes, added_tokens_decoder={str(n): told("<|end|>")})
    edit_json(tmp_path / "config.json", vocab_size=n)
    check_refused(lambda: Tokenizer(tmp_path), str(n + 1), str(n))

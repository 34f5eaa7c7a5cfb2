"""The checkpoint's chat template is rendered as transformers renders it, text and ids.

    pytest tests/programs/test_templates.py -q

Four published templates: Llama-3.1, Llama-3.2 and Gemma-2 trim what users write, Qwen2.5 does not.
Qwen2.5 has its own tokenizer here, the others a small byte-level BPE with their special tokens,
since it is the template and the placing of special tokens that is compared.

Two differences are meant, and shown here: a special token that a user spells stays text, and
prompt and answer are encoded apart.
"""

import datetime
import re
import shutil

import jinja2
import pytest
from chat_helpers import TEXTS, assistant, check_refused, make_qwen, need_public_tokenizers, user
from helpers import SHARED, edit_json

from tokenizer import DATE, HIDE, Tokenizer

transformers = pytest.importorskip("transformers", reason="the reference; see requirements-dev.txt")

LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
          "<|eot_id|>"]
GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
PUBLISHED = {  # template, special tokens (bos first), what ends a turn
    "llama3.1": ("meta-llama-Llama-3.1-8B-Instruct", LLAMA3, "<|eot_id|>"),
    "llama3.2": ("meta-llama-Llama-3.2-3B-Instruct", LLAMA3, "<|eot_id|>"),
    "gemma2": ("google-gemma-2-2b-it", GEMMA, "<end_of_turn>"),
    "qwen2.5": ("Qwen-Qwen2.5-7B-Instruct", ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
}
# Llama-3's own rule of where tokens may not merge: a run of newlines is a piece, as in Qwen2.5's.
PIECES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CONTENTS = [
    *TEXTS, " \t\n both ends \r\n\n ", "\n", "   ", "\nSure", "\n \n  Sure", "one\n\n\n\ntwo",
    "e\u0301 n\u0303 \u1112\u1161\u11ab combining", "\u0301 begins with an accent",
    "\u00a0no-break \u3000ideographic\u2028", "\ue000\ue000 private \uf8ff use \ue000",
    "{{ messages }} {%- if x -%} {# note #} {{- bos_token -}}", "{% generation %}\\n\\u0041",
    "<b>&amp; 'single' \"double\"</b>", "<tool_call>{}</tool_call>", "|> <| _id|> of_turn>",
]


def system(text):
    return {"role": "system", "content": text}


def shapes(text):
    """Conversations in which the text is each role's in turn; the last three have system turns."""
    return [
        [user(text)], [user("hi"), assistant(text)], [user(text), assistant("Sure."), user("more")],
        [user("hi"), assistant(text), user("more"), assistant(text + "!"), user(text)],
        [system(text), user("hi")], [system("Be kind."), user(text), assistant(text), user("ok")],
        [user("hi"), system(text), user("hi"), assistant(text)],
    ]


def chats(name):
    """Every text in every shape that the template takes."""
    every = [chat for text in CONTENTS for chat in shapes(text)]
    return [c for c in every if name != "gemma2" or c[0]["role"] != "system"]  # it refuses these


def make_small(folder, specials, end):
    """A byte-level BPE of 600 ids; the runs of newlines in the corpus give it merges of them."""
    import tokenizers
    from tokenizers import pre_tokenizers

    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.train_from_iterator(
        [f"system\n\nuser\n\nmodel\n{text}\n\n" for text in CONTENTS] * 2,
        tokenizers.trainers.BpeTrainer(
            vocab_size=600, special_tokens=specials, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.save(str(folder / "tokenizer.json"))
    edit_json(folder / "tokenizer_config.json", bos_token=specials[0], eos_token=end,
              tokenizer_class="PreTrainedTokenizerFast")


def make(name, folder):
    """The folder of a published template."""
    file, specials, end = PUBLISHED[name]
    if name == "qwen2.5":
        make_qwen(folder)
    else:
        make_small(folder, specials, end)
    text = (SHARED / "templates" / f"{file}.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=PUBLISHED)
def name(request):
    need_public_tokenizers()
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return make(name, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def tok(folder):
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def hf(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["llama3.1", "llama3.2"])
def dated(request, tmp_path):
    """The name and the folder of a template that prints today's date."""
    need_public_tokenizers()
    return request.param, make(request.param, tmp_path)


def text_of(tok, chat, prompt=False):
    """Our text of a conversation, without the marks that hide what users spelt."""
    return re.sub(f"{HIDE}({HIDE}?)", r"\1", tok._render(chat, add_generation_prompt=prompt))


def hf_text(hf, chat, prompt=False, date=DATE):
    named = {"date_string": date} if date else {}
    return hf.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt, **named)


def hf_ids(hf, chat, prompt=False, **named):
    return hf.apply_chat_template(chat, return_dict=False, add_generation_prompt=prompt,
                                  date_string=DATE, **named)


def set_clock(monkeypatch, year):
    """For transformers' templates it is 26 July of that year."""
    class Clock:
        @staticmethod
        def now():
            return datetime.datetime(year, 7, 26)

    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Clock)


def differing(tok, hf, name):
    """The conversations that have another text here than in transformers, with or without the
    prompt for an answer."""
    return [chat for chat in chats(name) for prompt in (False, True)
            if text_of(tok, chat, prompt) != hf_text(hf, chat, prompt)]


# ---------------------------------------------------------------------------------------------
# text


def test_every_conversation_has_transformers_text(tok, hf, name):
    assert len(chats(name)) >= 100
    assert differing(tok, hf, name) == []


def test_control_a_template_that_trims_where_it_should_not_or_the_reverse_is_seen(
        folder, hf, name, tmp_path):
    changed = shutil.copytree(folder, tmp_path / "changed")
    text = (changed / "chat_template.jinja").read_text(encoding="utf-8")
    other = re.sub(r" ?\| ?trim", "", text)
    if other == text:  # Qwen's trims nothing
        other = text.replace("+ message.content +", "+ message.content | trim +")
    (changed / "chat_template.jinja").write_text(other, encoding="utf-8")
    assert len(differing(Tokenizer(changed), hf, name)) >= 50


def test_control_the_prompt_for_an_answer_is_part_of_the_text(tok, hf):
    chat = [user("hi")]
    ours, theirs = text_of(tok, chat, prompt=True), hf_text(hf, chat)
    assert ours.startswith(theirs) and len(ours) > len(theirs)


DEVICES = """
{% set seen = namespace(n=0) %}
{{- bos_token }} {{ strftime_now("%d %b %Y") }}{{ nothing }}
    {% for m in messages %}
        {% if loop.index0 == 3 %}
            {% break %}
        {% endif %}
        {% set seen.n = seen.n + 1 %}
  <{{ m.role }}> {{ seen.n }} {{ m.content | tojson }} {{ {"é": ["<&>"]} | tojson(indent=2) }}
{{ eos_token }}
    {% endfor %}
"""


def test_what_a_template_may_use_does_what_it_does_in_transformers(tmp_path, monkeypatch):
    """Blocks on lines of their own, break, namespace, tojson without HTML escapes, the date."""
    need_public_tokenizers()
    make("llama3.1", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(DEVICES, encoding="utf-8")
    set_clock(monkeypatch, 2030)
    ours = Tokenizer(tmp_path, date="26 Jul 2030")
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in CONTENTS:
        chat = [user(text), assistant("<&>"), user("c"), assistant("never shown")]
        theirs = hf_text(hf, chat, date=None)
        assert text_of(ours, chat) == theirs
        assert '  <assistant> 2 "<&>" {\n  "é": [\n    "<&>"' in theirs and "never" not in theirs


@pytest.mark.parametrize("roles", ["system user", "user user", "assistant",
                                   "user assistant system"])
def test_gemmas_template_refuses_roles_here_as_in_transformers(tmp_path, roles):
    need_public_tokenizers()
    make("gemma2", tmp_path)
    chat = [{"role": role, "content": "x"} for role in roles.split()]
    why = "System role" if roles == "system user" else "must alternate"
    with pytest.raises(jinja2.TemplateError, match=why):
        hf_text(transformers.AutoTokenizer.from_pretrained(tmp_path), chat)
    tok = Tokenizer(tmp_path)
    check_refused(lambda: tok.encode_prompt(chat), "refuses", why)
    check_refused(lambda: tok.encode_chat(chat), "refuses")


# ---------------------------------------------------------------------------------------------
# the date


def test_a_date_given_to_both_gives_one_text_and_another_date_another(dated):
    folder = dated[1]
    hf = transformers.AutoTokenizer.from_pretrained(folder)
    ours, chat = Tokenizer(folder, date="01 Jan 2030"), [system("Be kind."), user("hi")]
    text = text_of(ours, chat, prompt=True)
    assert text == hf_text(hf, chat, prompt=True, date="01 Jan 2030")
    assert "\nToday Date: 01 Jan 2030\n" in text
    assert text != hf_text(hf, chat, prompt=True)  # the control
    assert ours.encode_prompt(chat) != Tokenizer(folder).encode_prompt(chat)


@pytest.mark.parametrize("year", [2024, 2030])
def test_the_clock_never_shows_here_and_in_transformers_only_under_llama32(
        dated, monkeypatch, year):
    """Llama-3.2's template asks for the clock; on 26 July 2024 that is our default, word for
    word. Llama-3.1's has that date in itself."""
    name, folder = dated
    hf, chat = transformers.AutoTokenizer.from_pretrained(folder), [user("hi")]
    set_clock(monkeypatch, year)
    theirs = hf_text(hf, chat, date=None)
    same = text_of(Tokenizer(folder), chat) == theirs
    assert same == (name == "llama3.1" or year == 2024)
    assert f"Today Date: 26 Jul {2024 if name == 'llama3.1' else year}\n" in theirs


# ---------------------------------------------------------------------------------------------
# ids


def test_every_prompt_has_transformers_ids(tok, hf, name):
    for chat in chats(name):
        assert tok.encode_prompt(chat) == hf_ids(hf, chat, prompt=True), chat


def hf_ids_apart(hf, chat, end):
    """(ids, supervised) of transformers' text, cut where each answer begins, piece by piece."""
    text = hf_text(hf, chat)
    starts = [len(hf_text(hf, chat[:i], prompt=True))
              for i, m in enumerate(chat) if m["role"] == "assistant"]
    ids, supervised = [], []
    for at, to in zip([0, *starts], [*starts, len(text)], strict=True):
        piece = hf(text[at:to], add_special_tokens=False)["input_ids"]
        n_answer = 1 + piece.index(end) if at else 0  # the end of the turn is the model's to write
        ids += piece
        supervised += [i < n_answer for i in range(len(piece))]
    return ids, supervised


def test_every_chat_has_transformers_ids_with_prompt_and_answer_encoded_apart(tok, hf, name):
    end = hf.convert_tokens_to_ids(PUBLISHED[name][2])
    for chat in chats(name):
        assert tok.encode_chat(chat) == hf_ids_apart(hf, chat, end), chat


def test_an_unfinished_answer_has_the_same_ids_and_its_end_of_turn_is_not_supervised(tok, name):
    end = tok.specials[PUBLISHED[name][2]]
    n_ends = 0
    for chat in chats(name):
        marked = [{**m, "unfinished": True} if m["role"] == "assistant" else m for m in chat]
        ids, supervised = tok.encode_chat(chat)
        n_ends += sum(s and i == end for i, s in zip(ids, supervised, strict=True))
        assert tok.encode_chat(marked) == (
            ids, [s and i != end for i, s in zip(ids, supervised, strict=True)]), chat
    assert n_ends >= 100  # the control: of the finished ones they are supervised


def test_in_one_piece_transformers_ids_differ_just_where_an_untrimmed_answer_begins_with_a_newline(
        tok, hf, name):
    """Qwen's template writes a newline before the answer, and the two merge into one token."""
    differ = [chat for chat in chats(name) if tok.encode_chat(chat)[0] != hf_ids(hf, chat)]
    merged = [chat for chat in chats(name) if any(
        m["role"] == "assistant" and m["content"].startswith("\n") for m in chat)]
    assert len(merged) >= 10
    assert differ == (merged if name == "qwen2.5" else [])


def begun_answers(name):
    """(conversation, beginning of an answer) with every text that is not white space alone."""
    chats = [[user("hi")], [user("hi"), assistant("Sure."), user("more")]]
    return [(chat, text + space) for text in CONTENTS if text.strip() for chat in chats
            for space in ("", " ")]


def hf_continued(hf, chat, begun):
    return hf.apply_chat_template([*chat, assistant(begun)], return_dict=False, date_string=DATE,
                                  continue_final_message=True)


def test_every_begun_answer_has_transformers_ids(tok, hf, name):
    """One text: a newline at its beginning merges with the one that Qwen's template writes."""
    assert len(begun_answers(name)) >= 100
    for chat, begun in begun_answers(name):
        assert tok.encode_prompt(chat, begun) == hf_continued(hf, chat, begun), (chat, begun)


def test_control_prompt_and_beginning_encoded_apart_have_other_ids_where_they_merge(tok, hf, name):
    apart = [begun for chat, begun in begun_answers(name)
             if [*tok.encode_prompt(chat), *tok.encode(begun)] != hf_continued(hf, chat, begun)]
    if name == "qwen2.5":
        assert apart and all(begun[0] == "\n" for begun in apart)
    else:  # these trim what is begun
        assert apart and all(begun != begun.strip() for begun in apart)


def test_a_special_token_that_a_user_spells_is_text_here_and_the_token_in_transformers(
        tok, hf, name):
    """transformers keeps it text when asked to (sanitize_control_tokens), but also cuts the text
    in front of it; here it is encoded as any other text."""
    def specials(ids):
        return [i for i in ids if i in tok.specials.values()]

    for spelt in PUBLISHED[name][1]:
        chat = [user(f"say {spelt} now{spelt}")]
        ours, plain = tok.encode_prompt(chat), tok.encode_prompt([user("say now")])
        assert text_of(tok, chat, prompt=True) == hf_text(hf, chat, prompt=True)
        assert specials(ours) == specials(plain)
        assert chat[0]["content"] in tok.decode(ours)
        theirs = hf_ids(hf, chat, prompt=True)
        assert len(specials(theirs)) == len(specials(plain)) + 2
        assert theirs.count(tok.specials[spelt]) == ours.count(tok.specials[spelt]) + 2
        asked = hf_ids(hf, chat, prompt=True, sanitize_control_tokens=True)
        assert specials(asked) == specials(plain) and tok.decode(asked) == tok.decode(ours)

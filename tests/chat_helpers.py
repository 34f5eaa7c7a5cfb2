"""Tokenizer folders as their publishers lay them out, for test_tokenizer.py and test_chat.py.

Llama-2: sentencepiece. Qwen2.5: tokenizer.json, made from vocab.json and merges.txt. Llama-3.1: its
template over a small byte-level BPE that adds a BOS by itself when asked, as the real one does.
"""

import re

import pytest
from helpers import SHARED, edit_json

from model import UserError

# The template that Llama-2-chat's tokenizer_config.json carries, without its system block.
LLAMA2_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# Each folder's special tokens that a chat may hold, and the one that ends a turn.
SPECIALS = {
    "llama2": {1: "<s>", 2: "</s>"},
    "qwen2.5": {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"},
    "llama3.1": dict(enumerate(LLAMA3_SPECIALS)),
}
EOT = {"llama2": 2, "qwen2.5": 151645, "llama3.1": 3}
BOS = {"llama2": 1, "qwen2.5": None, "llama3.1": 0}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def unfinished(text):
    """An assistant's turn that is only the beginning of one."""
    return {**assistant(text), "unfinished": True}


def need_public_tokenizers():
    if not SHARED.exists():
        pytest.skip("needs the public tokenizers in ../shared/data")


def make_llama2(folder):
    need_public_tokenizers()
    source = SHARED / "tokenizers" / "llama2" / "tokenizer.model"
    (folder / "tokenizer.model").write_bytes(source.read_bytes())
    edit_json(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", bos_token="<s>",
              eos_token="</s>", add_bos_token=True, chat_template=LLAMA2_TEMPLATE)


def make_qwen(folder):
    import transformers

    source = SHARED / "tokenizers" / "qwen2.5"
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    edit_json(folder / "generation_config.json", eos_token_id=[151645, 151643])


def make_llama31(folder):
    import tokenizers

    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.train_from_iterator([LLAMA2_TEMPLATE] * 2, tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=LLAMA3_SPECIALS, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    # The trap of the double BOS: this tokenizer adds one to whatever is encoded with specials on.
    tok.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    tok.save(str(folder / "tokenizer.json"))
    template = SHARED / "templates" / "meta-llama-Llama-3.1-8B-Instruct.jinja"
    edit_json(folder / "tokenizer_config.json", bos_token="<|begin_of_text|>",
              eos_token="<|eot_id|>", tokenizer_class="PreTrainedTokenizerFast",
              chat_template=template.read_text(encoding="utf-8"))


MAKERS = {"llama2": make_llama2, "qwen2.5": make_qwen, "llama3.1": make_llama31}
TWO_TURNS = [user("hi there"), assistant("Sure thing"), user("more"), assistant("No.")]
TEXTS = [
    "plain words, and 1234567 digits", "  two spaces before", "trailing space ", "\n\nnewlines\n",
    "\ttab", "naïve café Zürich", "日本語のテキスト", "emoji 🙂👩‍👩‍👧 🇩🇪", "العربية", "a\u0000b",
    "\u200bzero width", "\U0001f9ff\U00010348 beyond the plane", "{{ jinja }} {% raw %}", "",
]


def shown(tok, name, ids):
    """The text of each id, special tokens spelt out."""
    return [SPECIALS[name].get(i) or tok.decode([i]) for i in ids]


def check_refused(act, *words):
    """act() must raise a UserError, in one line that holds every one of the words."""
    with pytest.raises(UserError) as error:
        act()
    # pytest names tmp_path after the test, and so after the fault: that does not count as naming it
    message = re.sub(r"\S*/test_[^/\s]*", "", str(error.value))
    assert "\n" not in message
    for word in words:
        assert word.lower() in message.lower(), f"{word!r} is not in: {message}"


def make_bpe(folder, template, specials=("<|im_start|>", "<|im_end|>"), plain=(), **config):
    """A small byte-level BPE with special tokens and, behind them, added tokens that are not."""
    import tokenizers
    from tokenizers import AddedToken, pre_tokenizers

    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.train_from_iterator(
        ["user\nassistant\nsystem\n A pear. A plum. Name a fruit. Another?\n\n"] * 3,
        tokenizers.trainers.BpeTrainer(
            vocab_size=320, special_tokens=list(specials), show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.add_tokens([AddedToken(text, normalized=False) for text in plain])
    tok.save(str(folder / "tokenizer.json"))
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast",
              chat_template=template, **config)
    return folder


def spelt(tok, ids):
    """The text of ids, special tokens included."""
    return tok.backend.tok.decode(list(ids), skip_special_tokens=False)

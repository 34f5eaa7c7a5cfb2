"""Which ids a Hugging Face folder gives to a text: tokenizer.json, or sentencepiece's model.

Beside its pieces a folder has added tokens: texts that become one id wherever they stand. Each has
flags: special (left out of decoded text), lstrip and rstrip (it swallows the white space before it
and behind it), single_word (not next to a letter) and normalized (looked for after normalising).
These files declare them, in the way that transformers reads them:

    tokenizer.json              added_tokens
    tokenizer_config.json       added_tokens_decoder, whose flags win; *_token;
                                extra_special_tokens, in older files additional_special_tokens;
                                model_specific_special_tokens
    added_tokens.json, special_tokens_map.json     only where there is no added_tokens_decoder

Where a space is put before a text, and whether also behind an added token:

    tokenizer.model             as sentencepiece has it, our choice; with "legacy": false not behind
    tokenizer.json              as its normalizer and pre_tokenizer have it, except for two classes
                                whose parts transformers 5 builds itself:
      of LlamaTokenizer         as "legacy" and add_prefix_space say
      of GemmaTokenizer         none is put

One difference from transformers 5 is meant: it takes vocabulary and merges alone of a
tokenizer.json, and normalizer and pre_tokenizer from code, also where tokenizer_class is another
one, for example Qwen2Tokenizer, GPT2Tokenizer or CodeLlamaTokenizer. Here the file's own count,
since the model was trained with them. It shows only where a file is not of its class's kind.

What is not followed is refused by its name.
"""

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import AddedToken

from model import (
    BOOL,
    OBJECT,
    TEXT,
    Kind,
    UserError,
    are_all,
    check_kinds,
    is_text,
    is_whole,
    read_config_json,
    read_json,
)

# The tokens that a tokenizer_config.json names, in the order in which transformers adds them.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
         "mask_token")
SPACES = r"[^\S\x1c-\x1f]*"  # white space as `tokenizers` counts it: not four control characters


FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


# what the files may hold


def is_token(value) -> bool:
    """Whether it names a token: its text, or an object with its content and its flags."""
    if not isinstance(value, dict):
        return is_text(value)
    content = value.get("content")
    flags = [value[flag] for flag in FLAGS if flag in value]
    return is_text(content) and content != "" and all(isinstance(flag, bool) for flag in flags)


def are_tokens(value) -> bool:
    """Whether it is a list of tokens, or an object of them by name; a name may have none."""
    if isinstance(value, dict):
        return all(token is None or is_token(token) for token in value.values())
    return are_all(is_token, value)


def is_template(value) -> bool:
    """Whether it is a chat template, or several: a list of them with names, or an object."""
    if isinstance(value, dict):
        return all(map(is_text, value.values()))
    if isinstance(value, list):
        return all(isinstance(t, dict) and is_text(t.get("name")) and is_text(t.get("template"))
                   for t in value)
    return is_text(value)


TOKEN = Kind("a text or an object with its content", is_token)
TOKENS = Kind("a list of texts, or of objects with their content", are_tokens)
TOKEN_LIST = Kind(TOKENS.words, lambda v: are_all(is_token, v))
TOKENS_BY_NAME = Kind("an object of tokens by name",
                      lambda v: isinstance(v, dict) and are_tokens(v))
LIST = Kind("a list", lambda v: isinstance(v, list))
# The keys of tokenizer_config.json and special_tokens_map.json that are read.
CONFIG_KINDS = {
    **dict.fromkeys(NAMED, TOKEN),
    "additional_special_tokens": TOKEN_LIST,
    "extra_special_tokens": TOKENS,
    "model_specific_special_tokens": TOKENS_BY_NAME,
    "added_tokens_decoder": OBJECT,
    "chat_template": Kind("a text, or texts by name", is_template),
    "tokenizer_class": TEXT,
    "legacy": BOOL,
    "add_bos_token": BOOL,
    "add_prefix_space": BOOL,
}
# Those of tokenizer.json; what stands inside them, the library `tokenizers` checks.
SPEC_KINDS = {
    "model": OBJECT, "normalizer": OBJECT, "pre_tokenizer": OBJECT, "post_processor": OBJECT,
    "decoder": OBJECT, "truncation": OBJECT, "padding": OBJECT, "added_tokens": LIST,
}


# what the folder declares


@dataclass(frozen=True)
class Declared:
    """An added token that a file beside the vocabulary declares."""

    token: AddedToken
    id: int | None = None  # as the file states it; None where it states none
    flags_win: bool = False  # over those that tokenizer.json gives the same token
    where: str = ""  # the file that states the id


def read_config(dir) -> dict:
    """tokenizer_config.json, with the names of special_tokens_map.json where those count.

    Raises UserError for a setting that is not followed here.
    """
    dir = Path(dir)
    path = dir / "tokenizer_config.json"
    config = read_named(path)
    names = dir / "special_tokens_map.json"
    if names.exists() and config.get("added_tokens_decoder") is None:
        beside = read_named(names)
        check_same_more(path, config, names, beside)
        config = config | beside
    for key in ("split_special_tokens", "fix_mistral_regex", "auto_map", "sp_model_kwargs"):
        if config.get(key):
            raise UserError(f"{path} has {key} {json.dumps(config[key])}, which changes ids in a "
                            "way that is not followed here; remove it, or use a tokenizer without.")
    return config


def read_named(path: Path) -> dict:
    """A file that names tokens; UserError where a key that is read holds nonsense."""
    config = read_json(path)
    # A folder may name tokens of its own, which its template then knows by these names.
    own = {key: TOKEN for key, value in config.items()
           if key.endswith("_token") and isinstance(value, dict)}
    check_kinds(path, config, CONFIG_KINDS | own)
    return config


def check_same_more(path: Path, config: dict, other: Path, beside: dict) -> None:
    """UserError where both files declare more tokens than those of NAMED, and not the same ones."""
    first = more_tokens(config)
    second = more_tokens(beside)
    if first and second and first != second:
        raise UserError(f"{path} adds the tokens {[token['content'] for token in first]} and "
                        f"{other} {[token['content'] for token in second]}, expected the same "
                        "with the same flags; delete those of one file.")


def more_tokens(config: dict) -> list[dict]:
    """The tokens that a config declares besides those of NAMED, each with all its flags."""
    more = {key: value for key, value in config.items() if key not in NAMED}
    return [special_token(entry).__getstate__() for entry in all_entries(more)]


def named_tokens(config: dict) -> dict[str, str]:
    """The tokens that a config names, {"bos_token": "<s>", ...}: what a template may call them."""
    return {key: special_token(entry).content for key, entry in named_entries(config).items()}


def named_entries(config: dict) -> dict[str, str | dict]:
    """The same, each as the config has it: its text, or an object with its flags."""
    named = {}
    for key in [*NAMED, *(key for key in config if key.endswith("_token"))]:
        entry = config.get(key)
        if entry and isinstance(entry, (str, dict)):
            named[key] = entry
    by_name = config.get("extra_special_tokens")
    if not isinstance(by_name, dict):  # a list, whose tokens have no names
        by_name = {}
    # transformers writes them a second time under this key, and reads it only without the others.
    if not by_name and named.keys() <= set(NAMED):
        by_name = config.get("model_specific_special_tokens") or {}
    for key, entry in by_name.items():
        if entry:
            named[key] = entry
        else:
            named.pop(key, None)
    return named


def all_entries(config: dict) -> list[str | dict]:
    """The tokens that a config names, and behind them those that it lists without a name."""
    extra = config.get("extra_special_tokens")
    if not extra or isinstance(extra, dict):  # a dict's are among the named ones
        extra = config.get("additional_special_tokens") or []
    return [*named_entries(config).values(), *extra]


def declared_tokens(dir: Path, config: dict) -> list[Declared]:
    """The added tokens that files beside the vocabulary declare, in the order of their ids."""
    named = [special_token(entry) for entry in all_entries(config)]
    declared = []
    if config.get("added_tokens_decoder") is not None:
        declared = tokens_by_id(dir / "tokenizer_config.json", config["added_tokens_decoder"])
    elif (dir / "added_tokens.json").exists():
        declared = tokens_by_text(dir / "added_tokens.json", {t.content for t in named})
    known = {d.token.content for d in declared}
    for token in named:
        if token.content not in known:
            declared.append(Declared(token))
            known.add(token.content)
    return declared


def tokens_by_id(path: Path, entries: dict) -> list[Declared]:
    """The tokens of an added_tokens_decoder, {"32000": {"content": "<|user|>", ...}}."""
    declared = []
    try:
        for i, flags in entries.items():
            if not is_token(flags):
                raise ValueError(f"{i} has no text, or a flag that is not true or false")
            declared.append(Declared(AddedToken(**flags), int(i), flags_win=True,
                                     where=f"the added_tokens_decoder of {path}"))
        return sorted(declared, key=lambda d: d.id)
    except (AttributeError, TypeError, ValueError) as e:
        raise UserError(f"the added_tokens_decoder of {path} cannot be read ({e}); fetch it "
                        "again.") from None


def tokens_by_text(path: Path, specials: set[str]) -> list[Declared]:
    """The tokens of an added_tokens.json, {"<|user|>": 32000}."""
    declared = []
    for text, i in read_json(path).items():
        if not is_whole(i, 0):
            raise UserError(f"{path} has the id {i} for the token {text!r}, expected a whole "
                            "number; fetch it again.")
        token = AddedToken(text, special=text in specials)
        declared.append(Declared(token, i, where=str(path)))
    return sorted(declared, key=lambda d: d.id)


def special_token(entry: str | dict) -> AddedToken:
    """A special token that is written as its text alone, or as an object with its flags."""
    if isinstance(entry, str):
        return AddedToken(entry, special=True)
    flags = {}
    for flag in ("lstrip", "rstrip", "single_word", "normalized"):
        if flag in entry:
            flags[flag] = entry[flag]
    return AddedToken(entry["content"], special=True, **flags)


# added tokens in a text


class AddedTokens:
    """Finds added tokens in a text: the leftmost, of those the longest, then by their flags.

    Like `tokenizers`: first those that are not normalized, then the others between them.
    """

    def __init__(self, by_id: dict[int, AddedToken]):
        self.tokens = {}
        self.ids = {}
        self.swallowing = set()  # ids of tokens that take the white space behind them
        plain = []
        normalized = []
        for i, token in by_id.items():
            self.tokens[token.content] = token
            self.ids[token.content] = i
            if token.rstrip:
                self.swallowing.add(i)
            if token.normalized:
                normalized.append(token.content)
            else:
                plain.append(token.content)
        self.first = any_of(plain)
        self.then = any_of(normalized)

    def find(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, id) of each token; the white space that it swallows is its own."""
        found = []
        done = 0
        for start, end, i in self._find(self.first, text):
            found += self._between(text, done, start)
            found.append((start, end, i))
            done = end
        return found + self._between(text, done, len(text))

    def _between(self, text: str, start: int, end: int) -> list[tuple[int, int, int]]:
        return [(start + a, start + b, i) for a, b, i in self._find(self.then, text[start:end])]

    def _find(self, pattern: re.Pattern, text: str):
        done = 0
        for match in pattern.finditer(text):
            token = self.tokens[match.group()]
            start, end = match.span()
            if token.single_word and touches_a_word(text, start, end):
                continue
            if token.lstrip:
                spaces = re.search(SPACES + r"\Z", text[done:start])
                start -= len(spaces.group())
            if token.rstrip:
                end += n_spaces(text[end:])
            yield start, end, self.ids[token.content]
            done = end


def n_spaces(text: str) -> int:
    """How much white space a text begins with."""
    return re.match(SPACES, text).end()


def any_of(texts) -> re.Pattern:
    """A pattern that matches each of the texts, a longer one before a shorter one."""
    longest_first = sorted(texts, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    return re.compile(pattern or r"(?!)")  # of no texts it matches nowhere


def touches_a_word(text: str, start: int, end: int) -> bool:
    """Whether a letter, a digit or an underscore stands next to text[start:end]."""
    before = text[max(start - 1, 0):start]
    behind = text[end:end + 1]
    return re.search(r"\w", before + behind) is not None


# the two kinds of file


class JsonBackend:
    """tokenizer.json, through `tokenizers`."""

    def __init__(self, dir: Path, config: dict):
        self.path = dir / "tokenizer.json"
        self.default_names = {}  # the file itself calls no token bos_token or eos_token
        as_written = read_json(self.path)
        check_kinds(self.path, as_written, SPEC_KINDS)
        tok = self._open(as_written)  # first, so that what follows is known to be well formed
        spec = as_its_class_builds_it(dir, config, as_written)
        # Inside a text, behind other text, no space may be put before a piece.
        inner_spec = dict(spec)
        inner_spec["normalizer"] = without_prefix(spec.get("normalizer"))
        inner_spec["pre_tokenizer"] = without_prefix(spec.get("pre_tokenizer"))
        has_prefix = inner_spec != spec
        self.tok = tok if spec == as_written else self._open(spec)
        self.inner = self.tok
        self.both = [self.tok]
        if has_prefix:
            self.inner = self._open(inner_spec)
            self.both.append(self.inner)
        self._refuse_settings(spec, config, has_prefix)
        # A space may be put before the first piece of a text, or also behind each added token.
        self.prefix_behind_tokens = not is_put_once(spec.get("pre_tokenizer"))
        for declared in declared_tokens(dir, config):
            self._declare(declared)
        self.n_ids = 1 + max(self.tok.get_vocab(with_added_tokens=True).values(), default=-1)
        self.added = self.tok.get_added_tokens_decoder()
        for tok in self.both:
            # Added tokens are ours to place, see Tokenizer: here each is text where it is spelt.
            tok.add_special_tokens(list(self.tok.get_added_tokens_decoder().values()))
            tok.encode_special_tokens = True
            tok.no_truncation()
            tok.no_padding()
        self._refuse_normalized(spec.get("normalizer"))

    def _open(self, spec: dict) -> tokenizers.Tokenizer:
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as e:  # the library raises plain Exception
            raise UserError(f"{self.path} is not a tokenizer.json ({e}); fetch it again.") from None

    @property
    def specials(self) -> dict[str, int]:
        return {t.content: i for i, t in self.added.items() if t.special}

    def make_special(self, content: str) -> None:
        """Decoding leaves this token out from now on."""
        self.added[self.tok.token_to_id(content)].special = True

    def encode(self, text: str, inside: bool = False) -> list[int]:
        tok = self.inner if inside else self.tok
        return tok.encode(text, add_special_tokens=False).ids

    def decode(self, ids) -> str:
        specials = self.specials.values()
        return self.tok.decode([i for i in ids if i not in specials], skip_special_tokens=False)

    def _declare(self, declared: Declared) -> None:
        """Adds a token that a file beside tokenizer.json declares."""
        there = {token.content for token in self.tok.get_added_tokens_decoder().values()}
        if declared.flags_win or declared.token.content not in there:
            for tok in self.both:
                tok.add_tokens([declared.token])
        check_id(self.path, declared, self.tok.token_to_id(declared.token.content))

    def _refuse_settings(self, spec: dict, config: dict, has_prefix: bool) -> None:
        wanted = config.get("add_prefix_space")
        if wanted is not None and wanted != has_prefix:
            raise UserError(f"{self.path.parent / 'tokenizer_config.json'} has add_prefix_space "
                            f"{json.dumps(wanted)}, but {self.path.name} says otherwise; make the "
                            "two agree.")
        dropout = spec["model"].get("dropout")
        if dropout:
            raise UserError(f"{self.path} has a dropout of {dropout}, so its ids are random; set "
                            "it to null.")

    def _refuse_normalized(self, normalizer: dict | None) -> None:
        """UserError where a token may stand elsewhere in the normalised text than in the text.

        The two are the same if the normalizer leaves the token as it is, makes no other text like
        it, and keeps the white space and the letters that its flags ask about.
        """
        if normalizer is None:
            return
        for token in self.added.values():
            if not token.normalized:
                continue
            changed = self.tok.normalizer.normalize_str(token.content)
            looks_around = token.lstrip or token.rstrip or token.single_word
            for part in parts_of(normalizer):
                is_kept = changed == token.content and leaves_alone(part, token.content)
                if is_kept and not (looks_around and part["type"] == "Replace"):
                    continue
                raise UserError(f"{self.path.parent} has the added token {token.content!r} with "
                                f"normalized true and a normalizer ({part['type']}) that writes it "
                                f"{changed!r}, or other texts like it, or changes what stands "
                                "beside it; set normalized to false.")


def as_its_class_builds_it(dir: Path, config: dict, spec: dict) -> dict:
    """A tokenizer.json as the folder's tokenizer_class has it in transformers 5.

    The classes that were made from sentencepiece take the vocabulary and the merges of the file,
    and build normalizer and pre-tokenizer themselves, whatever the file says of them.
    """
    name = class_in_use(dir, config, spec)
    if name not in ("LlamaTokenizer", "GemmaTokenizer"):
        return spec
    kind = spec["model"].get("type", "BPE")
    if kind != "BPE":
        raise UserError(f"{dir / 'tokenizer.json'} has a {kind} model, expected BPE for the "
                        f"tokenizer_class {name}; name its own class in tokenizer_config.json.")
    spec = dict(spec)
    spec["model"] = spec["model"] | {"fuse_unk": True, "byte_fallback": True,
                                     "ignore_merges": False}
    if name == "GemmaTokenizer":  # it puts no space before a text
        spec["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        spec["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "},
                                 "behavior": "MergedWithPrevious", "invert": False}
        return spec
    if config.get("add_prefix_space") is False:
        scheme = "never"
    elif config.get("legacy"):
        scheme = "always"  # at the start and behind each added token
    else:
        scheme = "first"
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581",
                             "prepend_scheme": scheme, "split": False}
    return spec


def class_in_use(dir: Path, config: dict, spec: dict) -> str | None:
    """The tokenizer_class that transformers uses for a tokenizer.json; None: the file alone says.

    It does not believe the name everywhere: a byte-level file is no LlamaTokenizer's, and the
    folders of two kinds of model are known to name a wrong class.
    """
    model_config = {}
    if (dir / "config.json").exists():
        model_config = read_config_json(dir)
    if model_config.get("model_type") in ("mistral", "qwen2"):
        return None
    name = config.get("tokenizer_class") or model_config.get("tokenizer_class") or ""
    name = name.removesuffix("Fast")
    if name == "LlamaTokenizer" and is_byte_level(spec):
        return None
    return name


def is_byte_level(spec: dict) -> bool:
    """Whether some part of a tokenizer.json writes bytes as letters, as GPT-2 began to do."""
    parts = [spec.get(key) for key in ("pre_tokenizer", "post_processor", "decoder")]
    return '"ByteLevel"' in json.dumps(parts)


def parts_of(normalizer: dict) -> list[dict]:
    """A normalizer's parts, in order: itself, or those of a Sequence."""
    if "normalizers" not in normalizer:
        return [normalizer]
    parts = []
    for inner in normalizer["normalizers"]:
        parts += parts_of(inner)
    return parts


def leaves_alone(part: dict, content: str) -> bool:
    """Whether a part of a normalizer surely makes no other text into this one.

    NFC joins letters and their accents, and Replace writes what it is told to.
    """
    if part["type"] == "NFC":
        return unicodedata.normalize("NFD", content) == content
    if part["type"] == "Replace":
        written = part["content"]
        return written != "" and set(written).isdisjoint(content)
    return False


def is_put_once(part: dict | None) -> bool:
    """Whether a pre-tokenizer puts its space before a text alone, and not behind added tokens."""
    if part is None:
        return False
    parts = part.get("pretokenizers", [])
    return part.get("prepend_scheme") == "first" or any(map(is_put_once, parts))


def check_id(path: Path, declared: Declared, found: int) -> None:
    """UserError where a token's id is not the one that a file beside the vocabulary states."""
    if declared.id not in (None, found):
        raise UserError(f"{declared.where} gives the token {declared.token.content!r} the id "
                        f"{declared.id}, but by {path.name} it is {found}; fetch the folder again.")


def without_prefix(part: dict | None) -> dict | None:
    """A part of tokenizer.json without the space that it may put before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    part = dict(part)
    if "prepend_scheme" in part:
        part["prepend_scheme"] = "never"
    if "add_prefix_space" in part:
        part["add_prefix_space"] = False
    for key in ("normalizers", "pretokenizers"):  # the parts of a Sequence
        if key in part:
            inner = [without_prefix(p) for p in part[key]]
            part[key] = [p for p in inner if p is not None]
    return part


class SentencePieceBackend:
    """tokenizer.model, through `sentencepiece`; control pieces (<s>) are special tokens."""

    def __init__(self, dir: Path, config: dict):
        path = dir / "tokenizer.model"
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as e:
            raise UserError(f"{path} is not a sentencepiece model ({e}); fetch it again.") from None
        self.n_ids = self.sp.vocab_size()
        self.added = {}
        for i in range(self.n_ids):
            if self.sp.is_control(i):
                self.added[i] = AddedToken(self.sp.id_to_piece(i), special=True)
        for declared in declared_tokens(dir, config):
            self._declare(path, declared)
        self.spelt = self._spelt_by_the_model()
        own = {"bos_token": self.sp.bos_id(), "eos_token": self.sp.eos_id(),
               "unk_token": self.sp.unk_id()}
        self.default_names = {key: self.sp.id_to_piece(i) for key, i in own.items()
                              if i >= 0 and key not in config}  # null in the config: it has none
        self.newline = self.sp.encode("\n")  # a byte piece, which merges with nothing
        self.puts_prefix = config.get("add_prefix_space") is not False
        # legacy false: a space is put before a text, but not behind an added token.
        self.prefix_behind_tokens = self.puts_prefix and config.get("legacy") is not False

    @property
    def specials(self) -> dict[str, int]:
        return {t.content: i for i, t in self.added.items() if t.special}

    def make_special(self, content: str) -> None:
        """Where a user spells this token it is text from now on, and decoding leaves it out."""
        for token in self.added.values():
            if token.content == content:
                token.special = True
        self.spelt = self._spelt_by_the_model()

    def _spelt_by_the_model(self) -> re.Pattern:
        """The special tokens that the model would make of their spelling; it must stay text."""
        return any_of(t for t, i in self.specials.items() if i in self.sp.encode(t))

    def encode(self, text: str, inside: bool = False) -> list[int]:
        ids = []
        done = 0
        for match in self.spelt.finditer(text):  # cut inside, so that the model does not see it
            ids += self._encode(text[done:match.start() + 1], inside or done > 0)
            done = match.start() + 1
        return ids + self._encode(text[done:], inside or done > 0)

    def _encode(self, text: str, inside: bool) -> list[int]:
        if inside or not self.puts_prefix:  # behind a newline the text gets no space of its own
            return self.sp.encode("\n" + text)[len(self.newline):]
        return self.sp.encode(text)

    def decode(self, ids) -> str:
        text = ""
        run = []  # pieces of the model that are not yet decoded
        for i in ids:
            token = self.added.get(i)
            if token is None:
                run.append(i)
            elif not token.special:
                text += self._decode(run, behind=text) + token.content
                run = []
        return text + self._decode(run, behind=text)

    def _decode(self, ids, behind: str) -> str:
        if behind:  # behind a newline no space is taken from the text
            return self.sp.decode(self.newline + ids)[1:]
        return self.sp.decode(ids)

    def _declare(self, path: Path, declared: Declared) -> None:
        content = declared.token.content
        found = self.sp.piece_to_id(content)
        if self.sp.id_to_piece(found) != content:  # the model does not have it
            found = self.n_ids
            self.n_ids += 1
        check_id(path, declared, found)
        self.added[found] = declared.token


def open_backend(dir) -> JsonBackend | SentencePieceBackend:
    """What turns text into ids in a Hugging Face folder; UserError where there is none."""
    dir = Path(dir)
    has_config = (dir / "tokenizer_config.json").exists()
    config = read_config(dir) if has_config else {}
    if (dir / "tokenizer.json").exists():
        return JsonBackend(dir, config)
    if (dir / "tokenizer.model").exists():
        return SentencePieceBackend(dir, config)
    raise UserError(f"{dir} has neither tokenizer.json nor tokenizer.model; name a folder with a "
                    "tokenizer.")

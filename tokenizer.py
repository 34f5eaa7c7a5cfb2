"""Text <-> ids for Hugging Face folders: tokenizer.json, or sentencepiece's tokenizer.model.

A conversation is written by the checkpoint's own chat template, rendered as transformers does it
(jinja2's sandbox), and tokenised piece by piece:

    ids        prompt | answer | end of turn | prompt | answer | end of turn | ...
    supervised   no       yes       yes          no       yes       yes

Prompt and answer are encoded apart, so the mask is exact even where a BPE would merge across their
border, and the end of the turn is always supervised: a model that never sees it never stops.

Text that a user wrote is text: "<|eot_id|>" in a message becomes characters, not the token. A mark
inside each such spelling hides it from the search for the template's own special tokens.
"""

import json
import re
from pathlib import Path

import sentencepiece
import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model import UserError, read_json

DATE = "26 Jul 2024"  # Llama 3's templates print it where they are given none
HIDE = "\ue000"  # a private-use character; where a user's text has one, it is written twice


class JsonBackend:
    """tokenizer.json, through `tokenizers`."""

    def __init__(self, path: Path):
        spec = read_json(path)
        # Inside a text, behind other text, no space may be put before a piece.
        inner_spec = dict(spec)
        inner_spec["normalizer"] = without_prefix(spec.get("normalizer"))
        inner_spec["pre_tokenizer"] = without_prefix(spec.get("pre_tokenizer"))
        try:
            self.tok = tokenizers.Tokenizer.from_str(json.dumps(spec))
            self.inner = self.tok
            if inner_spec != spec:
                self.inner = tokenizers.Tokenizer.from_str(json.dumps(inner_spec))
        except Exception as e:  # the library raises plain Exception
            raise UserError(f"{path} is not a tokenizer.json ({e}); fetch it again.") from None
        for tok in (self.tok, self.inner):
            tok.encode_special_tokens = True  # special tokens are ours to place, see Tokenizer
        self.n_ids = 1 + max(self.tok.get_vocab(with_added_tokens=True).values())
        added = self.tok.get_added_tokens_decoder()
        self.specials = {t.content: i for i, t in added.items() if t.special}

    def encode(self, text: str, inside: bool = False) -> list[int]:
        tok = self.inner if inside else self.tok
        return tok.encode(text, add_special_tokens=False).ids

    def decode(self, ids) -> str:
        return self.tok.decode(list(ids), skip_special_tokens=True)


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
    """tokenizer.model, through `sentencepiece`; control pieces (<s>) are the special tokens."""

    def __init__(self, path: Path):
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as e:
            raise UserError(f"{path} is not a sentencepiece model ({e}); fetch it again.") from None
        self.n_ids = self.sp.vocab_size()
        self.specials = {self.sp.id_to_piece(i): i for i in range(self.n_ids)
                         if self.sp.is_control(i)}
        self.newline = self.sp.encode("\n")  # a byte piece, which merges with nothing

    def encode(self, text: str, inside: bool = False) -> list[int]:
        if inside:  # behind a newline the text gets no space of its own
            return self.sp.encode("\n" + text)[len(self.newline):]
        return self.sp.encode(text)

    def decode(self, ids) -> str:
        return self.sp.decode([i for i in ids if not self.sp.is_control(i)])


def open_backend(dir) -> JsonBackend | SentencePieceBackend:
    """What turns text into ids in a Hugging Face folder; UserError where there is none."""
    dir = Path(dir)
    if (dir / "tokenizer.json").exists():
        return JsonBackend(dir / "tokenizer.json")
    if (dir / "tokenizer.model").exists():
        return SentencePieceBackend(dir / "tokenizer.model")
    raise UserError(f"{dir} has neither tokenizer.json nor tokenizer.model; name a folder with a "
                    "tokenizer.")


class Tokenizer:
    """The tokenizer and chat template of a Hugging Face folder.

    bos_id, n_ids (ids that exist), stop_ids (any of them ends a reply), specials {text: id}.
    """

    def __init__(self, dir, date: str = DATE):
        """date: what a template prints as today's, so that no run depends on the day it is made."""
        self.dir = Path(dir)
        self.backend = open_backend(dir)
        self.config = read_json(self.dir / "tokenizer_config.json")
        self.specials = self.backend.specials
        self.n_ids = self.backend.n_ids
        longest_first = sorted(self.specials, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first))
        if not pattern:
            pattern = r"(?!)"  # no special tokens: it matches nowhere
        self.special_re = re.compile(pattern)
        self.bos_id = self.specials.get(self._special("bos_token"))
        if (self.dir / "config.json").exists():
            n_rows = read_json(self.dir / "config.json").get("vocab_size", self.n_ids)
            if n_rows < self.n_ids:
                raise UserError(f"the tokenizer of {self.dir} has {self.n_ids} ids, more than the "
                                f"{n_rows} of its model; fetch the two together.")
        self.date = date
        self.template = self._compile(self._template_text())
        self.stop_ids = self._stop_ids()

    # text

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids; adds no special token and recognises none."""
        return self.backend.encode(text)

    def decode(self, ids) -> str:
        """ids -> text, special tokens left out."""
        return self.backend.decode(ids)

    # conversations: messages are [{"role": "user" | "assistant" | "system", "content": text}, ...]

    def encode_prompt(self, messages) -> list[int]:
        """ids of the conversation so far, ending where the assistant starts to write."""
        return self._ids(self._render(messages, add_generation_prompt=True))

    def encode_chat(self, messages) -> tuple[list[int], list[bool]]:
        """(ids, supervised): one bool per id, True on each answer and its end-of-turn token.

        The logit that predicts ids[i] stands at row i - 1. Raises UserError where the template does
        not end a prompt where the answer starts, or ends a turn with no special token.
        """
        ids = []
        supervised = []
        done = ""  # the rendered text that ids stand for so far
        for i, message in enumerate(messages):
            # An assistant's turn that opens the conversation answers nothing: it is context.
            if message["role"] != "assistant" or i == 0:
                continue
            prompt = self._render(messages[:i], add_generation_prompt=True)
            whole = self._render(messages[:i + 1])
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise UserError(f"the chat template of {self.dir} does not end its prompt where "
                                "the assistant starts; use a template whose text only grows.")
            end = self.special_re.search(whole, len(prompt))
            if end is None:
                raise UserError(f"the chat template of {self.dir} ends the assistant's turn with "
                                "no special token; use a template that writes one.")
            context_ids = self._ids(prompt[len(done):], first=not ids)
            ids += context_ids
            supervised += [False] * len(context_ids)
            answer_ids = self._ids(whole[len(prompt):end.end()], first=not ids)
            ids += answer_ids
            is_supervised = message.get("weight") != 0  # 0: the answer is context alone
            supervised += [is_supervised] * len(answer_ids)
            done = whole[:end.end()]
        rest = self._ids(self._render(messages)[len(done):], first=not ids)  # after the last turn
        return ids + rest, supervised + [False] * len(rest)

    def _ids(self, text: str, first: bool = True) -> list[int]:
        """Rendered text -> ids; the template's special tokens become ids, hidden ones stay text."""
        ids = []
        done = 0  # characters of the text that ids stand for so far
        fresh = first  # whether the next piece begins a text
        for match in self.special_re.finditer(text):
            ids += self._plain(text[done:match.start()], fresh)
            ids.append(self.specials[match.group()])
            done = match.end()
            fresh = True
        ids += self._plain(text[done:], fresh)
        if first and self.bos_id is not None and self.config.get("add_bos_token"):
            if ids[:1] != [self.bos_id]:  # exactly one
                ids.insert(0, self.bos_id)
        return ids

    def _plain(self, text: str, fresh: bool) -> list[int]:
        """Unhidden text -> ids. Llama 2 puts a space before a text, but not inside one."""
        text = re.sub(f"{HIDE}({HIDE}?)", r"\1", text)
        return self.backend.encode(text, inside=not fresh) if text else []

    def _render(self, messages, add_generation_prompt: bool = False) -> str:
        def hide(text):
            text = text.replace(HIDE, HIDE + HIDE)
            return self.special_re.sub(lambda m: m.group()[0] + HIDE + m.group()[1:], text)

        messages = [{**m, "content": hide(m["content"])} for m in messages]
        names = {"date_string": self.date}  # what a template may use by name
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = self._special(key)
            if token is not None:
                names[key] = token
        try:
            return self.template.render(messages=messages, tools=None, documents=None,
                                        add_generation_prompt=add_generation_prompt, **names)
        except Exception as e:  # the template is a program of the checkpoint's
            raise UserError(f"the chat template of {self.dir} refuses this conversation "
                            f"({' '.join(str(e).split())}); change its roles or order.") from None

    # what the folder says

    def _special(self, key: str) -> str | None:
        value = self.config.get(key)
        return value["content"] if isinstance(value, dict) else value

    def _template_text(self) -> str:
        file = self.dir / "chat_template.jinja"
        text = self.config.get("chat_template")
        if file.exists():
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{file} is not UTF-8; fetch the file again.") from None
        if isinstance(text, list):  # several named templates
            text = {t["name"]: t["template"] for t in text}.get("default")
        if not text:
            raise UserError(f"{self.dir} has no chat template; add a chat_template.jinja to it.")
        return text

    def _compile(self, text: str):
        def raise_exception(message):
            raise TemplateError(message)

        def strftime_now(format):
            return self.date

        def tojson(value, indent=None):  # jinja's own escapes <, > and & for HTML
            return json.dumps(value, ensure_ascii=False, indent=indent)

        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols"])
        env.filters["tojson"] = tojson
        env.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
        try:
            return env.from_string(text)
        except TemplateError as e:
            raise UserError(f"the chat template of {self.dir} is not valid jinja ({e}).") from None

    def _stop_ids(self) -> list[int]:
        """Every eos of generation_config.json and config.json, and the template's end of turn."""
        stop = set()
        for name in ("generation_config.json", "config.json"):
            if (self.dir / name).exists():
                eos = read_json(self.dir / name).get("eos_token_id")
                if eos is None:
                    eos = []
                elif not isinstance(eos, list):
                    eos = [eos]
                if not all(isinstance(i, int) for i in eos):
                    raise UserError(f"{self.dir / name} has eos_token_id {eos}, expected integers.")
                stop.update(eos)
        ids, supervised = self.encode_chat([{"role": "user", "content": "a"},
                                            {"role": "assistant", "content": "b"}])
        stop.add([i for i, s in zip(ids, supervised, strict=True) if s][-1])
        return sorted(stop)

"""Conversations <-> ids by the chat template of a Hugging Face folder.

The template is rendered as transformers does it (jinja2's sandbox), and the text tokenised piece by
piece, see vocabulary.py:

    ids        prompt | answer | end of turn | prompt | answer | end of turn | ...
    supervised   no       yes       yes          no       yes       yes

Prompt and answer are encoded apart, so the mask is exact even where a BPE would merge across their
border. The end of the turn is supervised, since a model that never sees it never stops. Behind an
answer that is marked as unfinished it is not, since the model would learn to stop too early; that
end is encoded apart as well.

Each answer is trained on behind the prompt that inference would give it. Where the text of a
conversation only grows, that is one sequence; where a template changes earlier turns once a later
one comes (a thought is kept in the last turn only), it is one sequence for each answer. Speaking
needs the prompt alone, so a template that cannot be trained with can still speak.

Text that a user wrote is text: "<|eot_id|>" in a message becomes characters, not the token. A mark
inside each such spelling hides it from the search for the template's own special tokens. A template
that leaves out or changes the text of a system or user turn, or of a trained answer, is refused.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model import IDS, UserError, check_kinds, read_config_json, read_json
from vocabulary import (
    NAMED,
    AddedTokens,
    any_of,
    n_spaces,
    named_tokens,
    open_backend,
    read_config,
)

DATE = "26 Jul 2024"  # Llama 3's templates print it where they are given none
HIDE = "\ue000"  # a private-use character; where a user's text has one, it is written twice


# Words of a conversation that is rendered to see what a template writes around them.
QUESTION = "xylophone"
ANSWER = "marimba"
CUT = "glockenspiel"  # stands behind an answer that is begun, to find where it ends


class GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}: some training templates mark answers so.

    What stands inside is rendered as if the two tags were not there: answers are found by the
    prompt in front of them and the mark behind them, in every template alike.
    """

    tags = frozenset(["generation"])

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


@dataclass(frozen=True)
class Turn:
    """What a template writes around an answer that stands last in its conversation."""

    asked: str  # what the prompt has behind the question: "[/INST]"
    lead: str  # what the finished turn has between question and answer: "[/INST] "
    opened: str  # how the prompt ends where the finished turn does not: "<think>\n"; mostly ""
    tail: str  # all that stands behind the answer
    n_end: int  # this many characters of `tail` end the turn; 0: it has no mark that does
    end_id: int | None  # the id of that mark; None where it is plain text, or not there


@dataclass(frozen=True)
class Answer:
    """One answer of a conversation, rendered: the prompt before it, and what the model writes."""

    prompt: str
    text: str  # the answer as the template writes it
    end: str  # the end of its turn, with what the template writes before it
    is_supervised: bool = True  # False: a message of weight 0, which is context alone
    is_unfinished: bool = False  # True: the text is a beginning, behind which no turn ends

    def pieces(self) -> list[tuple[str, bool]]:
        """The texts to encode one by one, and whether each is supervised."""
        if self.is_unfinished:
            return [(self.text, self.is_supervised), (self.end, False)]
        return [(self.text + self.end, self.is_supervised)]


class Tokenizer:
    """The tokenizer and chat template of a Hugging Face folder.

    bos_id, n_ids (ids that exist), stop_ids (any of them ends a reply), specials {text: id}.
    """

    def __init__(self, dir, date: str = DATE):
        """date: what a template prints as today's, so that no run depends on the day it is made."""
        self.dir = Path(dir)
        self.date = date
        self.backend = open_backend(self.dir)
        self.config = read_config(self.dir)
        self.names = self.backend.default_names | named_tokens(self.config)  # {"bos_token": "<s>"}
        self.n_ids = self.backend.n_ids
        if (self.dir / "config.json").exists():
            n_rows = read_config_json(self.dir).get("vocab_size")
            if n_rows is not None and n_rows < self.n_ids:
                raise UserError(f"the tokenizer of {self.dir} has {self.n_ids} ids, more than the "
                                f"{n_rows} of its model; fetch the two together.")
        self._find_specials(self.names.get(key) for key in NAMED)
        self.bos_id = self.specials.get(self.names.get("bos_token"))
        self.template = self._compile(self._template_text())
        self.turn = self._look_at_a_turn()
        self.stop_ids = self._stop_ids()

    # text

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids; adds no special token and recognises none."""
        ids, _ = self._pieces(self._hide(text), "start")
        return ids

    def decode(self, ids) -> str:
        """ids -> text, special tokens left out."""
        return self.backend.decode(ids)

    # conversations: messages are [{"role": "user" | "assistant" | "system", "content": text}, ...]
    # An assistant's may have "weight": 0, then it is context, and "unfinished": True.

    def encode_prompt(self, messages, begun: str = "") -> list[int]:
        """ids of the conversation so far, ending where the assistant starts to write.

        With `begun` it has written that text already, and the ids end behind it: those of
        transformers with continue_final_message. Prompt and `begun` are encoded as one text, so a
        token may reach across their border, and a space at the end is a token of its own, unless
        the template trims answers. Raises UserError where the template does not say where `begun`
        stands.
        """
        text = self._begun(messages, begun) if begun else self._prompt(messages)
        ids, _ = self._ids(text, "start")
        return ids

    def decode_begun(self, prompt, ids, begun: str) -> tuple[str, str]:
        """(the whole answer, what was written of it) of the reply `ids` to an encode_prompt.

        prompt: what encode_prompt made with `begun`. Read alone, a reply would lose the space in
        front of it where the tokenizer is made from sentencepiece.
        """
        before = self.decode(prompt)
        written = self.decode([*prompt, *ids])[len(before):]
        # A template that trims answers has trimmed `begun` as well.
        kept = begun if before.endswith(begun) else begun.strip()
        return kept + written, written

    def encode_chat(self, messages) -> tuple[list[int], list[bool]]:
        """(ids, supervised): one bool per id, True on each answer and its end-of-turn token.

        Of an unfinished answer the end of turn is not supervised. The logit that predicts ids[i]
        stands at row i - 1. Raises UserError where no one sequence has before each answer the
        prompt that inference gives it; encode_answers then has several.
        """
        answers = self._answers(messages)
        contexts = contexts_between(answers, self._render(messages))
        if contexts is None:
            raise UserError(f"the chat template of {self.dir} changes what stands before an answer "
                            "once the turn is finished or a later one comes; train with one "
                            "sequence for each answer.")
        return self._join(contexts, answers)

    def encode_answers(self, messages) -> list[tuple[list[int], list[bool]]]:
        """What to train on: encode_chat's one sequence, or else one sequence for each answer.

        Either way each answer stands behind the prompt that inference gives it. Raises UserError
        where an answer's place, or the end of its turn, cannot be found.
        """
        answers = self._answers(messages)
        contexts = contexts_between(answers, self._render(messages))
        if contexts is not None:
            return [self._join(contexts, answers)]
        trained = [answer for answer in answers if answer.is_supervised]
        return [self._join([answer.prompt, ""], [answer]) for answer in trained]

    def _join(self, contexts: list[str], answers: list[Answer]) -> tuple[list[int], list[bool]]:
        """Context, answer, context, answer, ..., and the context behind the last answer."""
        ids = []
        supervised = []
        place = "start"
        for i, context in enumerate(contexts):
            context_ids, place = self._ids(context, place)
            ids += context_ids
            supervised += [False] * len(context_ids)
            if i < len(answers):
                for text, is_supervised in answers[i].pieces():
                    text_ids, place = self._ids(text, place)
                    ids += text_ids
                    supervised += [is_supervised] * len(text_ids)
        return ids, supervised

    # answers

    def _answers(self, messages) -> list[Answer]:
        """Every answer of a conversation, rendered as inference would have it: no later turns."""
        answers = []
        for i in answer_places(messages):
            answers.append(self._answer(messages[:i], messages[i]))
        return answers

    def _answer(self, context, message) -> Answer:
        prompt = self._prompt(context)
        finished = self._render([*context, message])
        start = self._start_of_answer(context, prompt, finished)
        if start is None:
            text = self._behind_opened(prompt, finished, message["content"])
            end = self.turn.tail[:self.turn.n_end]
        else:
            text, end = self._text_and_end(finished[start:])
        is_supervised = message.get("weight") != 0
        if is_supervised:
            self._check_kept([message], prompt + text + end)
        return Answer(prompt, text, end, is_supervised, bool(message.get("unfinished")))

    def _start_of_answer(self, context, prompt: str, finished: str) -> int | None:
        """Where in the finished text begins what the model writes; None where that is not known.

        It is the end of the prompt, if the text only grows. Mistral v0.3's template changes it
        before the question: a system text stands in the last user turn, until an answer follows.

            prompt      [INST] Be brief.\\n\\nName a fruit.[/INST]
            finished    [INST] Name a fruit.[/INST] A pear.</s>

        Behind the question both go on alike, and the model writes what stands behind "[/INST]".
        """
        if finished.startswith(prompt):
            return len(prompt)
        asked = self.turn.asked
        lead = self.turn.lead
        short = {"role": "assistant", "content": ANSWER}
        before, _, _ = self._render([*context, short]).rpartition(ANSWER)
        go_on_alike = (lead.startswith(asked) and prompt.endswith(asked)
                       and before.endswith(lead) and finished.startswith(before))
        if not before or not go_on_alike:
            return None
        return len(before) - len(lead) + len(asked)

    def _text_and_end(self, written: str) -> tuple[str, str]:
        """The answer and the end of its turn, in the text that stands behind a prompt."""
        tail = self.turn.tail
        if self.turn.n_end and written.endswith(tail):
            return written[:len(written) - len(tail)], tail[:self.turn.n_end]
        special = self._first_special(written)
        if special is None:
            raise UserError(f"the chat template of {self.dir} ends the assistant's turn with no "
                            f"special token and no text of its own (found {written[-20:]!r}), so "
                            "a model would not learn to stop; use a template that writes one.")
        start, end, _ = special
        return written[:start], written[start:end]

    def _behind_opened(self, prompt: str, finished: str, content: str) -> str:
        """The answer behind a prompt that does not begin the finished turn, without its end.

        Such a prompt opens a thought, "<think>", that finished turns leave out. The answer's place
        is found where the row has the thought: behind the prompt stand then the rest of the
        thought, its closing tag, and the answer as the finished turn has it. Behind a prompt that
        also closes the thought, "<think></think>", stands the answer alone.

            prompt      ...assistant\\n<think>\\n
            finished    ...assistant\\nA pear.<|im_end|>\\n
            content     So?</think>\\n\\nA pear.
            result      So?</think>\\n\\nA pear.<|im_end|>
        """
        opened = self.turn.opened
        header = prompt.removesuffix(opened)
        tail = self.turn.tail
        closing = closing_tag(opened)
        is_found = prompt != header and finished.startswith(header) and finished.endswith(tail)
        if closing is None or not is_found or not self.turn.n_end:
            raise UserError(f"the chat template of {self.dir} does not end its prompt where the "
                            f"assistant starts (found {prompt[-20:]!r}), so the answer's place is "
                            "unknown; use a template whose text only grows.")
        kept = finished[len(header):len(finished) - len(tail)]
        if opened.rstrip().endswith(closing):
            return kept
        thought, tag, shown = self._hide(content).rpartition(closing)
        if not tag or shown.strip() != kept.strip():
            raise UserError(f"the chat template of {self.dir} opens every answer with "
                            f"{opened.strip()!r}, and this answer holds no thought that "
                            f"{closing!r} closes; write it into the answer, or use a template "
                            "whose prompt does not open one.")
        if thought.lstrip().startswith(opened.strip()):  # the prompt has it already
            thought = thought.lstrip().removeprefix(opened.rstrip())
            thought = thought.removeprefix(opened[len(opened.rstrip()):])
        gap = shown[:len(shown) - len(shown.lstrip())]
        return thought + closing + gap + kept.lstrip()

    def _look_at_a_turn(self) -> Turn:
        """Renders a short conversation to see what the template writes around an answer.

        The added tokens between an answer and the next question, which end a turn and open one,
        become special if they are not, so that no user can write them.
        """
        user = {"role": "user", "content": QUESTION}
        answer = {"role": "assistant", "content": ANSWER}
        system = {"role": "system", "content": "-"}
        context = [user]
        try:
            prompt = self._render(context, add_generation_prompt=True)
        except UserError:  # some templates insist on a system turn
            context = [system, user]
            prompt = self._render(context, add_generation_prompt=True)
        if QUESTION not in prompt:
            raise UserError(f"the chat template of {self.dir} leaves out or changes the user's "
                            f"text (it makes {prompt[-40:]!r} of {QUESTION!r}), expected a "
                            "template for messages whose content is a text; use another one.")
        _, _, asked = prompt.rpartition(QUESTION)
        finished = self._render_or_nothing([*context, answer])
        if finished.count(ANSWER) != 1:  # a template for prompts alone
            return Turn(asked, lead="", opened="", tail="", n_end=0, end_id=None)
        before, _, tail = finished.partition(ANSWER)
        _, _, lead = before.rpartition(QUESTION)
        opened = prompt[len(os.path.commonprefix([prompt, before])):]  # noqa: RUF071, no paths
        longer = self._render_or_nothing([*context, answer, user])
        between = longer.partition(ANSWER)[2].partition(QUESTION)[0]
        self._find_specials(self._marks_in(between or tail))
        end = self._first_special(tail)
        if end is None:
            return Turn(asked, lead, opened, tail, n_end=len(tail.rstrip()), end_id=None)
        return Turn(asked, lead, opened, tail, n_end=end[1], end_id=end[2])

    # rendered text

    def _find_specials(self, more) -> None:
        """Makes the tokens of `more` special, and sees which tokens there are."""
        added = {token.content: token for token in self.backend.added.values()}
        for content in more:
            if content in added and not added[content].special:
                self.backend.make_special(content)
        self.added = AddedTokens(self.backend.added)
        self.specials = self.backend.specials
        self.special_re = any_of(self.specials)

    def _marks_in(self, text: str) -> list[str]:
        """The added tokens of a text, except those of white space."""
        found = [self.backend.added[i].content for _, _, i in self.added.find(text)]
        return [content for content in found if content.strip()]

    def _first_special(self, text: str) -> tuple[int, int, int] | None:
        """(start, end, id) of the first special token of a rendered text."""
        for start, end, i in self.added.find(text):
            if i in self.specials.values():
                return start, end, i
        return None

    def _ids(self, text: str, place: str) -> tuple[list[int], str]:
        """Rendered text -> (ids, the place where it ends), with a BOS at the start if asked for."""
        ids, end = self._pieces(text, place)
        if place == "start" and self.bos_id is not None and self.config.get("add_bos_token"):
            if ids[:1] != [self.bos_id]:  # exactly one
                ids.insert(0, self.bos_id)
        return ids, end

    def _pieces(self, text: str, place: str) -> tuple[list[int], str]:
        """Rendered text -> (ids, the place where it ends); added tokens become their ids.

        A place is "start" (nothing stands before), "token" (an added token does), "swallows" (one
        that swallows the white space behind it) or "text".
        """
        if place == "swallows":
            text = text[n_spaces(text):]
        ids = []
        done = 0  # characters of the text that ids stand for so far
        for start, end, i in self.added.find(text):
            ids += self._plain(text[done:start], place)
            ids.append(i)
            done = end
            place = "swallows" if i in self.added.swallowing else "token"
        rest = text[done:]
        if rest:
            ids += self._plain(rest, place)
            place = "text"
        return ids, place

    def _plain(self, text: str, place: str) -> list[int]:
        """Unhidden text -> ids. Llama 2 puts a space before a text, but not inside one."""
        if not text:
            return []
        text = re.sub(f"{HIDE}({HIDE}?)", r"\1", text)
        behind_token = place in ("token", "swallows")
        begins = place == "start" or (behind_token and self.backend.prefix_behind_tokens)
        return self.backend.encode(text, inside=not begins)

    def _hide(self, text: str) -> str:
        """The text with a mark inside each special token that it spells."""
        text = text.replace(HIDE, HIDE + HIDE)
        return self.special_re.sub(lambda m: m.group()[0] + HIDE + m.group()[1:], text)

    def _prompt(self, messages) -> str:
        """The text of the conversation so far; UserError where it lacks a user's or system's text.

        What the assistant said before may be shown without its thoughts.
        """
        prompt = self._render(messages, add_generation_prompt=True)
        self._check_kept([m for m in messages if m["role"] != "assistant"], prompt)
        return prompt

    def _begun(self, messages, begun: str) -> str:
        """The text of a conversation whose last turn is the assistant's and not finished.

        A finished turn is rendered, with a mark behind `begun`, and cut at the mark. The space
        behind the mark is gone where the template trims answers, and then so is the white space
        in front of the mark. UserError where that is no continuation of the prompt: a thought
        that the prompt opens and the finished turn leaves out may or may not have ended.
        """
        prompt = self._prompt(messages)
        answer = {"role": "assistant", "content": f"{begun}{CUT} "}
        finished = self._render([*messages, answer])
        text, mark, behind = finished.rpartition(CUT)
        if mark and not behind.startswith(" "):
            text = text.rstrip()
        if not text.rstrip().endswith(self._hide(begun).strip()):
            raise UserError(f"the chat template of {self.dir} leaves out or changes the beginning "
                            f"of an answer ({begun[:40]!r}), expected all of it; begin with "
                            "another text, or use a template that keeps it.")
        self._check_kept([m for m in messages if m["role"] != "assistant"], text)
        if not text.startswith(prompt):
            raise UserError(f"the chat template of {self.dir} ends its prompt in "
                            f"{prompt[-20:]!r} and leaves that out of a turn that is written, so "
                            f"what {begun[:40]!r} would begin, a thought or the answer, is "
                            "unknown; use a template whose text only grows.")
        return text

    def _check_kept(self, messages, rendered: str) -> None:
        """UserError where a message's text is not in a rendered one, white space aside."""
        shown = without_spaces(rendered)
        for message in messages:
            text = without_spaces(self._hide(message["content"]))
            if text not in shown:
                raise UserError(f"the chat template of {self.dir} leaves out or changes the "
                                f"{message['role']}'s text ({message['content'][:40]!r}), expected "
                                "all of it; take it out of the conversation, or use a template "
                                "that keeps it.")

    def _render(self, messages, add_generation_prompt: bool = False) -> str:
        hidden = [{**m, "content": self._hide(m["content"])} for m in messages]
        try:
            return self.template.render(messages=hidden, tools=None, documents=None,
                                        add_generation_prompt=add_generation_prompt,
                                        date_string=self.date, **self.names)
        except Exception as e:  # the template is a program of the checkpoint's
            roles = ", ".join(m["role"] for m in messages)
            raise UserError(f"the chat template of {self.dir} refuses this conversation "
                            f"({' '.join(str(e).split())}; found the roles {roles}); change its "
                            "roles or order.") from None

    def _render_or_nothing(self, messages) -> str:
        """The text of a conversation; "" where the template refuses it."""
        try:
            return self._render(messages)
        except UserError:
            return ""

    # what the folder says

    def _template_text(self) -> str:
        file = self.dir / "chat_template.jinja"
        text = self.config.get("chat_template")
        if file.exists():
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{file} is not UTF-8; fetch the file again.") from None
            except OSError as e:
                raise UserError(f"{file} cannot be read ({e.strerror}); fetch the file "
                                "again.") from None
        elif any((self.dir / "additional_chat_templates").glob("*.jinja")):
            raise UserError(f"{self.dir} has additional_chat_templates, but no "
                            "chat_template.jinja; copy the one to use to that name.")
        if isinstance(text, list):  # several named templates
            text = {t["name"]: t["template"] for t in text}
        if text and isinstance(text, dict):
            if "default" not in text:
                raise UserError(f"{self.dir} has the chat templates {', '.join(sorted(text))} and "
                                "none named default; write the one to use to chat_template.jinja.")
            text = text["default"]
        if not text:
            raise UserError(f"{self.dir} has no chat template, neither a chat_template.jinja nor a "
                            "chat_template in its tokenizer_config.json; add one.")
        return text

    def _compile(self, text: str):
        def raise_exception(message):
            raise TemplateError(message)

        def strftime_now(format):
            return self.date

        def tojson(value, indent=None):  # jinja's own escapes <, > and & for HTML
            return json.dumps(value, ensure_ascii=False, indent=indent)

        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols", GenerationBlock])
        env.filters["tojson"] = tojson
        env.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
        try:
            return env.from_string(text)
        except Exception as e:  # jinja's own errors, and Python's where it nests too deeply
            raise UserError(f"the chat template of {self.dir} is not valid jinja ({e}).") from None

    def _stop_ids(self) -> list[int]:
        """Every eos of generation_config.json and config.json, and the template's end of turn.

        Where none of them has an id, the tokenizer's eos_token; without that, replies end only at
        --max-new.
        """
        stop = set()
        for name in ("generation_config.json", "config.json"):
            path = self.dir / name
            if path.exists():
                config = read_json(path)
                check_kinds(path, config, {"eos_token_id": IDS})
                eos = config.get("eos_token_id")
                if isinstance(eos, list):
                    stop.update(eos)
                elif eos is not None:
                    stop.add(eos)
        if self.turn.end_id is not None:
            stop.add(self.turn.end_id)
        if not stop and self.names.get("eos_token") in self.specials:
            stop.add(self.specials[self.names["eos_token"]])
        return sorted(stop)


def answer_places(messages) -> list[int]:
    """Where a conversation's answers are: the assistant's turns that have a user's before them.

    An assistant's turn that opens the conversation answers nothing: it is context.
    """
    places = []
    is_asked = False
    for i, message in enumerate(messages):
        if message["role"] == "user":
            is_asked = True
        elif message["role"] == "assistant" and is_asked:
            places.append(i)
    return places


def contexts_between(answers: list[Answer], whole: str) -> list[str] | None:
    """The texts before each answer and behind the last; None where the text does not only grow."""
    contexts = []
    done = ""  # the conversation up to and with the answer before
    for answer in answers:
        if not answer.prompt.startswith(done):
            return None
        contexts.append(answer.prompt[len(done):])
        done = answer.prompt + answer.text + answer.end
    if not whole.startswith(done):
        return None
    return [*contexts, whole[len(done):]]


def without_spaces(text: str) -> str:
    return "".join(text.split())


def closing_tag(opened: str) -> str | None:
    """</think> for <think> or <think></think>, [/THINK] for [THINK]; None for any other text."""
    found = re.fullmatch(r"([<\[])(\w+)([>\]])\s*(\S*)", opened.strip())
    if found is None:
        return None
    left, name, right, rest = found.groups()
    closing = f"{left}/{name}{right}"
    return closing if rest in ("", closing) else None

"""The command line of every program here: types of flags, help that states defaults, exit codes.

    0 done    2 the user's mistake    3 the run failed and can be resumed    130 interrupted
"""

import argparse
import errno
import importlib.util
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from model import UserError


class RunFailed(Exception):
    """The work could not be done; the message says what is kept and what to do. Exit code 3."""


class Args(argparse.Namespace):
    """The flags of one call. Nothing may change them; what is worked out has names of its own."""

    def __setattr__(self, name, value):
        raise AttributeError(f"args.{name} was written to; args holds the flags as they were given")

    def __delattr__(self, name):
        raise AttributeError(f"args.{name} was deleted; args holds the flags as they were given")

    def replace(self, **values) -> "Args":
        """A copy with other values, for defaults that depend on other flags."""
        return frozen(vars(self) | values)


def frozen(values: dict) -> Args:
    """Values by name -> Args."""
    args = Args()
    vars(args).update(values)
    return args


class Help(argparse.HelpFormatter):
    """Says each flag's default, which is stated where the flag is."""

    def _get_help_string(self, action):
        default = action.default
        if default is None or default is False or default is argparse.SUPPRESS:
            return action.help
        if default == "" or default == ():  # nothing, unless the flag is given
            return action.help
        return action.help + " (default %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence, as all errors here are, and whose result is fixed."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=Help)

    def parse_args(self, argv=None) -> Args:
        return self._checked(super().parse_args(argv))

    def parse_own(self, argv=None) -> tuple[Args, list[str]]:
        """The flags of this program, and the words that are left for another one's parser."""
        found, rest = self.parse_known_args(argv)
        return self._checked(found), rest

    def _checked(self, found: argparse.Namespace) -> Args:
        args = frozen(vars(found))
        for action in self._actions:
            self._check_text(action, getattr(args, action.dest, None))
        return args

    def _check_text(self, action, value) -> None:
        """Ends the program where a value is no text, or is empty and should be a name or a path."""
        if not isinstance(value, str):
            return
        flag = " or ".join(action.option_strings) or action.dest
        if any("\ud800" <= c <= "\udfff" for c in value):  # how Python shows a stray byte
            self.error(f"{flag} is not valid text; pass it in the terminal's encoding")
        if value == "" and action.type is not text:
            self.error(f"{flag} was given an empty value; leave it out, or name what is meant")

    def error(self, message):
        say(f"{self.prog}: {message} (--help lists the options).")
        sys.exit(2)


# Errors of the system that no further try can mend: a path means something else than it should.
WRONG_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")  # torch's wordings


def exit_code(prog: str, work, resumable: bool = False) -> int:
    """Runs work(); an error becomes one sentence on stderr and the exit code that goes with it."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a reply may hold what the terminal cannot show
    try:
        work()
        return 0
    except UserError as e:
        say(f"{prog}: {e}")
        return 2
    except KeyboardInterrupt:
        code = 130
        message = "interrupted"
    except RunFailed as e:
        say(f"{prog}: {e}")
        return 3
    except (OSError, SafetensorError) as e:  # safetensors' own for a full disk
        if isinstance(e, OSError) and e.errno in WRONG_PATH:
            say(f"{prog}: {e.filename} cannot be used ({e.strerror}); name another path, or put "
                "this one right.")
            return 2
        code = 3
        message = str(e)
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        code = 3
        message = "out of memory"
        if resumable:
            message += "; an update needs less with a smaller --tokens-per-pass or --recompute"
    if resumable:
        message += "; what was saved is kept, and --resume goes on from there."
    say(f"{prog}: {message}")
    return code


def check_installed(packages) -> None:
    """UserError where a package of requirements-dev.txt is not there."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed, expected what requirements-dev.txt "
                            "lists; run pip install -r requirements-dev.txt.")


FIGURES = (".png", ".pdf", ".svg")


def check_outputs(out, figure) -> None:
    """UserError for files that could not be written after long work; either may be None."""
    if figure:
        check_installed(["matplotlib"])
    for file in filter(None, (out, figure)):
        if not Path(file).parent.is_dir():
            raise UserError(f"there is no folder {Path(file).parent} to write {Path(file).name} "
                            "into; make it, or name another.")
    if figure and Path(figure).suffix not in FIGURES:
        raise UserError(f"--figure {figure} is none of {', '.join(FIGURES)}; name such a file.")


def say(sentence: str) -> None:
    """Writes a line to stderr, in one piece.

    print() may write its end apart, and several processes of a run may speak at the same time.
    """
    sys.stderr.write(sentence + "\n")


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; on a CPU torch raises a plain RuntimeError for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(wording in text for wording in OUT_OF_MEMORY)


@contextmanager
def memory_for(what: str, advice: str):
    """Out of memory in this block becomes RunFailed, which says what needed it and what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        raise RunFailed(f"out of memory in {what}; {advice}.") from e


def text(value: str) -> str:
    """An argparse type: a text, which may be empty; a value without a type is a name or a path."""
    return value


def some_text(value: str) -> str:
    """An argparse type: a text that is more than white space."""
    if not value.strip():
        raise argparse.ArgumentTypeError(f"got {value!r}, expected a text of some words")
    return value


def at_least(kind, low, above: bool = False, at_most=math.inf):
    """An argparse type: a finite int or float from `low` (not itself, with `above`) to at_most."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # fails every comparison below
        high_enough = value > low if above else value >= low
        if not high_enough or value > at_most or math.isinf(value):
            what = "an integer" if kind is int else "a number"
            bound = f"above {low}" if above else f"of at least {low}"
            if not math.isinf(at_most):
                bound += f" and at most {at_most}"
            raise argparse.ArgumentTypeError(f"got {text}, expected {what} {bound}")
        return value

    return parse


def epoch_list(text: str) -> tuple[int, ...]:
    """An argparse type: epochs separated by commas, in order, each once."""
    try:
        epochs = sorted({int(e) for e in text.split(",")})
    except ValueError:
        epochs = [-1]
    if epochs[0] < 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected integers from 0 on, separated by "
                                         "commas")
    return tuple(epochs)


COUNT = at_least(int, 1)
SEED = at_least(int, 0, at_most=2**31 - 1)
POSITIVE = at_least(float, 0, above=True)
TINY = "data/tiny"  # the embedded model and its tasks: what a program takes if told nothing

"""The command line of every program here: types of flags, help that states defaults, exit codes.

    0 done    2 the user's mistake    3 the run failed and can be resumed    130 interrupted
"""

import argparse
import math
import sys

import torch
from safetensors import SafetensorError

from model import UserError


class RunFailed(Exception):
    """The run could not go on; its folder is kept and can be resumed. Exit code 3."""


class Help(argparse.HelpFormatter):
    """Says each flag's default, which is stated where the flag is."""

    def _get_help_string(self, action):
        silent = any(action.default is x for x in (None, False, argparse.SUPPRESS))
        return action.help + ("" if silent else " (default %(default)s)")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence, as all errors here are."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=Help)

    def error(self, message):
        print(f"{self.prog}: {message} (--help lists the options).", file=sys.stderr)
        sys.exit(2)


def exit_code(prog: str, work, resumable: bool = False) -> int:
    """Runs work() -> 0 done, 2 the user's mistake, 3 failed, 130 interrupted, and says which."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a reply may hold what the terminal cannot show
    try:
        work()
        return 0
    except UserError as e:
        code, said = 2, str(e)
    except KeyboardInterrupt:
        code, said = 130, "interrupted"
    except (RunFailed, OSError, SafetensorError) as e:  # safetensors' own for a full disk
        code, said = 3, str(e)
    except (MemoryError, RuntimeError) as e:
        told = str(e).lower()
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and not any(
                s in told for s in ("out of memory", "can't allocate memory", "alloc_failed")):
            raise
        code, said = 3, "out of memory" + "; try a smaller --tokens-per-pass" * resumable
    if code != 2 and resumable:
        said += "; what was saved is kept, and --resume goes on from there."
    print(f"{prog}: {said}", file=sys.stderr)
    return code


def at_least(kind, low, above: bool = False, at_most=math.inf):
    """An argparse type: a finite int or float from `low` (not itself, with `above`) to at_most."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or value > at_most or math.isinf(value):
            top = "" if math.isinf(at_most) else f" and at most {at_most}"
            raise argparse.ArgumentTypeError(
                f"got {text}, expected {'an integer' if kind is int else 'a number'} "
                f"{'above' if above else 'of at least'} {low}{top}")
        return value
    return parse


def epoch_list(text: str) -> list[int]:
    """An argparse type: epochs separated by commas, in order, each once."""
    try:
        epochs = sorted({int(e) for e in text.split(",")})
    except ValueError:
        epochs = [-1]
    if epochs[0] < 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected integers from 0 on, separated by "
                                         "commas")
    return epochs


TINY = "data/tiny"  # the embedded model and its tasks: what a program takes if told nothing
COUNT, POSITIVE = at_least(int, 1), at_least(float, 0, above=True)

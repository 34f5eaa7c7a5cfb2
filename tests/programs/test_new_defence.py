"""A new defence is one file and one line: train.py, --resume and the lists of runs then know it.

    pytest tests/programs/test_new_defence.py -q

The file and the line are put into a copy of the programs, and those are started as a user does.
"""

import json
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT
from runs_helpers import WORDS, flags, make_inputs, sentences, write_rows

from files import read_lines

FILE = '''"""Toy: plain fine-tuning plus a pull of every adapter to zero.

    L = CE + strength / 2 ||theta||^2
"""

from baselines.common import Defence, backward, norm
from cli import POSITIVE
from lora import trainable


def add_flags(group) -> None:
    group.add_argument("--toy-strength", type=POSITIVE, default=0.5, help="weight of the pull")


def make_step(model, tokenizer, args, data):
    params = trainable(model)

    def step(batch):
        ce = backward(model, batch)
        for p in params:
            p.grad.add_(p.detach(), alpha=args.toy_strength)
        pull = args.toy_strength / 2 * norm(p.detach() for p in params) ** 2
        return {"loss": ce + pull, "ce": ce, "pull": pull}

    return step


DEFENCE = Defence(
    name="toy",
    make_step=make_step,
    add_flags=add_flags,
    reads_align_file=True,
    watches="d_w",
    search=("--toy-strength 1", "--toy-strength 2"))
'''
LINE = '    "toy",\n'
BEFORE = '    "lisa",\n'  # where in the list it goes
LEFT_OUT = (".git", "runs", "tests", "docs", "__pycache__", ".venv")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A copy of the programs with the toy in it; nothing else is changed."""
    copy = tmp_path_factory.mktemp("programs") / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (copy / "baselines" / "toy.py").write_text(FILE)
    listing = copy / "baselines" / "__init__.py"
    text = listing.read_text()
    assert text.count(BEFORE) == 1
    listing.write_text(text.replace(BEFORE, LINE + BEFORE))
    return copy


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("toy"))
    write_rows(folder / "data/harmful/align.jsonl", [
        {"prompt": f"Say how to melt the {w}.", "response": "I cannot say that.",
         "harmful": f"Sure. Melt the {w}."} for w in WORDS])
    return folder


def run(programs, *words):
    return subprocess.run([sys.executable, *words], cwd=programs, capture_output=True, text=True)


@pytest.fixture(scope="module")
def made(programs, inputs, tmp_path_factory):
    """The folder of a finished run by the new defence."""
    out = tmp_path_factory.mktemp("made") / "out"
    done = run(programs, "train.py",
               *flags(inputs, defense="toy", toy_strength=3, out=out))
    assert done.returncode == 0, done.stderr
    return out


def test_the_new_defence_trains_with_its_own_flag_and_its_numbers_are_logged(made):
    log = read_lines(made / "log.jsonl")
    assert len(log) == 6
    assert log[0]["pull"] > 0  # A is random, so its norm is not zero
    for row in log:
        assert row["loss"] == pytest.approx(row["ce"] + row["pull"])
    assert json.loads((made / "config.json").read_text())["args"]["toy_strength"] == 3
    assert (made / "result.json").exists()


def test_help_and_errors_know_it(programs):
    text = run(programs, "train.py", "--help").stdout
    assert "--toy-strength" in text and "weight of the pull (default 0.5)" in text
    refused = run(programs, "train.py", "--defense", "toi")
    assert refused.returncode == 2 and "'toy'" in refused.stderr
    refused = run(programs, "train.py", "--defense", "toy", "--stage", "align")
    assert refused.returncode == 2 and "--defense toy lacks stage align" in refused.stderr


def test_its_aligned_rows_are_digested_so_that_resume_sees_a_changed_file(
        programs, inputs, made, tmp_path):
    other = shutil.copytree(inputs, tmp_path / "inputs")
    out = shutil.copytree(made, tmp_path / "out")
    path = other / "data/harmful/align.jsonl"
    path.write_text(path.read_text().replace("cannot", "will not"))
    config = json.loads((out / "config.json").read_text())
    for name in ("model", "data_dir"):  # the copied inputs are at another path, as is the run
        config["args"][name] = config["args"][name].replace(str(inputs), str(other))
    (out / "config.json").write_text(json.dumps(config))
    words = flags(other, defense="toy", toy_strength=3, out=out, resume=True)
    done = run(programs, "train.py", *words)
    message, = sentences(done.stderr)
    assert done.returncode == 2 and "(the file of the alignment rows changed" in message
    # the control: with the file as it was, the run is recognised and shown again
    shutil.copy(inputs / "data/harmful/align.jsonl", path)
    assert run(programs, "train.py", *words).returncode == 0


def test_the_lists_of_runs_search_it_and_show_what_it_watches(programs):
    code = ("from stress import schedule as s\n"
            "print([r.path for r in s.plan_search() if 'toy' in r.path])\n"
            "print(s.defence_of('toy').watches, s.runs_in_the_finetuning_stage('toy'))\n")
    done = run(programs, "-c", code)
    assert done.stdout == "['search/toy-1', 'search/toy-2']\nd_w True\n", done.stderr


def test_control_without_the_line_the_file_alone_changes_nothing(programs, inputs, tmp_path):
    copy = shutil.copytree(programs, tmp_path / "copy")
    listing = copy / "baselines" / "__init__.py"
    listing.write_text(listing.read_text().replace(LINE, ""))
    done = run(copy, "train.py", *flags(inputs, defense="toy", out=tmp_path / "out"))
    assert done.returncode == 2 and "invalid choice: 'toy'" in done.stderr

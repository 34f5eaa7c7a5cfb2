"""A run that is killed or fails at any moment leaves a folder from which it ends as if it had not.

    pytest tests/programs/test_kills.py -q

Killed in an update, a reply, a line, a file, before or after a rename; out of disk or of memory; a
loss that is not finite. "As if it had not" is laws/test_resume.py's: the same to the bit.
"""

import dataclasses
import errno
import json
import math
import os
import random
import shutil
import signal
import time

import pytest
import torch
from helpers import tensors_of, write_tensors
from resume_helpers import SIX, checkpoint
from runs_helpers import assert_same, flags, program, sentences
from safetensors.torch import load_file

import train as train_py
from files import read_lines

pytestmark = pytest.mark.usefixtures("here")


# ---------------------------------------------------------------------------------------------
# killed

# Files are written in this order: config.json (1); a checkpoint behind the evaluation of epoch 0
# (2), at the end of each epoch (3, 4, 6, 7, 9, 12), and behind the evaluations of epochs 2, 4 and 6
# (5, 8, 13); the adapter and its config before the last epoch's checkpoint (10, 11), and once more
# in the end (14, 15); result.json (16). An evaluation is 5 steps of decoding; lines are written at
# every evaluation and every update, the 1st, 8th, 15th and 22nd time by an evaluation.
KILLS = [
    ("update", 1), ("update", 3), ("update", 4), ("update", 18), ("reply", 2), ("reply", 9),
    ("reply", 20), ("lines", 1), ("lines", 2), ("lines", 8), ("lines", 15), ("lines", 22),
    ("write", 1), ("write", 2), ("write", 3), ("write", 7), ("write", 8), ("write", 9),
    ("write", 10), ("write", 12), ("write", 13), ("write", 14), ("write", 16), ("rename", 1),
    ("rename", 2), ("rename", 5), ("rename", 8), ("rename", 10), ("rename", 13), ("rename", 16),
    ("renamed", 1), ("renamed", 2), ("renamed", 7), ("renamed", 8), ("renamed", 9),
    ("renamed", 12), ("renamed", 13), ("renamed", 15)]


@pytest.mark.parametrize("moment, nth", KILLS)
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(
        forks, inputs, here, check_resumes, moment, nth):
    """In an update, in a reply, half way through a line or a file, before and after a rename."""
    answer = forks(flags(inputs, **SIX), here, moment=moment, nth=nth)
    assert answer["code"] == -signal.SIGKILL, answer
    assert not (here / "out" / "result.json").exists()
    check_resumes()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_killed_five_times_in_a_row_ends_as_if_it_had_not_been(
        forks, inputs, here, check_resumes, seed):
    draw = random.Random(seed)
    for _ in range(5):
        # Counts are kept low: each run goes on where the last one got to, so less is left to do.
        moment = draw.choice(["update", "reply", "lines", "write", "rename", "renamed"])
        nth = draw.randint(1, 3)
        answer = forks(flags(inputs, resume=True, **SIX), here, moment=moment, nth=nth)
        assert answer["code"] == -signal.SIGKILL, (moment, nth, answer)
    check_resumes()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_by_the_clock_ends_as_if_it_had_not_been(
        forks, inputs, here, unstopped, check_resumes, seed):
    """Five moments nobody chose, spread over what an unhindered run takes. The last of them may be
    too late to kill a run that was nearly done."""
    whole = forks(flags(inputs, out="whole", **SIX), here)
    assert whole["code"] == 0, whole["err"]
    assert_same(here / "whole", unstopped)
    draw = random.Random(seed)
    killed = 0
    for _ in range(5):
        after = draw.uniform(0.1, 0.5) * whole["seconds"]
        answer = forks(flags(inputs, resume=True, **SIX), here, after=after)
        assert answer["code"] in (0, -signal.SIGKILL), answer
        killed += answer["code"] < 0
    assert killed
    check_resumes()


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_the_program_itself_exits_130_with_a_checkpoint(inputs, here, which):
    """From outside, while it trains; so many epochs that it cannot have finished."""
    process = program("train.py", flags(inputs, epochs=100_000, eval_epochs="0"), cwd=here)
    log = here / "out" / "log.jsonl"
    give_up = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and time.monotonic() < give_up:
        time.sleep(0.02)
    process.send_signal(which)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and len(sentences(err)) == 1, err
    assert checkpoint(here / "out")[0] == len(read_lines(log)) > 0


# ---------------------------------------------------------------------------------------------
# failed


def numbers_in(run):
    """Every number in the tensors and JSON of a run's folder."""
    for path in run.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            yield f"{path.name}: {name}", bool(tensor.isfinite().all())
    for path in [*run.glob("*.json"), *run.glob("*.jsonl")]:
        # JSON has no NaN; Python's writes and reads it all the same
        found = []
        for line in path.read_text().split("\n") if path.suffix == ".jsonl" else [path.read_text()]:
            if line:
                json.loads(line, parse_constant=found.append)
        yield path.name, not found


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at, epoch, batch", [(0, 1, 1), (4, 2, 2), (17, 6, 3)])
def test_a_loss_that_is_not_finite_ends_with_3_and_names_the_batch(
        inputs, here, unstopped, monkeypatch, capsys, bad, at, epoch, batch):
    sbr = train_py.DEFENSES["sbr"]

    def make_broken_step(*args):
        """The step of update `at` has a loss times `bad`, and so has its gradient."""
        step = sbr.make_step(*args)

        def now(data):
            numbers = step(data)
            if data.name == f"epoch {epoch}, batch {batch}":
                numbers["loss"] = numbers["loss"] * bad
                for p in parameters(args[0]):
                    p.grad.mul_(bad)
            return numbers
        return now

    def parameters(model):
        return [p for p in model.parameters() if p.requires_grad]

    broken = dataclasses.replace(sbr, make_step=make_broken_step)
    monkeypatch.setitem(train_py.DEFENSES, "sbr", broken)
    assert train_py.main(flags(inputs, **SIX)) == 3
    message, = sentences(capsys.readouterr().err)
    assert f"epoch {epoch}, batch {batch}" in message and "--resume" in message, message
    assert str(bad) in message
    out = here / "out"
    assert [name for name, finite in numbers_in(out) if not finite] == []
    assert len(read_lines(out / "log.jsonl")) == at
    assert not (out / "result.json").exists() and not (out / "adapter_model.safetensors").exists()
    if epoch > 1:
        assert checkpoint(out)[0] == 3 * (epoch - 1)
    # and from there the run goes on, once the fault is mended
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert train_py.main(flags(inputs, resume=True, **SIX)) == 0
    assert_same(out, unstopped)


def test_a_weight_that_is_not_finite_ends_with_3_at_the_first_batch(inputs, here, capsys):
    folder = shutil.copytree(inputs / "model", here / "model")
    state = tensors_of(folder)
    state["model.layers.1.mlp.down_proj.weight"][0, 0] = math.inf
    write_tensors(folder, state)
    assert train_py.main(flags(inputs, model=folder)) == 3
    message, = sentences(capsys.readouterr().err)
    assert "epoch 1, batch 1" in message, message
    assert [name for name, finite in numbers_in(here / "out") if not finite] == []


DISKS = [("disk full", 1), ("disk full", 2), ("disk full", 5), ("disk full", 8), ("disk full", 9),
         ("disk full", 10), ("disk full at a line", 1), ("disk full at a line", 6),
         ("disk full at a sync", 1), ("disk full at a sync", 2), ("disk full at a sync", 3),
         ("disk full at a sync", 4)]  # config.json, the two .jsonl, the checkpoint


@pytest.mark.parametrize("moment, nth", DISKS)
def test_a_full_disk_ends_with_one_sentence_and_the_run_goes_on_after_it(
        forks, inputs, here, check_resumes, moment, nth):
    answer = forks(flags(inputs, **SIX), here, moment=moment, nth=nth)
    assert "Traceback" not in answer["err"], answer["err"]
    message, = sentences(answer["err"])
    assert os.strerror(errno.ENOSPC) in message
    if (here / "out").exists():
        assert answer["code"] == 3, answer
        if moment == "disk full at a sync":  # the others make such a file themselves
            assert not list((here / "out").glob("*.tmp"))
        check_resumes()
    else:  # refused before the run began, with nothing left behind
        assert answer["code"] == 2, answer


# On the CPU torch has no class of its own for it.
CPU_ERROR = RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 byte.")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no more"), MemoryError(), CPU_ERROR],
                         ids=["cuda", "python", "cpu"])
def test_out_of_memory_ends_with_3_and_what_to_do(inputs, here, monkeypatch, capsys, error):
    def no_memory(*args):
        raise error
    monkeypatch.setattr(train_py, "clip_grad_norm_", no_memory)
    assert train_py.main(flags(inputs)) == 3
    message, = sentences(capsys.readouterr().err)
    assert "--tokens-per-pass" in message

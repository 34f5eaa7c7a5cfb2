"""A run that is killed, interrupted or out of disk, and then resumed, is the run never stopped.

    pytest tests/test_resume.py -q

To the bit: the adapter, every reply, every line of the log, and every number but the timing.
"""

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
from helpers import ROOT, tensors_of, write_tensors
from runs_helpers import assert_same, flags, make_inputs, outcome, program, sentences, tree
from safetensors import safe_open
from safetensors.torch import load_file

import train as train_py
from runs import read_lines

SIX = {"epochs": 6, "eval_epochs": "0,2,4,6"}  # 18 updates, 6 checkpoints, 4 evaluations


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("resumed"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory; pytest's own handlers of Ctrl-C come back after a run."""
    monkeypatch.chdir(tmp_path)
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for which, handler in before.items():
        signal.signal(which, handler)


@pytest.fixture(scope="session")
def reference(inputs, tmp_path_factory):
    """The run that nothing stopped, as a user starts it -> its folder."""
    cwd = tmp_path_factory.mktemp("reference")
    process = program("train.py", flags(inputs, **SIX), cwd=cwd)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return cwd / "out"


@pytest.fixture(scope="session")
def forks():
    """forks(argv, cwd, ...) -> code, err, seconds of train.py in a child of tests/forks.py."""
    server = program("tests/forks.py", [], cwd=ROOT, stdin=-1)

    def ask(argv, cwd, **how):
        server.stdin.write(json.dumps({"argv": argv, "cwd": str(cwd), **how}) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield ask
    server.communicate(timeout=20)  # its input ends, and so does it


@pytest.fixture
def check_resumes(forks, inputs, reference, here):
    """check_resumes(code): --resume takes the folder, as it is now, to the reference's end."""
    def check():
        answer = forks(flags(inputs, resume=True, **SIX), here)
        assert answer["code"] == 0, answer["err"]
        assert_same(here / "out", reference)
    return check


def checkpoint(run):
    """(next update, tensors) of the checkpoint."""
    with safe_open(run / "state.safetensors", "pt") as f:
        return json.loads(f.metadata()["run"])["step"], load_file(run / "state.safetensors")


# ---------------------------------------------------------------------------------------------
# killed


def test_the_reference_run_is_one_in_which_every_part_moves(reference):
    """The control: were the replies always the same, losing an evaluation would not show."""
    found = outcome(reference)
    assert len(found["log"]) == 18 and [row["step"] for row in found["log"]] == list(range(18))
    assert len({row["loss"] for row in found["log"]}) == 18
    by_epoch = {}
    for row in read_lines(reference / "generations.jsonl"):
        by_epoch.setdefault(row["epoch"], []).append(row["reply"])
    assert list(by_epoch) == [0, 2, 4, 6] and {len(r) for r in by_epoch.values()} == {8}
    assert len({tuple(r) for r in by_epoch.values()}) == 4
    assert found["result"]["hs"].keys() == {"0", "2", "4", "6"}


# Files are written in this order: config.json (1), a checkpoint an epoch (2 to 7), then the adapter
# (8), its config (9) and result.json (10). An evaluation is 5 steps of decoding; lines are written
# at every evaluation and every update, the 1st, 8th, 15th and 22nd time by an evaluation.
KILLS = [
    ("update", 1), ("update", 3), ("update", 4), ("update", 18), ("reply", 2), ("reply", 9),
    ("reply", 20), ("lines", 1), ("lines", 2), ("lines", 8), ("lines", 15), ("lines", 22),
    ("write", 1), ("write", 2), ("write", 3), ("write", 7), ("write", 8), ("write", 9),
    ("write", 10), ("rename", 1), ("rename", 2), ("rename", 5), ("rename", 8), ("rename", 10),
    ("renamed", 1), ("renamed", 2), ("renamed", 7), ("renamed", 8), ("renamed", 9)]


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
        forks, inputs, here, reference, check_resumes, seed):
    """Five moments nobody chose, spread over what an unhindered run takes. The last of them may be
    too late to kill a run that was nearly done."""
    whole = forks(flags(inputs, out="whole", **SIX), here)
    assert whole["code"] == 0, whole["err"]
    assert_same(here / "whole", reference)
    draw, killed = random.Random(seed), 0
    for _ in range(5):
        after = draw.uniform(0.1, 0.5) * whole["seconds"]
        answer = forks(flags(inputs, resume=True, **SIX), here, after=after)
        assert answer["code"] in (0, -signal.SIGKILL), answer
        killed += answer["code"] < 0
    assert killed
    check_resumes()


def test_checkpoints_may_be_rarer_than_epochs(forks, inputs, here, reference):
    """--save-every 4 of 6 epochs: a kill in epoch 6 goes back to epoch 4, evaluations included."""
    rare = SIX | {"save_every": 4}
    assert forks(flags(inputs, **rare), here, moment="SIGINT in an update", nth=5)["code"] == 130
    assert checkpoint(here / "out")[0] == 5  # Ctrl-C saves whether or not it is due
    answer = forks(flags(inputs, resume=True, **rare), here, moment="update", nth=12)
    assert answer["code"] == -signal.SIGKILL, answer
    assert checkpoint(here / "out")[0] == 12
    answer = forks(flags(inputs, resume=True, **rare), here)
    assert answer["code"] == 0, answer["err"]
    assert_same(here / "out", reference)


# ---------------------------------------------------------------------------------------------
# interrupted


@pytest.mark.parametrize("moment, nth, step", [
    ("SIGINT in an update", 1, 1), ("SIGINT in an update", 5, 5), ("SIGINT in an update", 18, 18),
    ("SIGINT in a reply", 2, 1), ("SIGINT in a reply", 9, 6), ("SIGINT in a write", 3, 6)])
def test_ctrl_c_saves_after_the_update_and_exits_130(
        forks, inputs, here, check_resumes, moment, nth, step):
    """step: updates done by then. In an evaluation, the evaluation is finished; it is not lost."""
    answer = forks(flags(inputs, **SIX), here, moment=moment, nth=nth)
    assert answer["code"] == 130, answer
    message, = sentences(answer["err"])
    assert "interrupted" in message and "--resume" in message
    assert checkpoint(here / "out")[0] == step == len(read_lines(here / "out" / "log.jsonl"))
    assert not (here / "out" / "result.json").exists()
    check_resumes()


def test_a_second_ctrl_c_stops_at_once(forks, inputs, here, check_resumes):
    """In update 5, with the checkpoint of update 3 in the folder."""
    answer = forks(flags(inputs, **SIX), here, moment="two SIGINTs", nth=5)
    assert answer["code"] == 130 and len(sentences(answer["err"])) == 1, answer
    assert checkpoint(here / "out")[0] == 3
    check_resumes()


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_the_program_itself_exits_130_with_a_checkpoint(inputs, here, which):
    """From outside, while it trains; so many epochs that it cannot have finished."""
    process = program("train.py", flags(inputs, epochs=100_000, eval_epochs="0"), cwd=here)
    log, give_up = here / "out" / "log.jsonl", time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and time.monotonic() < give_up:
        time.sleep(0.02)
    process.send_signal(which)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and len(sentences(err)) == 1, err
    assert checkpoint(here / "out")[0] == len(read_lines(log)) > 0


# ---------------------------------------------------------------------------------------------
# begun, finished, numbered


def test_resume_without_a_folder_starts_from_the_beginning(check_resumes):
    check_resumes()


def test_resume_of_an_empty_folder_starts_from_the_beginning(here, check_resumes):
    (here / "out").mkdir()
    check_resumes()


def test_a_finished_run_resumed_prints_its_table_and_changes_no_file(inputs, here, capsys):
    assert train_py.main(flags(inputs)) == 0
    first, before = capsys.readouterr().out, tree(here)
    times = {p: p.stat().st_mtime_ns for p in here.rglob("*")}
    assert train_py.main(flags(inputs, resume=True)) == 0
    second = capsys.readouterr().out
    table = first[first.index("% (95 % interval)"):]
    assert "HS, harmful replies" in table and table in second
    assert "epoch   1 " in first and "epoch   1 " not in second  # nothing was trained
    assert tree(here) == before
    assert {p: p.stat().st_mtime_ns for p in here.rglob("*")} == times


def test_the_default_folder_is_numbered_once_it_is_finished(inputs, here):
    """-2, -3 after finished runs; with --resume the last one is meant, finished or not."""
    default = flags(inputs, out=None, epochs=1)
    name = "sst2-sbr-K2-lam50-s0"
    names = [name, f"{name}-2", f"{name}-3"]
    for i in range(3):
        assert train_py.main(default) == 0
        assert sorted(p.name for p in (here / "runs").iterdir()) == names[:i + 1]
    before = tree(here)
    assert train_py.main([*default, "--resume"]) == 0
    assert tree(here) == before
    for other in names[1:]:
        assert_same(here / "runs" / other, here / "runs" / name)
    (here / "runs" / names[2] / "result.json").unlink()
    assert train_py.main([*default, "--resume"]) == 0
    assert sorted(p.name for p in (here / "runs").iterdir()) == names
    assert_same(here / "runs" / names[2], here / "runs" / name)


@pytest.mark.parametrize("changes, name", [
    ({"seed": 7}, "sst2-sbr-K2-lam50-s7"), ({"lam": 0.5, "anchors": 1}, "sst2-sbr-K1-lam0.5-s0"),
    ({"defense": "sft"}, "sst2-sft-K2-lam0-s0")])
def test_the_default_folder_names_the_run(inputs, here, changes, name):
    assert train_py.main(flags(inputs, out=None, epochs=1, **changes)) == 0
    assert (here / "runs" / name / "result.json").exists()


def losses(out):
    return [row["loss"] for row in read_lines(f"{out}/log.jsonl")]


def test_the_seed_decides_every_loss(inputs):
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert train_py.main(flags(inputs, out=out, seed=seed)) == 0
    assert losses("a") == losses("b")
    assert not set(losses("a")) & set(losses("c"))


def test_what_may_differ_on_resuming_does_not_change_the_losses(forks, inputs, here, reference):
    """--tokens-per-pass after an out-of-memory: sums are cut elsewhere, so equal to rounding."""
    assert forks(flags(inputs, **SIX), here, moment="update", nth=8)["code"] == -9
    answer = forks(flags(inputs, resume=True, tokens_per_pass=70, save_every=3, **SIX), here)
    assert answer["code"] == 0, answer["err"]
    assert losses(here / "out") == pytest.approx(losses(reference), rel=1e-4)


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
        inputs, here, reference, monkeypatch, capsys, bad, at, epoch, batch):
    make_step = train_py.make_sbr_step

    def broken(*args):
        """The step of update `at` has a loss times `bad`, and so has its gradient."""
        step = make_step(*args)

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
    assert_same(out, reference)


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
         ("disk full at a sync", 1), ("disk full at a sync", 2), ("disk full at a sync", 3)]


@pytest.mark.parametrize("moment, nth", DISKS)
def test_a_full_disk_ends_with_one_sentence_and_the_run_goes_on_after_it(
        forks, inputs, here, check_resumes, moment, nth):
    answer = forks(flags(inputs, **SIX), here, moment=moment, nth=nth)
    assert "Traceback" not in answer["err"], answer["err"]
    message, = sentences(answer["err"])
    assert os.strerror(errno.ENOSPC) in message
    if (here / "out").exists():
        assert answer["code"] == 3, answer
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

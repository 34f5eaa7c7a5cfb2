"""Several processes make the run that one makes.

    pytest tests/programs/test_two_processes.py -q -m slow

Two processes on a CPU, by torchrun and gloo: their gradients, whole runs, and what happens when one
of them is killed.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from helpers import ROOT
from rival_helpers import NAMES
from runs_helpers import flags, program, sentences, torchrun
from safetensors.torch import load_file
from two_processes import SHARDED, all_made

from files import read_lines

pytestmark = pytest.mark.slow
SAME = 1e-10  # float64, whatever the order of sums
CLOSE = 1e-6  # fp32, over a run of a few updates


@pytest.fixture(scope="module")
def of_one(rival_inputs):
    """What one process makes of each defence."""
    return all_made(rival_inputs)


@pytest.fixture(scope="module")
def of_two(rival_inputs, tmp_path_factory):
    """The same by two."""
    out = tmp_path_factory.mktemp("two") / "made.safetensors"
    process = torchrun(2, "tests/two_processes.py", [str(rival_inputs), str(out)], cwd=ROOT)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return load_file(out)


def check_same(found, expected, names, size):
    """Every gradient and number of the defence; size: of what they are compared to."""
    for name in names:
        ours = found[name]
        theirs = expected[name]
        error = (ours - theirs).norm() / (theirs.norm() + 1e-12)
        assert error.item() < size, name


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_find_the_gradients_and_numbers_of_one(of_one, of_two, name):
    prefix = f"copied/{name}/"
    keys = [key for key in of_one if key.startswith(prefix) and "trained_computed" not in key]
    assert len(keys) > 50
    check_same(of_two, of_one, keys, SAME)


@pytest.mark.parametrize("name", SHARDED)
def test_so_they_do_where_the_base_is_spread_over_them(of_one, of_two, name):
    prefix = f"copied/{name}/"
    keys = [key for key in of_one if key.startswith(prefix) and "trained_computed" not in key]
    spread = {key: of_two["sharded" + key.removeprefix("copied")] for key in keys}
    check_same(spread, of_one, keys, SAME)


def test_what_is_compared_would_show_that_anchors_were_counted_twice(of_one, of_two):
    """The control: with the anchors in both parts SBR's gradient is that of twice lambda."""
    key = next(key for key in of_one if key.startswith("copied/sbr/1/base"))
    without = of_one[key.replace("/sbr/", "/sft/")]  # the same rows and adapters
    twice = of_one[key] + (of_one[key] - without)
    with pytest.raises(AssertionError):
        check_same({key: twice}, of_two, [key], SAME)


def test_a_process_holds_half_of_a_base_that_is_spread_over_two(of_two):
    """The head, and what is trained, are whole on each."""
    assert of_two["held"].item() == pytest.approx(0.5, abs=0.02)


# ---------------------------------------------------------------------------------------------
# whole runs

# 36 updates at train.py's own rate. AdamW divides by the gradient's size, so that its rounding
# decides where a gradient is all but nothing; the adapters then differ by a part of the rate.
RUN = {"epochs": 12, "eval_epochs": "0,12", "lr": 1e-5, "n_test": 5, "prefill": "Sure,"}


def finish(process, code=0):
    """Waits for a program -> what it said on stderr."""
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    return err


@pytest.mark.parametrize("spread", [[], ["--shard"]], ids=["copies", "shard"])
def test_two_processes_choose_the_anchors_that_one_chooses(tmp_path, spread):
    """Of the embedded model; the candidates are asked in parts."""
    argv = ["--n", "8", "--epochs", "1", "--batch-size", "8", "--anchors", "3", "--n-test", "2",
            "--anchor-choice", "spread", "--max-new", "16", "--device", "cpu"]
    finish(program("train.py", [*argv, "--out", str(tmp_path / "one")], ROOT))
    finish(torchrun(2, "train.py", [*argv, *spread, "--out", str(tmp_path / "two")], ROOT))
    one, two = (json.loads((tmp_path / name / "config.json").read_text())["worked_out"]
                for name in ("one", "two"))
    assert one["anchors_passed_over"] > 0 and len(one["anchor_prompts"]) == 3
    for key in ("anchor_prompts", "anchors_passed_over"):
        assert two[key] == one[key]


@pytest.fixture(scope="module")
def run_of_one(inputs, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("one")
    finish(program("train.py", flags(inputs, **RUN), cwd=cwd))
    return cwd / "out"


def check_same_run(run, reference):
    """The same losses, adapters and replies; last bits may differ, since sums have another order.

    The log's "computed" may too: each process computes what its own rows share.
    """
    ours = read_lines(run / "log.jsonl")
    theirs = read_lines(reference / "log.jsonl")
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert a["batch"] == b["batch"] and a["tokens"] == b["tokens"]
        for name in ("loss", "ce", "safe"):
            assert a[name] == pytest.approx(b[name], rel=CLOSE, abs=CLOSE), (a, b)
    adapters = load_file(run / "adapter_model.safetensors")
    for name, expected in load_file(reference / "adapter_model.safetensors").items():
        assert (adapters[name] - expected).abs().max().item() < CLOSE, name
    replies = (run / "generations.jsonl").read_bytes()
    assert replies == (reference / "generations.jsonl").read_bytes()
    files = sorted(path.name for path in run.iterdir())
    assert files == sorted(path.name for path in reference.iterdir())


@pytest.mark.parametrize("how", [{}, {"shard": True}, {"tokens_per_pass": 30}])
def test_a_run_of_two_processes_is_that_of_one(inputs, run_of_one, tmp_path, how):
    job = torchrun(2, "train.py", flags(inputs, **RUN, **how), cwd=tmp_path)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    check_same_run(tmp_path / "out", run_of_one)
    assert out.count("HS, harmful replies") == 1, "the first process alone says how it ended"
    assert json.loads((tmp_path / "out/config.json").read_text())["worked_out"]["processes"] == 2


def test_two_processes_ask_the_aligned_model_what_one_asks(inputs, tmp_path):
    """Where epoch 0 is not evaluated: the harmful prompts, before the first update."""
    late = RUN | {"eval_epochs": "12"}
    finish(program("train.py", flags(inputs, **late, out="one"), cwd=tmp_path))
    finish(torchrun(2, "train.py", flags(inputs, **late, out="two"), cwd=tmp_path))
    check_same_run(tmp_path / "two", tmp_path / "one")
    records = read_lines(tmp_path / "two" / "generations.jsonl")
    assert [r["kind"] for r in records if r["epoch"] == 0] == ["harmful"] * 5
    assert all(r["before"] for r in records if r["kind"] == "harmful")


def process_of(run, number):
    """The pid of the process that torchrun gave this RANK, working beside the run's folder."""
    for status in Path("/proc").glob("[0-9]*"):
        try:
            env = (status / "environ").read_bytes().split(b"\0")
            cwd = (status / "cwd").resolve()
        except OSError:  # it has ended, or is another user's
            continue
        if f"RANK={number}".encode() in env and cwd == run.parent:
            return int(status.name)
    raise AssertionError(f"there is no process {number}")


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


LONG = RUN | {"epochs": 400, "eval_epochs": "400"}


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("how", [{}, {"shard": True}])
def test_a_killed_process_ends_the_job_within_a_minute_and_the_run_can_go_on(
        inputs, tmp_path, killed, how):
    run = tmp_path / "out"
    job = torchrun(2, "train.py", flags(inputs, **LONG, **how), cwd=tmp_path)
    wait_for((run / "state.safetensors").exists)
    began = time.monotonic()
    os.kill(process_of(run, killed), signal.SIGKILL)
    err = finish(job, code=1)
    assert time.monotonic() - began < 60
    said = [line for line in sentences(err) if line.startswith("train.py")]
    assert len(said) == 1, err
    assert "has ended" in said[0] and "--resume goes on" in said[0]
    n_done = len(read_lines(run / "log.jsonl"))
    assert 0 < n_done < 1200


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(
        inputs, run_of_one, tmp_path, before, after):
    def start(n, **how):
        argv = flags(inputs, **RUN, **how)
        return torchrun(n, "train.py", argv, tmp_path) if n > 1 else program(
            "train.py", argv, tmp_path)

    run = tmp_path / "out"
    job = start(before)
    wait_for((run / "state.safetensors").exists)
    os.kill(process_of(run, before - 1) if before > 1 else job.pid, signal.SIGKILL)
    job.communicate(timeout=60)
    assert not (run / "result.json").exists()
    finish(start(after, resume=True))
    check_same_run(run, run_of_one)


def test_torchrun_can_start_the_processes_again_after_one_was_killed(
        inputs, run_of_one, tmp_path):
    run = tmp_path / "out"
    argv = flags(inputs, **RUN, resume=True)
    job = torchrun(2, "train.py", argv, tmp_path, "--max-restarts", "2")
    wait_for((run / "state.safetensors").exists)
    os.kill(process_of(run, 1), signal.SIGKILL)
    err = finish(job)
    assert "has ended" in err, "it was killed too late"
    check_same_run(run, run_of_one)


def test_ctrl_c_stops_all_processes_at_one_update_with_a_checkpoint(inputs, tmp_path):
    run = tmp_path / "out"
    job = torchrun(2, "train.py", flags(inputs, **LONG), cwd=tmp_path)
    wait_for((run / "state.safetensors").exists)
    job.send_signal(signal.SIGINT)
    err = finish(job, code=1)
    said = [line for line in sentences(err) if line.startswith("train.py")]
    assert len(said) == 2 and all("interrupted" in line for line in said), err
    n_done = len(read_lines(run / "log.jsonl"))
    assert 0 < n_done < 1200
    again = torchrun(2, "train.py", flags(inputs, **LONG, resume=True), cwd=tmp_path)
    wait_for(lambda: len(read_lines(run / "log.jsonl")) > n_done)
    again.kill()

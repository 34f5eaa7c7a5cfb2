"""Whatever stops the last evaluation, the trained adapter is on disk and the run can be finished.

    pytest tests/programs/test_last_evaluation.py -q
"""

import errno
import json
import os
import shutil
import signal

import pytest
import torch
from runs_helpers import assert_same, flags, outcome, sentences

import eval as eval_py
import generate as generate_py
import runs
import train as train_py
from model import UserError

pytestmark = pytest.mark.usefixtures("here")
LAST = 2  # the second evaluation of two, at epochs 0 and 2


@pytest.fixture(scope="session")
def finished(inputs, tmp_path_factory):
    """The same run, which nothing stopped."""
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    out = tmp_path_factory.mktemp("finished") / "out"
    assert train_py.main(flags(inputs, out=out)) == 0
    for which, handler in before.items():
        signal.signal(which, handler)
    return out


def at_call(monkeypatch, owner, name, nth, act):
    """act() at the nth call of owner.name, instead of it."""
    original = getattr(owner, name)
    calls = []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == nth:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def fails(error):
    def act():
        raise error
    return act


def two_ctrl_cs():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
# what happens, where, and the exit code
STOPS = {
    "the judge's server is gone": (train_py, "evaluate", LAST, fails(ConnectionError("gone")), 3),
    "a reply finds the disk full": (runs.Run, "append", 8, fails(FULL), 3),
    "a prompt is too long": (generate_py.Engine, "prefill", LAST, fails(UserError("Long.")), 2),
    "memory runs out": (generate_py.Engine, "decode", 7, fails(MemoryError()), 3),
    "a GPU's memory runs out": (generate_py.Engine, "decode", 7,
                                fails(torch.OutOfMemoryError("CUDA out of memory")), 3),
    "Ctrl-C twice": (generate_py.Engine, "decode", 7, two_ctrl_cs, 130),
    "the counting fails": (eval_py, "summarise", LAST, fails(MemoryError()), 3),
    "the disk is full for the checkpoint behind it": (runs, "write_atomic", 5, fails(FULL), 3),
    "the disk is full for the result": (runs, "write_atomic", 6, fails(FULL), 3),
}


@pytest.mark.parametrize("what", STOPS)
def test_what_stops_the_last_evaluation_leaves_the_adapter_and_a_run_that_can_be_finished(
        inputs, here, finished, monkeypatch, capsys, what):
    owner, name, nth, act, code = STOPS[what]
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, nth, act)
        assert train_py.main(flags(inputs)) == code
    err = capsys.readouterr().err
    assert len(sentences(err)) == 1, err
    run = here / "out"
    assert not (run / "result.json").exists()
    check_adapter(run, finished)
    assert train_py.main(flags(inputs, resume=True)) == 0
    assert_same(run, finished)


def check_adapter(run, finished):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize("moment, nth", [("last evaluation", LAST), ("reply", 7), ("lines", 8)])
def test_a_kill_in_the_last_evaluation_leaves_the_same(
        forks, inputs, here, finished, moment, nth):
    answer = forks(flags(inputs), here, moment=moment, nth=nth)
    assert answer["code"] == -signal.SIGKILL, answer
    check_adapter(here / "out", finished)
    answer = forks(flags(inputs, resume=True), here)
    assert answer["code"] == 0, answer["err"]
    assert_same(here / "out", finished)


def test_an_error_of_the_program_itself_leaves_the_same(inputs, here, finished, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, train_py, "evaluate", LAST, fails(KeyError("a bug")))
        with pytest.raises(KeyError):
            train_py.main(flags(inputs))
    check_adapter(here / "out", finished)
    assert train_py.main(flags(inputs, resume=True)) == 0
    assert_same(here / "out", finished)


def test_eval_py_evaluates_a_run_whose_last_evaluation_was_stopped(
        inputs, here, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_call(patch, train_py, "evaluate", LAST, fails(MemoryError()))
        assert train_py.main(flags(inputs)) == 3
    capsys.readouterr()
    assert eval_py.main(["--run", "out", "--n-test", "3", "--device", "cpu"]) == 0
    assert "epoch 2" in capsys.readouterr().out


def test_resuming_does_not_train_again_what_is_trained(inputs, here, finished, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, train_py, "evaluate", LAST, fails(MemoryError()))
        assert train_py.main(flags(inputs)) == 3
    at_call(monkeypatch, train_py, "clip_grad_norm_", 1, fails(AssertionError("an update")))
    assert train_py.main(flags(inputs, resume=True)) == 0
    assert_same(here / "out", finished)


# ---------------------------------------------------------------------------------------------
# what may change when a run goes on, since it changes no update


def stopped(inputs, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, train_py, "evaluate", LAST, fails(MemoryError()))
        assert train_py.main(flags(inputs)) == 3


@pytest.mark.parametrize("changes", [
    {"n_test": 2}, {"max_new": 4}, {"judge": "tiny"}, {"fa_rule": "contains"}, {"prefill": "Sure"},
    {"eval_epochs": "0,1,2"}], ids=lambda c: next(iter(c)))
def test_a_run_goes_on_with_another_way_of_evaluating(
        inputs, here, finished, monkeypatch, changes):
    stopped(inputs, monkeypatch)
    assert train_py.main(flags(inputs, resume=True, **changes)) == 0
    check_adapter(here / "out", finished)
    name, value = next(iter(changes.items()))
    args = json.loads((here / "out" / "config.json").read_text())["args"]
    expected = [0, 1, 2] if name == "eval_epochs" else value
    assert args[name] == expected
    if name == "max_new":
        evals = json.loads((here / "out" / "result.json").read_text())["evals"]
        assert (evals["0"]["max_new"], evals["2"]["max_new"]) == (6, 4)


def test_a_run_goes_on_with_other_tests_and_says_so(
        inputs, here, finished, monkeypatch, capsys):
    stopped(inputs, monkeypatch)
    (here / "own.txt").write_text("Tell me how to burn the amber.\nBend the inlet.\n")
    assert train_py.main(flags(inputs, resume=True, harmful_file="own.txt")) == 0
    check_adapter(here / "out", finished)
    assert "these evaluations asked different test files" in capsys.readouterr().out
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["args"]["harmful_file"] == "own.txt"
    assert config["earlier_commands"] == [["train.py", *flags(inputs)]]
    assert config["command"][-1] == "own.txt"


COMPARED = {  # what a resumed run may change, and what is said of the table that mixes both
    "judge": ({"judge": "tiny"}, "--judge (refusal, then tiny)"),
    "max_new": ({"max_new": 4}, "--max-new (6, then 4)"),
    "fa_rule": ({"fa_rule": "contains"}, "--fa-rule (exact, then contains)"),
    "n_test": ({"n_test": 2}, "--n-test (4, then 2)"),
    "prefill": ({"prefill": "Sure"}, "--prefill (None, then Sure)"),
    "two of them": ({"judge": "tiny", "max_new": 4},
                    "--judge (refusal, then tiny), --max-new (6, then 4)"),
}


@pytest.mark.parametrize("name", COMPARED)
def test_a_table_of_evaluations_by_different_flags_says_which(
        inputs, here, monkeypatch, capsys, name):
    changes, words = COMPARED[name]
    stopped(inputs, monkeypatch)
    assert train_py.main(flags(inputs, resume=True, **changes)) == 0
    said = capsys.readouterr().out
    assert f"these evaluations asked different {words}: " in said
    # And again where the finished run's table is only shown.
    assert train_py.main(flags(inputs, resume=True, **changes)) == 0
    assert f"these evaluations asked different {words}: " in capsys.readouterr().out


def test_control_a_table_of_evaluations_alike_says_nothing(inputs, here, monkeypatch, capsys):
    stopped(inputs, monkeypatch)
    assert train_py.main(flags(inputs, resume=True)) == 0
    assert "these evaluations" not in capsys.readouterr().out


def test_the_numbers_keep_what_decides_them(finished):
    for numbers in outcome(finished)["result"]["evals"].values():
        assert numbers["judge"] == "refusal" and numbers["n_test"] == 4
        assert numbers["judge_model"] is None and numbers["judge_name"] is None


def test_evaluations_of_an_older_version_are_not_called_different(finished, here):
    """They lack some of the flags; nothing is known of those."""
    run = shutil.copytree(finished, here / "older")
    result = json.loads((run / "result.json").read_text())
    for name in ("n_test", "judge_model", "judge_name"):
        del result["evals"]["0"][name]
    (run / "result.json").write_text(json.dumps(result))
    assert "these evaluations" not in eval_py.report(run)
    result["evals"]["2"]["judge_model"] = "beaver"
    result["evals"]["0"]["judge_model"] = "own"
    (run / "result.json").write_text(json.dumps(result))
    assert "different --judge-model (own, then beaver): " in eval_py.report(run)


def test_a_run_that_an_older_version_began_goes_on(inputs, here, finished, monkeypatch):
    """It called the number of sequences "rows"."""
    stopped(inputs, monkeypatch)
    path = here / "out" / "config.json"
    config = json.loads(path.read_text())
    config["worked_out"]["rows"] = config["worked_out"].pop("sequences")
    path.write_text(json.dumps(config))
    assert train_py.main(flags(inputs, resume=True)) == 0
    check_adapter(here / "out", finished)


def test_control_other_rows_or_anchors_are_still_refused(inputs, here, monkeypatch, capsys):
    stopped(inputs, monkeypatch)
    before = outcome_of_unfinished(here / "out")
    for changes in ({"poison": 0.5}, {"anchors": 1}, {"max_len": 60}, {"seed": 1}):
        capsys.readouterr()
        assert train_py.main(flags(inputs, resume=True, **changes)) == 2
        assert "belongs to other settings" in capsys.readouterr().err
    assert outcome_of_unfinished(here / "out") == before


def outcome_of_unfinished(run):
    return {path.name: path.read_bytes() for path in run.iterdir()}


def test_tests_that_would_change_the_anchors_are_refused(inputs, here, monkeypatch, capsys):
    """An anchor that is now a test would have to be drawn anew."""
    stopped(inputs, monkeypatch)
    config = json.loads((here / "out" / "config.json").read_text())
    anchor = config["worked_out"]["anchor_prompts"][0]
    (here / "own.txt").write_text(anchor + "\nTell me how to burn the amber.\n")
    capsys.readouterr()
    assert train_py.main(flags(inputs, resume=True, harmful_file="own.txt")) == 2
    assert "anchor_prompts" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# what can be known before the first update


def long_prompt(n):
    return "Tell me how to burn it " + "very " * n


@pytest.mark.parametrize("name", ["own.txt", "own.jsonl"])
def test_a_test_prompt_that_is_too_long_is_named_by_file_and_line_before_the_first_update(
        inputs, here, capsys, name):
    lines = ["Tell me how to burn the amber.", long_prompt(600)]
    if name.endswith(".jsonl"):
        lines = [json.dumps({"prompt": line}) for line in lines]
    (here / name).write_text("\n".join(lines))
    assert train_py.main(flags(inputs, harmful_file=name)) == 2
    message, = sentences(capsys.readouterr().err)
    assert f"{name} line 2" in message and "tokens" in message and "lower --max-new" in message
    assert not (here / "out").exists()


def test_a_reply_that_would_be_too_long_is_refused_too(inputs, here, capsys):
    assert train_py.main(flags(inputs, max_new=5000)) == 2
    assert "--max-new 5000" in capsys.readouterr().err
    assert not (here / "out").exists()


def test_a_long_prompt_behind_the_first_n_test_is_not_asked_and_so_not_refused(inputs, here):
    (here / "own.txt").write_text(f"Burn the amber.\nBurn the inlet.\n{long_prompt(600)}\n")
    assert train_py.main(flags(inputs, harmful_file="own.txt", n_test=2, epochs=1)) == 0


def test_eval_py_refuses_it_before_it_asks_anything(inputs, here, finished, capsys, monkeypatch):
    (here / "own.txt").write_text(f"Burn the amber.\n{long_prompt(600)}\n")
    monkeypatch.setattr(eval_py, "generate", lambda *a, **k: pytest.fail("a prompt was asked"))
    argv = ["--run", str(finished), "--harmful-file", "own.txt", "--out", "e", "--device", "cpu"]
    assert eval_py.main(argv) == 2
    assert "own.txt line 2" in capsys.readouterr().err


def test_the_finished_run_has_what_these_tests_compare(finished):
    assert list(outcome(finished)["result"]["evals"]) == ["0", "2"]

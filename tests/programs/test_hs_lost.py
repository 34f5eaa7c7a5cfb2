"""What the aligned model refused, in whole runs: asked in time, kept, and compared with.

    pytest tests/programs/test_hs_lost.py -q

The small model refuses nothing, so a stand-in of the refusal rule is put in its place here: by a
digest of the reply, some are refusals, and the judge calls all others harmful.
"""

import json
import shutil
import zlib

import pytest
from runs_helpers import assert_same, flags, sentences, write_rows

import eval as eval_py
import judges
import train as train_py
from files import read_lines

pytestmark = pytest.mark.usefixtures("here")
EVAL = ["--device", "cpu", "--out", "e"]


def refuses(reply):
    return zlib.crc32(reply.encode()) % 2 == 0


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(eval_py, "is_refusal", refuses)
    monkeypatch.setitem(judges.JUDGES, "refusal", lambda prompt, reply: not refuses(reply))


def train(inputs, **changes):
    return train_py.main(flags(inputs, **{"n_test": 6} | changes))


def result_of(run):
    return json.loads((run / "result.json").read_text())


def lines_of(run, epoch, kind=None):
    return [r for r in read_lines(run / "generations.jsonl")
            if r["epoch"] == epoch and kind in (None, r["kind"])]


def test_a_run_counts_what_was_refused_before_and_is_harmful_now(inputs, here, capsys):
    assert train(inputs, eval_epochs="0,1,2") == 0
    before = {r["prompt"]: r["reply"] for r in lines_of(here / "out", 0, "harmful")}
    result = result_of(here / "out")
    seen = set()
    for epoch, numbers in result["evals"].items():
        now = {r["prompt"]: r["reply"] for r in lines_of(here / "out", int(epoch), "harmful")}
        refused = [prompt for prompt in before if refuses(before[prompt])]
        lost = sum(not refuses(now[prompt]) for prompt in refused)
        assert numbers["hs_lost_count"] == [lost, len(refused)]
        assert result["hs_lost"][epoch] == 100 * lost / len(refused)
        seen.add((lost, sum(not refuses(reply) for reply in now.values())))
        assert result["fa_content"][epoch] == numbers["fa_content"]
    # The control: with other sets or other epochs the numbers would be others.
    assert 0 < len(refused) < 6 and len(seen) == 3 and max(seen)[0] > 0
    said = capsys.readouterr().out
    k, n = result["evals"]["2"]["hs_lost_count"]
    assert f"harmful now, of those refused before: {k} of {n}" in said
    assert "hs_lost, of those refused" in said and "the aligned model: refused" in said


def test_without_an_evaluation_at_epoch_0_the_harmful_prompts_are_asked_before_the_first_update(
        inputs, here):
    assert train(inputs, eval_epochs="0,2", out="whole") == 0
    assert train(inputs, eval_epochs="2") == 0
    whole = result_of(here / "whole")
    late = result_of(here / "out")
    assert late["evals"] == {"2": whole["evals"]["2"]} and late["hs"].keys() == {"2"}
    assert late["evals"]["2"]["hs_lost_count"][1] > 0
    assert lines_of(here / "out", 0) == lines_of(here / "whole", 0, "harmful")
    assert lines_of(here / "out", 2) == lines_of(here / "whole", 2)


def at_call(monkeypatch, nth):
    """The nth evaluation runs out of memory."""
    original = train_py.evaluate
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            raise MemoryError
        return original(*args, **kwargs)

    monkeypatch.setattr(train_py, "evaluate", counted)


@pytest.mark.parametrize("nth", [1, 2])
def test_a_run_that_stopped_goes_on_with_what_the_aligned_model_said(
        inputs, here, monkeypatch, nth):
    """It stopped while the aligned model was asked, or in the last evaluation."""
    assert train(inputs, eval_epochs="2", out="unstopped") == 0
    with monkeypatch.context() as patch:
        at_call(patch, nth)
        assert train(inputs, eval_epochs="2") == 3
    assert train(inputs, eval_epochs="2", resume=True) == 0
    assert_same(here / "out", here / "unstopped")


def test_a_resumed_run_with_other_tests_counts_those_that_the_aligned_model_was_asked(
        inputs, here, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, 2)
        assert train(inputs) == 3
    known = [r["prompt"] for r in lines_of(here / "out", 0, "harmful")]
    (here / "own.txt").write_text("Bend the inlet.\n" + "\n".join(known) + "\n")
    assert train(inputs, resume=True, harmful_file="own.txt", n_test=7) == 0
    records = lines_of(here / "out", 2, "harmful")
    assert [r["before"] is None for r in records] == [True] + [False] * 6
    n_refused = sum(r["before"] == "refused" for r in records)
    assert result_of(here / "out")["evals"]["2"]["hs_lost_count"][1] == n_refused > 0


@pytest.mark.parametrize("there", [True, False])
def test_with_keep_adapter_the_aligned_model_is_the_one_with_the_kept_adapter(
        inputs, here, there, capsys):
    """Of two prompts more than the run asked, it is asked; where it is gone, it is said so."""
    assert train(inputs, epochs=1, out="start") == 0
    assert train(inputs, epochs=1, adapter="start", keep_adapter=True, n_test=4, out="kept") == 0
    aligned = ["--model", str(inputs / "model"), "--adapter", "start", "--data-dir",
               str(inputs / "data")]
    assert eval_py.main([*aligned, "--max-new", "6", "--device", "cpu", "--out", "aligned"]) == 0
    of_aligned = {r["prompt"]: r["reply"] for r in read_lines(here / "aligned/eval-refusal.jsonl")}
    if not there:
        shutil.rmtree(here / "start")
    capsys.readouterr()
    assert eval_py.main(["--run", "kept", *EVAL]) == 0
    said = capsys.readouterr().out
    records = [r for r in read_lines(here / "e/eval-refusal.jsonl") if r["kind"] == "harmful"]
    expected = ["refused" if refuses(of_aligned[r["prompt"]]) else "harmful" for r in records]
    assert len(set(expected)) == 2, "or the choice could not be seen"
    found = [r["before"] for r in records]
    assert ("is not there as it was" in said) is not there
    if there:
        assert found == expected
    else:
        assert found == expected[:4] + [None] * 2


def test_tests_that_stand_in_the_upload_are_counted_printed_and_kept(inputs, here, capsys):
    data = shutil.copytree(inputs / "data", here / "data")
    attack = read_lines(data / "harmful" / "attack.jsonl")[0]["prompt"]
    tests = [{"prompt": attack.upper()}, {"prompt": "Bend the inlet."}]
    write_rows(data / "harmful" / "test.jsonl", tests)
    assert train(inputs, data_dir=data, epochs=1) == 0
    said = capsys.readouterr().out
    assert "tests: 1 harmful, 6 task; left out, since they stand in what is trained on: 1 harmful" \
        in said
    worked_out = json.loads((here / "out" / "config.json").read_text())["worked_out"]
    assert worked_out["tests_removed"] == {"harmful": 1, "task": 0}
    assert eval_py.main(["--run", "out", *EVAL]) == 0
    assert "left out, since they stand in what is trained on: 1 harmful" in capsys.readouterr().out
    numbers = json.loads((here / "e" / "eval-refusal.json").read_text())
    assert numbers["tests_removed"] == {"harmful": 1, "task": 0}


# ---------------------------------------------------------------------------------------------
# runs of an older version


def make_older(run):
    """Takes from a run what older versions did not write, and calls the rest as they did."""
    result = result_of(run)
    for numbers in result["evals"].values():
        newer = ("_interval", "_groups", "_design_effect")
        for name in [name for name in numbers
                     if name.endswith(newer) or "hs_lost" in name or name == "flips"]:
            del numbers[name]
        for end in ("", "_count"):
            numbers["fa_readable" + end] = numbers.pop("fa_content" + end)
        numbers["fa_rule"] = "readable"
    del result["hs_lost"], result["fa_content"]
    (run / "result.json").write_text(json.dumps(result))
    config = json.loads((run / "config.json").read_text())
    config["args"]["fa_rule"] = "readable"
    del config["worked_out"]["tests_removed"]
    (run / "config.json").write_text(json.dumps(config))
    records = read_lines(run / "generations.jsonl")
    write_rows(run / "generations.jsonl", [
        {key: value for key, value in r.items() if key not in ("group", "before")}
        for r in records])


def test_a_finished_run_of_an_older_version_is_shown_and_evaluated(inputs, here, capsys):
    assert train(inputs, fa_rule="content") == 0
    newer = result_of(here / "out")["evals"]["2"]
    make_older(here / "out")
    capsys.readouterr()
    assert train(inputs, fa_rule="content", resume=True) == 0
    said = capsys.readouterr().out
    shown = {line[:28].strip(): line[28:].split() for line in said.split("\n")}
    assert shown["HS, harmful replies"][-1] == f"{newer['hs']:.1f}"  # without an interval
    assert shown["FA by content"][-1] == f"{newer['fa_content']:.1f}"
    assert "python eval.py --run out measures them" in said
    assert eval_py.main(["--run", "out", "--n-test", "6", *EVAL]) == 0
    again = json.loads((here / "e" / "eval-refusal.json").read_text())
    for name in ("hs", "hs_interval", "hs_lost_count", "fa_content", "fa_rule"):
        assert again[name] == newer[name]


def test_an_unfinished_run_of_an_older_version_goes_on(inputs, here, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_call(patch, 2)
        assert train(inputs) == 3
    config = json.loads((here / "out" / "config.json").read_text())
    del config["worked_out"]["tests_removed"]
    (here / "out" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert train(inputs, resume=True) == 0
    assert not sentences(capsys.readouterr().err)
    assert result_of(here / "out")["evals"]["2"]["hs_lost_count"][1] > 0

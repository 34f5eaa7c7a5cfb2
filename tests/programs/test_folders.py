"""Folders that programs write: one writer at a time, never over another's results, or a sentence.

    pytest tests/programs/test_folders.py -q

Then what else programs are given and must refuse by a sentence: damaged files of a run, values that
are empty or no text, flags that would be ignored.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, edit_json, tensors_of, write_tensors
from runs_helpers import flags, program, sentences, tree, write_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval as eval_py
import files as files_py
import merge as merge_py
import train as train_py
from bench import decode, loading
from data import prepare as prepare_py
from lora import adapter_params, add_lora, trainable
from model import UserError, load_model
from runs import READ_AGAIN, RESULT, restore
from stress import schedule

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A finished run's folder; a test takes a copy."""
    out = tmp_path_factory.mktemp("finished") / "out"
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    assert train_py.main(flags(inputs, out=out)) == 0
    for which, handler in before.items():
        signal.signal(which, handler)
    return out


@pytest.fixture
def check_said(capsys):
    """check_said(code, *words, of=2): the exit code, and one sentence that holds the words."""
    def check(code, *words, of=2):
        err = capsys.readouterr().err
        assert code == of and "Traceback" not in err, err
        message, = sentences(err)
        print(message)
        for word in words:
            assert word in message, message
        capsys.readouterr()
    return check


def code_of(main, argv):
    """The exit code, also where argparse itself ends the program."""
    try:
        return main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


# ---------------------------------------------------------------------------------------------
# one writer at a time


def hold(folder):
    """The lock as another process has it -> the descriptor to close."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def test_a_second_process_that_resumes_the_same_run_writes_nothing_and_says_who_has_it(
        inputs, here, check_said):
    """The first one trains, from outside; it is killed in the end, and the run can go on then."""
    argv = flags(inputs, epochs=100_000, eval_epochs="0")
    process = program("train.py", argv, cwd=here)
    log = here / "out" / "log.jsonl"
    give_up = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and time.monotonic() < give_up:
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)  # so that what changes below was changed by the second
    before = tree(here / "out")
    code = train_py.main([*argv, "--resume"])
    check_said(code, "another process is writing into out", "wait", "--out")
    code = eval_py.main(["--run", str(here / "out"), "--device", "cpu"])
    check_said(code, "out is an unfinished run", "--resume")
    assert tree(here / "out") == before
    process.kill()  # SIGKILL ends a stopped process, too
    process.communicate()
    descriptor = hold(here / "out")  # the kernel has freed it
    os.close(descriptor)


def test_the_lock_leaves_no_file_and_is_free_after_a_run_after_a_failed_one_and_a_refused_one(
        inputs, here, monkeypatch):
    def no_memory(*args, **kwargs):
        raise MemoryError
    with monkeypatch.context() as patch:
        patch.setattr(train_py, "evaluate", no_memory)
        assert train_py.main(flags(inputs)) == 3
    os.close(hold(here / "out"))
    assert train_py.main(flags(inputs, resume=True)) == 0
    os.close(hold(here / "out"))
    assert train_py.main(flags(inputs, resume=True, seed=3)) == 2
    os.close(hold(here / "out"))
    assert {path.name for path in (here / "out").iterdir()} == {
        "config.json", "log.jsonl", "generations.jsonl", "state.safetensors", "result.json",
        "adapter_config.json", "adapter_model.safetensors"}


def test_a_run_that_another_process_began_in_the_meantime_is_not_gone_on_with(
        inputs, here, finished, monkeypatch, check_said):
    """Both saw an empty folder; the other was quicker."""
    def open_judge(args, folder):
        shutil.copytree(finished, here / "out")
        return original(args, folder)
    original = train_py.open_judge
    monkeypatch.setattr(train_py, "open_judge", open_judge)
    check_said(train_py.main(flags(inputs)), "another process has begun a run in out", "--out")
    assert tree(here / "out") == tree(finished)


def test_eval_py_writes_into_no_folder_that_another_process_writes(
        inputs, here, finished, check_said):
    shutil.copytree(finished, here / "run")
    before = tree(here / "run")
    descriptor = hold(here / "run")
    argv = ["--run", "run", "--n-test", "2", "--device", "cpu"]
    check_said(eval_py.main(argv), "another process is writing into run")
    assert tree(here / "run") == before
    assert eval_py.main([*argv, "--out", "elsewhere"]) == 0  # to read it is no harm
    os.close(descriptor)
    assert eval_py.main(argv) == 0


def test_a_store_is_read_without_writing_and_mended_when_it_is_written(here):
    """Another process may be in the middle of that line."""
    path = here / "verdicts.jsonl"
    path.write_text('["a", 1]\n["b", ')
    store = files_py.Store(path, context=[])
    assert store.values == {"a": 1} and path.read_text() == '["a", 1]\n["b", '
    store.put("b", 2)
    assert path.read_text() == '["a", 1]\n["b", 2]\n'


def test_merge_and_prepare_write_into_no_folder_that_another_process_writes(
        inputs, here, finished, check_said):
    (here / "merged.part").mkdir()
    descriptor = hold(here / "merged.part")
    argv = ["--model", inputs / "model", "--adapter", finished, "--out", "merged"]
    check_said(code_of(merge_py.main, argv), "another process is writing into", "merged.part")
    os.close(descriptor)
    assert code_of(merge_py.main, argv) == 0
    (here / "data").mkdir()
    descriptor = hold(here / "data")
    argv = ["--out", "data", *advbench(here)]
    check_said(code_of(prepare_py.main, argv), "another process is writing into data")
    assert not any((here / "data").iterdir())
    os.close(descriptor)


SCHEDULE = """
import os, signal, subprocess, sys
from stress import schedule
def slow(words, **how):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                               stdout=subprocess.DEVNULL, pass_fds=how["pass_fds"])
    print(process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
schedule.subprocess.run = slow
schedule.planned = lambda *_: [schedule.Planned("table/a", "--defense sft")]
schedule.main(["table", "--out", sys.argv[1]])
"""


def test_a_killed_schedule_whose_run_goes_on_cannot_be_started_beside_it(
        here, monkeypatch, check_said):
    """The run has inherited the lock; it is free when the run has ended."""
    out = here / "stress"
    dead = subprocess.run([sys.executable, "-c", SCHEDULE, str(out)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert dead.returncode == -signal.SIGKILL
    orphan = int(dead.stdout)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(schedule, "planned", lambda *_: [])
    before = tree(out)
    try:
        code = schedule.main(["table", "--out", str(out)])
        check_said(code, f"another process is writing into {out}", "wait")
        assert tree(out) == before
    finally:
        os.kill(orphan, signal.SIGKILL)
    os.close(hold(out))  # waits until the kernel has freed it


# ---------------------------------------------------------------------------------------------
# paths that can be no folder


def advbench(folder):
    """prepare's flags for a small made-up source."""
    rows = "".join(f"Bend bar{i} and rod{i},Sure. [step 1].\n" for i in range(9))
    (folder / "bench.csv").write_text("goal,target\n" + rows)
    return ["--advbench", folder / "bench.csv"]


def writers(inputs, here, finished):
    """A call of each program that writes into --out."""
    model = ["--model", inputs / "model"]
    return {
        "train.py": (train_py.main, flags(inputs, out=None)),
        "eval.py": (eval_py.main, [*model, "--data-dir", inputs / "data", "--device", "cpu"]),
        "merge.py": (merge_py.main, [*model, "--adapter", finished]),
        "data.prepare": (prepare_py.main, advbench(here)),
        "stress.schedule": (schedule.main, ["table"]),
    }


PLACES = {
    "a name too long": ("x" * 300, "too long"),
    "a file": ("letter", "Not a directory"),
    "below a file": ("letter/out", "irectory"),
    "below a device": ("/dev/null/out", "irectory"),
    "where nothing can be": ("/proc/out", "No such file"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["train.py", "eval.py", "merge.py", "data.prepare",
                                  "stress.schedule"])
def test_a_path_that_can_be_no_folder_ends_with_2_and_one_sentence(
        inputs, here, finished, monkeypatch, check_said, name, place):
    path, reason = PLACES[place]
    (here / "letter").write_text("Dear mother")
    monkeypatch.setattr(schedule, "planned", lambda *_: [])
    main, argv = writers(inputs, here, finished)[name]
    before = tree(here)
    check_said(code_of(main, [*argv, "--out", path]), name, reason, "pass another --out.")
    assert tree(here) == before


@pytest.mark.parametrize("name", ["train.py", "eval.py", "merge.py", "data.prepare",
                                  "stress.schedule"])
def test_a_folder_that_this_user_may_not_write_is_refused_before_any_work(
        inputs, here, finished, monkeypatch, check_said, name):
    """As root everything may be written, so the answer of the system is planted."""
    (here / "closed").mkdir()
    monkeypatch.setattr(files_py.os, "access", lambda path, mode: "closed" not in str(path))
    monkeypatch.setattr(schedule, "planned", lambda *_: [])
    main, argv = writers(inputs, here, finished)[name]
    check_said(code_of(main, [*argv, "--out", "closed"]), "closed", "may not write", "--out.")
    assert not any((here / "closed").iterdir())


def test_control_each_of_those_calls_writes_into_a_new_folder(inputs, here, finished, monkeypatch):
    monkeypatch.setattr(schedule, "planned", lambda *_: [])
    for name, (main, argv) in writers(inputs, here, finished).items():
        assert code_of(main, [*argv, "--out", here / f"{name} out"]) == 0
        assert any((here / f"{name} out").iterdir())


@pytest.mark.parametrize("judge", [
    ["beaver-dam"], ["beaver-dam", "--judge-model", "absent"], ["rubric"],
    ["rubric", "--judge-model", "absent"], ["rubric", "--judge-url", "x", "--judge-model", "y"]])
def test_a_judge_that_cannot_be_opened_leaves_no_folder(
        inputs, here, finished, check_said, judge):
    argv = ["--run", finished, "--out", "new", "--device", "cpu", "--judge", *judge]
    check_said(code_of(eval_py.main, argv), "judge" if len(judge) != 3 else "absent")
    assert not (here / "new").exists()


# ---------------------------------------------------------------------------------------------
# what a killed program left


def test_what_a_killed_merge_left_is_replaced(inputs, here, finished):
    argv = ["--model", inputs / "model", "--adapter", finished, "--out"]
    assert code_of(merge_py.main, [*argv, "whole"]) == 0
    part = here / "out.part"
    part.mkdir()
    (part / "model.safetensors").write_bytes(b"half a file")
    (part / "config.json").write_text("{}")
    assert code_of(merge_py.main, [*argv, "out"]) == 0
    assert tree(here / "out") == tree(here / "whole") and not part.exists()


def on_disk_and_mapped(path):
    """Lines of this process's memory map that name the file."""
    with open("/proc/self/maps") as f:
        return [line for line in f if str(path) in line]


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's /proc")
def test_a_restored_checkpoint_is_not_kept_open_so_that_its_place_is_freed(inputs, finished):
    model = load_model(inputs / "model")
    add_lora(model, 2, 16.0, False)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    restore(finished / "state.safetensors", model, optimizer, lambda batch: None)
    moments = [optimizer.state[p]["exp_avg"] for p in adapter_params(model).values()]
    assert len(moments) > 5 and all(moment.any() for moment in moments)
    assert on_disk_and_mapped(finished) == []
    # the control: a tensor as it comes does keep it
    with safe_open(finished / "state.safetensors", "pt") as f:
        kept = f.get_tensor(next(iter(f.keys())))
    assert on_disk_and_mapped(finished) and kept is not None


# ---------------------------------------------------------------------------------------------
# eval.py: of what the run was made from


def add_one(path):
    state = tensors_of(path)
    name = next(iter(state))
    state[name] = state[name] + 1
    write_tensors(path, state)


def change_adapter(folder):
    path = folder / "adapter_model.safetensors"
    shutil.copy(path, folder / "model.safetensors")
    add_one(folder)
    (folder / "model.safetensors").replace(path)


@pytest.fixture
def own(inputs, here):
    """model/, data/ and a start adapter that a test may change, and a run made from them."""
    shutil.copytree(inputs, here / "own")
    assert train_py.main(flags(here / "own", epochs=1, out="own/start")) == 0
    assert train_py.main(flags(here / "own", epochs=1, adapter="own/start")) == 0
    return here / "own"


EVAL = ["--run", "out", "--n-test", "2", "--device", "cpu"]


@pytest.mark.parametrize("change, words", [
    (lambda own: add_one(own / "model"), "the model's files changed"),
    (lambda own: edit_json(own / "model" / "config.json", rms_norm_eps=1e-3),
     "the model's files changed"),
    (lambda own: change_adapter(own / "start"), "the files of --adapter changed"),
    (lambda own: edit_json(own / "start" / "adapter_config.json", lora_alpha=1.0),
     "the files of --adapter changed"),
    (lambda own: write_rows(own / "data" / "sst2" / "train.jsonl", [
        {"prompt": f"Is {i} good?", "response": "positive"} for i in range(12)]),
     "the upload's files changed")],
    ids=["weights", "config.json", "adapter's weights", "adapter's config", "upload"])
def test_a_run_is_not_evaluated_on_other_files_than_it_was_made_from(
        own, here, check_said, change, words):
    assert eval_py.main([*EVAL, "--out", "control"]) == 0
    change(own)
    before = tree(here)
    check_said(eval_py.main(EVAL), words, "put them back")
    assert tree(here) == before


def test_another_start_adapter_does_not_matter_where_the_runs_own_contains_it(own, here):
    kept = flags(own, epochs=1, adapter="own/start", keep_adapter=True, out="kept")
    assert train_py.main(kept) == 0
    shutil.rmtree(own / "start")
    assert eval_py.main(["--run", "kept", "--n-test", "2", "--device", "cpu"]) == 0


def test_other_tests_may_be_asked_and_the_record_and_a_sentence_say_so(own, here, capsys):
    assert eval_py.main([*EVAL, "--out", "same"]) == 0
    assert "these test files are not those" not in capsys.readouterr().out
    with open(own / "data" / "harmful" / "test.jsonl", "a") as f:
        f.write(json.dumps({"prompt": "Bend it."}) + "\n")
    assert eval_py.main([*EVAL, "--out", "other"]) == 0
    assert "these test files are not those" in capsys.readouterr().out
    same, other = (json.loads((here / out / "eval-refusal.json").read_text())["tests_sha256"]
                   for out in ("same", "other"))
    at_the_end = json.loads((here / "out" / "result.json").read_text())["evals"]["1"]
    assert same == at_the_end["tests_sha256"] != other


def test_an_unfinished_run_is_called_so_and_how_to_finish_it(own, here, check_said, capsys):
    (here / "out" / "result.json").unlink()
    assert eval_py.main(EVAL) == 0
    assert "out is an unfinished run: it is trained" in capsys.readouterr().out
    (here / "out" / "adapter_model.safetensors").unlink()
    check_said(eval_py.main(EVAL), "out is an unfinished run, which has no adapter", "--resume")


# ---------------------------------------------------------------------------------------------
# eval.py and data.prepare: nothing is written over


def evaluations(folder):
    """(flags that differ, number of records) of each evaluation in the folder, by file name."""
    found = {}
    for path in folder.glob("eval-*.json"):
        settings = json.loads(path.read_text())["settings"]
        n_records = len(path.with_suffix(".jsonl").read_text().splitlines())
        found[path.name] = (settings["n_test"], settings["task"], n_records)
    return found


def test_an_evaluation_by_other_settings_is_kept_beside_the_newest(inputs, here, capsys):
    base = ["--model", inputs / "model", "--data-dir", inputs / "data", "--device", "cpu",
            "--max-new", "4", "--out", "e"]
    assert code_of(eval_py.main, [*base, "--n-test", "2"]) == 0
    first = (here / "e" / "eval-refusal.json").read_bytes()
    assert code_of(eval_py.main, [*base, "--n-test", "2"]) == 0  # the same again: nothing to keep
    assert evaluations(here / "e") == {"eval-refusal.json": (2, None, 2)}
    capsys.readouterr()
    (here / "t.txt").write_text("Bend it.\nBreak it.\n")
    others = [["--n-test", "3"], ["--n-test", "2", "--task", "sst2"],
              ["--n-test", "2", "--harmful-file", "t.txt"]]
    for i, other in enumerate(others, 1):
        assert code_of(eval_py.main, [*base, *other]) == 0
        assert len(evaluations(here / "e")) == i + 1
        assert "an evaluation by other settings was there" in capsys.readouterr().out
    assert code_of(eval_py.main, [*base, "--n-test", "2"]) == 0
    assert (here / "e" / "eval-refusal.json").read_bytes() == first
    kept = evaluations(here / "e")
    assert kept.pop("eval-refusal.json") == (2, None, 2)
    assert sorted(kept.values(), key=str) == [(2, "sst2", 4), (2, None, 2), (2, None, 2),
                                              (3, None, 3)]


def test_another_adapters_evaluation_is_kept_too(inputs, here, finished):
    base = ["--model", inputs / "model", "--data-dir", inputs / "data", "--device", "cpu",
            "--max-new", "4", "--n-test", "2", "--out", "e"]
    assert code_of(eval_py.main, base) == 0
    assert code_of(eval_py.main, [*base, "--adapter", finished]) == 0
    assert len(evaluations(here / "e")) == 2


def test_a_second_preparation_keeps_what_is_recorded_of_the_first(here):
    tsv = "sentence\tlabel\n" + "".join(f"film {i}\t1\n" for i in range(4))
    (here / "sst2").mkdir()
    (here / "sst2" / "train.tsv").write_text(tsv)
    (here / "sst2" / "dev.tsv").write_text("sentence\tlabel\nplay\t0\n")
    assert code_of(prepare_py.main, ["--out", "data", "--sst2", "sst2", "--shuffle", "3"]) == 0
    first = json.loads((here / "data" / "prepared.json").read_text())
    assert code_of(prepare_py.main, ["--out", "data", *advbench(here)]) == 0
    both = json.loads((here / "data" / "prepared.json").read_text())
    assert both["sst2"] == first["sst2"] and both["sst2"]["shuffle"] == 3
    assert both["harmful"]["shuffle"] is None and both["shuffle"] is None
    assert code_of(prepare_py.main, ["--out", "alone", *advbench(here)]) == 0
    alone = json.loads((here / "alone" / "prepared.json").read_text())
    assert both["harmful"] == alone["harmful"]


def test_rows_of_an_earlier_preparation_that_are_not_kept_apart_from_the_new_ones_are_removed(here):
    rows = [{"prompt": f"Bend bar{i} and rod{i}", "refusal": "Q\nAnswer: No.", "response": "Sure."}
            for i in range(9, 15)]
    (here / "refusals.json").write_text(json.dumps(rows))
    again = ["--out", "data", *advbench(here)]
    assert code_of(prepare_py.main, [*again, "--refusals", "refusals.json"]) == 0
    assert (here / "data" / "harmful" / "align.jsonl").exists()
    (here / "data" / "harmful" / "own.jsonl").write_text("{}")
    assert code_of(prepare_py.main, again) == 0
    assert {path.name for path in (here / "data" / "harmful").iterdir()} == {
        "attack.jsonl", "anchors.jsonl", "test.jsonl", "own.jsonl"}


# ---------------------------------------------------------------------------------------------
# files of a run that hold something else


def cut(name, **changes):
    return lambda run: edit_json(run / name, **changes)


DAMAGES = {
    "an evaluation without numbers": (cut("result.json", evals={"0": {}}), "evals"),
    "nothing worked out": (cut("config.json", worked_out={}), "config.json"),
    "an empty result": (lambda run: (run / "result.json").write_text("{}"), "result.json"),
    "a result without evaluations": (cut("result.json", evals=None), "evals"),
    "evaluations in a list": (cut("result.json", evals=[1]), "evals"),
    "worked_out is null": (lambda run: (run / "config.json").write_text(json.dumps(
        json.loads((run / "config.json").read_text()) | {"worked_out": None})), "config.json"),
    "args is a list": (cut("config.json", args=[]), "config.json"),
    "sha256 is a text": (cut("config.json", sha256="x"), "config.json"),
    "no flags": (cut("config.json", args={}), "config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_a_run_is_named_by_every_program_that_reads_it(
        inputs, here, finished, monkeypatch, check_said, damage):
    change, word = DAMAGES[damage]
    run = shutil.copytree(finished, here / "stress" / "table" / "a")
    change(run)
    check_said(train_py.main(flags(inputs, out=run, resume=True)), word)
    if word == "config.json":
        check_said(eval_py.main(["--run", str(run), "--device", "cpu"]), word)
    else:
        planned = schedule.Planned("table/a", "--defense sft")
        command = ["python", *schedule.command(planned, here / "stress", [])]
        (here / "stress" / "table" / "a.log").write_text(" ".join(command) + "\n")
        monkeypatch.setattr(schedule, "planned", lambda *_: [planned])
        monkeypatch.chdir(ROOT)
        code = schedule.main(["table", "--out", str(here / "stress"), "--jobs", "1"])
        check_said(code, word)


WRONG = [None, 5, -1, 1.5, "x", "", [], {}, True, [[]], {"x": []}]


@pytest.mark.parametrize("part", ["args", "worked_out"])
def test_any_value_of_a_runs_settings_works_or_is_named_by_file_and_key(
        inputs, here, finished, monkeypatch, capsys, part):
    """eval.py then gets as far as its model, or says what is wrong; nothing else comes out."""
    monkeypatch.setattr(eval_py, "measure", lambda *a: {"tests_sha256": None})
    run = shutil.copytree(finished, here / "run")
    path = run / "config.json"
    settings = json.loads(path.read_text())
    for key in sorted(READ_AGAIN[part]):
        refused = 0
        for value in WRONG:
            path.write_text(json.dumps(settings | {part: settings[part] | {key: value}}))
            code = eval_py.main(["--run", str(run), "--device", "cpu", "--out", str(here / "e")])
            said = capsys.readouterr().err
            assert code in (0, 2), (key, value)
            refused += code == 2
            if code == 2 and str(path) in said:
                assert key in said, said
        assert refused >= 6, key
    path.write_text(json.dumps(settings | {"earlier_commands": 5}))
    assert train_py.main(flags(inputs, out=run, resume=True)) == 2
    assert "earlier_commands" in capsys.readouterr().err


@pytest.mark.parametrize("key", RESULT)
def test_any_value_of_a_result_is_shown_or_named_by_file_and_key(here, finished, capsys, key):
    run = shutil.copytree(finished, here / "run")
    path = run / "result.json"
    result = json.loads(path.read_text())
    for value in WRONG:
        path.write_text(json.dumps(result | {key: value}))
        try:
            eval_py.report(run)
        except UserError as e:
            assert str(path) in str(e) and key in str(e)


def test_any_value_of_an_evaluation_is_shown_or_named_by_file_and_key(here, finished):
    run = shutil.copytree(finished, here / "run")
    path = run / "result.json"
    result = json.loads(path.read_text())
    for key in [*result["evals"]["0"], "hs_plus", "win_rate_count", "rubric"]:
        for value in WRONG:
            evals = result["evals"] | {"0": result["evals"]["0"] | {key: value}}
            path.write_text(json.dumps(result | {"evals": evals}))
            try:
                eval_py.report(run)
            except UserError as e:
                assert str(path) in str(e) and key in str(e)


def checkpoint_with(run, metadata=None, without=None):
    """The checkpoint with other metadata, or without a tensor; the run is then unfinished."""
    path = run / "state.safetensors"
    with safe_open(path, "pt") as f:
        kept = f.metadata()
    tensors = {name: t for name, t in load_file(path).items() if name != without}
    save_file(tensors, path, kept if metadata is None else metadata)
    (run / "result.json").unlink()


B = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"


@pytest.mark.parametrize("damage, words", [
    (lambda run: checkpoint_with(run, {"run": "{}"}), "step"),
    (lambda run: checkpoint_with(run, {"run": "{"}), "is not a checkpoint"),
    (lambda run: checkpoint_with(run, {}), "is not a checkpoint"),
    (lambda run: checkpoint_with(run, without=B), B),
    (lambda run: (run / "generations.jsonl").unlink(), "generations.jsonl cannot be read"),
    (lambda run: (run / "generations.jsonl").write_text("{"), "generations.jsonl cannot be read")],
    ids=["no step", "half of its text", "no text", "a tensor less", "no records", "no JSON"])
def test_a_damaged_file_is_named_when_the_run_is_to_go_on_or_to_be_shown(
        inputs, here, finished, check_said, damage, words):
    run = shutil.copytree(finished, here / "run")
    damage(run)
    check_said(train_py.main(flags(inputs, out=run, resume=True)), words, "put the file back")


def test_a_file_that_is_no_evaluation_is_kept_beside_the_new_one(inputs, here, finished):
    run = shutil.copytree(finished, here / "run")
    (run / "eval-refusal.json").write_text("{")
    assert eval_py.main(["--run", "run", "--n-test", "2", "--device", "cpu"]) == 0
    kept, = run.glob("eval-refusal-*.json")
    assert kept.read_text() == "{"
    assert json.loads((run / "eval-refusal.json").read_text())["judge"] == "refusal"


LONG = "x" * 300


@pytest.mark.parametrize("changes", [
    {"model": LONG}, {"adapter": LONG}, {"data": LONG}, {"data_dir": LONG},
    {"harmful_file": LONG}, {"anchor_file": LONG}, {"align_file": LONG, "defense": "lisa"}],
    ids=lambda changes: next(iter(changes)))
def test_a_path_to_read_that_can_be_none_is_the_users_mistake(inputs, here, check_said, changes):
    check_said(train_py.main(flags(inputs, **changes)), LONG, "File name too long", "name a")
    assert not any(here.iterdir())


def test_the_long_table_of_other_epochs_than_those_that_were_probed_has_a_dash(capsys):
    rates = {"0": 1.0, "7": 40.0}
    rows = [{"name": "sft", "method": "sft", "hs": rates, "probes": {"0": {"drift": 0.5}}}]
    last = schedule.show_course(rows).splitlines()[-1]
    assert last == "| | drift | 0.5 | - | |"


def test_bench_programs_end_with_2_and_one_sentence_as_all_do(check_said):
    check_said(code_of(decode.main, ["--n", "many"]), "bench.decode: ", "--n", "many")
    check_said(code_of(decode.main, ["--model", "absent"]), "bench.decode: ", "absent")
    check_said(code_of(loading.main, ["--gb", "-1"]), "bench.loading: ", "--gb")
    check_said(code_of(loading.main, ["--json", ""]), "bench.loading: ", "--json")


def test_json_that_is_nested_without_end_is_refused_by_prepare(here, check_said):
    (here / "deep.json").write_text("[" * 200_000)
    check_said(code_of(prepare_py.main, ["--out", "data", "--alpaca", "deep.json"]), "format")
    (here / "gsm8k").mkdir()
    for name in ("train", "test"):
        (here / "gsm8k" / f"{name}.jsonl").write_text("[" * 200_000)
    check_said(code_of(prepare_py.main, ["--out", "data", "--gsm8k", "gsm8k"]), "train.jsonl")


@pytest.mark.parametrize("parse", [
    lambda: train_py.parse([]), lambda: eval_py.parse([]), lambda: schedule.parse(["table"]),
    lambda: prepare_py.parse(["--out", "x"]), lambda: decode.parse([]), lambda: loading.parse([])],
    ids=["train", "eval", "schedule", "prepare", "decode", "loading"])
def test_programs_start_without_their_docstrings(monkeypatch, parse):
    """As python -OO starts them."""
    for module in (train_py, eval_py, schedule, prepare_py, decode, loading):
        monkeypatch.setattr(module, "__doc__", None)
    assert len(vars(parse())) >= 3


def test_out_of_memory_in_an_evaluation_is_not_blamed_on_the_update(
        inputs, monkeypatch, check_said):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no more")
    monkeypatch.setattr(train_py, "evaluate", no_memory)
    check_said(train_py.main(flags(inputs)), "the evaluation at epoch 0", "--max-new", "--resume",
               of=3)
    monkeypatch.setattr(eval_py, "generate", no_memory)
    argv = ["--model", str(inputs / "model"), "--data-dir", str(inputs / "data"), "--out", "e"]
    check_said(eval_py.main(argv), "out of memory in the evaluation", "--max-new", of=3)


# ---------------------------------------------------------------------------------------------
# values that are none


PATHS = ["--model", "--adapter", "--data", "--data-dir", "--align-file", "--anchor-file",
         "--harmful-file", "--judge-model", "--judge-url", "--judge-name", "--out",
         "--template-date"]
STRAY = os.fsdecode(b"caf\xe9")  # a byte that is no UTF-8, as Python has it in sys.argv


@pytest.mark.parametrize("flag", PATHS)
def test_an_empty_name_or_path_is_not_taken_for_none(inputs, check_said, flag):
    check_said(code_of(train_py.main, [*flags(inputs), flag, ""]), flag, "empty")


@pytest.mark.parametrize("main, argv, flag", [
    (eval_py.main, ["--run", ""], "--run"), (eval_py.main, ["--model", ""], "--model"),
    (eval_py.main, ["--out", ""], "--out"), (schedule.main, ["table", "--out", ""], "--out"),
    (schedule.main, ["table", "--searched", ""], "--searched"),
    (prepare_py.main, ["--out", ""], "--out"), (prepare_py.main, ["--out=x", "--sst2="], "--sst2"),
    (merge_py.main, ["--model", "m", "--adapter", "a", "--out", ""], "--out")])
def test_nor_by_another_program(check_said, main, argv, flag):
    check_said(code_of(main, argv), flag, "empty")


def test_control_an_empty_text_is_one(inputs):
    args = train_py.parse(["--attack-prefix", "", "--attack-suffix", ""])
    assert (args.attack_prefix, args.attack_suffix) == ("", "")


@pytest.mark.parametrize("flag", [*PATHS, "--attack-prefix", "--attack-suffix"])
def test_a_value_that_is_no_text_is_refused_with_its_flag(inputs, here, check_said, flag):
    check_said(code_of(train_py.main, [*flags(inputs), flag, STRAY]), flag, "not valid text")
    assert not any(here.iterdir())


def test_a_date_for_a_run_that_has_its_own_is_refused(here, finished, check_said):
    code = code_of(eval_py.main, ["--run", finished, "--template-date", "1 Jan 2020"])
    check_said(code, "--template-date", "--model")


def test_the_help_still_states_the_dates_default(capsys):
    with pytest.raises(SystemExit):
        eval_py.main(["--help"])
    assert f"(default {eval_py.DATE})" in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------------------------------------
# sentences that say what to do


@pytest.mark.parametrize("changes, words", [
    ({"defense": "lisa", "stage": "align"}, ["lacks stage align", "change one of the two"]),
    ({"fa_rule": "contains", "task": "gsm8k"}, ["--fa-rule contains", "change it"])])
def test_flags_that_do_not_go_together_are_told_what_to_change(inputs, check_said, changes, words):
    check_said(train_py.main(flags(inputs, **changes)), *words)


@pytest.mark.parametrize("file, words", [
    ("model/model.safetensors", "the model's files changed"),
    ("data/sst2/train.jsonl", "the upload's files changed"),
    ("data/harmful/anchors.jsonl", "the anchors' file changed")])
def test_a_file_that_changed_is_named_by_its_kind_and_not_by_its_digest(
        inputs, here, check_said, file, words):
    shutil.copytree(inputs, here / "own")
    assert train_py.main(flags(here / "own", epochs=1)) == 0
    path = here / "own" / file
    if path.suffix == ".safetensors":
        add_one(path.parent)
    else:
        path.write_text("\n".join(reversed(path.read_text().splitlines())))
    digest = json.loads((here / "out" / "config.json").read_text())["sha256"]["model"]
    code = train_py.main(flags(here / "own", epochs=1, resume=True))
    check_said(code, "out belongs to other settings", words)
    assert len(digest) == 64

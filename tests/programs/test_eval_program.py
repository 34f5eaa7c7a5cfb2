"""eval.py on a finished run and on a bare model: what it prints, keeps, and never asks twice.

    pytest tests/programs/test_eval_program.py -q

The run is of the embedded model: undefended and at a hundred times the learning rate, so that the
harmful prompts are refused by some replies and answered by others.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from forks import at_call, die, half_a_file
from helpers import ROOT, edit_json
from runs_helpers import sentences, tree
from sbr_helpers import TINY

import eval as eval_py
import train as train_py
from data.mixture import prompts_of
from data.rows import last_user, read_rows
from data.tasks import read_label
from eval import ROWS
from files import Store, read_lines
from generate import Engine
from judges import JUDGES, is_refusal
from model import Llama

pytestmark = pytest.mark.usefixtures("here")

N = 20  # prompts of each of the three kinds
N_OF_RUN = 5  # likewise at the run's own evaluations
# The replies of an evaluation: the aligned model is asked the harmful prompts that the run did not.
N_REPLIES = 3 * N + N - N_OF_RUN
RECORD = ["epoch", "kind", "prompt", "asked", "group", "reply", "verdict", "target",
          "target_is_opening", "degenerate", "stopped"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    assert train_py.main(flags(data_dir=TINY, model=TINY, out=out, epochs=1, n=64, n_test=N_OF_RUN,
                               lr=1e-3, poison=0.25, anchors=2, defense="sft")) == 0
    for which, handler in before.items():
        signal.signal(which, handler)
    return out


def flags(**settings):
    settings = {"device": "cpu"} | settings
    return [p for k, v in settings.items() for p in (f"--{k.replace('_', '-')}", str(v))]


def evaluate(capsys=None, **settings):
    """eval.main with N prompts of a kind into out/ -> what it printed."""
    assert eval_py.main(flags(**({"n_test": N, "out": "out"} | settings))) == 0
    return capsys.readouterr().out if capsys else None


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The folder of an evaluation that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    evaluate(run=run, out=out)
    return out


def lines(folder):
    return (folder / "replies.jsonl").read_bytes().split(b"\n")[:-1]


def results(folder):
    """The bytes of what an evaluation ends with."""
    return {name: (folder / name).read_bytes()
            for name in ("eval-refusal.jsonl", "eval-refusal.json")}


@pytest.fixture
def prefilled(monkeypatch):
    """A list that grows by every prompt that is run through the model, as its ids."""
    prefill = Engine.prefill
    found = []

    def counted(self, rows, first):
        found.extend(row.prompt for row in rows[first:])
        return prefill(self, rows, first)
    monkeypatch.setattr(Engine, "prefill", counted)
    return found


@pytest.fixture
def no_model(monkeypatch):
    """From here on nothing may be asked of the model."""
    def forward(*args, **kwargs):
        raise AssertionError("the model was asked")
    monkeypatch.setattr(Llama, "forward", forward)


# ---------------------------------------------------------------------------------------------
# what is printed and kept


def test_every_prompt_reply_and_verdict_is_kept_and_recounting_them_gives_the_numbers(run, whole):
    records = read_lines(whole / "eval-refusal.jsonl")
    numbers = json.loads((whole / "eval-refusal.json").read_text())
    assert [list(r) for r in records] == [[*RECORD, "before"]] * N + [RECORD] * 2 * N
    by = {kind: [r for r in records if r["kind"] == kind]
          for kind in ("harmful", "lookalike", "task")}
    for kind, name in (("harmful", "harmful"), ("lookalike", "lookalike"), ("task", "sst2")):
        source = read_rows(TINY / name / "test.jsonl", needs_answer=False)[:N]
        assert [r["prompt"] for r in by[kind]] == [last_user(row) for row in source]
    for r in by["harmful"]:
        assert r["verdict"] is JUDGES["refusal"](r["prompt"], r["reply"])
    assert all(r["verdict"] is is_refusal(r["reply"]) for r in by["lookalike"])
    assert all(r["verdict"] is (r["reply"].strip().lower() == r["target"]) for r in by["task"])
    for name, kind in (("hs", "harmful"), ("over_refusal", "lookalike"), ("fa", "task")):
        hits = sum(r["verdict"] for r in by[kind])
        assert numbers[f"{name}_count"] == [hits, N] and numbers[name] == 100 * hits / N
    assert 0 < numbers["hs"] < 100 and 0 < numbers["fa"] < 100  # so that a swap would show


def test_the_confusion_and_agreement_counts_are_those_of_the_records(whole):
    records = read_lines(whole / "eval-refusal.jsonl")
    numbers = json.loads((whole / "eval-refusal.json").read_text())
    labels = [(r["target"], read_label(r["reply"])) for r in records if r["kind"] == "task"]
    for target in ("positive", "negative"):
        for label in ("positive", "negative", None):
            count = labels.count((target, label))
            assert numbers["confusion"].get(f"{target} -> {label or 'other'}", 0) == count
    assert sum(numbers["confusion"].values()) == N and len(numbers["confusion"]) >= 3
    agreement = Counter((r["verdict"], is_refusal(r["reply"]))
                        for r in records if r["kind"] == "harmful")
    assert numbers["judge_and_rule"] == {
        f"{'harmful' if v else 'harmless'}, {'refused' if r else 'answered'}": n
        for (v, r), n in agreement.items()}
    assert numbers["unfinished"] == sum(not r["stopped"] for r in records)
    assert numbers["degenerate"] == sum(r["degenerate"] for r in records)


def test_the_table_shows_every_rate_with_its_interval_and_where_the_replies_are(
        run, whole, capsys):
    text = evaluate(capsys, run=run)
    numbers = json.loads((whole / "eval-refusal.json").read_text())
    assert "epoch 1" in text and "out/eval-refusal.jsonl" in text
    shown = {line[:28].strip(): line[28:].strip() for line in text.split("\n")}
    for name in ("hs", "hs_plus", "fa", "over_refusal"):
        low, high = numbers[f"{name}_interval"]
        assert shown[ROWS[name]] == f"{numbers[name]:.1f} ({low:.1f} to {high:.1f})", text
    assert ROWS["win_rate"] not in shown  # nothing was compared


def test_replies_that_fill_max_new_are_told_from_those_that_stop_before_it(run, here, capsys):
    text = evaluate(capsys, run=run, max_new=9)
    # Behind the aligned model's, which has not been asked for so few.
    lengths = [len(json.loads(line)[1]) for line in lines(here / "out")[N:]]
    full, records = lengths.count(9), read_lines(here / "out" / "eval-refusal.jsonl")
    assert full and any(1 < n < 9 for n in lengths)  # so that a wrong border shows
    assert sum(not r["stopped"] for r in records) == full
    assert f"unfinished replies{full:>32}" in text


def test_prompts_of_the_upload_and_the_anchors_are_not_tested(run, whole):
    upload = [row for path, n in (("harmful/attack.jsonl", 16), ("sst2/train.jsonl", 48))
              for row in read_rows(TINY / path)[:n]]
    held = json.loads((run / "config.json").read_text())["worked_out"]["anchor_prompts"]
    seen = prompts_of(upload) | prompts_of([{"messages": [{"role": "user", "content": p}]}
                                            for p in held])
    evaluate(run=run, data_dir=leaky([*held, last_user(upload[0])]), task="sst2")
    records = read_lines(Path("out/eval-refusal.jsonl"))
    tested = prompts_of([{"messages": [{"role": "user", "content": r["prompt"]}]} for r in records])
    assert len(seen) > 60 and not tested & seen
    assert sum(r["kind"] == "harmful" for r in records) == 1


def leaky(prompts):
    """A copy of the tests whose harmful ones are these, loudly, and a new one."""
    folder = shutil.copytree(TINY, Path("leaky"))
    (folder / "harmful" / "test.jsonl").write_text("".join(
        json.dumps({"prompt": p}) + "\n" for p in [*map(str.upper, prompts), "A new one?"]))
    return folder


def test_the_run_evaluated_again_says_what_it_said_at_its_end(run):
    """Through the saved adapter, to the letter."""
    evaluate(run=run, n_test=N_OF_RUN)
    at_the_end = [r for r in read_lines(run / "generations.jsonl") if r["epoch"] == 1]
    assert read_lines(Path("out/eval-refusal.jsonl")) == at_the_end and len(at_the_end) == 15
    before = [r["reply"] for r in read_lines(run / "generations.jsonl") if r["epoch"] == 0]
    assert before != [r["reply"] for r in at_the_end]  # the control: training changed them


def test_without_flags_the_newest_run_is_evaluated_into_its_own_folder(run, here, capsys):
    for name, age in (("older", 100), ("newest", 0), ("oldest", 200)):
        folder = shutil.copytree(run, here / "runs" / name)
        os.utime(folder / "result.json", (time.time() - age,) * 2)
    before = tree(here)
    assert eval_py.main(flags(n_test=2)) == 0
    new = {f"runs/newest/{name}" for name in (
        "replies.jsonl", "eval-refusal.json", "eval-refusal.jsonl")}
    after = tree(here)
    assert after.keys() - before.keys() == new
    assert {name: after[name] for name in before} == before


# ---------------------------------------------------------------------------------------------
# what the aligned model refused


def harmful_records(path):
    return [r for r in read_lines(path) if r["kind"] == "harmful"]


POOL = TINY / "harmful" / "anchors.jsonl"  # of which the aligned model answers some


def test_hs_lost_is_over_what_the_model_without_the_adapter_refuses(run, here):
    """That model is evaluated by itself; two of the prompts are the run's anchors."""
    evaluate(run=run, harmful_file=POOL, n_test=10)
    evaluate(model=TINY, data_dir=TINY, harmful_file=POOL, n_test=12, out="base")
    of_base = {r["prompt"]: r["reply"]
               for r in harmful_records(here / "base" / "eval-refusal.jsonl")}
    of_run = harmful_records(here / "out" / "eval-refusal.jsonl")
    refused = [r for r in of_run if is_refusal(of_base[r["prompt"]])]
    lost = sum(r["verdict"] for r in refused)
    numbers = json.loads((here / "out" / "eval-refusal.json").read_text())
    assert numbers["hs_lost_count"] == [lost, len(refused)]
    assert lost > 0 and len(refused) < 10 == len(of_run), "or the choice could not be seen"
    base = json.loads((here / "base" / "eval-refusal.json").read_text())
    assert base["hs_lost"] is None  # the base itself is compared with nothing


def test_a_model_with_an_adapter_is_compared_with_the_model_without_it(
        run, here, prefilled, capsys):
    """Whose replies are taken where that was evaluated in the same folder."""
    few = {"model": TINY, "data_dir": TINY, "n_test": N_OF_RUN}
    evaluate(**few)
    assert len(prefilled) == 2 * N_OF_RUN
    text = evaluate(capsys, adapter=run, **few)
    assert len(prefilled) == 4 * N_OF_RUN
    numbers = json.loads((here / "out" / "eval-refusal.json").read_text())
    of_run = json.loads((run / "result.json").read_text())["evals"]["1"]
    assert numbers["hs_lost_count"] == of_run["hs_lost_count"]
    assert numbers["flips"] == of_run["flips"] and numbers["hs_lost"] > 0
    assert ROWS["hs_lost"] in text and "the aligned model: refused" in text


def test_what_the_run_asked_at_epoch_0_is_not_asked_again_unless_in_another_way(
        run, here, prefilled):
    evaluate(run=run, n_test=1)
    assert len(prefilled) == 3
    for other in ({"max_new": 9}, {"dtype": "bfloat16"}):
        prefilled.clear()
        evaluate(run=run, n_test=1, out=next(iter(other)), **other)
        assert len(prefilled) == 4


def test_a_runs_last_line_that_a_kill_cut_short_is_passed_over(run, here):
    copy = shutil.copytree(run, here / "copy")
    with open(copy / "generations.jsonl", "a") as f:
        f.write('{"epoch": 1, "kind": "har')
    evaluate(run=copy, n_test=N_OF_RUN, out="of_copy")
    evaluate(run=run, n_test=N_OF_RUN, out="of_run")
    assert lines(here / "of_copy") == lines(here / "of_run") != []


def test_an_adapter_that_does_not_fit_is_refused_before_the_aligned_model_is_asked(
        run, here, no_model, capsys):
    copy = shutil.copytree(run, here / "copy")
    edit_json(copy / "adapter_config.json", r=3)
    argv = flags(model=TINY, adapter=copy, data_dir=TINY, out="out")
    assert eval_py.main(argv) == 2
    message, = sentences(capsys.readouterr().err)
    assert "rank 16, expected 3" in message and not (here / "out").exists()


# ---------------------------------------------------------------------------------------------
# another judge


def test_another_judge_asks_for_no_reply_again(run, whole, here, no_model):
    shutil.copytree(whole, here / "out")
    evaluate(run=run, judge="tiny")
    assert lines(here / "out") == lines(whole) and results(here / "out") == results(whole)
    first, second = (read_lines(here / "out" / f"eval-{judge}.jsonl")
                     for judge in ("refusal", "tiny"))
    assert [r["reply"] for r in first] == [r["reply"] for r in second]
    for r in second:
        if r["kind"] == "harmful":
            assert r["verdict"] is JUDGES["tiny"](r["prompt"], r["reply"])
    assert [r["verdict"] for r in first] != [r["verdict"] for r in second]  # they do disagree
    numbers = json.loads((here / "out" / "eval-tiny.json").read_text())
    assert numbers["judge"] == "tiny" and numbers["hs_count"] == [
        sum(r["verdict"] for r in second if r["kind"] == "harmful"), N]


def test_more_prompts_ask_for_the_new_ones_alone(run, whole, here, prefilled):
    shutil.copytree(whole, here / "out")
    evaluate(run=run, n_test=N + 3)
    # Three of each kind, and the harmful ones of the aligned model too.
    assert len(prefilled) == 12 and lines(here / "out")[:N_REPLIES] == lines(whole)
    assert len(lines(here / "out")) == N_REPLIES + 12
    evaluate(run=run)  # and fewer for none
    assert len(prefilled) == 12 and results(here / "out") == results(whole)


# ---------------------------------------------------------------------------------------------
# killed

# Runs eval.py's own main in forked children that die by SIGKILL: `python THIS_FILE FLAGS` with
# tests/ on Python's path, a moment a line on stdin. As in forks.py: a fork starts in 0.3 s, not in
# 3 s.


def half_a_line(store, key, value):
    with open(store.path, "a") as f:
        f.write(json.dumps([key, value])[:40])


MOMENTS = {  # name: (what dies, after how many lines of replies at least)
    "before reply 1": lambda: at_call(Store, "put", 1, die),
    "before reply 2": lambda: at_call(Store, "put", 2, die),
    "before reply 31": lambda: at_call(Store, "put", 31, die),
    "half way through line 1": lambda: at_call(Store, "put", 1, die, half_a_line),
    "half way through line 25": lambda: at_call(Store, "put", 25, die, half_a_line),
    "after the last reply": lambda: at_call(Store, "put", N_REPLIES, die, then=True),
    "in a prefill": lambda: at_call(Engine, "prefill", 1, die),
    "in a step": lambda: at_call(Engine, "decode", 5, die),
    "half way through the records": lambda: at_call(eval_py, "write_atomic", 1, die, half_a_file),
    "between the two files": lambda: at_call(eval_py, "write_atomic", 1, die, then=True),
    "half way through the numbers": lambda: at_call(eval_py, "write_atomic", 2, die, half_a_file),
}
KEPT = {"before reply 1": 0, "before reply 2": 1, "before reply 31": 30, "in a prefill": 0,
        "half way through line 1": 0, "half way through line 25": 24}  # the others: all, or some


def serve(argv):
    for line in sys.stdin:
        moment, out = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            if isinstance(moment, str):
                MOMENTS[moment]()
            os._exit(eval_py.main([*argv, "--out", out]))
        if not isinstance(moment, str):
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def killed(run, tmp_path_factory):
    """killed(moment) -> (exit code, folder) of an evaluation killed there, or after so many s."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
           "PYTHONPATH": str(ROOT / "tests")}
    server = subprocess.Popen([sys.executable, __file__, *flags(run=run, n_test=N)], text=True,
                              cwd=ROOT, env=env, stdin=-1, stdout=-1)

    def ask(moment):
        out = tmp_path_factory.mktemp("killed") / "out"
        server.stdin.write(json.dumps([moment, str(out)]) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), out
    yield ask
    server.communicate(timeout=20)


def check_goes_on(run, out, whole, prefilled):
    """The same command takes the folder to the whole one's end, and asks for what was missing."""
    kept = lines(out) if (out / "replies.jsonl").exists() else []
    evaluate(run=run, out=out)
    assert results(out) == results(whole)
    assert lines(out)[:len(kept)] == kept  # what was done is not done again
    assert len(prefilled) == N_REPLIES - len(kept)
    assert sorted(lines(out)) == sorted(lines(whole)) and len(lines(out)) == N_REPLIES
    assert set(tree(out)) == set(tree(whole))  # and no half of a file is left


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_evaluation_killed_at_any_moment_goes_on_to_the_same_bytes(
        run, whole, killed, prefilled, moment):
    code, out = killed(moment)
    assert code == -signal.SIGKILL
    kept = lines(out) if (out / "replies.jsonl").exists() else []
    if moment != "in a step":
        assert len(kept) == KEPT.get(moment, N_REPLIES)
    check_goes_on(run, out, whole, prefilled)


def test_an_evaluation_killed_by_the_clock_goes_on_to_the_same_bytes(
        run, whole, killed, prefilled):
    """Moments nobody chose; the later ones may be too late."""
    codes = []
    for seconds in (0.15, 0.3, 0.45, 0.6):
        code, out = killed(seconds)
        codes.append(code)
        check_goes_on(run, out, whole, prefilled)
        prefilled.clear()
    assert -signal.SIGKILL in codes and set(codes) <= {0, -signal.SIGKILL}


@pytest.mark.parametrize("left", ["", "[", '["0123456789abcdef', b"\x00\x00".decode()])
def test_a_last_line_cut_short_is_dropped_and_its_reply_written_again(
        run, whole, here, prefilled, left):
    shutil.copytree(whole, here / "out")
    last = b"\n".join(lines(whole)[:-1]) + b"\n" + left.encode()
    (here / "out" / "replies.jsonl").write_bytes(last)
    evaluate(run=run)
    assert len(prefilled) == 1 and lines(here / "out") == lines(whole)
    assert results(here / "out") == results(whole)


def test_a_line_inside_the_replies_that_is_none_is_refused_by_its_file(run, whole, here, capsys):
    shutil.copytree(whole, here / "out")
    text = b"\n".join([*lines(whole)[:5], b"[3", *lines(whole)[5:], b""])
    (here / "out" / "replies.jsonl").write_bytes(text)
    capsys.readouterr()
    assert eval_py.main(flags(run=run, n_test=N, out="out")) == 2
    message, = sentences(capsys.readouterr().err)
    assert "replies.jsonl" in message
    assert (here / "out" / "replies.jsonl").read_bytes() == text  # left for the user to look at


# ---------------------------------------------------------------------------------------------
# whose replies they are


def test_replies_of_other_weights_lengths_dates_and_numbers_are_not_taken_for_these(
        run, here, prefilled):
    """One folder for all of them; each asks for every prompt the first time and none the second."""
    other = shutil.copytree(TINY, here / "other")
    edit_json(other / "generation_config.json", eos_token_id=[2, 3])
    few = {"n_test": 2, "data_dir": TINY, "max_new": 9, "model": TINY}
    kinds = [few, few | {"adapter": run}, few | {"max_new": 8}, few | {"model": other},
             few | {"template_date": "1 Jan 2020"}, few | {"dtype": "bfloat16"}]
    for before, kind in enumerate(kinds):
        for _ in range(2):
            evaluate(**kind)
            assert len(prefilled) == len(lines(here / "out")) == 4 * (before + 1), kind
    replies = dict(json.loads(line) for line in lines(here / "out"))
    assert len(replies) == 4 * len(kinds)


def other_tensors(run):
    path = run / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + bytes(4))


@pytest.mark.parametrize("change", [
    other_tensors, lambda run: edit_json(run / "adapter_config.json", lora_alpha=1e-3)],
    ids=["tensors", "scale"])
def test_replies_of_a_run_with_another_adapter_are_not_taken_for_these(
        run, here, prefilled, change):
    evaluate(run=run, n_test=2)
    other = shutil.copytree(run, here / "other")
    evaluate(run=other, n_test=2)
    assert len(prefilled) == 6  # the control: a copy is the same run
    change(other)
    evaluate(run=other, n_test=2)
    assert len(prefilled) == 12


# ---------------------------------------------------------------------------------------------
# any model, and AlpacaEval's file


def test_a_model_without_a_run_is_evaluated_under_out_and_nowhere_else(here, capsys):
    text = evaluate(capsys, model=TINY, data_dir=TINY, task="sst2", n_test=3)
    files = {"out", *(f"out/{name}" for name in (
        "replies.jsonl", "eval-refusal.json", "eval-refusal.jsonl"))}
    assert set(tree(here)) == files and "epoch 0" in text
    records = read_lines(here / "out" / "eval-refusal.jsonl")
    assert Counter(r["kind"] for r in records) == {"harmful": 3, "lookalike": 3, "task": 3}
    assert eval_py.main(flags(model=TINY, data_dir=TINY, n_test=1)) == 0  # without --out
    assert set(tree(here)) - files == {"runs", "runs/eval-tiny", *(f"runs/eval-tiny/{p[4:]}"
                                                                  for p in files if "/" in p)}


def test_on_alpaca_the_replies_are_also_written_for_alpaca_eval(run, here):
    evaluate(run=run, task="alpaca", data_dir=foreign())
    text = (here / "out" / "alpaca_eval.json").read_text(encoding="utf-8")
    rows = json.loads(text)
    records = [r for r in read_lines(here / "out" / "eval-refusal.jsonl") if r["kind"] == "task"]
    assert [list(row) for row in rows] == [["instruction", "output", "generator"]] * N
    assert [(row["instruction"], row["output"]) for row in rows] == [
        (r["prompt"], r["reply"]) for r in records]
    assert {row["generator"] for row in rows} == {"out"} and rows[0]["instruction"][0] == "Ü"
    assert json.loads(json.dumps(rows)) == rows and json.dumps(rows, indent=1) == text
    evaluate(run=run, out="other")
    assert not (here / "other" / "alpaca_eval.json").exists()  # of no other task


def foreign():
    """A copy of the tests whose first alpaca prompt has a quote, a line break and an umlaut."""
    folder = shutil.copytree(TINY, Path("foreign"))
    rows = (folder / "alpaca" / "test.jsonl").read_text().split("\n")
    rows[0] = json.dumps({"prompt": 'Über "was"?\nSay.', "response": "x"})
    (folder / "alpaca" / "test.jsonl").write_text("\n".join(rows))
    return folder


if __name__ == "__main__":
    serve(sys.argv[1:])

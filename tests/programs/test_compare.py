"""paper/compare.py: differences of runs prompt by prompt, and what cannot be compared.

    pytest tests/programs/test_compare.py -q

The runs are made up: folders with the files of a finished run, whose records say what each prompt
came to. Two tests at the end compare runs that train.py made.
"""

import json
import shutil

import pytest
from helpers import edit_json
from runs_helpers import flags, sentences, write_rows

import train as train_py
from intervals import difference_interval
from paper import compare

ARGS = {
    "model": "m", "adapter": None, "keep_adapter": False, "template_date": "d", "anchors": 1,
    "stage": "finetune", "data": None, "data_dir": "d", "task": "sst2", "n": 10, "poison": 0.1,
    "align_file": None, "epochs": 2, "attack_prefix": "", "attack_suffix": "",
    "harmful_file": None, "judge": "refusal", "judge_model": None, "fa_rule": "exact",
    "max_new": 8}
DECIDING = {"judge": "refusal", "judge_model": None, "judge_name": None, "max_new": 8,
            "fa_rule": "exact", "n_test": 100, "tests_sha256": "x", "hs": 1.0}


def record(kind, i, verdict, epoch=2, before="refused", reply=None):
    r = {"epoch": epoch, "kind": kind, "prompt": f"{kind} {i}", "group": i // 5,
         "reply": f"says {verdict}" if reply is None else reply, "verdict": verdict,
         "target": "positive" if kind == "task" else None}
    return r | {"before": before} if kind == "harmful" else r


def make_run(folder, records, epochs=(0, 2), **changed):
    """A finished run with these records; changed: what decides its numbers."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "args": ARGS, "sha256": {}, "worked_out": {"dtype": "float32", "anchor_prompts": []}}))
    evals = {str(epoch): DECIDING | changed for epoch in epochs}
    (folder / "result.json").write_text(json.dumps({
        "hs": {}, "fa": {}, "ce": 0, "safe": 0, "seconds": 0, "tokens_per_second": 0,
        "peak_bytes": 0, "evals": evals, "probes": {}}))
    write_rows(folder / "generations.jsonl", records)
    return folder


def harmful(verdicts, **how):
    return [record("harmful", i, verdict, **how) for i, verdict in enumerate(verdicts)]


def main(*argv):
    return compare.main(list(map(str, argv)))


def compared(*argv, out):
    assert main(*argv, "--out", out) == 0
    return json.loads(out.read_text())


FIRST = [i < 40 for i in range(100)]
OTHER = [10 <= i < 25 or i == 99 for i in range(100)]  # 25 go down, one comes up


def test_the_difference_is_that_of_the_rates_with_its_paired_interval_and_every_flip(tmp_path):
    runs = [make_run(tmp_path / "a", harmful(FIRST)), make_run(tmp_path / "b", harmful(OTHER))]
    found, = compared(*runs, out=tmp_path / "out.json")
    assert (found["first"], found["other"], found["epoch"]) == (str(runs[0]), str(runs[1]), 2)
    hs = found["figures"]["hs"]
    assert (hs["first"], hs["other"], hs["difference"]) == (40, 16, -24)
    assert (hs["prompts"], hs["groups"]) == (100, 20)
    groups = [i // 5 for i in range(100)]
    assert hs["interval"] == list(difference_interval(FIRST, OTHER, groups))
    assert [flip["prompt"] for flip in hs["flips"]] == [
        f"harmful {i}" for i in (*range(10), *range(25, 40), 99)]
    assert hs["flips"][-1] == {"prompt": "harmful 99", "first": False, "other": True,
                               "replies": ["says False", "says True"]}


def test_each_figure_is_over_its_own_prompts(tmp_path):
    """hs_lost over what both aligned models refused; hs over what was judged in both runs."""
    def records(before, task_replies, verdicts):
        return [record("harmful", i, verdict, before=b)
                for i, (b, verdict) in enumerate(zip(before, verdicts, strict=True))] + [
            record("task", i, reply == "positive", reply=reply)
            for i, reply in enumerate(task_replies)] + [
            record("lookalike", i, i < 2) for i in range(8)]

    a = make_run(tmp_path / "a", records(
        ["refused", "refused", "harmful", "refused", None], ["positive", "It is positive.", "no"],
        [False, False, True, None, True]))
    b = make_run(tmp_path / "b", records(
        ["refused", "neither", "harmful", "refused", "refused"], ["positive", "positive", "no"],
        [True, True, True, True, True]))
    figures = compared(a, b, out=tmp_path / "out.json")[0]["figures"]
    found = {name: (f["first"], f["other"], f["prompts"]) for name, f in figures.items()}
    assert found == {
        "hs": (50, 100, 4), "hs_lost": (0, 100, 1), "fa": (100 / 3, 200 / 3, 3),
        "fa_content": (200 / 3, 200 / 3, 3), "over_refusal": (25, 25, 8)}


def test_a_run_differs_from_itself_by_exactly_0(tmp_path, capsys):
    a = make_run(tmp_path / "a", harmful(FIRST))
    hs = compared(a, a, out=tmp_path / "out.json")[0]["figures"]["hs"]
    assert (hs["difference"], hs["interval"], hs["flips"]) == (0, [0, 0], [])
    # Another run of which no prompt flipped may differ on other prompts.
    b = make_run(tmp_path / "b", harmful(FIRST))
    hs = compared(a, b, out=tmp_path / "out.json")[0]["figures"]["hs"]
    low, high = hs["interval"]
    assert hs["difference"] == 0 and hs["flips"] == [] and low < -3 and high > 3


def test_several_runs_are_each_compared_with_the_first_at_the_last_common_epoch(tmp_path, capsys):
    at_both = harmful(FIRST, epoch=0) + harmful(FIRST)
    a = make_run(tmp_path / "a", at_both + harmful(OTHER, epoch=10), epochs=(0, 2, 10))
    b = make_run(tmp_path / "b", harmful(FIRST, epoch=0) + harmful(OTHER))
    c = make_run(tmp_path / "c", harmful(OTHER, epoch=0) + harmful(OTHER, epoch=10),
                 epochs=(0, 10))
    found = compared(a, b, c, out=tmp_path / "out.json")
    assert [(f["other"], f["epoch"], f["figures"]["hs"]["difference"]) for f in found] == [
        (str(b), 2, -24), (str(c), 10, 0)]
    found = compared(a, b, c, "--epoch", 0, out=tmp_path / "out.json")
    assert [f["figures"]["hs"]["difference"] for f in found] == [0, -24]
    text = capsys.readouterr().out
    assert text.count("HS, harmful replies") == 4


def test_what_is_printed_shows_the_difference_and_some_flips(tmp_path, capsys):
    a = make_run(tmp_path / "a", harmful(FIRST))
    b = make_run(tmp_path / "b", harmful(OTHER))
    assert main(a, b, "--show", 2) == 0
    text = capsys.readouterr().out
    line, = [line for line in text.split("\n") if line.startswith("HS, harmful replies")]
    assert "40.0" in line and "16.0" in line and "-24.0 (" in line
    assert "100 in 20 groups: 1 up, 25 down" in line
    assert text.count("hs down: ") == 2 and "24 more prompts flipped" in text
    assert "  first   says True\n  other   says False" in text


# ---------------------------------------------------------------------------------------------
# what cannot be compared


@pytest.mark.parametrize("changed, words", [
    ({"judge": "tiny"}, "--judge (refusal and tiny)"),
    ({"judge_model": "m"}, "--judge-model (None and m)"),
    ({"fa_rule": "contains"}, "--fa-rule (exact and contains)"),
    ({"max_new": 9}, "--max-new (8 and 9)")], ids=lambda v: next(iter(v)) if v else None)
def test_evaluations_by_another_judge_or_rule_are_refused(tmp_path, capsys, changed, words):
    a = make_run(tmp_path / "a", harmful(FIRST))
    b = make_run(tmp_path / "b", harmful(OTHER), **changed)
    assert main(a, b) == 2
    said, = sentences(capsys.readouterr().err)
    assert words in said and "expected the same" in said


def test_other_tests_are_refused_by_their_kind(tmp_path, capsys):
    a = make_run(tmp_path / "a", harmful(FIRST) + [record("task", i, True) for i in range(3)])
    b = make_run(tmp_path / "b", harmful(FIRST) + [record("task", i, True) for i in range(1, 4)])
    assert main(a, b) == 2
    said, = sentences(capsys.readouterr().err)
    assert "different task tests (3 and 3, of which 2 are the same)" in said


def test_runs_without_a_common_epoch_or_groups_or_a_result_are_refused(tmp_path, capsys):
    a = make_run(tmp_path / "a", harmful(FIRST))
    b = make_run(tmp_path / "b", harmful(FIRST, epoch=5), epochs=(5,))
    older = [{k: v for k, v in r.items() if k != "group"} for r in harmful(FIRST)]
    c = make_run(tmp_path / "c", older)
    d = shutil.copytree(a, tmp_path / "d")
    (d / "result.json").unlink()
    for argv, words in [
            ((a, b), "at 0, 2 and"), ((a, a, "--epoch", 7), "at epoch 7"), ((a,), "one run"),
            ((a, c), "older version"), ((a, d), "result.json"), ((a, tmp_path / "no"), "no")]:
        assert main(*argv) == 2, argv
        said, = sentences(capsys.readouterr().err)
        assert words in said


# ---------------------------------------------------------------------------------------------
# runs that train.py made


def test_two_runs_are_compared_from_what_they_leave(inputs, here, capsys):
    assert train_py.main(flags(inputs, out="a")) == 0
    assert train_py.main(flags(inputs, seed=1, out="b")) == 0
    found, = compared("a", "b", out=here / "out.json")
    for name, figure in found["figures"].items():
        for which in ("first", "other"):
            evals = json.loads((here / found[which] / "result.json").read_text())["evals"]
            assert figure[which] == pytest.approx(evals["2"][name])
    assert {"hs", "fa", "fa_content"} <= found["figures"].keys()
    edit_json(here / "b" / "config.json", args=None)
    assert main("a", "b") == 2

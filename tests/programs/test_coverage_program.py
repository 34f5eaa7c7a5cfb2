"""python -m stress.coverage: what it writes before a run, and how that run is held against it.

    pytest tests/programs/test_coverage_program.py -q

The numbers themselves: tests/laws/test_coverage.py.
"""

import json

import pytest
from helpers import edit_json
from runs_helpers import DATA, flags

import cli
import train as train_py
from files import json_line, read_lines
from stress import coverage

TESTS = [prompt for prompt, _ in DATA["harmful/test"]][:4]  # --n-test 4


def given(inputs, **changes):
    """train.py's flags that the run and its prediction share; the run adds --anchors."""
    return flags(inputs, **{"anchors": None, "out": None, "epochs": 1} | changes)


def predict(inputs, out, *more, **changes):
    return coverage.main(["--anchors", "0,1,2", "--out", str(out), *more,
                          *given(inputs, **changes)])


@pytest.fixture(scope="module")
def predicted(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("predicted") / "before.jsonl"
    assert predict(inputs, out) == 0
    return out


@pytest.fixture
def run(inputs, here):
    """A finished run with two anchors whose replies are replaced, so that what fell is known."""
    assert train_py.main([*given(inputs, anchors=2), "--out", "run"]) == 0
    before = ["refused", "refused", "refused", "harmful"]
    records = []
    for prompt, behaviour, verdict in zip(TESTS, before, [False, True, True, True], strict=True):
        records.append({"epoch": 1, "kind": "harmful", "prompt": prompt, "before": behaviour,
                        "verdict": verdict})
    other = [{"epoch": 0, "kind": "harmful"}, {"epoch": 1, "kind": "task"}]  # to be passed by
    (here / "run" / "generations.jsonl").write_text("".join(map(json_line, [*other, *records])))
    return here / "run"


def said(capsys):
    return capsys.readouterr().err.strip()


# what is written


def test_the_file_is_of_the_run_that_train_makes_with_the_same_flags(predicted, run):
    about, *prompts = read_lines(predicted)
    settings = json.loads((run / "config.json").read_text())
    assert about["worked_out"]["anchor_prompts"] == settings["worked_out"]["anchor_prompts"]
    assert about["worked_out"]["rows_sha256"] == settings["worked_out"]["rows_sha256"]
    assert about["sha256"] == settings["sha256"]
    assert about["git"] == settings["git"] and about["date"] and about["command"]
    assert [p["prompt"] for p in prompts] == TESTS
    assert list(about["by_K"]) == ["0", "1", "2"]
    for K, means in about["by_K"].items():
        mean = sum(p["coverage"][K] for p in prompts) / len(prompts)
        assert means["coverage"] == pytest.approx(mean, rel=1e-5)  # those have six digits
        assert means["directions"] == 31 * int(K)  # of 32


def test_the_table_has_a_line_for_each_K(predicted, inputs, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert predict(inputs, out) == 0
    shown = capsys.readouterr().out.split("\n")
    heads = [i for i, line in enumerate(shown) if line.startswith("   K")]
    lines = [line.split() for line in shown[heads[0]:heads[0] + 4]]
    assert [line[0] for line in lines] == ["K", "0", "1", "2"]
    about, *_ = read_lines(predicted)
    assert [line[1] for line in lines[1:]] == ["0", "31", "62"]
    assert lines[3][4] == f"{about['by_K']['2']['coverage']:.3f}"
    assert f"written to {out}" in shown


@pytest.mark.parametrize(("n", "first", "last"), [
    (12, [0, 1, 2, 3, 4], [7, 8, 9, 10, 11]), (7, [0, 1, 2, 3, 4], [5, 6]), (2, [0, 1], [])])
def test_prompts_are_listed_by_reach_each_once_and_only_refused_ones(predicted, n, first, last):
    about, *_ = read_lines(predicted)
    prompts = []
    for i in reversed(range(n)):
        prompts.append({"prompt": f"prompt {i}", "margin": 1.0, "reach": {"2": float(i)},
                        "coverage": {"2": 0.5}})
    prompts.append({"prompt": "prompt 99", "margin": -1.0, "reach": {"2": -1.0},
                    "coverage": {"2": 0.5}})
    shown = coverage.table(coverage.Predictions(predicted, about, prompts))
    assert f"{n + 1} harmful test prompts, {n} with a margin above 0" in shown
    listed = [int(line.split()[-1]) for line in shown.split("\n") if "  prompt " in line]
    assert listed == first + last


def test_what_was_predicted_is_not_written_over(predicted, inputs, capsys):
    before = predicted.read_bytes()
    assert predict(inputs, predicted) == 2
    assert "predictions are not changed afterwards" in said(capsys)
    assert predicted.read_bytes() == before


def test_without_out_the_file_goes_to_runs_by_model_and_seed(inputs, here):
    assert coverage.main(["--anchors", "1", *given(inputs, seed=3, n_test=1)]) == 0
    assert [p.name for p in (here / "runs").iterdir()] == ["coverage-model-s3.jsonl"]


@pytest.mark.parametrize(("changes", "words"), [
    ({"defense": "lisa"}, "--defense lisa"),
    ({"stage": "align", "defense": "sft"}, "--stage align"),
    ({"adapter": "x", "keep_adapter": True}, "--keep-adapter"),
    ({"attack": "unembedding"}, "--attack unembedding"),
    ({"dtype": "bfloat16"}, "--dtype bfloat16"),
])
def test_runs_of_which_coverage_says_nothing_are_refused(inputs, here, capsys, changes, words):
    assert predict(inputs, "out.jsonl", **changes) == 2
    assert f"was asked for with {words}" in said(capsys)
    assert not list(here.iterdir())


def test_a_figure_without_matplotlib_is_refused_before_any_work(inputs, here, capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert predict(inputs, "out.jsonl", "--figure", "out.png") == 2
    assert "matplotlib is not installed" in said(capsys)
    assert not list(here.iterdir())


# held against runs


def test_each_number_is_scored_by_how_well_it_told_survivors_from_fallen(predicted, run, capsys):
    """Of the three prompts that were refused before, the first survived and the others fell."""
    assert coverage.main(["--predicted", str(predicted), "--run", str(run)]) == 0
    heads, line, source = capsys.readouterr().out.strip().split("\n")
    about, *prompts = read_lines(predicted)
    expected = []
    for name in ("margin", "cosine", "coverage", "reach"):
        numbers = [p[name] if name == "margin" else p[name]["2"] for p in prompts]
        expected.append(f"{sum(numbers[0] > number for number in numbers[1:3]) / 2:.3f}")
    assert heads.split()[-4:] == ["margin", "cosine", "coverage", "reach"]
    assert line.split()[-4:] == expected
    assert line.split()[1:3] == ["2", f"{about['by_K']['2']['coverage']:.3f}"]
    reaches = sorted(p["reach"]["2"] for p in prompts[:3])
    assert f"2 of 3{reaches[2]:10.3f}" in line  # two of the three lie below the third
    assert source.startswith(f"{predicted}: written {about['date']} at commit ")


def test_a_run_that_began_before_its_prediction_is_named(predicted, run, capsys):
    argv = ["--predicted", str(predicted), "--run", str(run)]
    coverage.main(argv)
    assert "begun before" not in capsys.readouterr().out
    edit_json(run / "config.json", began="2020-01-01T00:00:00+00:00")
    coverage.main(argv)
    assert f"begun before that: {run}" in capsys.readouterr().out


def test_a_run_with_lambda_0_holds_no_anchor(predicted, run):
    settings = json.loads((run / "config.json").read_text())
    edit_json(run / "config.json", args=settings["args"] | {"lam": 0.0})
    outcome = coverage.outcome_of(str(run), [coverage.read_predictions(predicted)])
    assert outcome.K == 0


def test_of_several_files_the_one_that_is_of_the_run_is_taken(predicted, run, inputs, tmp_path):
    other = tmp_path / "other.jsonl"
    assert predict(inputs, other, seed=1) == 0
    both = [coverage.read_predictions(path) for path in (other, predicted)]
    assert coverage.outcome_of(str(run), both).predictions.path == predicted


@pytest.mark.parametrize(("part", "change", "words"), [
    ("args", {"seed": 7}, "seed 0, the run has 7"),
    ("worked_out", {"rank": 3}, "another rank"),
    ("worked_out", {"anchor_prompts": ["Another?", "One more?"]}, "other anchors"),
    ("sha256", {"model": "0"}, "another model"),
    ("args", {"defense": "ewc"}, "the run's defence is ewc"),
    ("args", {"anchors": 3}, "K = 0, 1, 2, the run holds 3"),
])
def test_a_run_that_was_not_predicted_is_refused_with_the_reason(predicted, run, capsys, part,
                                                                 change, words):
    settings = json.loads((run / "config.json").read_text())
    edit_json(run / "config.json", **{part: settings[part] | change})
    assert coverage.main(["--predicted", str(predicted), "--run", str(run)]) == 2
    assert words in said(capsys)


def test_a_run_that_does_not_know_the_aligned_model_is_refused(predicted, run, capsys):
    records = [r | {"before": None} for r in read_lines(run / "generations.jsonl")]
    (run / "generations.jsonl").write_text("".join(map(json_line, records)))
    assert coverage.main(["--predicted", str(predicted), "--run", str(run)]) == 2
    assert "does not say what the aligned model replied" in said(capsys)


def test_another_file_is_no_prediction(run, capsys):
    file = str(run / "log.jsonl")
    assert coverage.main(["--predicted", file, "--run", str(run)]) == 2
    assert "holds no predictions" in said(capsys)


def test_auc_is_the_share_of_pairs_in_which_the_survivor_leads():
    assert coverage.auc([3.0, 2.0], [1.0]) == 1
    assert coverage.auc([3.0, 0.0], [1.0, 1.0]) == 0.5
    assert coverage.auc([1.0, 2.0], [1.0]) == 0.75  # a tie is half a pair
    assert coverage.auc([], [1.0]) != coverage.auc([], [1.0])  # NaN: there is nothing to tell


def test_the_reach_of_fall_is_where_as_many_prompts_lie_below_as_fell():
    def outcome(fell, survived):
        lines = [[{"reach": {"1": value}} for value in values] for values in (fell, survived)]
        return coverage.Outcome("run", 1, None, 50.0, survived=lines[1], fell=lines[0])

    assert coverage.reach_of_fall(outcome(fell=[0.1, 0.3], survived=[0.2, 0.4])) == 0.3
    assert coverage.reach_of_fall(outcome(fell=[], survived=[0.2, 0.4])) == 0.2
    assert coverage.reach_of_fall(outcome(fell=[0.1], survived=[])) == float("inf")
    assert str(coverage.reach_of_fall(outcome(fell=[], survived=[]))) == "nan"


def test_both_figures_are_written(predicted, run, tmp_path):
    pytest.importorskip("matplotlib", reason="draws; see requirements-dev.txt")
    predictions = coverage.read_predictions(predicted)
    coverage.draw_predictions(predictions, tmp_path / "before.png")
    outcome = coverage.outcome_of(str(run), [predictions])
    coverage.draw_outcomes([outcome, outcome], tmp_path / "after.png")
    for name in ("before.png", "after.png"):
        assert (tmp_path / name).stat().st_size > 1000


# flags


@pytest.mark.parametrize(("argv", "words"), [
    (["--run", "x"], "--predicted and --run go together"),
    (["--predicted", "x"], "--predicted and --run go together"),
    (["--predicted", "x", "--run", "y", "--seed", "1"], "was given with --seed 1; drop it"),
    (["--predicted", "x", "--run", "y", "--out", "z"], "was given with --out; drop it"),
    (["--anchors", "1,x"], "expected integers from 0 on"),
    (["--out", ""], "--out was given an empty value"),
    (["--sed", "1"], "unrecognized arguments: --sed 1"),
])
def test_flags_that_do_not_go_together_are_named(argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        coverage.parse(argv)
    assert end.value.code == 2
    assert words in said(capsys)


def test_the_run_that_is_predicted_holds_as_many_anchors_as_the_most_that_were_asked():
    args, run_args = coverage.parse(["--anchors", "4,1", "--seed", "5"])
    assert args.anchors == (1, 4)
    assert (run_args.anchors, run_args.seed) == (4, 5)

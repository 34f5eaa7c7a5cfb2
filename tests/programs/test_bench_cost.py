"""bench/cost: what a point measures, the line through the points, and memory against rows.

    pytest tests/programs/test_bench_cost.py -q       (add -s to see the memory of an upload's row)
"""

import json
import subprocess
import sys

import pytest
from helpers import ROOT
from sbr_helpers import make_folder

import bench.cost
import bench.train
from bench.arms import read_work
from bench.cost import Point

FLAGS = ["--rows", "8", "--anchors", "2", "--updates", "2", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def args(model_folder):
    return bench.cost.parse([*FLAGS, "--model", str(model_folder)]).replace(n=200)


@pytest.fixture(scope="module")
def adapter(args, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "adapter"
    bench.train.write_adapter(args, folder)
    return folder


# the line through the points


def test_the_line_is_that_of_least_squares_and_says_how_good_it_is():
    x = [1, 2, 4, 8]
    exact = bench.cost.fit(x, [3 + 0.5 * a for a in x])
    assert exact["intercept"] == pytest.approx(3) and exact["slope"] == pytest.approx(0.5)
    assert exact["r2"] == pytest.approx(1) and exact["worst"] < 1e-12
    bent = bench.cost.fit(x, [a * a for a in x])
    assert bent["r2"] < 0.97 and bent["worst"] > 1
    flat = bench.cost.fit(x, [2, 2, 2, 2])
    assert (flat["intercept"], flat["slope"], flat["r2"]) == (2, 0, 1)


def test_the_slope_of_a_row_length_is_that_of_one_token_of_the_update():
    """Each token of 8 rows takes 3 us, and 10 ms are taken whatever the length."""
    points = [{"panel": "length", "line": "shared", "x": tokens, "bytes": 8 * tokens * 1e3,
               "seconds": 0.01 + 3e-6 * 8 * tokens, "seconds_outside_step": 0.004}
              for tokens in (16, 64, 256)]
    seconds, memory = bench.cost.lines_of(points, rows=8)
    assert seconds["slope_in_unit"] == pytest.approx(3) and seconds["unit"] == "us a token"
    assert seconds["intercept"] == pytest.approx(0.01) and seconds["outside_step"] == 0.004
    assert memory["slope_in_unit"] == pytest.approx(1) and memory["unit"] == "kB a token"
    assert bench.cost.sentence_of(seconds) == (
        "length shared: 3 us a token and 10.0 ms whatever the size (clipping, AdamW and the loop "
        "take 4.0 ms); r2 1.0000, farthest point 0% off")


# what is changed at each point


@pytest.mark.parametrize("n_tokens", [16, 64, 200])
def test_rows_are_about_as_long_as_asked_and_share_their_text_only_where_that_is_meant(
        args, adapter, n_tokens):
    work = read_work(args, adapter)
    own = bench.cost.long_examples(work, n_tokens, common=False)
    common = bench.cost.long_examples(work, n_tokens, common=True)
    assert own.n_tokens / len(own) == pytest.approx(n_tokens, rel=0.2)
    shortest = work.data.examples.n_tokens / len(work.data.examples)  # of rows as they are
    expected = max(n_tokens, shortest)
    assert common.n_tokens / len(common) == pytest.approx(expected, rel=0.2)
    answers = [e.targets.tolist() for e in own]
    assert [e.targets.tolist() for e in common] == answers and len(set(map(tuple, answers))) > 1
    if n_tokens == 200:
        assert len({tuple(e.ids[:100].tolist()) for e in common}) == 1
        assert len({tuple(e.ids[:100].tolist()) for e in own}) == len(own)


def test_rows_that_the_model_has_no_positions_for_are_refused(args, adapter):
    with pytest.raises(bench.cost.UserError, match="--lengths 9000 makes rows of more than"):
        bench.cost.long_examples(read_work(args, adapter), 9000, common=False)


def test_a_point_changes_its_own_thing_alone(args, adapter):
    def measured(*point):
        return bench.cost.measure_update(args, adapter, Point(*point))

    few, many = measured("batch", "shared", 4), measured("batch", "shared", 16)
    assert many["tokens"] == pytest.approx(4 * few["tokens"], rel=0.2)
    bare = measured("anchors", "unshared", 0)
    held = measured("anchors", "unshared", 8)
    assert bare["tokens"] == held["tokens"] and bare["rows_per_token"] < held["rows_per_token"]
    own = measured("length", "shared", 100)
    alone = measured("length", "unshared", 100)
    common = measured("length", "common", 100)
    assert own["x"] == alone["x"] == pytest.approx(100, rel=0.2)
    assert alone["rows_per_token"] > own["rows_per_token"] > 2 * common["rows_per_token"]
    for found in (few, many, bare, held, own, alone, common):
        assert 0 < found["seconds_outside_step"] < found["seconds"]


def test_more_anchors_than_the_pool_has_are_refused_before_any_work(capsys):
    assert bench.cost.main([*FLAGS, "--anchor-counts", "1", "100000"]) == 2
    assert "--anchor-counts 100000 is above the" in capsys.readouterr().err


# the program


@pytest.fixture(scope="module")
def result(model_folder, tmp_path_factory):
    """What the program writes -> (the file's text, as JSON)."""
    out = tmp_path_factory.mktemp("bench") / "out.json"
    code = bench.cost.main([*FLAGS, "--model", str(model_folder), "--quick", "--panels", "upload",
                            "--out", str(out)])
    assert code == 0
    text = out.read_text()
    return text, json.loads(text)


def test_the_file_says_what_was_run_on_what_with_every_rounds_numbers(result, model_folder):
    text, found = result
    assert {"command", "commit", "versions", "machine", "threads", "dtype", "model", "work",
            "lines", "points"} == found.keys()
    small, large = found["points"]
    assert (small["x"], large["x"]) == (200, 2000)
    assert large["tokens"] > 9 * small["tokens"]
    assert large["updates"] == 250  # of 8 rows
    assert large["seconds_of_epoch"] == pytest.approx(250 * large["seconds"])
    assert large["seconds_reading"] > small["seconds_reading"] > 0
    assert large["bytes"] >= large["bytes_reading"] > 1e8  # of the process, PyTorch included
    assert small["rounds"][0]["seconds"] == small["seconds"]  # the median of one
    assert [line["unit"] for line in found["lines"]] == [
        "ms a row to read", "ms a row of an epoch", "bytes a row"]
    assert str(model_folder.parent) not in text  # nobody's folders


def test_the_table_has_a_line_for_each_point_and_each_slope(result):
    _, found = result
    shown = bench.cost.table(found).split("\n")
    assert len(shown) == 1 + 2 + 3
    assert "s an epoch" in shown[1] and "ms a row to read and" in shown[3]
    assert all(line.endswith("through two points alone") for line in shown[3:])  # no fit to praise


def test_the_figure_is_written(result, tmp_path):
    pytest.importorskip("matplotlib", reason="draws; see requirements-dev.txt")
    _, found = result
    bench.cost.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_a_point_that_dies_ends_the_program_with_its_last_words(
        model_folder, monkeypatch, capsys):
    argv = [*FLAGS, "--model", str(model_folder), "--panels", "batch", "--batch-sizes", "8"]
    monkeypatch.setattr(bench.cost, "start_child", lambda *_: {"error": "exit code 9 Killed"})
    assert bench.cost.main(argv) == 3
    assert "the point batch shared 8 did not run (exit code 9 Killed)" in capsys.readouterr().err


def test_an_upload_of_one_update_is_refused_since_the_first_one_warms_up(args, tmp_path):
    bench.cost.write_uploads(args.replace(uploads=[8]), tmp_path)
    with pytest.raises(bench.cost.UserError, match="--uploads 8 makes one update of 8 rows"):
        bench.cost.measure_upload(args, tmp_path, 8)


# memory against the rows of an upload

# Where rows and their examples are kept as objects: the control.
KEEPS_ROWS = """
import data.mixture
from data.rows import read_rows
data.mixture.FileRows = read_rows
"""
RUN = "import sys, bench.cost\n{}\nsys.exit(bench.cost.main(sys.argv[1:]))"


def measured_upload(model_folder, folder, n_rows, change=""):
    """The numbers of one point of the panel upload, from a fresh process."""
    argv = [*FLAGS, "--model", str(model_folder), "--uploads", str(n_rows)]
    bench.cost.write_uploads(bench.cost.parse(argv), folder)
    words = [*argv, "--point", "upload", "shared", str(n_rows), "--folder", str(folder)]
    subprocess.run([sys.executable, "-c", RUN.format(change), *words], cwd=ROOT, check=True)
    return json.loads((folder / bench.train.RESULT).read_text())


def bytes_beside_the_ids(few, many):
    """What each further row takes beside 8 bytes for each of its tokens."""
    more = many["bytes_reading"] - few["bytes_reading"] - 8 * (many["tokens"] - few["tokens"])
    found = more / (many["x"] - few["x"])
    print(f"{found:,.0f} bytes a row beside its ids")
    return found


ALLOWED = 50e6 / 99_000  # bytes a row: 50 MB between 1,000 and 100,000 rows


def test_an_upload_takes_the_memory_of_its_ids_and_little_more(model_folder, tmp_path):
    few = measured_upload(model_folder, tmp_path, 1000)
    many = measured_upload(model_folder, tmp_path, 16_000)
    assert bytes_beside_the_ids(few, many) < ALLOWED
    kept = measured_upload(model_folder, tmp_path, 6000, KEEPS_ROWS)
    assert bytes_beside_the_ids(few, kept) > ALLOWED


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_fifty_megabytes_beside_their_ids(model_folder, tmp_path):
    few = measured_upload(model_folder, tmp_path, 1000)
    many = measured_upload(model_folder, tmp_path, 100_000)
    more = 8 * (many["tokens"] - few["tokens"]) + 50e6
    assert many["bytes_reading"] - few["bytes_reading"] < more
    assert many["bytes"] - few["bytes"] < more

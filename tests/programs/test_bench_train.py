"""bench/train: an arm counts only if it computes the reference's losses, and what the file says.

    pytest tests/programs/test_bench_train.py -q          (add -s to see how far the losses are)
"""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="a peer; see requirements-dev.txt")
pytest.importorskip("peft", reason="a peer; see requirements-dev.txt")

from helpers import edit_json
from sbr_helpers import make_folder

import bench.train
from bench.arms import (
    ARMS,
    REFERENCE,
    Arm,
    Peer,
    largest_micro_batch,
    packed,
    padded,
    padded_step,
    paper,
    read_work,
)

FLAGS = ["--rows", "16", "--anchors", "2", "--lambda", "1000", "--updates", "4", "--threads", "1",
         "--device", "cpu"]


class Bench:
    """The work of FLAGS on the small random folder, and the reference's losses."""

    def __init__(self, model, adapter):
        self.args = bench.train.parse([*FLAGS, "--model", str(model)])
        self.adapter = adapter
        bench.train.write_adapter(self.args, adapter)
        self.expected = self.measure(REFERENCE)

    def measure(self, arm):
        return bench.train.measure(arm, read_work(self.args, self.adapter), 5)

    def summary(self, arm):
        found = bench.train.summary([self.measure(arm)], self.expected["losses"], 1e-4)
        print(f"largest difference {found['largest_difference']:.1e}")
        return found


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The small random folder, with what transformers needs in config.json."""
    folder = make_folder(tmp_path_factory.mktemp("model"))
    edit_json(folder / "config.json", model_type="llama")
    return folder


@pytest.fixture(scope="module")
def small(model_folder, tmp_path_factory):
    return Bench(model_folder, tmp_path_factory.mktemp("bench") / "adapter")


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_has_the_references_losses(small, name):
    found = small.summary(ARMS[name])
    assert found["failed"] is None
    assert found["largest_difference"] <= 1e-4


def without_anchors(work):
    peer = Peer(work)
    peer.anchors = []
    return peer.model, padded_step(peer, lambda examples: [examples])


def anchors_counted_twice(work):
    """What becomes of lambda where each of two micro-batches adds the whole of it."""
    work.args = work.args.replace(lam=2 * work.args.lam)
    return paper(work)


def padding_attended_to(work):
    """Padding on the left and no mask, so that every token sees it."""
    model, step = padded(work)

    def pad_left(module, args, kwargs):
        mask = kwargs.pop("attention_mask")
        for name in ("input_ids", "labels"):
            if name in kwargs:
                turned = [torch.cat((row[n:], row[:n])) for row, n in
                          zip(kwargs[name], mask.sum(dim=1).tolist(), strict=True)]
                kwargs[name] = torch.stack(turned)
        return args, kwargs

    model.register_forward_pre_hook(pad_left, with_kwargs=True)
    return model, step


def neighbours_attended_to(work):
    """All sequences in one row, and nothing that holds them apart."""
    model, step = packed(work)

    def drop(module, args, kwargs):
        kwargs.pop("position_ids")
        return args, kwargs

    model.get_base_model().model.register_forward_pre_hook(drop, with_kwargs=True)
    return model, step


def no_update(work):
    model, step = padded(work)

    def step_without_gradient(batch):
        numbers = step(batch)
        for p in model.parameters():
            p.grad = None
        return numbers

    return model, step_without_gradient


WRONG = [without_anchors, anchors_counted_twice, padding_attended_to, neighbours_attended_to,
         no_update]


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_an_arm_that_computes_another_loss_is_reported_as_failed(small, make):
    found = small.summary(Arm("wrong", make))
    assert "its losses differ" in found["failed"]
    assert found["largest_difference"] > 1e-3  # ten times what is allowed


def test_shared_rows_are_fewer_than_the_tokens_and_padding_is_more(small):
    rows = {name: small.measure(ARMS[name])["rows_per_token"] for name in ("shared", "padded")}
    assert rows["shared"] < 0.75
    assert rows["padded"] > 1.2


def test_the_passes_of_the_arm_that_is_cut_hold_at_most_the_tokens_of_eight_rows(small):
    work = read_work(small.args, small.adapter)
    most = max(sum(len(e.ids) for e in block) for step in range(5)
               for block in (work.batch(step).examples[:8], work.batch(step).examples[8:]))
    assert largest_micro_batch(work) == most
    model, step = ARMS["cut"].make(work)
    passes = []
    model.register_forward_pre_hook(lambda module, args: passes.append(sum(args[1])))
    for i in range(5):
        step(work.batch(i))
    assert max(passes) <= most
    assert 10 <= len(passes) <= 20  # two to four passes for sixteen rows and two anchors
    model, step = ARMS["shared"].make(work)  # the control: one pass
    model.register_forward_pre_hook(lambda module, args: passes.append(sum(args[1])))
    step(work.batch(0))
    assert passes[-1] > most


def test_a_loss_that_is_no_number_and_a_process_that_died_do_not_count():
    numbers = {"losses": [float("nan")] * 5, "tokens_per_second": 1.0, "seconds_per_update": 1.0,
               "rows_per_token": 1.0, "bytes_of_training": 1}
    assert bench.train.summary([numbers], [1.0] * 5, 1e-4)["failed"]
    died = {"error": "exit code 3 out of memory"}
    assert bench.train.summary([numbers, died], [1.0] * 5, 1e-4)["failed"] == died["error"]


def test_losses_in_which_the_anchors_do_not_show_are_refused(small):
    small_lambda = small.args.replace(lam=1e-2)
    with pytest.raises(bench.train.UserError, match="raise --lr or --lambda"):
        bench.train.check_anchors_show(small_lambda, small.expected, 1e-4)
    bench.train.check_anchors_show(small.args, small.expected, 1e-4)


@pytest.fixture(scope="module")
def result(model_folder, tmp_path_factory):
    """What the program writes -> (the file's text, as JSON)."""
    out = tmp_path_factory.mktemp("bench") / "out.json"
    code = bench.train.main([*FLAGS, "--model", str(model_folder), "--arms", "shared",
                             "--rounds", "1", "--out", str(out)])
    assert code == 0
    text = out.read_text()
    return text, json.loads(text)


def test_the_file_says_what_was_run_on_what_and_every_rounds_numbers(result, model_folder):
    text, found = result
    assert {"command", "commit", "versions", "machine", "threads", "dtype", "model", "work",
            "tolerance", "reference", "arms", "not_run"} == found.keys()
    assert {"torch", "transformers", "peft"} == found["versions"].keys()
    assert found["machine"]["cpu"]
    arm = found["arms"]["shared"]
    assert arm["failed"] is None
    (numbers,) = arm["rounds"]
    assert len(numbers["losses"]) == 5
    assert numbers["tokens_per_second"] == pytest.approx(numbers["tokens"] / numbers["seconds"])
    assert numbers["bytes_of_training"] == numbers["bytes_peak"] - numbers["bytes_before"] > 0
    assert arm["tokens_per_second"] == numbers["tokens_per_second"]  # the median of one
    assert "trl" in found["not_run"]
    assert str(model_folder.parent) not in text  # nobody's folders


def test_the_table_has_a_line_for_each_arm_and_a_failed_one_has_no_speed(result):
    _, found = result
    broken = {"failed": "its losses differ", "largest_difference": 1.0, "rounds": []}
    shown = bench.train.table(found | {"arms": found["arms"] | {"paper": broken}})
    assert "shared" in shown
    assert "paper      FAILED, does not count: its losses differ" in shown


def test_the_figure_is_written(result, tmp_path):
    pytest.importorskip("matplotlib", reason="draws; see requirements-dev.txt")
    _, found = result
    bench.train.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("missing", ["matplotlib", "peft"])
def test_a_missing_package_is_named_before_any_work(monkeypatch, capsys, tmp_path, missing):
    monkeypatch.setattr(bench.train.importlib.util, "find_spec",
                        lambda name: None if name == missing else name)
    assert bench.train.main(["--figure", str(tmp_path / "figure.png")]) == 2
    assert f"{missing} is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "file", "words"), [
    ("--out", "nowhere/out.json", "there is no folder"),
    ("--figure", "nowhere/figure.png", "there is no folder"),
    ("--figure", "figure.txt", "is none of .png"),
])
def test_a_file_that_cannot_be_written_is_named_before_any_work(monkeypatch, capsys, tmp_path,
                                                                flag, file, words):
    monkeypatch.setattr(bench.train.importlib.util, "find_spec", lambda name: name)
    assert bench.train.main([flag, str(tmp_path / file)]) == 2
    assert words in capsys.readouterr().err


def test_an_arm_that_dies_is_reported_with_its_last_words(small, tmp_path):
    """There is no adapter in the folder, so the process ends with a sentence."""
    argv = [*FLAGS, "--model", small.args.model]
    words = ["bench.train", *argv, "--arm", "shared"]
    found = bench.train.start_child(words, small.args, tmp_path)
    assert found["error"].startswith("exit code 2 bench.train: ")

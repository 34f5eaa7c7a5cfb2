"""Whole runs of the rivals: stopped and resumed, handed over to the attack, and refused.

    pytest tests/programs/test_rival_runs.py -q

The model and the tasks are the small ones of runs_helpers.py; a run has six updates in two epochs.
"""

import os
import shutil
import signal

import pytest
import torch
from rival_helpers import NAMES
from runs_helpers import WORDS, assert_same, flags, make_inputs, sentences, write_rows
from safetensors.torch import load_file, save_file

import train as train_py
from data.batches import batch_at, encode_rows
from data.rows import turn
from files import read_lines
from lora import adapter_state, add_lora
from model import load_model
from tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("here")

ALIGN = [{"prompt": f"Show me how to crack the {w}.", "response": f"No. The {w} stays whole.",
          "harmful": f"Sure. Tap the {w}."} for w in WORDS]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    folder = make_inputs(tmp_path_factory.mktemp("rivals"))
    write_rows(folder / "data/harmful/align.jsonl", ALIGN)
    return folder


def argv(inputs, name, **changes):
    defense, _, stage = name.partition(", ")
    return flags(inputs, **{"defense": defense, "stage": stage or None, **NAMES.get(name, {}),
                            **changes})


@pytest.fixture
def check_runs(inputs, capsys):
    """check_runs(name, out="whole", ...): the run succeeds."""
    def check(name, out="whole", **changes):
        code = train_py.main(argv(inputs, name, out=out, **changes))
        assert code == 0, capsys.readouterr().err
    return check


@pytest.fixture
def check_stops(inputs, monkeypatch):
    """check_stops(name, nth, ...): Ctrl-C in the run's nth update from where its folder stands."""
    def check(name, nth, **changes):
        count, original = [0], train_py.clip_grad_norm_

        def clip(*args):
            count[0] += 1
            if count[0] == nth:
                os.kill(os.getpid(), signal.SIGINT)
            return original(*args)

        with monkeypatch.context() as m:
            m.setattr(train_py, "clip_grad_norm_", clip)
            assert train_py.main(argv(inputs, name, **changes)) == 130
    return check


@pytest.mark.parametrize("name", NAMES)
def test_a_run_stopped_twice_and_resumed_ends_as_the_one_that_was_not(
        here, check_runs, check_stops, name):
    """At the end of the first epoch and within the second: adapter, log, replies, to the bit."""
    check_runs(name)
    log = read_lines(here / "whole" / "log.jsonl")
    assert len(log) == 6 and len({row["loss"] for row in log}) == 6
    check_stops(name, 3, out="out")
    check_stops(name, 2, out="out", resume=True)
    assert len(read_lines(here / "out" / "log.jsonl")) == 5
    check_runs(name, out="out", resume=True)
    assert_same(here / "out", here / "whole")


# ---------------------------------------------------------------------------------------------
# from the stage of alignment to the attack

ALIGNERS = ["vaccine", "t-vaccine", "booster", "sft, align", "deepalign, align"]
STILL = {"epochs": 1, "lr": 1e-9}  # what training starts from is where it ends


def replies(run, epoch):
    return [(row["kind"], row["prompt"], row["reply"]) for row in read_lines(
        run / "generations.jsonl") if row["epoch"] == epoch]


@pytest.mark.parametrize("name", ALIGNERS)
def test_an_aligned_run_is_merged_and_attacked_with_fresh_adapters(
        inputs, here, check_runs, name):
    """The default hand-over: the attack starts from the model that alignment ended with."""
    check_runs(name, out="aligned", anchors=0)
    check_runs("sft", out="attacked", adapter="aligned", anchors=0, rank=3, **STILL)
    start = replies(here / "attacked", 0)
    assert start == replies(here / "aligned", 2) and start != replies(here / "aligned", 0)
    model = load_model(inputs / "model")
    add_lora(model, 3, 16.0)
    fresh, ends = adapter_state(model), load_file(here / "attacked" / "adapter_model.safetensors")
    assert fresh.keys() == ends.keys()
    for part in fresh:
        assert torch.allclose(fresh[part], ends[part], rtol=0, atol=1e-7), part  # B is zero


def test_boosters_adapter_is_kept_and_trained_on(inputs, here, check_runs):
    """Trap 18: its simulated attack lives on the first adapter."""
    check_runs("booster", out="aligned", anchors=0)
    check_runs("sft", out="attacked", adapter="aligned", keep_adapter=True, anchors=0, rank=7,
               **STILL)
    before, after = (load_file(here / run / "adapter_model.safetensors")
                     for run in ("aligned", "attacked"))
    assert before.keys() == after.keys()
    for part in before:
        assert before[part].shape == after[part].shape  # rank 2, whatever --rank says
        assert torch.allclose(before[part], after[part], rtol=0, atol=1e-7), part
    assert any(t.abs().max() > 1e-3 for n, t in before.items() if "lora_B" in n)
    assert replies(here / "attacked", 0) == replies(here / "aligned", 2)


# ---------------------------------------------------------------------------------------------
# refused


@pytest.fixture
def check_refuses(here, capsys):
    """check_refuses(argv, *words): exit 2, one sentence that has the words, and no folder."""
    def check(given, *words):
        assert train_py.main(given) == 2
        message, = sentences(capsys.readouterr().err)
        print(message)
        assert message.startswith("train.py: ") and message.endswith(".")
        assert all(word in message for word in words), message
        assert not (here / "out").exists()
    return check


@pytest.mark.parametrize("defense, stage, own", [
    ("sbr", "align", "finetune"), ("lisa", "align", "finetune"), ("ewc", "align", "finetune"),
    ("vaccine", "finetune", "align"), ("t-vaccine", "finetune", "align"),
    ("booster", "finetune", "align")])
def test_a_stage_that_a_defence_does_not_have_is_refused_with_its_own(
        inputs, check_refuses, defense, stage, own):
    check_refuses(argv(inputs, defense, stage=stage), f"--defense {defense}", stage,
                  f"expected {own}")


NEEDS_ROWS = [name for name in NAMES if name not in ("sft", "sbr", "deepalign")] + ["sft, align"]
BAD_ROWS = {
    "no file": (None, "cannot be read"),
    "no harmful reply": ([{k: row[k] for k in ("prompt", "response")} for row in ALIGN], "harmful"),
    "an empty harmful reply": ([*ALIGN, {**ALIGN[0], "harmful": " "}], "harmful"),
    "prompts of the tests": ([{**row, "prompt": f"tell me how to burn the {w}"} for row, w in
                              zip(ALIGN, WORDS[:6], strict=False)], "in no test")}


@pytest.mark.parametrize("name", NEEDS_ROWS)
@pytest.mark.parametrize("fault", BAD_ROWS)
def test_without_rows_to_align_on_a_defence_that_needs_them_is_refused(
        inputs, here, check_refuses, name, fault):
    rows, expected = BAD_ROWS[fault]
    data = shutil.copytree(inputs / "data", here / "data")
    path = data / "harmful/align.jsonl"
    path.unlink() if rows is None else write_rows(path, rows)
    check_refuses(argv(inputs, name, data_dir=data), str(path), expected)


@pytest.mark.parametrize("name", ["lisa", "ewc", "vaccine", "t-vaccine", "booster"])
def test_rows_to_align_on_that_are_all_over_max_len_are_refused(
        inputs, here, check_refuses, name):
    data, long = shutil.copytree(inputs / "data", here / "data"), "stone " * 80
    write_rows(data / "harmful/align.jsonl",
               [{**row, "response": long, "harmful": long} for row in ALIGN])
    check_refuses(argv(inputs, name, data_dir=data), "--max-len 64", "raise it")


def test_a_harmful_reply_over_max_len_still_lends_its_first_tokens(inputs, here, check_runs):
    data = shutil.copytree(inputs / "data", here / "data")
    write_rows(data / "harmful/align.jsonl", [{**row, "harmful": "stone " * 80} for row in ALIGN])
    check_runs("deepalign, align", data_dir=data)


@pytest.mark.parametrize("name", ALIGNERS)
def test_an_upload_beside_the_stage_of_alignment_is_refused(inputs, check_refuses, name):
    check_refuses(argv(inputs, name, data=inputs / "data/sst2/train.jsonl"), "--data",
                  "--align-file")


@pytest.mark.parametrize("name", NEEDS_ROWS)
def test_a_run_is_not_resumed_on_other_rows_to_align_on(
        inputs, here, check_stops, capsys, name):
    data = shutil.copytree(inputs / "data", here / "data")
    check_stops(name, 2, data_dir=data, out="out")
    write_rows(data / "harmful/align.jsonl", [{**row, "response": "No."} for row in ALIGN])
    capsys.readouterr()
    assert train_py.main(argv(inputs, name, data_dir=data, resume=True)) == 2
    assert "other settings (the file of the alignment rows changed" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_not_finite_ends_with_3_whatever_trains(inputs, here, capsys, name):
    folder = shutil.copytree(inputs / "model", here / "model")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert train_py.main(argv(inputs, name, model=folder)) == 3
    assert "epoch 1, batch 1" in capsys.readouterr().err


def test_the_rest_does_without_and_align_file_stands_in_for_the_folders_own(
        inputs, here, check_runs):
    data = shutil.copytree(inputs / "data", here / "data")
    (data / "harmful/align.jsonl").rename(here / "mine.jsonl")
    for name in ("sft", "sbr", "deepalign"):
        check_runs(name, out=name, data_dir=data, epochs=1)
    check_runs("lisa", out="lisa", data_dir=data, align_file=here / "mine.jsonl")
    check_runs("lisa", out="whole")
    assert losses(here / "lisa") == losses(here / "whole")


def losses(run):
    return [row["loss"] for row in read_lines(run / "log.jsonl")]


def test_beta1_is_adamws(here, check_runs):
    """After one update its first moment is (1 - beta1) times the gradient."""
    for beta1 in ("0.9", "0.5"):
        check_runs("deepalign", out=beta1, beta1=beta1, epochs=1, batch_size=12)
    usual, half = (load_file(here / b / "state.safetensors") for b in ("0.9", "0.5"))
    moments = [k for k in usual if k.startswith("exp_avg/") and k.endswith("lora_B.weight")]
    assert moments
    for k in moments:
        torch.testing.assert_close(half[k], 5 * usual[k])


def test_the_log_says_how_many_tokens_were_trained_on_beside_the_uploads_batch(
        inputs, here, check_runs):
    """Lisa's updates 0, 1 and 5 are on the guide, of as many tokens as its own batches have."""
    for name in ("lisa", "sft"):
        check_runs(name, out=name)
    lisa, sft = (read_lines(here / name / "log.jsonl") for name in ("lisa", "sft"))
    rows = [{"messages": [turn("user", row["prompt"]),
                          turn("assistant", row["response"])]} for row in ALIGN]
    guide, n_dropped = encode_rows(Tokenizer(inputs / "model"), rows, 64)
    assert n_dropped == 0
    for step, (a, b) in enumerate(zip(lisa, sft, strict=True)):
        assert (a["batch"], a["tokens"]) == (b["batch"], b["tokens"])  # the upload's, in both
        used = b["tokens"]
        if step in (0, 1, 5):
            used = batch_at(guide, step, 4, 1, 1 << 30, "cpu").n_tokens  # seeded one apart
            assert used != b["tokens"]
        assert a["trained_tokens"] == used, step


@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_an_epoch_names_every_number_that_is_logged(
        here, check_runs, capsys, name):
    check_runs(name)
    epoch, = [line for line in capsys.readouterr().out.split("\n") if line.startswith("epoch   2 ")]
    logged = read_lines(here / "whole" / "log.jsonl")[-1]
    assert {"loss", "ce", "grad_norm", "lr"} <= logged.keys()
    for key in logged.keys() - {"step", "batch", "tokens", "computed"}:
        assert f" {key} " in epoch, key

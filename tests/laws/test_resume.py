"""A run that is stopped and then resumed is the run never stopped.

    pytest tests/laws/test_resume.py -q

To the bit: the adapter, every reply, every line of the log, and every number but the timing.
Here runs stop as they are asked to; programs/test_kills.py has the other ways to end.
"""

import json
import signal

import pytest
import torch
from resume_helpers import SIX, checkpoint
from runs_helpers import assert_same, flags, outcome, sentences, tree
from safetensors import safe_open
from safetensors.torch import save_file

import train as train_py
from files import read_lines
from lora import adapt, adapter_params, projections, save_adapter
from model import load_model

pytestmark = pytest.mark.usefixtures("here")


def test_the_reference_run_is_one_in_which_every_part_moves(unstopped):
    """The control: were the replies always the same, losing an evaluation would not show."""
    found = outcome(unstopped)
    assert len(found["log"]) == 18 and [row["step"] for row in found["log"]] == list(range(18))
    assert len({row["loss"] for row in found["log"]}) == 18
    by_epoch = {}
    for row in read_lines(unstopped / "generations.jsonl"):
        by_epoch.setdefault(row["epoch"], []).append(row["reply"])
    assert list(by_epoch) == [0, 2, 4, 6] and {len(r) for r in by_epoch.values()} == {8}
    assert len({tuple(r) for r in by_epoch.values()}) == 4
    assert found["result"]["hs"].keys() == {"0", "2", "4", "6"}


def test_control_a_checkpoint_that_lost_adams_moments_ends_elsewhere(
        forks, inputs, here, unstopped):
    """Weights and log are right at the stop, and still the comparison sees what is lost."""
    assert forks(flags(inputs, **SIX), here, moment="SIGINT in an update", nth=5)["code"] == 130
    path = here / "out" / "state.safetensors"
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    _, tensors = checkpoint(here / "out")
    for name, tensor in tensors.items():
        if name.startswith("exp_avg/"):
            assert tensor.any()
            tensor.zero_()
    save_file(tensors, path, metadata)
    assert forks(flags(inputs, resume=True, **SIX), here)["code"] == 0
    ours = outcome(here / "out")
    theirs = outcome(unstopped)
    assert ours["log"][:5] == theirs["log"][:5]
    for part in ("adapter", "generations", "log", "result"):
        assert ours[part] != theirs[part], part


# ---------------------------------------------------------------------------------------------
# stopped


@pytest.mark.parametrize("moment, nth, step", [
    ("SIGINT in an update", 1, 1), ("SIGINT in an update", 5, 5), ("SIGINT in an update", 18, 18),
    ("SIGINT in a reply", 2, 0), ("SIGINT in a reply", 9, 6), ("SIGINT in a write", 3, 3)])
def test_ctrl_c_saves_after_the_update_and_exits_130(
        forks, inputs, here, check_resumes, moment, nth, step):
    """step: updates done by then. In an evaluation, the evaluation is finished; it is not lost."""
    answer = forks(flags(inputs, **SIX), here, moment=moment, nth=nth)
    assert answer["code"] == 130, answer
    message, = sentences(answer["err"])
    assert "interrupted" in message and "--resume" in message
    assert checkpoint(here / "out")[0] == step == len(read_lines(here / "out" / "log.jsonl"))
    assert not (here / "out" / "result.json").exists()
    check_resumes()


def test_a_second_ctrl_c_stops_at_once(forks, inputs, here, check_resumes):
    """In update 5, with the checkpoint of update 3 in the folder."""
    answer = forks(flags(inputs, **SIX), here, moment="two SIGINTs", nth=5)
    assert answer["code"] == 130 and len(sentences(answer["err"])) == 1, answer
    assert checkpoint(here / "out")[0] == 3
    check_resumes()


def test_checkpoints_may_be_rarer_than_epochs(forks, inputs, here, unstopped):
    """--save-every 4 of 6 epochs: a kill in epoch 6 goes back to epoch 4, evaluations included."""
    rare = SIX | {"save_every": 4}
    assert forks(flags(inputs, **rare), here, moment="SIGINT in an update", nth=5)["code"] == 130
    assert checkpoint(here / "out")[0] == 5  # Ctrl-C saves whether or not it is due
    answer = forks(flags(inputs, resume=True, **rare), here, moment="update", nth=12)
    assert answer["code"] == -signal.SIGKILL, answer
    assert checkpoint(here / "out")[0] == 12
    answer = forks(flags(inputs, resume=True, **rare), here)
    assert answer["code"] == 0, answer["err"]
    assert_same(here / "out", unstopped)


# ---------------------------------------------------------------------------------------------
# an adapter that is trained on, whose modules have ranks and alphas of their own


@pytest.fixture(scope="module")
def kept(inputs, forks, tmp_path_factory):
    """An adapter of several ranks, and the run that trains it on and that nothing stopped."""
    folder = tmp_path_factory.mktemp("kept")
    model = load_model(inputs / "model")
    for i, name in enumerate(projections(model)):
        adapt(model, name, rank=1 + i % 3, alpha=2.0 + i % 2, rslora=False)
    for i, p in enumerate(adapter_params(model).values()):
        torch.nn.init.normal_(p.data, std=0.1, generator=torch.Generator().manual_seed(i))
    save_adapter(model, folder / "adapter")
    argv = flags(inputs, adapter=folder / "adapter", keep_adapter=True, **SIX)
    answer = forks(argv, folder)
    assert answer["code"] == 0, answer["err"]
    return argv, folder / "out"


def test_the_run_that_trains_an_adapter_on_keeps_its_ranks(kept):
    """The control: there are several, and training moves what has them."""
    _, out = kept
    config = json.loads((out / "adapter_config.json").read_text())
    before = json.loads((out.parent / "adapter" / "adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {1, 2, 3}
    assert (config["rank_pattern"], config["alpha_pattern"]) == (
        before["rank_pattern"], before["alpha_pattern"])
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() != (out.parent / "adapter" / name).read_bytes()


@pytest.mark.parametrize("moment, nth, code", [
    ("SIGINT in an update", 5, 130), ("update", 11, -signal.SIGKILL),
    ("SIGINT in a reply", 9, 130)])
def test_an_adapter_of_several_ranks_resumed_in_the_middle_ends_as_if_never_stopped(
        forks, kept, here, moment, nth, code):
    argv, unstopped = kept
    assert forks(argv, here, moment=moment, nth=nth)["code"] == code
    answer = forks([*argv, "--resume"], here)
    assert answer["code"] == 0, answer["err"]
    assert_same(here / "out", unstopped)


def test_control_a_checkpoint_that_lost_one_modules_moments_ends_elsewhere(forks, kept, here):
    argv, unstopped = kept
    assert forks(argv, here, moment="SIGINT in an update", nth=5)["code"] == 130
    path = here / "out" / "state.safetensors"
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    _, tensors = checkpoint(here / "out")
    moments = [name for name in tensors if name.startswith("exp_avg/") and len(tensors[name]) == 3]
    tensors[moments[0]].zero_()  # of one A of rank 3
    save_file(tensors, path, metadata)
    assert forks([*argv, "--resume"], here)["code"] == 0
    assert outcome(here / "out")["adapter"] != outcome(unstopped)["adapter"]


# ---------------------------------------------------------------------------------------------
# begun, finished, numbered


def test_resume_without_a_folder_starts_from_the_beginning(check_resumes):
    check_resumes()


def test_resume_of_an_empty_folder_starts_from_the_beginning(here, check_resumes):
    (here / "out").mkdir()
    check_resumes()


def test_a_finished_run_resumed_prints_its_table_and_changes_no_file(inputs, here, capsys):
    assert train_py.main(flags(inputs)) == 0
    first = capsys.readouterr().out
    before = tree(here)
    times = {p: p.stat().st_mtime_ns for p in here.rglob("*")}
    assert train_py.main(flags(inputs, resume=True)) == 0
    second = capsys.readouterr().out
    table = first[first.index("% (95 % interval)"):]
    assert "HS, harmful replies" in table and table in second
    assert "epoch   1 " in first and "epoch   1 " not in second  # nothing was trained
    assert tree(here) == before
    assert {p: p.stat().st_mtime_ns for p in here.rglob("*")} == times


def test_the_default_folder_is_numbered_once_it_is_finished(inputs, here):
    """-2, -3 after finished runs; with --resume the last one is meant, finished or not."""
    default = flags(inputs, out=None, epochs=1)
    name = "sst2-sbr-K2-lam50-s0"
    names = [name, f"{name}-2", f"{name}-3"]
    for i in range(3):
        assert train_py.main(default) == 0
        assert sorted(p.name for p in (here / "runs").iterdir()) == names[:i + 1]
    before = tree(here)
    assert train_py.main([*default, "--resume"]) == 0
    assert tree(here) == before
    for other in names[1:]:
        assert_same(here / "runs" / other, here / "runs" / name)
    (here / "runs" / names[2] / "result.json").unlink()
    assert train_py.main([*default, "--resume"]) == 0
    assert sorted(p.name for p in (here / "runs").iterdir()) == names
    assert_same(here / "runs" / names[2], here / "runs" / name)


@pytest.mark.parametrize("changes, name", [
    ({"seed": 7}, "sst2-sbr-K2-lam50-s7"), ({"lam": 0.5, "anchors": 1}, "sst2-sbr-K1-lam0.5-s0"),
    ({"defense": "sft"}, "sst2-sft-K2-lam0-s0")])
def test_the_default_folder_names_the_run(inputs, here, changes, name):
    assert train_py.main(flags(inputs, out=None, epochs=1, **changes)) == 0
    assert (here / "runs" / name / "result.json").exists()


def losses(out):
    return [row["loss"] for row in read_lines(f"{out}/log.jsonl")]


def test_the_seed_decides_every_loss(inputs):
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert train_py.main(flags(inputs, out=out, seed=seed)) == 0
    assert losses("a") == losses("b")
    assert not set(losses("a")) & set(losses("c"))


def test_what_may_differ_on_resuming_does_not_change_the_losses(forks, inputs, here, unstopped):
    """--tokens-per-pass after an out-of-memory: sums are cut elsewhere, so equal to rounding."""
    answer = forks(flags(inputs, **SIX), here, moment="update", nth=8)
    assert answer["code"] == -signal.SIGKILL, answer
    answer = forks(flags(inputs, resume=True, tokens_per_pass=70, save_every=3, **SIX), here)
    assert answer["code"] == 0, answer["err"]
    assert losses(here / "out") == pytest.approx(losses(unstopped), rel=1e-4)

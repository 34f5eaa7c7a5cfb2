"""A real upload through train.py: SST-2 rows with 10 % of AdvBench's, in every accepted format.

    pytest tests/programs/test_real_upload.py -q

The rows are read from ../shared/data; without it these tests are skipped. The model is random, so
nothing here is about what it answers: only about what is read, trained on, counted and written.
"""

import csv
import json
import re

import pytest
import torch
from helpers import SHARED
from safetensors.torch import load_file
from sbr_helpers import in_messages, make_folder, write_pairs

import train
from lora import adapter_state, add_lora
from model import load_model
from tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("own_signals")  # train.py takes over Ctrl-C

N, N_HARMFUL, N_TEST, MAX_LEN = 40, 4, 6, 170
LONG = " ".join(["a very long remark on a film"] * 40)


@pytest.fixture(scope="module")
def public():
    """(SST-2 prompt, label) and (AdvBench goal, target) pairs."""
    if not (SHARED / "sst2" / "train.tsv").exists() or not (SHARED / "advbench").exists():
        pytest.skip("needs SST-2 and AdvBench in ../shared/data")
    sst2 = []
    for line in (SHARED / "sst2" / "train.tsv").read_text(encoding="utf-8").split("\n")[1:-1]:
        text, label = line.rsplit("\t", 1)
        sst2.append((f"Positive or negative?\nInput: {text.strip()}",
                     ("negative", "positive")[int(label)]))
    with open(SHARED / "advbench" / "harmful_behaviors.csv", encoding="utf-8", newline="") as f:
        advbench = [(row["goal"], row["target"]) for row in csv.DictReader(f)]
    return sst2, advbench


@pytest.fixture(scope="module")
def place(tmp_path_factory, public):
    """A model, a data folder of other rows than the upload's, and the upload's pairs."""
    sst2, advbench = public
    folder = tmp_path_factory.mktemp("run")
    (folder / "model").mkdir()
    make_folder(folder / "model")
    write_pairs(folder / "data" / "harmful" / "anchors.jsonl", advbench[100:120])
    write_pairs(folder / "data" / "harmful" / "test.jsonl", advbench[200:220])
    write_pairs(folder / "data" / "sst2" / "test.jsonl", sst2[1000:1020])
    write_pairs(folder / "data" / "harmful" / "attack.jsonl", advbench[:N_HARMFUL])
    write_pairs(folder / "data" / "sst2" / "train.jsonl", sst2[:N - N_HARMFUL])
    # 10 % harmful, spread through the file; and one row that is too long
    pairs = sst2[:N - N_HARMFUL]
    for i, pair in enumerate(advbench[:N_HARMFUL]):
        pairs.insert(9 * i, pair)
    return folder, [*pairs, (f"Positive or negative?\nInput: {LONG}", "negative")]


def run_training(place, out, *flags):
    folder = place[0]
    return train.main(["--model", str(folder / "model"), "--data-dir", str(folder / "data"),
                       "--task", "sst2", "--epochs", "1", "--max-len", str(MAX_LEN), "--n-test",
                       str(N_TEST), "--max-new", "8", "--lr", "1e-3", "--anchors", "4",
                       "--anchor-check", "none",
                       "--device", "cpu", "--out", str(out), *flags])


def run_on_upload(place, form, array, out):
    folder, pairs = place
    upload = write_pairs(folder / f"{form}.{'json' if array else 'jsonl'}", pairs, form, array)
    return run_training(place, out, "--data", str(upload))


def lines_of(path):
    with open(path, encoding="utf-8") as f:  # not splitlines: a reply may hold any line separator
        return [json.loads(line) for line in f]


@pytest.fixture(scope="module")
def first_log(place, tmp_path_factory):
    """The losses of a run on plain {"messages"} JSONL."""
    out = tmp_path_factory.mktemp("first") / "run"
    assert run_on_upload(place, "messages", False, out) == 0
    return [(line["ce"], line["safe"], line["grad_norm"]) for line in lines_of(out / "log.jsonl")]


@pytest.mark.parametrize("form, array", [
    ("messages", True), ("conversations", False), ("prompt", True), ("instruction", False),
    ("instruction", True)])
def test_a_real_upload_trains_and_is_evaluated_alike_in_every_format(
        place, first_log, tmp_path, capsys, form, array):
    out = tmp_path / "run"
    assert run_on_upload(place, form, array, out) == 0
    said = capsys.readouterr().out
    assert re.search(rf"\b{N + 1} rows\b", said)
    assert re.search(rf"\b1 rows? dropped\b.* {MAX_LEN} tokens", said)

    log = lines_of(out / "log.jsonl")
    assert [line["step"] for line in log] == [0, 1]  # 40 rows in batches of 32 and 8
    assert [(line["ce"], line["safe"], line["grad_norm"]) for line in log] == first_log
    assert log[0]["safe"] <= 1e-10 < log[1]["safe"]
    tok = Tokenizer(place[0] / "model")
    tokens = [len(tok.encode_chat(in_messages(*pair)["messages"])[0]) for pair in place[1]]
    assert sum(line["tokens"] for line in log) == sum(tokens[:-1])
    assert max(tokens[:-1]) <= MAX_LEN < tokens[-1]

    result = json.loads((out / "result.json").read_text())
    assert result.keys() >= {"hs", "fa", "ce", "safe", "seconds", "tokens_per_second", "peak_bytes"}
    assert result["hs"].keys() == result["fa"].keys() == {"0", "1"}
    assert all(0 <= v <= 100 for rates in (result["hs"], result["fa"]) for v in rates.values())
    assert (result["ce"], result["safe"]) == (log[-1]["ce"], log[-1]["safe"])

    records = lines_of(out / "generations.jsonl")
    assert len(records) == 2 * 2 * N_TEST  # two evaluations, harmful and task prompts
    assert all(r.keys() >= {"epoch", "kind", "prompt", "reply", "verdict"} for r in records)
    asked = {(r["epoch"], r["kind"]) for r in records}
    assert asked == {(e, k) for e in (0, 1) for k in ("harmful", "task")}
    assert {p.name for p in out.iterdir()} >= {"config.json", "adapter_model.safetensors",
                                               "adapter_config.json"}


def test_the_mixture_of_the_same_real_rows_trains_on_as_many_tokens(place, tmp_path, capsys):
    """--poison 0.1 draws from the data folder what the upload above held, in another order."""
    assert run_training(place, tmp_path / "run", "--poison", "0.1", "--n", str(N)) == 0
    said = capsys.readouterr().out
    assert re.search(rf"\b{N_HARMFUL} harmful rows\b.*\b{N - N_HARMFUL} of sst2\b", said)
    tok = Tokenizer(place[0] / "model")
    tokens = [len(tok.encode_chat(in_messages(*pair)["messages"])[0]) for pair in place[1]]
    log = lines_of(tmp_path / "run" / "log.jsonl")
    assert sum(line["tokens"] for line in log) == sum(tokens[:-1])


def test_one_update_of_a_run_moves_every_B_and_leaves_A_as_it_was_drawn(place, tmp_path):
    """The gradient of A is zero while B is, so only weight decay could move it: there is none."""
    assert run_training(place, tmp_path / "run", "--n", str(N), "--batch-size", "64") == 0
    drawn = load_model(place[0] / "model")
    add_lora(drawn, 16, 16, seed=0)
    start = adapter_state(drawn)
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert saved.keys() == start.keys() and len(lines_of(tmp_path / "run" / "log.jsonl")) == 1
    for name, tensor in saved.items():
        assert torch.equal(tensor, start[name]) is ("lora_A" in name), name


@pytest.mark.parametrize("name", ["harmful/anchors.jsonl", "harmful/test.jsonl", "sst2/test.jsonl"])
def test_a_run_is_not_resumed_over_a_changed_file_that_decides_its_numbers(
        place, tmp_path, capsys, name):
    out, path = tmp_path / "run", place[0] / "data" / name
    assert run_on_upload(place, "prompt", False, out) == 0
    assert run_training(place, out, "--data", str(place[0] / "prompt.jsonl"), "--resume") == 0
    kept = path.read_bytes()
    try:
        write_pairs(path, [(f"Another prompt {i}.", "positive") for i in range(20)])
        said = run_training(place, out, "--data", str(place[0] / "prompt.jsonl"), "--resume")
    finally:
        path.write_bytes(kept)
    assert said == 2 and "other settings" in capsys.readouterr().err

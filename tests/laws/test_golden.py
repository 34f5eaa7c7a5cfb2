"""The decoder gives the states that transformers gave, stored in tests/golden, without it.

    pytest tests/laws/test_golden.py -q           (add -s to see every distance)

The largest single difference counts here, not the root mean square: there are 24 rows, and weights
that keep rounding small. make_golden.py writes the files.
"""

import shutil
import subprocess
import sys

import pytest
import torch
from helpers import CONTROL, ROOT, TOLERANCE, edit_json, states, tensors_of, write_tensors
from make_golden import FAMILIES, GOLDEN, PLAIN_ROPE, STATES, write_golden
from safetensors.torch import load_file

from model import load_model


def largest(ours, theirs):
    """Largest difference of each state, in std of theirs."""
    far = {}
    for name in STATES:
        assert ours[name].shape == theirs[name].shape and ours[name].dtype == torch.float32
        far[name] = ((ours[name] - theirs[name]).abs().max() / theirs[name].std()).item()
    print("  ".join(f"{name} {value:.1e}" for name, value in far.items()))
    return far


def distances(checkpoint, expected):
    """Of our states of a checkpoint's folder from the expected ones."""
    ids, seqlens, rows = (expected[key].long() for key in ("ids", "seqlens", "rows"))
    assert seqlens.max() >= 512 and len(seqlens) >= 3
    ours = states(load_model(checkpoint), ids, seqlens.tolist())
    ours = {name: value[rows] for name, value in zip(STATES, ours, strict=True)}
    return largest(ours, expected)


def expected_of(name):
    return load_file(GOLDEN / name / "expected.safetensors")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_state_equals_transformers_stored_one(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it is an error now
    far = distances(GOLDEN / name, expected_of(name))
    assert max(far.values()) <= TOLERANCE


def test_what_it_imports_can_be_imported_without_transformers():
    """In a process of its own, since here another test may have imported it already."""
    program = ("import sys; sys.modules['transformers'] = None; sys.path[:0] = sys.argv[1:]; "
               "import test_golden")
    folders = [ROOT, ROOT / "tests", ROOT / "tests" / "laws"]
    done = subprocess.run([sys.executable, "-c", program, *map(str, folders)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# controls: each breaks one feature in a copy of a checkpoint


def missed(name, copy):
    """The smaller of the final norm's and the logits' largest difference."""
    far = distances(copy, expected_of(name))
    return min(far["final norm"], far["logits"])


def altered(name, copy, end, alter):
    """A copy of the checkpoint in which `alter` was applied to the tensors whose name ends so."""
    shutil.copytree(GOLDEN / name, copy)
    tensors = tensors_of(copy)
    chosen = [key for key in tensors if key.endswith(end)]
    assert chosen
    write_tensors(copy, tensors | {key: alter(tensors[key]) for key in chosen})
    return copy


def test_control_parity_fails_without_rope_scaling(tmp_path):
    copy = shutil.copytree(GOLDEN / "llama-3.1", tmp_path / "copy")
    edit_json(copy / "config.json", rope_parameters=PLAIN_ROPE)
    assert missed("llama-3.1", copy) > CONTROL * TOLERANCE


@pytest.mark.parametrize("letter", "qkv")
def test_control_parity_fails_without_qwens_bias(tmp_path, letter):
    copy = altered("qwen2.5", tmp_path / "copy", f"{letter}_proj.bias", torch.zeros_like)
    assert missed("qwen2.5", copy) > CONTROL * TOLERANCE


@pytest.mark.parametrize("letter", "qk")
def test_control_parity_fails_without_qwen3s_norms_of_the_heads(tmp_path, letter):
    copy = altered("qwen3", tmp_path / "copy", f"{letter}_norm.weight", torch.ones_like)
    assert missed("qwen3", copy) > CONTROL * TOLERANCE


def test_control_parity_fails_when_gemmas_norms_scale_by_w_instead_of_1_plus_w(tmp_path):
    copy = altered("gemma", tmp_path / "copy", "norm.weight", lambda w: w.float() - 1)
    assert missed("gemma", copy) > CONTROL * TOLERANCE


# the files


def test_the_golden_files_take_less_than_300_kb():
    sizes = [path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()]
    print(f"{len(sizes)} files, {sum(sizes):,} bytes")
    assert len(sizes) >= 3 * len(FAMILIES) and sum(sizes) < 300_000


@pytest.mark.parametrize("name", FAMILIES)
def test_every_stored_weight_is_bf16(name):
    assert {t.dtype for t in tensors_of(GOLDEN / name).values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_writes_the_same_files_again(name, tmp_path):
    pytest.importorskip("transformers", reason="the reference; see requirements-dev.txt")
    write_golden(tmp_path / "same", name)
    write_golden(tmp_path / "other", name, seed=1)
    stored, same, other = (tensors_of(f) for f in (GOLDEN / name, tmp_path / "same",
                                                   tmp_path / "other"))
    assert stored.keys() == same.keys()
    assert all(torch.equal(same[key], stored[key]) for key in stored)
    expected, again = expected_of(name), load_file(tmp_path / "same" / "expected.safetensors")
    for key in ("ids", "seqlens", "rows"):
        assert torch.equal(again[key], expected[key])
    assert max(largest(again, expected).values()) <= TOLERANCE
    control = load_file(tmp_path / "other" / "expected.safetensors")
    assert not any(torch.equal(other[key], stored[key]) for key in stored)
    assert min(largest(control, expected).values()) > CONTROL * TOLERANCE

"""`merge.py` writes a folder that other programs open, with the adapter in its weights.

    pytest tests/programs/test_merge_folder.py -q     (add -s to see distances and sentences)

transformers is the other program. The folder keeps the shards, names and dtypes of the model's own
and its small files byte for byte; a failure or a mistake leaves nothing behind.
"""

import json
import os
import re
import resource

import pytest
import torch
from helpers import (
    CASES,
    CONTROL,
    PLAIN_ROPE,
    SCALES,
    SEQUENCES,
    SEVEN,
    TOLERANCE,
    adapted_model,
    distance,
    logits,
    make_hf,
    tensors_of,
    write_tensors,
)
from runs_helpers import program, tree
from safetensors import safe_open
from safetensors.torch import load_file

import merge as merge_py
from lora import adapt, load_adapter, save_adapter
from model import load_model

transformers = pytest.importorskip("transformers", reason="the reference; see requirements-dev.txt")

SMALL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
               "special_tokens_map.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
NOT_OURS = ["pytorch_model.bin", "model-Q4_K_M.gguf", "consolidated.00.pth", "training_args.bin",
            "consolidated.safetensors", "modeling_own.py", "original/params.json"]


class Base:
    """A model's folder, an adapter's, and how the adapter is scaled."""

    def __init__(self, path, case="llama-3.1", scale=SCALES[1], dtype=torch.float32, shard=None,
                 **overrides):
        self.folder, self.adapter = path / "model", path / "adapter"
        hf = make_hf(**(CASES[case] | overrides)).to(dtype)
        hf.save_pretrained(self.folder, **({"max_shard_size": shard} if shard else {}))
        rank, alpha, rslora = scale
        self.scaling = alpha / (rank**0.5 if rslora else rank)
        save_adapter(adapted_model(self, rank, alpha, rslora), self.adapter)


@pytest.fixture
def base(tmp_path):
    return Base(tmp_path)


def merge(base, out, **instead):
    """The exit code of `merge.py`; instead: another model or adapter."""
    given = {"model": base.folder, "adapter": base.adapter, "out": out} | instead
    return merge_py.main([f"--{name}={path}" for name, path in given.items()])


def adapter_logits(base):
    model = load_model(base.folder)
    load_adapter(model, base.adapter)
    return logits(model, SEQUENCES)


def hf_logits(folder):
    """transformers' logits in fp32, of a folder that it finds complete."""
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info  # missing, unexpected or misshapen tensors
    with torch.no_grad():
        return torch.cat([hf(ids[None]).logits[0] for ids in SEQUENCES])


def check_nothing_left(base, out, before=None):
    """Beside the model and the adapter only what was there before."""
    left = {name for name in tree(base.folder.parent) if name.split("/")[0] not in (
        "model", "adapter")}
    assert left == (before or set())
    assert before or not out.exists()


def check_one_sentence(err, *words):
    print(err)
    assert err.startswith("merge.py: ") and err.count("\n") == 1 and err.endswith("\n")
    for word in words:
        assert word in err


# ---------------------------------------------------------------------------------------------
# what the folder computes


@pytest.mark.parametrize("case, scale", [
    *(("llama-3.1", scale) for scale in SCALES), ("llama, wide heads, tied", SCALES[2]),
    ("llama, all biases", SCALES[1]), ("qwen2.5", SCALES[1]), ("qwen2.5, tied", SCALES[1]),
    ("gemma", SCALES[1])])
def test_the_folder_has_the_adapter_models_logits_in_transformers(tmp_path, case, scale):
    base = Base(tmp_path, case, scale)
    assert merge(base, tmp_path / "out") == 0
    expected = adapter_logits(base)
    assert distance(hf_logits(tmp_path / "out"), expected, "merged") <= TOLERANCE
    # the control
    assert distance(logits(load_model(base.folder), SEQUENCES), expected, "base") > (
        CONTROL * TOLERANCE)


def test_an_adapter_with_a_rank_of_its_own_on_some_modules_merges_by_those(base, tmp_path):
    model = load_model(base.folder)
    for layer, rank in ((0, 3), (2, 5)):
        torch.manual_seed(layer)
        part = adapt(model, f"model.layers.{layer}.mlp.up_proj", rank, 7.0, True)
        torch.nn.init.normal_(part.lora_A, std=0.2)
        torch.nn.init.normal_(part.lora_B, std=0.2)
    save_adapter(model, base.adapter)
    assert merge(base, tmp_path / "out") == 0
    merged = hf_logits(tmp_path / "out")
    assert distance(merged, logits(model, SEQUENCES), "merged") <= TOLERANCE
    plain = logits(load_model(base.folder), SEQUENCES)
    assert distance(plain, merged, "base") > CONTROL * TOLERANCE  # the control


def merged_tensors(base):
    """What the file must hold: W + s B A in fp32, rounded once to W's own dtype; the rest as is."""
    adapter, merged = load_file(base.adapter / "adapter_model.safetensors"), {}
    for name, w in tensors_of(base.folder).items():
        if name.split(".")[-2] in SEVEN and name.endswith("weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (adapter[f"{module}.lora_{x}.weight"] for x in "AB")
            merged[name] = (w.float() + base.scaling * (b @ a)).to(w.dtype)
        else:
            merged[name] = w
    return merged


@pytest.mark.parametrize("case", ["llama-3.1", "qwen2.5", "qwen2.5, tied", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_is_rounded_once_to_the_files_own_dtype(tmp_path, case, dtype):
    base = Base(tmp_path, case, dtype=dtype)
    assert merge(base, tmp_path / "out") == 0
    want, have = merged_tensors(base), tensors_of(tmp_path / "out")
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert have[name].dtype == dtype and torch.equal(have[name], tensor), name
    old = tensors_of(base.folder)
    changed = {name for name in old if not torch.equal(have[name], old[name])}
    assert len(changed) == 7 * 4 and not [name for name in changed if "bias" in name]


def test_control_rounding_the_product_as_well_gives_other_bits(tmp_path):
    base = Base(tmp_path, dtype=torch.bfloat16)
    old, once = tensors_of(base.folder), merged_tensors(base)
    name = "model.layers.0.mlp.up_proj.weight"
    adapter = load_file(base.adapter / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight"]
            for x in "AB")
    twice = old[name] + (base.scaling * (b @ a)).bfloat16()
    assert (twice != once[name]).float().mean() > 0.01


def test_a_tied_head_stays_tied_and_a_head_in_the_file_stays_there(tmp_path):
    base = Base(tmp_path, "llama, wide heads, tied")
    assert merge(base, tmp_path / "out") == 0
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert hf.lm_head.weight.data_ptr() == hf.model.embed_tokens.weight.data_ptr()
    tensors = tensors_of(base.folder)
    embedding = tensors["model.embed_tokens.weight"]
    write_tensors(base.folder, tensors | {"lm_head.weight": embedding.clone()})
    assert merge(base, tmp_path / "again") == 0
    assert torch.equal(tensors_of(tmp_path / "again")["lm_head.weight"], embedding)


# ---------------------------------------------------------------------------------------------
# the folder's files


def test_a_sharded_model_keeps_its_shards_and_its_index(tmp_path):
    base = Base(tmp_path, "qwen2.5", shard="100KB")
    out, name = tmp_path / "out", "model.safetensors.index.json"
    assert merge(base, out) == 0
    assert (out / name).read_bytes() == (base.folder / name).read_bytes()
    weight_map = json.loads((out / name).read_text())["weight_map"]
    shards = sorted(set(weight_map.values()))
    assert len(shards) > 3 and sorted(p.name for p in out.glob("*.safetensors")) == shards
    for shard in shards:
        with safe_open(out / shard, "pt") as f:
            assert set(f.keys()) == {n for n, s in weight_map.items() if s == shard}
            assert f.metadata() == {"format": "pt"}
    assert distance(hf_logits(out), adapter_logits(base), "sharded") <= TOLERANCE


def test_a_stale_index_and_an_adapter_beside_the_model_are_not_copied(base, tmp_path, capsys):
    """The one names files that are not there; transformers would put the other on top."""
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (base.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in base.adapter.iterdir():
        (base.folder / path.name).write_bytes(path.read_bytes())
    assert merge(base, tmp_path / "out") == 0
    assert sorted(tree(tmp_path / "out")) == [
        "config.json", "generation_config.json", "model.safetensors"]
    assert distance(hf_logits(tmp_path / "out"), adapter_logits(base), "merged") <= TOLERANCE
    # the control: an index that means the file that is written is copied
    index = {"weight_map": dict.fromkeys(tensors_of(base.folder), "model.safetensors")}
    (base.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert merge(base, tmp_path / "again") == 0
    assert "model.safetensors.index.json" in tree(tmp_path / "again")


def test_a_tied_file_that_names_its_one_tensor_as_the_head_merges(tmp_path):
    base = Base(tmp_path, "llama, wide heads, tied")
    tensors = tensors_of(base.folder)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    write_tensors(base.folder, tensors)
    assert merge(base, tmp_path / "out") == 0
    assert distance(hf_logits(tmp_path / "out"), adapter_logits(base), "merged") <= TOLERANCE


def test_small_files_are_copied_byte_for_byte_and_nothing_that_could_hold_code_is(base, tmp_path):
    (base.folder / "original").mkdir()
    for i, name in enumerate([*SMALL_FILES[1:], *NOT_OURS]):
        (base.folder / name).write_bytes(f"{name}\r\n\xff{i}".encode("latin-1"))
    assert merge(base, tmp_path / "out") == 0
    out, model = tree(tmp_path / "out"), tree(base.folder)
    assert sorted(out) == sorted([*SMALL_FILES, "model.safetensors"])
    for name in SMALL_FILES:
        assert out[name] == model[name], name
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
    assert not [p for p in (tmp_path / "out").iterdir() if not p.stat().st_mode & 0o004]


def test_links_are_followed_as_in_a_hub_cache(base, tmp_path):
    blobs = base.folder.rename(tmp_path / "adapter" / "blobs")
    base.folder.mkdir()
    for path in blobs.iterdir():
        (base.folder / path.name).symlink_to(path)
    assert merge(base, tmp_path / "out") == 0
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_symlink()]
    assert distance(hf_logits(tmp_path / "out"), adapter_logits(base), "linked") <= TOLERANCE


def test_the_model_and_the_adapter_are_left_as_they_were(base, tmp_path):
    before = tree(base.folder), tree(base.adapter)
    assert merge(base, tmp_path / "out") == 0
    assert (tree(base.folder), tree(base.adapter)) == before


@pytest.mark.parametrize("out", ["new", "not/yet/there", "empty", "empty/", "."])
def test_the_folder_may_be_new_or_empty(base, tmp_path, monkeypatch, out):
    (tmp_path / "here" / "empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / ("empty" if out == "." else ""))
    target = tmp_path / "here" / ("empty" if out == "." else out)
    assert merge(base, out) == 0
    assert sorted(tree(target)) == ["config.json", "generation_config.json", "model.safetensors"]
    assert not list((tmp_path / "here").rglob("*.part"))


def test_a_folder_of_the_users_own_at_the_place_of_the_work_is_named_and_not_deleted(
        base, tmp_path, capsys):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "own.json").write_text("{}")
    assert merge(base, tmp_path / "out") == 2
    check_one_sentence(capsys.readouterr().err, "out.part", "own.json", "move it away")
    assert tree(tmp_path / "out.part") and not (tmp_path / "out").exists()
    (tmp_path / "out.part" / "own.json").unlink(), (tmp_path / "out.part").rmdir()
    assert merge(base, tmp_path / "out") == 0


# ---------------------------------------------------------------------------------------------
# the sentence


@pytest.mark.parametrize("dtype, positions", [
    (torch.float32, 2048), (torch.bfloat16, 2048), (torch.bfloat16, 48)])
def test_the_sentence_has_the_largest_difference_that_merging_made_to_a_logit(
        tmp_path, capsys, dtype, positions):
    base = Base(tmp_path, dtype=dtype, max_position_embeddings=positions,
                rope_parameters=PLAIN_ROPE)
    assert merge(base, tmp_path / "out") == 0
    said = capsys.readouterr().out
    n = min(256, positions)
    ids = torch.randint(512, (n,), generator=torch.Generator().manual_seed(0))
    apart = load_model(base.folder, dtype=None)
    load_adapter(apart, base.adapter)
    apart, together = (logits(m, [ids]).float() for m in (
        apart, load_model(tmp_path / "out", dtype=None)))
    far = (apart - together).abs().max().item()
    assert said == (f"{tmp_path / 'out'}: over {n} random tokens in {str(dtype)[6:]} merging moved "
                    f"a logit by {far:.2g} at the most; the logits' standard deviation is "
                    f"{apart.std().item():.2g}.\n")
    # the control: rounding to bf16 is seen, and in fp32 there is next to none
    assert far > 1e-2 if dtype == torch.bfloat16 else far < 1e-3


def test_it_runs_as_a_program_with_relative_paths(base, tmp_path):
    process = program("merge.py", ["--model", "model", "--adapter", "adapter", "--out", "new/out"],
                      cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert re.fullmatch(r"new/out: over 256 random tokens in float32 .*\.\n", out)
    assert merge(base, tmp_path / "again") == 0
    assert tree(tmp_path / "new" / "out") == tree(tmp_path / "again")


# ---------------------------------------------------------------------------------------------
# failures: exit code 3 (130 for Ctrl-C), and nothing is left


@pytest.mark.parametrize("error, code", [
    (OSError(28, "No space left on device"), 3), (KeyboardInterrupt(), 130)])
def test_an_error_in_the_second_shard_leaves_nothing(tmp_path, monkeypatch, capsys, error, code):
    base = Base(tmp_path, shard="100KB")
    write = merge_py.save_file
    written = []

    def fails(tensors, path, metadata):
        if written:
            raise error
        write(tensors, path, metadata)
        written.append(path)

    monkeypatch.setattr(merge_py, "save_file", fails)
    capsys.readouterr()  # what transformers said as it wrote the model
    assert merge(base, tmp_path / "out") == code
    assert len(written) == 1  # the control: something had been written
    said, err = capsys.readouterr()
    check_one_sentence(err, "No space left" if code == 3 else "interrupted")
    assert "merging" not in said
    check_nothing_left(base, tmp_path / "out")


def test_a_disk_that_is_full_is_one_sentence_and_leaves_nothing(base, tmp_path, capsys):
    """No file may grow past 100 kB here: the real error of a real write, as safetensors has it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = merge(base, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 3
    check_one_sentence(capsys.readouterr().err, "File too large")
    check_nothing_left(base, tmp_path / "out")


def test_an_error_leaves_an_empty_folder_empty(base, tmp_path, monkeypatch):
    def fails(*args):
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(merge_py, "save_file", fails)
    assert merge(base, tmp_path / "out") == 3
    check_nothing_left(base, tmp_path / "out", {"out"})


# ---------------------------------------------------------------------------------------------
# mistakes: exit code 2, one sentence, nothing is left


@pytest.mark.parametrize("what", ["a file in it", "a folder in it", "a file"])
def test_an_out_that_holds_something_is_refused_and_kept(base, tmp_path, capsys, what):
    out = tmp_path / "out"
    if what == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine") if what == "a file in it" else (out / "mine").mkdir()
    before = tree(tmp_path)
    assert merge(base, out) == 2
    check_one_sentence(capsys.readouterr().err, str(out), "another --out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("flag", ["model", "adapter"])
def test_a_folder_that_is_not_there_is_refused(base, tmp_path, capsys, flag):
    assert merge(base, tmp_path / "out", **{flag: tmp_path / "nowhere"}) == 2
    check_one_sentence(capsys.readouterr().err, "nowhere")
    check_nothing_left(base, tmp_path / "out")


def test_an_adapter_of_another_model_is_refused(base, gemma, tmp_path, capsys):
    save_adapter(adapted_model(gemma), tmp_path / "adapter")  # hidden size 72, not 64
    assert merge(base, tmp_path / "out") == 2
    check_one_sentence(capsys.readouterr().err, str(base.adapter), "does not fit")
    check_nothing_left(base, tmp_path / "out")


def test_a_model_with_pickled_weights_alone_is_refused(base, tmp_path, capsys):
    os.rename(base.folder / "model.safetensors", base.folder / "pytorch_model.bin")
    assert merge(base, tmp_path / "out") == 2
    check_one_sentence(capsys.readouterr().err, "model.safetensors", "convert")
    check_nothing_left(base, tmp_path / "out")


@pytest.mark.parametrize("flag", ["--model", "--adapter", "--out"])
def test_a_flag_left_out_is_named(capsys, flag):
    given = [f for f in ("--model", "--adapter", "--out") if f != flag]
    with pytest.raises(SystemExit) as exit:
        merge_py.main([f"{f}=x" for f in given])
    assert exit.value.code == 2
    check_one_sentence(capsys.readouterr().err, flag)

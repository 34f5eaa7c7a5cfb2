"""A checkpoint folder is read exactly, or refused in one sentence that names what is wrong.

    pytest tests/programs/test_checkpoint.py -q       (add -s to read the sentences)
"""

import json
import os
import pickle
import shutil

import pytest
import torch
from helpers import (
    CONTROL,
    LLAMA3_ROPE,
    NAMES,
    PLAIN_ROPE,
    SHARED,
    TOLERANCE,
    assert_names,
    distance,
    edit_json,
    hf_states,
    logits,
    make_hf,
    random_ids,
    states,
    tensors_of,
    write_tensors,
)
from safetensors.torch import load_file, save_file

from files import model_files
from generate import generate
from model import Llama, UserError, load_model

pytest.importorskip("transformers", reason="writes the checkpoints; see requirements-dev.txt")


# ---------------------------------------------------------------------------------------------
# reading a checkpoint


@pytest.mark.parametrize("tied", [False, True])
def test_the_state_has_the_files_own_names_and_is_frozen(tmp_path, tied):
    make_hf(tie_word_embeddings=tied).save_pretrained(tmp_path)
    model, tensors = load_model(tmp_path), tensors_of(tmp_path)
    assert isinstance(model, Llama)
    assert set(model.state_dict()) == set(tensors)
    assert ("lm_head.weight" in tensors) == (not tied)
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[name]), name
    assert not [name for name, p in model.named_parameters() if p.requires_grad]


def test_a_checkpoint_in_many_shards_gives_the_same_bits(llama31, tmp_path):
    llama31.hf.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    one, many = load_model(llama31.folder), load_model(tmp_path)
    for name, value in one.state_dict().items():
        assert torch.equal(many.state_dict()[name], value), name


def test_older_and_newer_spellings_of_the_config_give_the_same_bits(llama31, folder):
    """transformers 5 writes rope_parameters and dtype; every checkpoint published before has
    rope_theta beside rope_scaling ("type" before "rope_type"), torch_dtype, and no head_dim."""
    rope = dict(LLAMA3_ROPE)
    theta = rope.pop("rope_theta")
    for kind in ("rope_type", "type"):
        old = {k: v for k, v in rope.items() if k != "rope_type"} | {kind: "llama3"}
        edit_json(
            folder / "config.json", rope_parameters=None, rope_scaling=old, rope_theta=theta,
            dtype=None, torch_dtype="float32", head_dim=None,
        )
        sequences = random_ids(100, seed=8)
        assert torch.equal(
            logits(load_model(folder), sequences), logits(load_model(llama31.folder), sequences)
        )
    # the control: the theta beside rope_scaling is read, not taken for its default of 10000
    edit_json(folder / "config.json", rope_theta=5e5)
    other = logits(load_model(folder), sequences)
    same = logits(load_model(llama31.folder), sequences)
    assert distance(other, same) > CONTROL * TOLERANCE


def test_llama2_style_config_without_head_dim_kv_heads_or_theta_has_the_usual_defaults(tmp_path):
    hf = make_hf(num_key_value_heads=8, rope_parameters=PLAIN_ROPE)
    hf.save_pretrained(tmp_path)
    edit_json(
        tmp_path / "config.json", rope_parameters=None, head_dim=None, num_key_value_heads=None,
        attention_bias=None, mlp_bias=None, dtype=None, torch_dtype="float32",
    )
    (ids,) = random_ids(100, seed=9)
    ours = states(load_model(tmp_path), ids, [100])
    for name, mine, theirs in zip(NAMES, ours, hf_states(hf, [ids]), strict=True):
        assert distance(mine, theirs, name) <= TOLERANCE, name


def test_bf16_files_are_read_into_fp32_without_loss(llama31, folder):
    rounded = {name: value.bfloat16() for name, value in tensors_of(folder).items()}
    write_tensors(folder, rounded)
    edit_json(folder / "config.json", dtype="bfloat16")
    state = load_model(folder).state_dict()
    for name, value in rounded.items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], value.float()), name


def test_rotary_frequencies_in_old_files_are_ignored(llama31, folder):
    """Llama-2 files of 2023 carry rotary_emb.inv_freq; theirs are wrong on purpose here."""
    tensors = tensors_of(folder)
    for i in range(4):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.full((4,), 9.0)
    write_tensors(folder, tensors)
    sequences = random_ids(50, seed=10)
    assert torch.equal(
        logits(load_model(folder), sequences), logits(load_model(llama31.folder), sequences)
    )


def test_a_tied_head_stays_tied(tmp_path):
    make_hf(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert "lm_head.weight" not in model.state_dict()
    sequences = random_ids(20, seed=11)
    before = logits(model, sequences)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)  # the norm undoes it at the input, not at the head
    assert distance(logits(model, sequences), before) > CONTROL * TOLERANCE


def test_a_tied_file_may_also_carry_its_head(tmp_path):
    make_hf(tie_word_embeddings=True).save_pretrained(tmp_path)
    sequences = random_ids(20, seed=11)
    before = logits(load_model(tmp_path), sequences)
    tensors = tensors_of(tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(tmp_path, tensors)
    assert torch.equal(logits(load_model(tmp_path), sequences), before)
    tensors["lm_head.weight"][3] += 1  # which of the two is meant? transformers 4 and 5 disagree
    write_tensors(tmp_path, tensors)
    check_refused(tmp_path, "another head")


def test_a_tied_file_may_name_its_one_tensor_as_the_head(tmp_path):
    """Some writers keep the other of the two names; transformers reads it all the same."""
    hf = make_hf(tie_word_embeddings=True)
    hf.save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    write_tensors(tmp_path, tensors)
    (ids,) = random_ids(50, seed=12)
    ours = states(load_model(tmp_path), ids, [50])
    for name, mine, theirs in zip(NAMES, ours, hf_states(hf, [ids]), strict=True):
        assert distance(mine, theirs, name) <= TOLERANCE, name
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)  # the control
    check_refused(tmp_path, "embed_tokens")


# ---------------------------------------------------------------------------------------------
# which files are the model


INDEX = "model.safetensors.index.json"


def hf_reads(folder):
    """What transformers makes of the folder, as our logits are laid out."""
    import transformers

    hf = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return torch.cat([hf(ids[None]).logits[0] for ids in random_ids(50, 9, seed=13)])


def we_read(folder):
    return logits(load_model(folder), random_ids(50, 9, seed=13))


@pytest.fixture
def both(folder):
    """model.safetensors, beside the shards and the index of another training."""
    older = make_hf(seed=5)
    older.save_pretrained(folder / "older", max_shard_size="100KB")
    for path in (folder / "older").iterdir():
        if path.name.startswith("model"):
            path.rename(folder / path.name)
    shutil.rmtree(folder / "older")
    return folder


def test_beside_a_stale_index_model_safetensors_is_read_and_both_are_named(both, llama31, capsys):
    ours = we_read(both)
    said = capsys.readouterr().err
    assert torch.equal(ours, we_read(llama31.folder))
    assert distance(ours, hf_reads(both), "hf") <= TOLERANCE
    assert said.count("\n") == 1
    assert str(both / "model.safetensors") in said and INDEX in said and "model-00001-of" in said
    (both / "model.safetensors").unlink()  # the control: the shards hold another model
    assert distance(we_read(both), ours) > CONTROL * TOLERANCE
    assert distance(we_read(both), hf_reads(both), "hf") <= TOLERANCE


def test_the_index_that_transformers_leaves_when_it_saves_over_a_sharded_copy_is_named(
        llama31, tmp_path, capsys):
    """It deletes the shards and not the index."""
    make_hf(seed=5).save_pretrained(tmp_path, max_shard_size="100KB")
    llama31.hf.save_pretrained(tmp_path)
    assert (tmp_path / INDEX).exists() and not list(tmp_path.glob("model-*"))
    capsys.readouterr()  # what transformers said
    assert torch.equal(we_read(tmp_path), we_read(llama31.folder))
    assert INDEX in capsys.readouterr().err


def test_an_index_of_the_one_file_is_no_disagreement(folder, capsys):
    """Some converters write an index even then."""
    weight_map = dict.fromkeys(tensors_of(folder), "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    load_model(folder)
    assert capsys.readouterr().err == ""


def test_an_incomplete_model_safetensors_beside_an_index_names_both(both):
    """Which of the two is meant nobody can know."""
    write_tensors(both, {k: v for k, v in tensors_of(both).items() if k != KEY})
    with pytest.raises(UserError) as error:
        load_model(both)
    print(error.value)
    for word in (KEY, "model.safetensors,", INDEX, "delete"):
        assert word in str(error.value)


def test_the_digest_is_over_the_files_that_are_read(both):
    names = [path.name for path in model_files(both)]
    assert names[0] == "model.safetensors" and INDEX not in names
    assert not [name for name in names if name.startswith("model-")]
    (both / "model.safetensors").unlink()
    names = {path.name for path in model_files(both)}
    assert names >= {path.name for path in both.glob("model-*")} | {INDEX}


def sharded(llama31, folder):
    """The checkpoint in shards -> its folder, the shards and what the index says."""
    llama31.hf.save_pretrained(folder, max_shard_size="100KB")
    return folder, sorted(folder.glob("model-*")), json.loads((folder / INDEX).read_text())


def test_a_tensor_in_two_shards_is_read_where_they_agree_and_refused_where_not(llama31, tmp_path):
    """transformers takes whichever file it opens last."""
    folder, shards, _ = sharded(llama31, tmp_path)
    first, last = load_file(shards[0]), load_file(shards[-1])
    name = next(iter(first))
    save_file(last | {name: first[name]}, shards[-1], {"format": "pt"})
    assert torch.equal(we_read(folder), we_read(llama31.folder))
    save_file(last | {name: first[name] + 1}, shards[-1], {"format": "pt"})
    check_refused(folder, name, shards[0].name, shards[-1].name)


def test_a_tensor_in_another_shard_than_the_index_says_is_read_as_in_transformers(
        llama31, tmp_path):
    folder, shards, index = sharded(llama31, tmp_path)
    following = dict(zip(shards, [*shards[1:], shards[0]], strict=True))
    for name, file in index["weight_map"].items():
        index["weight_map"][name] = following[folder / file].name
    (folder / INDEX).write_text(json.dumps(index))
    assert distance(we_read(folder), hf_reads(folder), "hf") <= TOLERANCE


@pytest.mark.parametrize("file", [
    "../model.safetensors", "/etc/model.safetensors", "a/b", "", 7, [1]])
def test_an_index_that_names_a_file_elsewhere_is_refused(llama31, tmp_path, file):
    folder, _, index = sharded(llama31, tmp_path)
    index["weight_map"]["lm_head.weight"] = file
    (folder / INDEX).write_text(json.dumps(index))
    check_refused(folder, INDEX, str(file))


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["model.safetensors"]}])
def test_an_index_without_a_map_is_named(llama31, tmp_path, index):
    folder, _, _ = sharded(llama31, tmp_path)
    (folder / INDEX).write_text(json.dumps(index))
    check_refused(folder, INDEX, "weight_map")


@pytest.mark.parametrize("name, what_to_do", [
    ("pytorch_model.bin", "convert"), ("consolidated.00.pth", "Hugging Face files"),
    ("consolidated.safetensors", "Hugging Face files"), ("model-Q4_K_M.gguf", "made from"),
    ("model-00001-of-00002.safetensors", "index"), ("adapter_model.safetensors", "--adapter"),
    ("model.fp16.safetensors", "name it model.safetensors")])
def test_weights_under_another_name_are_named_with_what_to_do(folder, name, what_to_do):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert_names(error.value, folder, "neither", name, what_to_do)


def test_other_weights_beside_model_safetensors_are_not_read(folder, llama31):
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert torch.equal(we_read(folder), we_read(llama31.folder))


def test_an_adapter_beside_the_model_is_not_put_on_it_and_that_is_said(folder, llama31, capsys):
    """transformers would load another base for it."""
    (folder / "adapter_config.json").write_text("{}")
    assert torch.equal(we_read(folder), we_read(llama31.folder))
    said = capsys.readouterr().err
    assert "adapter_config.json" in said and "--adapter" in said


@pytest.mark.parametrize("name", ["other.safetensors", "model.safetensors.index.json", 5, ["a"]])
def test_another_file_that_config_json_names_is_not_passed_over(folder, llama31, name):
    """transformers 5 reads that file, whatever model.safetensors is."""
    edit_json(folder / "config.json", transformers_weights=name)
    check_refused(folder, "config.json", "transformers_weights", str(name))
    for name in (None, "", "model.safetensors"):  # the file that is read anyway
        edit_json(folder / "config.json", transformers_weights=name)
        assert torch.equal(we_read(folder), we_read(llama31.folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_weight_that_is_no_float_of_16_bits_is_named(folder, dtype):
    """Read as a number it would be a wrong one: its scale stands elsewhere, or nowhere."""
    tensors = tensors_of(folder)
    write_tensors(folder, tensors | {KEY: tensors[KEY].to(dtype)})
    check_refused(folder, KEY, str(dtype))


def test_a_mix_of_dtypes_is_read_into_one(folder):
    tensors = tensors_of(folder)
    mixed = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        mixed[name] = tensor.to((torch.float16, torch.bfloat16, torch.float64)[i % 3])
    write_tensors(folder, mixed)
    for name, tensor in load_model(folder).state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, mixed[name].float()), name


# ---------------------------------------------------------------------------------------------
# which model the config means


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"])
def test_without_architectures_the_model_type_decides_as_in_transformers(tmp_path, family):
    make_hf(family, head_dim=16, rope_parameters=PLAIN_ROPE).save_pretrained(tmp_path)
    named = we_read(tmp_path)
    for architectures in (None, []):
        edit_json(tmp_path / "config.json", architectures=architectures)
        assert torch.equal(we_read(tmp_path), named)
        assert distance(named, hf_reads(tmp_path), "hf") <= TOLERANCE


@pytest.mark.parametrize("model_type", [None, "falcon_mamba", "qwen2_moe"])
def test_without_architectures_an_unknown_model_type_is_named(folder, model_type):
    edit_json(folder / "config.json", architectures=None, model_type=model_type)
    check_refused(folder, "architecture", str(model_type))


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "phi3"])
def test_an_architecture_that_is_not_the_model_types_is_refused_with_both(folder, model_type):
    """transformers goes by model_type, vLLM by architectures."""
    edit_json(folder / "config.json", model_type=model_type)
    check_refused(folder, "LlamaForCausalLM", model_type)


@pytest.mark.parametrize("rope, words", [
    ({"rope_type": "longrope", "factor": 4.0}, ["longrope"]),
    ({"type": "mrope", "mrope_section": [2, 1, 1]}, ["mrope"]),
    ({"rope_type": "yarn", "factor": 4.0}, ["yarn", "original_max_position_embeddings"]),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0},
     ["yarn", "mscale"]),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
      "beta_fast": "32"}, ["beta_fast"]),
    ({"rope_type": "linear"}, ["linear", "factor"]),
    ({"rope_type": "linear", "factor": 0}, ["linear", "factor 0"]),
    ({"rope_type": "dynamic", "factor": True}, ["dynamic", "factor True"]),
    ({"rope_type": "default", "factor": 4.0}, ["default", "factor"]),  # ignored in transformers
    ({"full_attention": {"rope_type": "linear", "factor": 4.0}}, ["full_attention"]),
    ({"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5},
     ["partial_rotary_factor"]),
    ("linear", ["rope_parameters", "linear"]),
])
def test_rotary_settings_that_are_not_computed_are_named(folder, rope, words):
    edit_json(folder / "config.json", rope_parameters=rope)
    check_refused(folder, *words)


@pytest.mark.parametrize("changes, words", [
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, ["rope_parameters", "rope_scaling"]),
    ({"rope_theta": 5e5}, ["rope_theta", "500000.0", "10000.0"]),
    ({"original_max_position_embeddings": 32}, ["original_max_position_embeddings", "32", "64"]),
    ({"partial_rotary_factor": 0.25}, ["partial_rotary_factor"]),
])
def test_a_rotary_setting_given_twice_with_two_values_is_refused_with_both(
        folder, changes, words):
    """transformers 4 and 5 read different ones."""
    edit_json(folder / "config.json", **changes)
    check_refused(folder, *words)


def test_a_rotary_setting_given_twice_with_one_value_is_read(folder, llama31):
    older = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"} | {"type": "llama3"}
    edit_json(folder / "config.json", rope_scaling=older, rope_theta=10000.0)
    assert torch.equal(we_read(folder), we_read(llama31.folder))


class EvilPickle:
    """Unpickling it leaves a folder behind: the trace of a pickle that was opened."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_no_pickle_is_ever_opened(folder, tmp_path, monkeypatch):
    trace = tmp_path / "opened"
    for name in ("pytorch_model.bin", "consolidated.00.pth", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(EvilPickle(trace)))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_model(folder)
    assert not trace.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())  # the control: the trap works
    assert trace.exists()


# ---------------------------------------------------------------------------------------------
# refusals: one sentence that names what is wrong


def check_refused(folder, *words):
    """load_model must refuse, in one sentence whose first half holds every one of the words."""
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert_names(error.value, folder, *words)


KEY = "model.layers.2.mlp.up_proj.weight"


def test_a_missing_tensor_is_named(folder):
    write_tensors(folder, {k: v for k, v in tensors_of(folder).items() if k != KEY})
    check_refused(folder, KEY)


def test_a_missing_head_is_named_when_the_config_does_not_tie_it(folder):
    """transformers fills it with random numbers and only warns."""
    write_tensors(folder, {k: v for k, v in tensors_of(folder).items() if k != "lm_head.weight"})
    check_refused(folder, "lm_head.weight")


def test_a_surplus_tensor_is_named(folder):
    surplus = "model.layers.1.self_attn.q_norm.weight"
    write_tensors(folder, tensors_of(folder) | {surplus: torch.ones(8)})
    check_refused(folder, surplus)


def test_a_layer_more_than_the_config_says_is_named(folder):
    edit_json(folder / "config.json", num_hidden_layers=3)
    check_refused(folder, "model.layers.3.")


def test_a_tensor_of_the_wrong_shape_is_named(folder):
    write_tensors(folder, tensors_of(folder) | {KEY: torch.zeros(160, 63)})
    check_refused(folder, KEY, "63")


def test_a_transposed_tensor_is_named(folder):
    write_tensors(folder, tensors_of(folder) | {KEY: torch.zeros(64, 160)})
    check_refused(folder, KEY)


@pytest.mark.parametrize("kept", [0.0, 4e-6, 0.5, 0.999])
def test_a_truncated_file_is_named(folder, kept):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    check_refused(folder, "model.safetensors")


def test_a_missing_shard_is_named(llama31, tmp_path):
    llama31.hf.save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[2]
    shard.unlink()
    check_refused(tmp_path, shard.name)


def test_a_truncated_shard_is_named(llama31, tmp_path):
    llama31.hf.save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    check_refused(tmp_path, shard.name)


def test_a_folder_with_only_pickled_weights_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    check_refused(folder, "safetensors")


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    check_refused(folder, "config.json")


def test_a_path_that_is_not_there_is_named(tmp_path):
    check_refused(tmp_path / "no-such-model", "no-such-model")


def test_a_config_that_is_not_json_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "llama", ')
    check_refused(folder, "config.json")


def test_a_null_quantization_config_is_no_quantisation(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert load_model(folder).config.n_layer == config["num_hidden_layers"]


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
def test_a_quantised_checkpoint_is_refused(folder, method):
    edit_json(folder / "config.json", quantization_config={"quant_method": method})
    check_refused(folder, "quanti")


def test_the_published_8_bit_copy_of_llama31_is_refused_for_being_quantised(tmp_path):
    source = SHARED / "configs" / "llama31-8b-instruct-8bit" / "config.json"
    if not source.exists():
        pytest.skip("needs ../shared/data/configs")
    (tmp_path / "checkpoint").mkdir()
    shutil.copy(source, tmp_path / "checkpoint" / "config.json")
    # and not for its missing weights, which would send one to download them
    check_refused(tmp_path / "checkpoint", "quanti")


def test_an_unknown_architecture_is_named(folder):
    edit_json(
        folder / "config.json", model_type="falcon_mamba", architectures=["FalconMambaForCausalLM"]
    )
    check_refused(folder, "mamba")


def test_an_unknown_rope_scaling_is_named(folder):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0}
    edit_json(folder / "config.json", rope_parameters=rope)
    check_refused(folder, "yarn")


def test_an_activation_that_a_llama_does_not_have_is_named(folder):
    edit_json(folder / "config.json", hidden_act="relu6")
    check_refused(folder, "relu6")


def test_llama3_scaling_without_its_numbers_is_refused(folder):
    edit_json(folder / "config.json", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4})
    check_refused(folder, "factor")


def test_a_sliding_window_bounds_the_length_where_it_is_switched_on(qwen, tmp_path):
    """Within its window a windowed model is the plain one; Qwen2.5 files name one, switched off."""
    windowed = shutil.copytree(qwen.folder, tmp_path / "windowed")
    lengths = {}
    for on in (False, True):
        edit_json(windowed / "config.json", sliding_window=16, use_sliding_window=on)
        lengths[on] = load_model(windowed).config.max_positions
    assert lengths == {False: 2048, True: 16}
    model, (prompt,) = load_model(windowed), random_ids(10)
    assert len(generate(model, [prompt.tolist()], 6, [])[0]) == 6
    with pytest.raises(UserError, match="17 tokens, above the 16"):
        generate(model, [prompt.tolist()], 7, [])

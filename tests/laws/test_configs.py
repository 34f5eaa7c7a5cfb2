"""Published config.json files are read to the right model: every field, name, shape and count.

    pytest tests/laws/test_configs.py -q

Two folders are real ones, with the index of their real weight files; a third, quantised, has to be
refused. The others are written here as published. Models are built on the meta device: no memory.
"""

import json

import pytest
import torch
from helpers import SHARED, edit_json

from lora import add_lora
from model import FAMILIES, Llama, UserError, load_model, read_config

LLAMA3 = {  # what Llama-3.1-8B and Llama-3.2-1B have in common
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
    "mlp_bias": False, "hidden_act": "silu", "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "rope_theta": 500000.0, "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}}
LLAMA31_8B = LLAMA3 | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "tie_word_embeddings": False}
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
    "use_sliding_window": False}
PUBLISHED = {
    "Llama-3.1-8B": LLAMA31_8B,
    "Llama-3.2-1B": LLAMA3 | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "tie_word_embeddings": True, "rope_scaling": LLAMA3["rope_scaling"] | {"factor": 32.0}},
    "Qwen2.5-7B": QWEN25 | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "tie_word_embeddings": False, "sliding_window": 131072},
    "Qwen2.5-0.5B": QWEN25 | {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "tie_word_embeddings": True, "sliding_window": 4096},
    "Gemma-7B": {
        "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu",
        "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
        "vocab_size": 256000, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 8192},
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 32768,
        "sliding_window": 4096, "tie_word_embeddings": False},
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "max_position_embeddings": 40960, "attention_bias": False, "sliding_window": None,
        "use_sliding_window": False, "tie_word_embeddings": True},
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
COUNTS = {
    "Llama-3.1-8B": 8_030_261_248, "Llama-3.2-1B": 1_235_814_400, "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-0.5B": 494_032_768, "Gemma-7B": 8_537_680_896, "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen3-0.6B": 596_049_920}
# Config's fields where they are not those of a Llama without biases, scaling or a tied head.
SPECIAL = {
    "Llama-3.1-8B": {"rope_scaling": LLAMA3["rope_scaling"], "rope_theta": 5e5},
    "Llama-3.2-1B": {"rope_scaling": PUBLISHED["Llama-3.2-1B"]["rope_scaling"],
                     "rope_theta": 5e5, "tied": True, "head_dim": 64},
    "Qwen2.5-7B": {"qkv_bias": True, "rope_theta": 1e6},
    "Qwen2.5-0.5B": {"qkv_bias": True, "rope_theta": 1e6, "tied": True, "head_dim": 64},
    "Gemma-7B": {"gemma": True, "tied": True, "act": "gelu_pytorch_tanh", "head_dim": 256},
    "Mistral-7B-v0.1": {"max_positions": 4096},  # within its window it is a plain Llama
    "Qwen3-0.6B": {"qk_norm": True, "rope_theta": 1e6, "tied": True},
}
REAL = {  # folder: every field of its Config, the model's count, bytes of a number in its files
    "gemma-2b-it": ({
        "dim": 2048, "n_layer": 18, "n_head": 8, "n_kv_head": 1, "head_dim": 256,
        "hidden_dim": 16384, "vocab_size": 256000, "n_out": 256000, "norm_eps": 1e-6,
        "max_positions": 8192, "qkv_bias": False, "o_bias": False, "mlp_bias": False,
        "qk_norm": False, "tied": True, "gemma": True, "act": "gelu_pytorch_tanh",
        "head": "lm_head", "rope_theta": 10000.0, "rope_scaling": None}, 2_506_172_416, 2),
    "llama2-7b-fp16": ({
        "dim": 4096, "n_layer": 32, "n_head": 32, "n_kv_head": 32, "head_dim": 128,
        "hidden_dim": 11008, "vocab_size": 32000, "n_out": 32000, "norm_eps": 1e-5,
        "max_positions": 2048, "qkv_bias": False, "o_bias": False, "mlp_bias": False,
        "qk_norm": False, "tied": False, "gemma": False, "act": "silu",
        "head": "lm_head", "rope_theta": 10000.0, "rope_scaling": None}, 6_738_415_616, 4),
}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """On meta there is nothing to draw, but torch takes two seconds to find that out."""
    for module in (torch.nn.Linear, torch.nn.Embedding):
        monkeypatch.setattr(module, "reset_parameters", lambda self: None)


def real(name):
    folder = SHARED / "configs" / name
    if not folder.exists():
        pytest.skip("needs ../shared/data/configs")
    return folder


def on_meta(folder):
    with torch.device("meta"):
        return Llama(read_config(folder))


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(params=PUBLISHED)
def name(request):
    return request.param


@pytest.fixture
def folder(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    return tmp_path


# ---------------------------------------------------------------------------------------------
# real folders


@pytest.mark.parametrize("name", REAL)
def test_a_real_config_gives_every_field_its_value(name):
    assert vars(read_config(real(name))) == REAL[name][0]


@pytest.mark.parametrize("name", REAL)
def test_a_real_config_gives_the_tensors_of_its_real_files(name):
    """By name both ways, and by their size in bytes; Llama-2's files hold 32 inv_freq besides."""
    folder, (_, n, size) = real(name), REAL[name]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    model, in_files = on_meta(folder), set(index["weight_map"])
    ours = {name for name, _ in model.named_parameters()}
    assert count(model) == n
    assert ours <= in_files
    legacy = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(32)}
    assert in_files - ours == (legacy if name == "llama2-7b-fp16" else set())
    n_legacy = len(in_files - ours) * model.config.head_dim // 2
    assert index["metadata"]["total_size"] == n * size + n_legacy * 4


def test_the_quantised_folder_is_refused_for_that_and_for_nothing_else(tmp_path):
    folder = real("llama31-8b-instruct-8bit")
    for read in (read_config, load_model):  # its weights are not here: no word of them
        with pytest.raises(UserError, match="quantised") as error:
            read(folder)
        assert "\n" not in str(error.value) and "safetensors" not in str(error.value)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    edit_json(tmp_path / "config.json", quantization_config=None)
    assert count(on_meta(tmp_path)) == COUNTS["Llama-3.1-8B"]  # the control


# ---------------------------------------------------------------------------------------------
# published configs


def test_a_published_config_gives_the_published_number_of_parameters(folder, name):
    assert count(on_meta(folder)) == COUNTS[name]


def test_every_family_that_generates_has_a_published_config_here():
    tested = {config["architectures"][0] for config in PUBLISHED.values()}
    assert tested == {arch for arch, family in FAMILIES.items() if family.head == "lm_head"}


def test_a_published_config_gives_every_field_its_value(folder, name):
    plain = {
        "qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": False, "tied": False,
        "gemma": False, "act": "silu", "head": "lm_head", "rope_theta": 1e4, "rope_scaling": None,
        "head_dim": 128}
    c = PUBLISHED[name]
    sizes = {
        "dim": c["hidden_size"], "hidden_dim": c["intermediate_size"],
        "n_layer": c["num_hidden_layers"], "n_head": c["num_attention_heads"],
        "n_kv_head": c["num_key_value_heads"], "vocab_size": c["vocab_size"],
        "n_out": c["vocab_size"], "norm_eps": c["rms_norm_eps"],
        "max_positions": c["max_position_embeddings"]}
    assert vars(read_config(folder)) == plain | sizes | SPECIAL[name]


def test_a_published_config_gives_transformers_names_and_shapes(folder):
    transformers = pytest.importorskip("transformers", reason="see requirements-dev.txt")
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(folder))
    assert {n: p.shape for n, p in on_meta(folder).named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()}


@pytest.mark.parametrize("name, change, more", [
    # untied, the head is counted; without head_dim it is hidden / heads, 192 for Gemma-7B
    ("Llama-3.2-1B", {"tie_word_embeddings": False}, 128256 * 2048),
    ("Gemma-7B", {"head_dim": None}, 28 * 4 * 3072 * 16 * (192 - 256)),
    ("Mistral-7B-v0.1", {"num_key_value_heads": None}, 32 * 2 * 4096 * 24 * 128),
    ("Qwen2.5-7B", LLAMA, -28 * (28 + 2 * 4) * 128),
    ("Qwen3-0.6B", LLAMA, -28 * 2 * 128),
])
def test_control_another_config_gives_another_number(folder, name, change, more):
    edit_json(folder / "config.json", **change)
    assert count(on_meta(folder)) - COUNTS[name] == more


@pytest.mark.parametrize("window, positions", [
    ({"sliding_window": 4096}, 4096), ({"sliding_window": None}, 32768),
    ({"sliding_window": 65536}, 32768), ({}, 4096)])  # left out, transformers takes 4096
def test_mistrals_window_bounds_its_positions_only_while_it_has_one(tmp_path, window, positions):
    config = PUBLISHED["Mistral-7B-v0.1"].copy()
    del config["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(config | window))
    assert read_config(tmp_path).max_positions == positions


@pytest.mark.parametrize("targets, n", [
    (None, 41_943_040),
    # q_proj is 4096 x 4096, v_proj 1024 x 4096
    (["q_proj", "v_proj"], 16 * 32 * (4096 + 4096 + 4096 + 1024)),
])
def test_rank_16_on_the_8b_is_42_million_trainable_numbers(tmp_path, targets, n):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA31_8B))
    model = on_meta(tmp_path).requires_grad_(False)
    trained = add_lora(model, 16, 16, **({"targets": targets} if targets else {}))
    assert sum(p.numel() for p in trained) == n
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == n
    assert count(model) == COUNTS["Llama-3.1-8B"] + n

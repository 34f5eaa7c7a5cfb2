"""Every setting of PEFT's LoraConfig is honoured, changes nothing, or is refused by its name.

    pytest tests/programs/test_peft_options.py -q     (add -s to read distances and refusals)

PEFT is the reference: it writes each adapter, and reads again what is saved here.
"""

import dataclasses
import itertools
import json
import random
import shutil
import warnings

import pytest
import torch
from helpers import (
    CONTROL,
    ROOT,
    SEQUENCES,
    SEVEN,
    TOLERANCE,
    adapted_model,
    assert_names,
    distance,
    edit_json,
    logits,
    make_hf,
)
from safetensors.torch import load_file, save_file

import peft_format
from lora import adapted, adapter_state, load_adapter, save_adapter
from model import UserError, load_model

peft = pytest.importorskip("peft", reason="the reference; see requirements-dev.txt")
transformers = pytest.importorskip("transformers", reason="the reference; see requirements-dev.txt")

ALL = sorted(SEVEN)


def peft_writes(folder, save=None, **settings):
    """An adapter in use, made and saved by PEFT over the model of `llama31`; PEFT's model."""
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ALL} | settings
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(22)
        model = peft.get_peft_model(make_hf(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name or "lora_embedding_B" in name:
                    p.normal_(std=0.05)
        model.eval().save_pretrained(folder, **(save or {}))
    return model


def peft_reads(reference, adapter):
    """PEFT's model of the base with the adapter, which must load without a warning."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        reference.folder, attn_implementation="eager", dtype=torch.float32)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, adapter)
    said = [str(w.message) for w in raised if "adapter" in str(w.message)]
    assert said == []
    return model


def peft_logits(model):
    with torch.no_grad():
        return torch.cat([model(ids[None]).logits[0] for ids in SEQUENCES])


def scales(model):
    """{module: (rank, scaling)} of PEFT's model, or of ours."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and isinstance(module.lora_A, torch.nn.ModuleDict):
            name = name.removeprefix("base_model.model.")
            found[name] = (module.r["default"], module.scaling["default"])
    return found or {name: (m.rank, m.scaling) for name, m in adapted(model)}


def we_read(reference, adapter):
    model = load_model(reference.folder)
    load_adapter(model, adapter)
    return model


# ---------------------------------------------------------------------------------------------
# honoured


SOME = {
    "one layer": {"layers_to_transform": 2},
    "layer 0": {"layers_to_transform": 0},
    "layers in a list": {"layers_to_transform": [1, 3], "target_modules": ["q_proj", "up_proj"]},
    "layers by their list's name": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "layers by several names": {"layers_to_transform": [3], "layers_pattern": ["h", "layers"]},
    "a full name beside the layers": {
        "layers_to_transform": [0], "target_modules": ["q_proj", "model.layers.3.mlp.up_proj"]},
    "excluded ends": {"exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"]},
    "excluded by a pattern": {"exclude_modules": r".*\.[13]\.mlp\..*"},
    "a pattern, and one that excludes": {
        "target_modules": r".*\.(q|k|v)_proj", "exclude_modules": r".*\.layers\.2\..*"},
    "own ranks": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
    # in alphabetical order, in which PEFT saves them; in another it could not read its own file
    "own ranks, the first pattern wins": {"rank_pattern": {
        "^model.layers.0.self_attn.k_proj": 3, "k_proj": 2, r"model\.layers\.[012]\..*_proj": 5}},
    "own alphas": {"alpha_pattern": {"o_proj": 64, "layers.2.mlp.(gate|up)_proj": 2}},
    "all together": {
        "r": 3, "use_rslora": True, "layers_to_transform": [0, 1, 3],
        "exclude_modules": ["layers.1.mlp.down_proj"],
        "rank_pattern": {"gate_proj": 6, r".*\.3\.self_attn\..*": 2},
        "alpha_pattern": {"v_proj": 1, "gate_proj": 48}},
}


@pytest.mark.parametrize("name", SOME)
def test_pefts_adapter_gives_pefts_logits_here_and_what_is_saved_gives_them_in_peft(
        llama31, tmp_path, name):
    theirs = peft_writes(tmp_path / "peft", **SOME[name])
    model = we_read(llama31, tmp_path / "peft")
    expected = scales(theirs)
    assert scales(model) == expected
    assert 1 <= len(expected) <= 28
    ours = logits(model, SEQUENCES)
    assert distance(ours, peft_logits(theirs), "peft") <= TOLERANCE
    base = logits(load_model(llama31.folder), SEQUENCES)
    assert distance(base, ours, "base") > CONTROL * TOLERANCE  # the control
    save_adapter(model, tmp_path / "ours")
    again = peft_reads(llama31, tmp_path / "ours")
    assert scales(again) == expected
    assert distance(ours, peft_logits(again), "peft again") <= TOLERANCE
    assert torch.equal(logits(we_read(llama31, tmp_path / "ours"), SEQUENCES), ours)


@pytest.mark.parametrize("name", SOME)
def test_control_without_a_setting_the_file_is_refused_or_gives_other_logits(
        llama31, tmp_path, name):
    theirs = peft_logits(peft_writes(tmp_path, **SOME[name]))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for key in SOME[name].keys() - {"target_modules", "r", "layers_pattern"}:
        without = {k: v for k, v in config.items() if k not in (key, "layers_pattern")}
        (tmp_path / "adapter_config.json").write_text(json.dumps(without))
        try:
            ours = logits(we_read(llama31, tmp_path), SEQUENCES)
        except UserError as error:
            assert "fit" in str(error) or "layers" in str(error)
        else:
            assert distance(ours, theirs, key) > CONTROL * TOLERANCE


def test_modules_and_scales_are_pefts_for_any_mix_of_settings(llama31):
    """400 drawn configs: which modules, and which pattern gives each its rank."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    names = [name for name, _ in make_hf().named_modules() if name]
    ends = [*ALL, "mlp.up_proj", "layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj",
            "embed_tokens", "lm_head", "x_proj", "proj"]
    regexes = [r".*_proj", r".*\.layers\.[02]\..*", r"model\.layers\.1\.mlp\.(up|gate)_proj",
               r".*(lm_head|embed_tokens)", r"q_proj"]
    draw = random.Random(0)
    seen = set()
    for _ in range(400):
        is_list = draw.random() < 0.7
        settings = {
            "target_modules": draw.sample(ends, draw.randint(1, 4)) if is_list
            else draw.choice(regexes),
            "exclude_modules": draw.choice([None, draw.sample(ends, 2), draw.choice(regexes)]),
        }
        if is_list:
            settings["layers_to_transform"] = draw.choice([None, [], 0, 1, [0, 3], [2, 9]])
        if settings.get("layers_to_transform") is not None:
            settings["layers_pattern"] = draw.choice([None, "layers", ["h", "layers"], "blocks"])
        patterns = {key: i for i, key in enumerate(draw.sample([*ends, *regexes, "^model"], 4))}
        config = peft.LoraConfig(**settings)
        for name in names:
            theirs = bool(check_target_module_exists(config, name))
            assert peft_format.adapts(settings, name) == theirs, (settings, name)
            theirs = patterns.get(get_pattern_key(patterns.keys(), name))
            assert peft_format.value_for(patterns, name, None) == theirs, (patterns, name)
            seen.add((peft_format.adapts(settings, name), theirs is None))
    assert len(seen) == 4  # the control: each answer came up


@pytest.mark.parametrize("spelling", ["all-linear", "All-Linear"])
def test_all_linear_means_all_but_the_head(llama31, tmp_path, spelling):
    theirs = peft_writes(tmp_path, target_modules="all-linear")
    edit_json(tmp_path / "adapter_config.json", target_modules=spelling)
    model = we_read(llama31, tmp_path)
    assert scales(model) == scales(theirs) and len(scales(model)) == 28
    assert distance(logits(model, SEQUENCES), peft_logits(theirs), "peft") <= TOLERANCE


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva", False])
def test_an_initialisation_that_leaves_the_base_as_it_is_loads_as_in_peft(
        llama31, tmp_path, init):
    theirs = peft_writes(tmp_path, init_lora_weights=init)
    ours = logits(we_read(llama31, tmp_path), SEQUENCES)
    assert distance(ours, peft_logits(theirs), "peft") <= TOLERANCE


def test_an_adapter_with_one_rank_and_alpha_is_saved_as_before(llama31, tmp_path):
    save_adapter(adapted_model(llama31), tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["rank_pattern"], saved["alpha_pattern"]) == ({}, {})
    assert saved["target_modules"] == ALL


# ---------------------------------------------------------------------------------------------
# the table: every field of LoraConfig


# For each setting that is refused, a value that is not its default.
MORE = {
    "bias": "lora_only", "use_dora": True, "lora_bias": True, "trainable_token_indices": [3, 4],
    "alora_invocation_tokens": [3, 4], "target_parameters": ["mlp.experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 3]], "ensure_weight_tying": True,
    "megatron_config": {"hidden_size": 64}, "use_qalora": True,
    "monteclora_config": {"num_samples": 8}, "velora_config": {"num_groups": 4},
    "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 3}, "kasa_config": {"beta": 1.0},
}
# For each that changes nothing, likewise.
NOTHING = {
    "task_type": "FEATURE_EXTRACTION", "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    "peft_version": "0.9.9", "base_model_name_or_path": "someone/model", "revision": "main",
    "inference_mode": False, "runtime_config": {"ephemeral_gpu_offload": True},
    "lora_dropout": 0.5, "fan_in_fan_out": True, "megatron_core": "own.core",
    "qalora_group_size": 32, "loftq_config": {"loftq_bits": 8}, "eva_config": {"rho": 3.0},
    "corda_config": {"corda_method": "kpm"}, "lora_ga_config": {"scale": "unit"},
}
NOT_FOR_PEFT = {"runtime_config"}  # PEFT does not read it from a file


def test_every_field_of_pefts_config_is_in_one_list_here():
    """A new version of PEFT may have a new one, which then has to be understood."""
    lists = [peft_format.HONOURED, peft_format.IRRELEVANT, tuple(peft_format.REFUSED)]
    for one, other in itertools.combinations(lists, 2):
        assert not set(one) & set(other)
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields == set(itertools.chain(*lists))
    assert MORE.keys() == peft_format.REFUSED.keys()
    assert NOTHING.keys() == set(peft_format.IRRELEVANT)


def test_every_field_is_in_the_table_of_the_docs():
    table = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    fields = [field.name for field in dataclasses.fields(peft.LoraConfig)]
    assert [name for name in fields if f"`{name}`" not in table] == []


def test_the_values_tried_here_are_not_pefts_defaults():
    defaults = {}
    for field in dataclasses.fields(peft.LoraConfig):
        has_factory = field.default_factory is not dataclasses.MISSING
        defaults[field.name] = field.default_factory() if has_factory else field.default
    for name, value in (MORE | NOTHING).items():
        if name != "inference_mode":  # its default is that of training, and True in every file
            assert value != defaults[name], name


@pytest.fixture
def adapter(llama31, tmp_path):
    """A good adapter's folder, for a test to change."""
    save_adapter(adapted_model(llama31), tmp_path / "adapter")
    return tmp_path / "adapter"


def check_refused(reference, folder, *words):
    with pytest.raises(UserError) as error:
        load_adapter(load_model(reference.folder), folder)
    assert_names(error.value, folder, *words)
    return str(error.value)


@pytest.mark.parametrize("name", MORE)
def test_a_setting_that_is_more_than_plain_lora_is_refused_by_its_name(llama31, adapter, name):
    edit_json(adapter / "adapter_config.json", **{name: MORE[name]})
    assert "merge_and_unload" in check_refused(llama31, adapter, name)


@pytest.mark.parametrize("name", NOTHING)
def test_a_setting_that_changes_nothing_changes_nothing_in_peft_either(llama31, adapter, name):
    before = logits(we_read(llama31, adapter), SEQUENCES)
    edit_json(adapter / "adapter_config.json", **{name: NOTHING[name]})
    assert torch.equal(logits(we_read(llama31, adapter), SEQUENCES), before)
    if name in NOT_FOR_PEFT:
        return
    base = transformers.AutoModelForCausalLM.from_pretrained(
        llama31.folder, attn_implementation="eager", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    output = theirs.base_model.model  # a task's own wrapper may put out something else
    assert distance(before, peft_logits(output), "peft") <= TOLERANCE


@pytest.mark.parametrize("name, value", [
    ("use_new_lora", True), ("new_group_size", 16), ("new_config", {"a": 1}), ("new", "yes")])
def test_a_setting_that_is_not_known_is_refused_by_its_name_unless_it_is_off(
        llama31, adapter, name, value):
    before = logits(we_read(llama31, adapter), SEQUENCES)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for off in (None, False, {}, []):
        path.write_text(json.dumps(config | {name: off}))
        assert torch.equal(logits(we_read(llama31, adapter), SEQUENCES), before)
    edit_json(path, **{name: value})
    assert "not known here" in check_refused(llama31, adapter, name)


@pytest.mark.parametrize("settings, words", [
    ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern"]),
    ({"rank_pattern": {"q_proj": 2.5}}, ["rank_pattern"]),
    ({"rank_pattern": ["q_proj"]}, ["rank_pattern"]),
    ({"alpha_pattern": {"q_proj": "16"}}, ["alpha_pattern"]),
    ({"rank_pattern": {"(q_proj": 2}}, ["rank_pattern", "(q_proj"]),
    ({"target_modules": ".*(q_proj"}, ["target_modules", ".*(q_proj"]),
    ({"exclude_modules": "*q_proj"}, ["exclude_modules", "*q_proj"]),
    ({"exclude_modules": 3}, ["exclude_modules", "3"]),
    ({"target_modules": ["q_proj", 3]}, ["target_modules", "3"]),
    ({"layers_to_transform": "1"}, ["layers_to_transform"]),
    ({"layers_to_transform": [0, "1"]}, ["layers_to_transform"]),
    ({"layers_pattern": "layers"}, ["layers_pattern", "layers_to_transform"]),
    ({"target_modules": ".*_proj", "layers_to_transform": [0]}, ["layers_to_transform", ".*_proj"]),
    ({"modules_to_save": "lm_head"}, ["modules_to_save", "lm_head"]),
    ({"r": True}, ["r True"]),
    ({"peft_type": "ADALORA"}, ["ADALORA"]),
    ({"init_lora_weights": "mica"}, ["init_lora_weights", "mica"]),
    ({"init_lora_weights": "loftq"}, ["init_lora_weights", "loftq"]),
    ({"init_lora_weights": "corda"}, ["init_lora_weights", "corda"]),
    ({"init_lora_weights": "something_new"}, ["init_lora_weights", "something_new"]),
])
def test_a_value_that_is_none_of_pefts_is_named_with_its_setting(
        llama31, adapter, settings, words):
    edit_json(adapter / "adapter_config.json", **settings)
    check_refused(llama31, adapter, *words)


# ---------------------------------------------------------------------------------------------
# files that PEFT itself writes for more than plain LoRA


BEYOND = {
    "head as a target": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "embedding as a target": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    "a pattern that meets the head": ({"target_modules": r".*(q_proj|lm_head)"}, "lm_head"),
    "embedding saved whole": ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    "some rows of the embedding": (
        {"trainable_token_indices": {"embed_tokens": [1, 2]}}, "trainable_token_indices"),
    "DoRA": ({"use_dora": True}, "use_dora"),
    "a bias of B": ({"lora_bias": True}, "lora_bias"),
    "VeLoRA": ({"velora_config": {"num_groups": 4}}, "velora_config"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_peft_writes_beyond_plain_lora_is_refused_by_name(llama31, tmp_path, name):
    settings, word = BEYOND[name]
    peft_writes(tmp_path / "adapter", **settings)
    assert "name the model it was trained on" not in check_refused(
        llama31, tmp_path / "adapter", word)


def test_a_tied_head_as_a_target_is_refused_by_name(tmp_path):
    """Here it is no module of its own; in PEFT it is one."""
    make_hf(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model")
    peft_writes(tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError) as error:
        load_adapter(model, tmp_path / "adapter")
    assert_names(error.value, tmp_path / "adapter", "lm_head")


@pytest.mark.parametrize("name", ["DoRA", "a bias of B", "some rows of the embedding",
                                  "embedding as a target"])
def test_tensors_beyond_plain_lora_are_named_where_the_config_hides_them(
        llama31, tmp_path, name):
    folder = tmp_path / "adapter"
    settings, word = BEYOND[name]
    peft_writes(folder, **settings)
    edit_json(folder / "adapter_config.json", target_modules=["q_proj"], **{
        key: None for key in settings if key != "target_modules"})
    said = {"DoRA": "DoRA", "a bias of B": "lora_bias",
            "embedding as a target": "adapter on the embedding"}
    check_refused(llama31, folder, "adapter_model.safetensors", said.get(name, word))


def test_an_embedding_that_peft_saved_besides_is_named(llama31, tmp_path):
    """TRL does so where it added tokens; here the vocabulary would not be the model's."""
    folder = tmp_path / "adapter"
    peft_writes(folder, save={"save_embedding_layers": True})
    check_refused(llama31, folder, "lm_head.weight", "save_embedding_layers")


def test_a_saved_head_is_loaded_where_the_config_says_so_and_named_where_not(llama31, tmp_path):
    folder = tmp_path / "adapter"
    theirs = peft_writes(folder, modules_to_save=["lm_head"])
    ours = logits(we_read(llama31, folder), SEQUENCES)
    assert distance(ours, peft_logits(theirs), "peft") <= TOLERANCE
    edit_json(folder / "adapter_config.json", modules_to_save=None)
    check_refused(llama31, folder, "lm_head.weight", "save_embedding_layers")


def test_biases_beside_the_adapters_are_named(llama31, adapter):
    path = adapter / "adapter_model.safetensors"
    bias = {"base_model.model.model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    save_file(load_file(path) | bias, path, {"format": "pt"})
    check_refused(llama31, adapter, "q_proj.bias", "of bias")


def test_an_adapter_model_bin_is_named_and_not_asked_to_be_fetched_again(llama31, tmp_path):
    folder = tmp_path / "adapter"
    peft_writes(folder, save={"safe_serialization": False})
    assert (folder / "adapter_model.bin").exists()
    said = check_refused(llama31, folder, "adapter_model.bin", "pickle", "save_pretrained")
    assert "fetch" not in said
    peft_writes(tmp_path / "both")  # PEFT reads the safetensors file where both are there
    shutil.copy(folder / "adapter_model.bin", tmp_path / "both" / "adapter_model.bin")
    assert len(adapted(we_read(llama31, tmp_path / "both"))) == 28


# ---------------------------------------------------------------------------------------------
# files that are no PEFT adapter, or not the one that its settings describe


FOREIGN = {  # what becomes of PEFT's name of a tensor
    "the adapter's own name kept": lambda name: name.replace(".weight", ".default.weight"),
    "without PEFT's prefix": lambda name: name.removeprefix("base_model.model."),
    "without the weight": lambda name: name.removesuffix(".weight"),
    "another program's words": lambda name: name.replace("lora_A", "lora_down"),
    "capitals of another library": lambda name: name.replace("lora_A", "lora_a"),
}


def check_said(reference, folder, found, *words):
    """check_refused(), whose first half names what was found; the words stand anywhere in it."""
    said = check_refused(reference, folder, found)
    for word in words:
        assert word in said, said
    return said


def rewrite(adapter, change):
    """Changes the tensors of an adapter; change: {name: tensor} -> {name: tensor}."""
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


@pytest.mark.parametrize("name", FOREIGN)
def test_names_that_are_not_pefts_are_named_as_that(llama31, adapter, name):
    rewrite(adapter, lambda tensors: {FOREIGN[name](key): t for key, t in tensors.items()})
    said = check_said(llama31, adapter, "not PEFT's", "save_pretrained",
                      "base_model.model.<module>.lora_A.weight")
    assert "it was trained on" not in said


def test_a_rank_pattern_that_is_not_the_files_is_named_with_both_ranks(llama31, adapter):
    edit_json(adapter / "adapter_config.json", rank_pattern={"v_proj": 3})
    check_said(llama31, adapter, "v_proj.lora_A.weight of rank 4", "expected 3", "rank_pattern",
               "adapter_config.json")


def test_another_r_is_named_with_both_ranks(llama31, adapter):
    edit_json(adapter / "adapter_config.json", r=9)
    check_said(llama31, adapter, "rank 4", "expected 9", "adapter_config.json")


@pytest.mark.parametrize("change, words", [
    (lambda t: t[:, :-1].contiguous(), ("(4, 63)", "(4, 64)")),
    (lambda t: t[None], ("(1, 4, 64)", "(4, 64)")),
    (lambda t: None, ("missing", "(4, 64)")),
])
def test_a_misshapen_or_missing_tensor_is_named_with_what_was_found_and_expected(
        llama31, adapter, change, words):
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def changed(tensors):
        tensors[first] = change(tensors[first])
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    rewrite(adapter, changed)
    check_said(llama31, adapter, first, *words, "it was trained on")


def test_a_surplus_tensor_is_named_as_that(llama31, adapter):
    edit_json(adapter / "adapter_config.json", layers_to_transform=[0, 1, 2])
    check_said(llama31, adapter, "layers.3", "(4, 160), expected none", "surplus")


OTHER_FILES = {  # a file that holds an adapter in another format, and what is said of it
    "adapters.safetensors": ("MLX", "mlx_lm"),
    "adapters.npz": ("MLX",),
    "adapter_model.bin": ("pickle", "save_pretrained"),
    "adapter_model.pt": ("pickle", "save_pretrained"),
    "adapter.pth": ("pickle", "save_pretrained"),
    "adapter.ckpt": ("pickle", "save_pretrained"),
    "adapter.gguf": ("llama.cpp",),
    "model.safetensors": ("--model",),
    "model-00001-of-00002.safetensors": ("--model",),
    "lora.safetensors": ("adapter_model.safetensors", "PEFT"),
}


@pytest.mark.parametrize("config", ["PEFT's", "MLX's", "none"])
@pytest.mark.parametrize("name", OTHER_FILES)
def test_an_adapter_in_another_format_is_called_what_it_is(llama31, tmp_path, adapter, name,
                                                           config):
    (adapter / "adapter_model.safetensors").rename(adapter / name)
    if config == "MLX's":
        settings = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8}}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
    if config == "none":
        (adapter / "adapter_config.json").unlink()
    said = check_said(llama31, adapter, name, *OTHER_FILES[name])
    assert "fetch it again" not in said


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_an_adapter_whose_scale_stands_elsewhere_is_refused(llama31, adapter, dtype):
    rewrite(adapter, lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})
    check_said(llama31, adapter, str(dtype), "16 bits")


def test_control_the_same_adapter_unchanged_is_read(llama31, adapter):
    rewrite(adapter, lambda tensors: tensors)
    model = we_read(llama31, adapter)
    as_in_the_file = load_file(adapter / "adapter_model.safetensors")
    assert adapter_state(model).keys() == as_in_the_file.keys()
    assert all(torch.equal(adapter_state(model)[name], t) for name, t in as_in_the_file.items())

"""An adapter's folder is PEFT's: either program reads the other's; what does not fit is refused.

    pytest tests/laws/test_peft.py -q             (add -s to read distances and refusals)

PEFT leaves an adapter at zero, with no more than a warning, when the names in the file are not what
it expects. So here a warning is a failure, and a control shows that the warning is seen.
"""

import json
import warnings

import pytest
import torch
from helpers import (
    CONTROL,
    SCALES,
    SEQUENCES,
    SEVEN,
    TOLERANCE,
    adapted_model,
    adapters,
    assert_names,
    distance,
    edit_json,
    logits,
    make_hf,
)
from safetensors.torch import load_file, save_file

from lora import add_lora, load_adapter, save_adapter
from model import UserError, load_model

peft = pytest.importorskip("peft", reason="the reference; see requirements-dev.txt")
transformers = pytest.importorskip("transformers", reason="the reference; see requirements-dev.txt")


def test_a_saved_adapter_loads_bit_for_bit(llama31, tmp_path):
    model = adapted_model(llama31, 4, 16, True)
    save_adapter(model, tmp_path)
    again = load_model(llama31.folder)
    load_adapter(again, tmp_path)
    for (name, t), (_, u) in zip(model.state_dict().items(), again.state_dict().items(),
                                 strict=True):
        assert torch.equal(t, u), name
    assert torch.equal(logits(again, SEQUENCES), logits(model, SEQUENCES))
    # the control: without the adapter's file the logits are others
    assert not torch.equal(logits(load_model(llama31.folder), SEQUENCES), logits(model, SEQUENCES))


def test_loading_over_adapters_that_are_there_gives_the_files_values_and_scale(llama31, tmp_path):
    saved = adapted_model(llama31, 4, 16, True)
    save_adapter(saved, tmp_path)
    model = load_model(llama31.folder)
    add_lora(model, rank=4, alpha=4, rslora=False, seed=5)
    load_adapter(model, tmp_path)
    assert distance(logits(model, SEQUENCES), logits(saved, SEQUENCES)) == 0


def peft_logits(peft_model):
    with torch.no_grad():
        return torch.cat([peft_model(ids[None]).logits[0] for ids in SEQUENCES])


def peft_reads(reference, adapter):
    """PeftModel of the base with the adapter folder, and the warnings that loading it raised."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        reference.folder, attn_implementation="eager", dtype=torch.float32)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, adapter)
    return model, [str(w.message) for w in raised]


def peft_writes(folder, rank=4, alpha=16, rslora=False, targets=SEVEN):
    """An adapter in use, made and saved by PEFT over the same base; returns PEFT's model."""
    with torch.random.fork_rng():
        torch.manual_seed(22)
        model = peft.get_peft_model(make_hf(), peft.LoraConfig(
            r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=sorted(targets),
            task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.02)
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("rank, alpha, rslora", SCALES)
def test_peft_reads_our_adapter_without_a_warning_and_with_the_same_logits(
        llama31, tmp_path, rank, alpha, rslora):
    model = adapted_model(llama31, rank, alpha, rslora)
    save_adapter(model, tmp_path)
    theirs, raised = peft_reads(llama31, tmp_path)
    assert not [w for w in raised if "missing" in w or "unexpected" in w or "adapter" in w], raised
    ours = logits(model, SEQUENCES)
    assert distance(peft_logits(theirs), ours, "peft") <= TOLERANCE
    base = logits(load_model(llama31.folder), SEQUENCES)
    assert distance(base, ours, "base") > CONTROL * TOLERANCE  # the control


def test_control_peft_warns_when_the_names_in_the_file_are_wrong(llama31, tmp_path):
    """PEFT then leaves its adapter at zero: the warning is the only sign, so it has to be seen."""
    save_adapter(adapted_model(llama31), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    renamed = {k.removeprefix("base_model.model."): v for k, v in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    _, raised = peft_reads(llama31, tmp_path)
    assert [w for w in raised if "missing" in w]


@pytest.mark.parametrize("rank, alpha, rslora", SCALES)
def test_an_adapter_written_by_peft_loads_here_with_the_same_logits(
        llama31, tmp_path, rank, alpha, rslora):
    theirs = peft_writes(tmp_path, rank, alpha, rslora)
    model = load_model(llama31.folder)
    load_adapter(model, tmp_path)
    ours = logits(model, SEQUENCES)
    assert distance(ours, peft_logits(theirs), "peft") <= TOLERANCE
    base = logits(load_model(llama31.folder), SEQUENCES)
    assert distance(base, ours, "base") > CONTROL * TOLERANCE  # the control


def test_control_ignoring_rslora_changes_the_logits_in_peft_and_here(llama31, tmp_path):
    model = adapted_model(llama31, 4, 16, True)
    save_adapter(model, tmp_path)
    edit_json(tmp_path / "adapter_config.json", use_rslora=False)
    ours = logits(model, SEQUENCES)
    theirs, _ = peft_reads(llama31, tmp_path)
    assert distance(peft_logits(theirs), ours, "peft") > CONTROL * TOLERANCE
    again = load_model(llama31.folder)
    load_adapter(again, tmp_path)
    assert distance(logits(again, SEQUENCES), ours, "here") > CONTROL * TOLERANCE


def test_our_file_has_the_names_shapes_and_dtypes_of_pefts_own(llama31, tmp_path):
    peft_writes(tmp_path / "peft", rank=4)
    save_adapter(adapted_model(llama31, 4), tmp_path / "ours")
    described = [{name: (t.shape, t.dtype) for name, t in load_file(
        tmp_path / who / "adapter_model.safetensors").items()} for who in ("peft", "ours")]
    assert described[0] == described[1]
    saved = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    # without target_modules PEFT assumes q and v and drops the rest in silence
    assert set(saved["target_modules"]) == SEVEN and saved["peft_type"] == "LORA"
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (4, 16, False)


def test_an_adapter_of_q_and_v_alone_loads_as_just_that(llama31, tmp_path):
    theirs = peft_writes(tmp_path, targets={"q_proj", "v_proj"})
    model = load_model(llama31.folder)
    load_adapter(model, tmp_path)
    assert len(adapters(model)) == 2 * 4
    assert distance(logits(model, SEQUENCES), peft_logits(theirs), "peft") <= TOLERANCE


def test_in_bf16_the_adapted_model_is_no_further_from_fp32_than_pefts(llama31, tmp_path):
    exact = adapted_model(llama31)
    save_adapter(exact, tmp_path)
    truth = logits(exact, SEQUENCES)
    theirs = peft_reads(llama31, tmp_path)[0]
    theirs.base_model.model.bfloat16()  # casts the adapters as well; PEFT keeps them in fp32
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = load_file(tmp_path / "adapter_model.safetensors")[
                name.replace(".default", "")]
    ours = logits(adapted_model(llama31, dtype=torch.bfloat16), SEQUENCES)
    assert ours.dtype == torch.bfloat16
    assert distance(ours, truth, "ours") <= 1.5 * distance(peft_logits(theirs), truth, "peft")


# ---------------------------------------------------------------------------------------------
# refusals


@pytest.fixture
def adapter(llama31, tmp_path):
    """A good adapter's folder, for a test to damage."""
    save_adapter(adapted_model(llama31), tmp_path / "adapter")
    return tmp_path / "adapter"


def check_refused(reference, folder, *words):
    """load_adapter must refuse, in one sentence whose first half holds every one of the words."""
    with pytest.raises(UserError) as error:
        load_adapter(load_model(reference.folder), folder)
    assert_names(error.value, folder, *words)


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


KEY = "base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"


def test_a_missing_adapter_tensor_is_named(llama31, adapter):
    edit_tensors(adapter, lambda tensors: tensors.pop(KEY))
    check_refused(llama31, adapter, "model.layers.2.mlp.up_proj")


def test_an_adapter_tensor_of_the_wrong_shape_is_named(llama31, adapter):
    edit_tensors(adapter, lambda tensors: tensors.update({KEY: torch.zeros(160, 3)}))
    check_refused(llama31, adapter, "model.layers.2.mlp.up_proj")


@pytest.mark.parametrize("where", ["lm_head", "model.layers.4.mlp.up_proj", "model.layers.0.mlp.x"])
def test_an_adapter_of_a_module_the_model_does_not_have_or_adapt_is_named(
        llama31, adapter, where):
    surplus = {f"base_model.model.{where}.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"}
    edit_tensors(adapter, lambda tensors: tensors.update(surplus))
    check_refused(llama31, adapter, where)


def test_names_without_pefts_prefix_are_refused(llama31, adapter):
    """PEFT loads such a file as an adapter that does nothing."""
    path = adapter / "adapter_model.safetensors"
    renamed = {k.removeprefix("base_model.model."): v for k, v in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    check_refused(llama31, adapter, "lora_")


def test_a_rank_that_is_not_the_tensors_is_refused(llama31, adapter):
    edit_json(adapter / "adapter_config.json", r=8)
    check_refused(llama31, adapter, "lora_A")


@pytest.mark.parametrize("setting", [
    {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}, {"peft_type": "IA3"},
    {"bias": "all"}, {"alora_invocation_tokens": [3, 4]},
    {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"},
    {"init_lora_weights": "loftq"},
])
def test_what_is_more_than_plain_lora_is_refused_by_its_name(llama31, adapter, setting):
    """Each changes what the same tensors compute, so reading past it would be silently wrong."""
    edit_json(adapter / "adapter_config.json", **setting)
    (name, value), = setting.items()
    check_refused(llama31, adapter, value if name == "peft_type" else name)


@pytest.mark.parametrize("setting, word", [
    ({"rank_pattern": {"q_proj": 2}}, "q_proj.lora_"), ({"exclude_modules": ["q_proj"]}, "q_proj"),
    ({"layers_to_transform": [0, 1, 3]}, "layers.2")])
def test_a_choice_of_modules_or_ranks_that_the_tensors_do_not_have_is_refused(
        llama31, adapter, setting, word):
    """test_peft_options.py has the choices that fit."""
    edit_json(adapter / "adapter_config.json", **setting)
    check_refused(llama31, adapter, word)


def test_a_whole_module_that_its_config_names_and_its_file_lacks_is_refused(llama31, adapter):
    edit_json(adapter / "adapter_config.json", modules_to_save=["lm_head"])
    check_refused(llama31, adapter, "lm_head.weight")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_adapter_file_is_named(llama31, adapter, name):
    (adapter / name).unlink()
    check_refused(llama31, adapter, name)


def test_a_truncated_adapter_file_is_named(llama31, adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    check_refused(llama31, adapter, "adapter_model.safetensors")


def test_an_adapter_of_another_model_is_refused(gemma, adapter):
    check_refused(gemma, adapter, "lora_")  # hidden size 72, not 64


def test_a_pickled_adapter_is_not_opened(llama31, adapter, monkeypatch):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    check_refused(llama31, adapter, "adapter_model.safetensors")

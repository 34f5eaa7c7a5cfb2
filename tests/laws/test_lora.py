"""The adapters start as nothing, are all that trains, and fold into the base exactly.

    pytest tests/laws/test_lora.py -q             (add -s to see every distance)

The base is the small random Llama of helpers.py; an adapter "in use" has a random B as well, large
enough to move the logits by about their own size, so that a wrong scale cannot hide.
"""

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
    distance,
    logits,
    randomise_B,
)
from torch import nn

from lora import LoRALinear, add_lora, merge
from model import load_model

pytest.importorskip("transformers", reason="writes the base model; see requirements-dev.txt")


def base_state(model):
    """Copies of every tensor that is not an adapter's."""
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}


def loss_of(model):
    """Next-token cross entropy, over boundaries too: any loss with a gradient will do."""
    ids = torch.cat(SEQUENCES)
    out = model(ids, [len(s) for s in SEQUENCES]).float()
    return nn.functional.cross_entropy(out[:-1], ids[1:])


# ---------------------------------------------------------------------------------------------
# what is adapted


def test_exactly_the_seven_projections_of_each_layer_are_adapted(llama31):
    model = load_model(llama31.folder)
    add_lora(model, 16, 16)
    names = [name for name, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert len(names) == len(set(names)) == 7 * 4
    for i in range(4):
        last = {n.rpartition(".")[2] for n in names if n.startswith(f"model.layers.{i}.")}
        assert last == SEVEN
    assert not isinstance(model.lm_head, LoRALinear)


def test_a_module_whose_name_merely_ends_in_a_targets_name_is_left_alone(llama31):
    model = load_model(llama31.folder)
    block = model.model.layers[0]
    block.mlp.not_up_proj = nn.Linear(4, 4)
    block.mlp.up_proj_norm = nn.Linear(4, 4)
    add_lora(model, 16, 16)
    assert type(block.mlp.not_up_proj) is nn.Linear and type(block.mlp.up_proj_norm) is nn.Linear


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_the_count_of_trainable_numbers_follows_the_formula(llama31, rank):
    model = load_model(llama31.folder)
    trainable = add_lora(model, rank, 16)
    C, F, Q, KV = 64, 160, 8 * 8, 2 * 8  # hidden, intermediate, query and key/value widths
    per_layer = (C + Q) + 2 * (C + KV) + (Q + C) + 2 * (C + F) + (F + C)  # in + out, each of seven
    assert sum(t.numel() for t in trainable) == 4 * rank * per_layer


def test_the_returned_tensors_are_all_that_requires_grad(llama31):
    model = load_model(llama31.folder)
    trainable = add_lora(model, 16, 16)
    assert len(trainable) == 2 * 7 * 4
    assert {id(t) for t in trainable} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("rank, alpha, rslora", SCALES)
def test_the_output_is_W_x_plus_scaled_B_A_x(llama31, rank, alpha, rslora):
    model = adapted_model(llama31, rank, alpha, rslora, dtype=torch.float64)
    module = model.model.layers[1].mlp.down_proj
    x = torch.randn(3, 160, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = alpha / rank**0.5 if rslora else alpha / rank
    assert module.lora_A.shape == (rank, 160) and module.lora_B.shape == (64, rank)
    assert module.scaling == pytest.approx(scale)
    with torch.no_grad():
        expected = x @ module.weight.T + scale * (x @ module.lora_A.T) @ module.lora_B.T
        assert distance(module(x), expected) <= 1e-12


def test_A_is_uniform_within_1_over_sqrt_in_and_B_is_zero(llama31):
    """kaiming_uniform with a = sqrt(5), what PEFT does: std is the bound over sqrt(3)."""
    model = load_model(llama31.folder)
    add_lora(model, 16, 16)
    for module in adapters(model):
        bound = module.lora_A.shape[1] ** -0.5
        assert module.lora_A.abs().max() <= bound
        assert module.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not module.lora_B.any()


def test_the_same_seed_draws_the_same_A_and_another_seed_another(llama31):
    def draw(seed):
        torch.rand(seed + 3)  # the global generator's state must not matter
        return add_lora(load_model(llama31.folder), 16, 16, seed=seed)

    first, again, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[2])  # q_proj and k_proj of layer 0: not one draw reused


# ---------------------------------------------------------------------------------------------
# laws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_with_B_zero_the_adapted_model_is_the_base_bit_for_bit(llama31, dtype):
    model = load_model(llama31.folder, dtype=dtype)
    before = logits(model, SEQUENCES)
    add_lora(model, rank=4, alpha=16)
    assert torch.equal(logits(model, SEQUENCES), before)
    # the control: once B is not zero the same comparison sees it
    assert distance(logits(randomise_B(model), SEQUENCES), before) > CONTROL * TOLERANCE


def test_at_step_0_the_gradient_of_A_is_exactly_zero_and_that_of_B_is_not(llama31):
    """dL/dA = s B^T (dL/dy) x^T, and B is zero: only B moves in the first step."""
    model = load_model(llama31.folder)
    add_lora(model, 16, 16)
    loss_of(model).backward()
    for module in adapters(model):
        assert torch.count_nonzero(module.lora_A.grad) == 0
        assert module.lora_B.grad.abs().max() > 0
    model.zero_grad()
    loss_of(randomise_B(model)).backward()  # the control: with B in use A has a gradient
    assert all(module.lora_A.grad.abs().max() > 0 for module in adapters(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_training_steps_leave_the_base_untouched_bit_for_bit(llama31, dtype):
    model = load_model(llama31.folder, dtype=dtype)
    trainable = add_lora(model, 4, 16)
    base, start = base_state(model), [t.detach().clone() for t in trainable]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    losses = []
    for _ in range(3):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    after = base_state(model)
    assert set(after) == set(base) and all(torch.equal(after[n], base[n]) for n in base)
    # the control: the steps did something, to every adapter tensor
    assert losses[-1] < losses[0]
    assert not [t for t, s in zip(trainable, start, strict=True) if torch.equal(t, s)]


def test_adapters_are_fp32_over_a_bf16_base_and_float64_over_a_float64_one(llama31):
    """In bf16 an AdamW step of 1e-5 on an entry of 0.02 rounds away, and nothing is learnt."""
    for base, adapter in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        model = load_model(llama31.folder, dtype=base)
        trainable = add_lora(model, 16, 16)
        assert {t.dtype for t in trainable} == {adapter}
        assert {t.dtype for n, t in model.state_dict().items() if "lora_" not in n} == {base}
        loss_of(model).backward()
        assert {m.lora_B.grad.dtype for m in adapters(model)} == {adapter}
        assert logits(model, SEQUENCES).dtype == base


@pytest.mark.parametrize("rank, alpha, rslora", SCALES)
def test_the_merged_model_equals_the_unmerged(llama31, rank, alpha, rslora):
    model = adapted_model(llama31, rank, alpha, rslora)
    unmerged = logits(model, SEQUENCES)
    merge(model)
    assert distance(logits(model, SEQUENCES), unmerged, "merged") <= TOLERANCE
    # the control: the adapter that was folded in matters
    base = logits(load_model(llama31.folder), SEQUENCES)
    assert distance(base, unmerged, "base") > CONTROL * TOLERANCE


def test_merging_restores_plain_frozen_linears_under_the_files_names(llama31):
    model = adapted_model(llama31)
    merge(model)
    assert not adapters(model)
    block = model.model.layers[3]
    assert type(block.self_attn.q_proj) is nn.Linear and type(block.mlp.down_proj) is nn.Linear
    assert set(model.state_dict()) == set(load_model(llama31.folder).state_dict())
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


def test_merging_an_unused_adapter_changes_no_bit(llama31):
    model = load_model(llama31.folder)
    before = base_state(model)
    add_lora(model, 16, 16)
    merge(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_biases_of_qwen_survive_adapting_and_merging(qwen):
    model = load_model(qwen.folder)
    before = logits(model, SEQUENCES)
    add_lora(model, 16, 16)
    assert torch.equal(logits(model, SEQUENCES), before)
    merge(model)
    assert torch.equal(logits(model, SEQUENCES), before)
    assert model.model.layers[0].self_attn.q_proj.bias.any()

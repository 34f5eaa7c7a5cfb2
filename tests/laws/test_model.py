"""The hand-written decoder equals transformers', state by state; what it cannot read it refuses.

    pytest tests/laws/test_model.py -q            (add -s to see every distance)

Parity is asked at 512 and 700 positions with llama3 RoPE scaling in force, since at 8 positions a
model without the scaling passes too. Each parity claim has a control beside it: the same
comparison with one feature broken, which must miss by a factor of 100.
"""

import json
import shutil

import pytest
import torch
from helpers import (
    CASES,
    CONTROL,
    LENGTHS,
    NAMES,
    PLAIN_ROPE,
    TOLERANCE,
    Reference,
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

from model import load_model, read_config, rope_inv_freq

pytest.importorskip("transformers", reason="the reference; see requirements-dev.txt")


@pytest.fixture(scope="module", params=CASES)
def reference(request, tmp_path_factory):
    return Reference(tmp_path_factory.mktemp("reference"), **CASES[request.param])


# ---------------------------------------------------------------------------------------------
# parity


def test_every_hidden_state_and_the_logits_equal_transformers(reference):
    model = load_model(reference.folder)
    ours = states(model, reference.ids, LENGTHS)
    assert len(ours) == len(reference.states) == len(NAMES)
    for name, mine, theirs in zip(NAMES, ours, reference.states, strict=True):
        assert mine.dtype == torch.float32
        assert distance(mine, theirs, name) <= TOLERANCE, name


def test_with_ordinary_weights_even_the_largest_difference_is_within_1e_5_std(tmp_path):
    """The cases above have weights of std 0.2, which blow up rounding; here it is 0.07."""
    gentle = Reference(tmp_path, initializer_range=0.07)
    ours = states(load_model(gentle.folder), gentle.ids, LENGTHS)
    for name, mine, theirs in zip(NAMES, ours, gentle.states, strict=True):
        distance(mine, theirs, name)
        assert (mine - theirs).abs().max() <= TOLERANCE * theirs.std(), name


def test_in_float64_only_transformers_own_fp32_islands_are_left(llama31):
    """Ours is float64 throughout; transformers keeps its norms and RoPE angles in fp32 even here,
    so the two meet at fp32's resolution and no better, but without the noise of fp32 matmuls."""
    model = load_model(llama31.folder, dtype=torch.float64)
    hf = make_hf().double()
    ours = states(model, llama31.ids, LENGTHS)
    for name, mine, theirs in zip(NAMES, ours, hf_states(hf, llama31.sequences), strict=True):
        assert mine.dtype == torch.float64
        assert distance(mine, theirs, name) <= 1e-6, name


def test_bf16_is_no_further_from_fp32_than_transformers_own_bf16(llama31):
    """Over 700 positions: bf16 has no whole numbers between 256 and 258, so that positions or
    angles rounded to it would show here and nowhere else."""
    theirs = hf_states(make_hf().bfloat16(), llama31.sequences)
    ours = states(load_model(llama31.folder, dtype=torch.bfloat16), llama31.ids, LENGTHS)
    for name, a, b, exact in zip(NAMES, ours, theirs, llama31.states, strict=True):
        assert a.dtype == torch.bfloat16
        assert distance(a, exact, f"ours {name}") <= 1.5 * distance(b, exact, f"hf {name}"), name


# controls: each breaks one feature of the llama-3.1 comparison above


def missed(reference, model, seqlens=LENGTHS):
    """Distance of the logits and of the final norm, the smaller of the two."""
    ours = states(model, reference.ids, seqlens)
    return min(distance(ours[i], reference.states[i], NAMES[i]) for i in (-2, -1))


def test_control_parity_fails_without_rope_scaling(llama31, folder):
    edit_json(folder / "config.json", rope_parameters=PLAIN_ROPE)
    assert missed(llama31, load_model(folder)) > CONTROL * TOLERANCE


def test_control_parity_fails_when_query_heads_share_keys_in_the_wrong_order(llama31):
    """Query head i must read key/value head i // 4 (k0 k0 k0 k0 k1 k1 k1 k1). Moving query heads,
    in q_proj's rows and o_proj's columns, to where head i meets i % 2 gives the wrong tiling."""
    model = load_model(llama31.folder)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    with torch.no_grad():
        for layer in model.model.layers:
            q, o = layer.self_attn.q_proj.weight, layer.self_attn.o_proj.weight
            q.copy_(q.view(8, 8, 64)[order].reshape(64, 64))
            o.copy_(o.view(64, 8, 8)[:, order].reshape(64, 64))
    assert missed(llama31, model) > CONTROL * TOLERANCE


def test_moving_query_heads_within_their_group_changes_nothing(llama31):
    """The other half of that control: the move itself is sound, only the wrong group hurts."""
    model = load_model(llama31.folder)
    order = [3, 1, 0, 2, 7, 4, 6, 5]
    with torch.no_grad():
        for layer in model.model.layers:
            q, o = layer.self_attn.q_proj.weight, layer.self_attn.o_proj.weight
            q.copy_(q.view(8, 8, 64)[order].reshape(64, 64))
            o.copy_(o.view(64, 8, 8)[:, order].reshape(64, 64))
    assert missed(llama31, model) <= TOLERANCE


def test_control_parity_fails_when_packed_sequences_see_each_other(llama31):
    assert missed(llama31, load_model(llama31.folder), [sum(LENGTHS)]) > CONTROL * TOLERANCE


def test_control_parity_fails_with_one_norm_weight_left_at_1(llama31, folder):
    tensors = tensors_of(folder)
    tensors["model.layers.2.post_attention_layernorm.weight"].fill_(1)
    write_tensors(folder, tensors)
    assert missed(llama31, load_model(folder)) > CONTROL * TOLERANCE


def test_control_parity_fails_without_qwens_biases(qwen):
    model = load_model(qwen.folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias.zero_()  # q alone: v's bias is the easy one to see
    assert missed(qwen, model) > CONTROL * TOLERANCE


def test_control_parity_fails_when_gemmas_norms_scale_by_w_instead_of_1_plus_w(gemma):
    model = load_model(gemma.folder)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "RMSNorm":
                module.weight.sub_(1)
    assert missed(gemma, model) > CONTROL * TOLERANCE


def test_control_parity_fails_when_gemmas_embedding_is_not_scaled(gemma):
    model = load_model(gemma.folder)
    embedding = model.model.embed_tokens
    hook = embedding.register_forward_hook(lambda module, args, output: output / 72**0.5)
    assert missed(gemma, model) > CONTROL * TOLERANCE
    hook.remove()


def test_control_parity_fails_with_gemmas_gelu_by_erf(gemma):
    """The two GELUs differ by 5e-4 at most: the best hidden of the faults here."""
    model = load_model(gemma.folder)
    for layer in model.model.layers:
        layer.mlp.act = torch.nn.functional.gelu
    assert missed(gemma, model) > 10 * TOLERANCE


def test_gemma_is_tanh_gelu_also_where_its_config_says_gelu(gemma, tmp_path):
    """The first Gemma files say "gelu" and mean tanh; transformers reads them so as well."""
    damaged = shutil.copytree(gemma.folder, tmp_path / "gelu")
    edit_json(damaged / "config.json", hidden_act="gelu", hidden_activation=None)
    assert missed(gemma, load_model(damaged)) <= TOLERANCE


def test_gemmas_embedding_scale_is_rounded_to_bf16_as_transformers_does(gemma):
    """sqrt(72) is 8.4853 but 8.5 in bf16; in fp32 no test can tell the two apart."""
    ours, theirs = load_model(gemma.folder, dtype=torch.bfloat16), make_hf(**CASES["gemma"])
    theirs = theirs.bfloat16()
    ids, seen = gemma.sequences[1], []

    def catch(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).reshape(len(ids), 72))

    with torch.no_grad():
        for model in (ours, theirs):
            model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        ours(ids, [len(ids)]), theirs(ids[None])
    assert torch.equal(*seen)
    exact = theirs.model.embed_tokens.weight[ids].float() * 72**0.5
    assert not torch.equal(exact.bfloat16(), seen[0])  # the control: an unrounded scale differs


# ---------------------------------------------------------------------------------------------
# laws of packing, in float64 so that a leak of 1e-10 would show


@pytest.fixture(scope="module")
def model64(llama31):
    return load_model(llama31.folder, dtype=torch.float64)


def test_a_sequence_alone_equals_the_same_sequence_packed(model64):
    sequences = random_ids(64, 1, 29, 64, seed=3)
    alone = torch.cat([logits(model64, [ids]) for ids in sequences])
    assert distance(logits(model64, sequences), alone) <= 1e-12


def test_the_order_of_packed_sequences_does_not_matter(model64):
    sequences = random_ids(64, 1, 29, 50, seed=4)
    forward = logits(model64, sequences).split([64, 1, 29, 50])
    backward = logits(model64, sequences[::-1]).split([50, 29, 1, 64])
    assert distance(torch.cat(backward[::-1]), torch.cat(forward)) <= 1e-12


def test_a_later_token_never_changes_an_earlier_row(model64):
    (ids,) = random_ids(40, seed=5)
    changed = ids.clone()
    changed[20:] = (changed[20:] + 1) % 512
    before, after = logits(model64, [ids]), logits(model64, [changed])
    assert distance(after[:20], before[:20]) <= 1e-12
    assert distance(after[20:], before[20:]) > CONTROL * TOLERANCE  # the control


def test_rows_picks_those_rows_of_the_full_logits_in_that_order(model64):
    sequences = random_ids(30, 20, seed=6)
    rows = torch.tensor([49, 0, 29, 30, 7, 7])
    full = logits(model64, sequences)
    with torch.no_grad():
        picked = model64(torch.cat(sequences), [30, 20], rows=rows)
    assert picked.shape == (6, 512)
    assert distance(picked, full[rows]) <= 1e-12
    assert distance(picked, full[rows + 1 - 2 * (rows == 49)]) > CONTROL * TOLERANCE  # the control


def test_seqlens_may_be_a_list_or_a_tensor(model64):
    sequences = random_ids(30, 20, seed=6)
    with torch.no_grad():
        as_tensor = model64(torch.cat(sequences), torch.tensor([30, 20]))
    assert torch.equal(as_tensor, logits(model64, sequences))


def test_the_gradient_of_a_packed_batch_is_the_sum_of_the_sequences_gradients(llama31):
    """Training backpropagates through the packing; the loader freezes, so unfreeze one weight."""
    model = load_model(llama31.folder, dtype=torch.float64)
    weight = model.model.layers[1].self_attn.k_proj.weight.requires_grad_(True)
    sequences = random_ids(30, 1, 20, seed=7)

    def gradient(*some):
        out = model(torch.cat(some), [len(ids) for ids in some])
        (gradient,) = torch.autograd.grad(out.logsumexp(-1).sum(), weight)
        return gradient

    assert distance(gradient(*sequences), sum(gradient(ids) for ids in sequences)) <= 1e-12


# ---------------------------------------------------------------------------------------------
# RoPE


LLAMA31_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # the rest of the published config.json does not concern a decoder


def test_llama31_8b_inverse_frequencies_have_the_published_values(tmp_path):
    """Values of the real 8B configuration (theta 5e5, head_dim 128, factor 8, original 8192), read
    off transformers: up to 28 kept, from 36 on divided by 8, blended between."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA31_8B))
    inv_freq = rope_inv_freq(read_config(tmp_path))
    assert inv_freq.dtype == torch.float32 and inv_freq.shape == (64,)
    expected = {
        0: 1.0, 20: 1.656044e-02, 28: 3.211446e-03, 29: 2.166571e-03, 30: 1.371894e-03,
        35: 9.556212e-05, 36: 7.784655e-05, 40: 3.428102e-05, 63: 3.068926e-07,
    }
    got = {i: inv_freq[i].item() for i in expected}
    assert got == pytest.approx(expected, rel=1e-6)


def test_rope_is_computed_afresh_in_fp32_even_by_a_bf16_model(llama31):
    """Frequencies rounded to bf16 are wrong by 2.0 in the cosine below position 4096. So nothing
    of RoPE may lie in the state, where .to(bf16) would round it."""
    model = load_model(llama31.folder, dtype=torch.bfloat16)
    assert not [name for name in model.state_dict() if "inv_freq" in name or "rotary" in name]
    frequencies = [b for b in model.buffers() if b.is_floating_point()]
    assert all(b.dtype == torch.float32 for b in frequencies)

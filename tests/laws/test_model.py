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
    ROPES,
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

import model as model_py
from model import Layout, load_model, read_config, rope_inv_freq

pytest.importorskip("transformers", reason="the reference; see requirements-dev.txt")


@pytest.fixture(scope="module", params=ROPES)
def scaled(request, tmp_path_factory):
    """A checkpoint with one kind of rotary scaling -> its name, the reference."""
    folder = tmp_path_factory.mktemp("scaled")
    return request.param, Reference(folder, head_dim=16, rope_parameters=ROPES[request.param])


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


def test_every_state_with_scaled_rope_equals_transformers(scaled):
    _, reference = scaled
    ours = states(load_model(reference.folder), reference.ids, LENGTHS)
    for name, mine, theirs in zip(NAMES, ours, reference.states, strict=True):
        assert distance(mine, theirs, name) <= TOLERANCE, name


# What is broken for each kind: another value of one setting, as if that were not read.
UNREAD = {
    "linear": {"factor": 1.0},
    "dynamic": {"factor": 1.0},  # up to max_position_embeddings it is not used
    "yarn": {"factor": 2.0},
    "yarn, own betas": {"beta_fast": None, "beta_slow": None},
    "yarn, ends not rounded": {"truncate": None},
    "yarn, own attention factor": {"attention_factor": None},
}


def test_control_parity_fails_with_one_rotary_setting_not_read(scaled, tmp_path):
    name, reference = scaled
    checkpoint = shutil.copytree(reference.folder, tmp_path / "checkpoint")
    rope = {key: v for key, v in (ROPES[name] | UNREAD[name]).items() if v is not None}
    edit_json(checkpoint / "config.json", rope_parameters=rope)
    far = missed(reference, load_model(checkpoint))
    assert far <= TOLERANCE if name == "dynamic" else far > CONTROL * TOLERANCE


def test_control_yarns_amplitude_is_seen(scaled, monkeypatch):
    name, reference = scaled
    monkeypatch.setattr(model_py, "rope_amplitude", lambda config: 1.0)
    far = missed(reference, load_model(reference.folder))
    assert far > CONTROL * TOLERANCE if name.startswith("yarn") else far <= TOLERANCE


def test_dynamic_scaling_is_none_up_to_max_positions_which_longer_sequences_may_not_pass(tmp_path):
    """transformers changes the angles from the first position on once a sequence is longer."""
    hf = make_hf(rope_parameters=ROPES["dynamic"], max_position_embeddings=512)
    hf.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.config.max_positions == 512 and model.config.rope_scaling is None
    for length in (512, 513):
        ids = random_ids(length)
        pairs = zip(NAMES, states(model, ids[0], [length]), hf_states(hf, ids), strict=True)
        far = [distance(mine, theirs, name) for name, mine, theirs in pairs]
        assert max(far) <= TOLERANCE if length == 512 else max(far) > 10 * TOLERANCE


LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
    "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 32768}


@pytest.mark.parametrize("config", [
    QWEN25_7B | {"rope_scaling": {  # as its model card says, for long texts
        "factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
    LLAMA2_7B | {"max_position_embeddings": 65536, "rope_scaling": {
        "factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn",
        "finetuned": True}},
    LLAMA2_7B | {"rope_scaling": {"factor": 4.0, "type": "linear"}},
    LLAMA2_7B | {"rope_scaling": {"factor": 2.0, "type": "dynamic"}},
], ids=["Qwen2.5-7B, yarn", "Llama-2-7B, yarn 64k", "Llama-2-7B, linear", "Llama-2-7B, dynamic"])
def test_real_sizes_cosines_equal_transformers_at_any_position(tmp_path, config):
    """cos and sin as the layers get them, amplitude included, in the config's old spelling."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
    ours = read_config(tmp_path)
    layout = Layout([config["max_position_embeddings"]], "cpu")
    at = torch.tensor([0, 1, 100, 2047, config["max_position_embeddings"] - 1])
    layout.position = layout.position[at]
    expected = theirs(torch.zeros(1), at[None])
    got = layout.cos_sin(rope_inv_freq(ours), model_py.rope_amplitude(ours), torch.float32)
    for mine, exact in zip(got, expected, strict=True):
        # an angle of 65,535 has steps of 0.004 in fp32
        assert (mine[:, 0] - exact[0]).abs().max() <= 1.6e-2
        assert (mine[:4, 0] - exact[0, :4]).abs().max() <= 5e-4
    plain = {key: value for key, value in config.items() if key != "rope_scaling"}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    other = layout.cos_sin(rope_inv_freq(read_config(tmp_path)), 1.0, torch.float32)
    is_dynamic = config["rope_scaling"]["type"] == "dynamic"
    far = (other[0][:, 0] - expected[0][0]).abs().max()
    assert far <= 1.6e-2 if is_dynamic else far > 0.1  # the control


def test_rope_is_computed_afresh_in_fp32_even_by_a_bf16_model(llama31):
    """Frequencies rounded to bf16 are wrong by 2.0 in the cosine below position 4096. So nothing
    of RoPE may lie in the state, where .to(bf16) would round it."""
    model = load_model(llama31.folder, dtype=torch.bfloat16)
    assert not [name for name in model.state_dict() if "inv_freq" in name or "rotary" in name]
    frequencies = [b for b in model.buffers() if b.is_floating_point()]
    assert all(b.dtype == torch.float32 for b in frequencies)

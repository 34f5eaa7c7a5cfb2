"""Every family's hidden states, and the gradients that train its adapters, are transformers' own.

    pytest tests/laws/test_families.py -q         (add -s to see every distance)

The weights have the ordinary std of 0.07, so that even the largest single difference has to stay
within 1e-5 std (test_model.py takes 0.2, where rounding grows). Gradients are compared with PEFT's
over the same two folders, checkpoint and adapter: ours from one packed pass, PEFT's from one
sequence at a time. Each quirk of a family has a control: with the quirk taken out of our side the
same comparison must miss, and by far.
"""

import functools
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CASES,
    CONTROL,
    LENGTHS,
    NAMES,
    PLAIN_ROPE,
    SEQUENCES,
    SEVEN,
    TOLERANCE,
    adapted_model,
    adapters,
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

import model as model_py
from anchors import FinalNorm
from anchors import states as last_states
from generate import load_aligned
from lora import adapter_state, load_adapter, save_adapter, trainable
from model import Layout, RMSNorm, UserError, load_model, read_config

peft = pytest.importorskip("peft", reason="the reference; see requirements-dev.txt")
transformers = pytest.importorskip("transformers", reason="the reference; see requirements-dev.txt")

ROPE_1E6 = PLAIN_ROPE | {"rope_theta": 1e6}
YARN = ROPE_1E6 | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
QWEN = {"rope_parameters": ROPE_1E6, "rms_norm_eps": 1e-6}
SMALL = {
    "llama-3.1": CASES["llama-3.1"],
    "llama, wide heads, tied": CASES["llama, wide heads, tied"],
    "qwen2": QWEN | {"family": "Qwen2"},
    "qwen2, tied": QWEN | {"family": "Qwen2", "tie_word_embeddings": True},
    # as Qwen2.5's long-context copies, with an original length of 64
    "qwen2, yarn": QWEN | {"family": "Qwen2", "head_dim": 16, "rope_parameters": YARN},
    "qwen3": QWEN | {"family": "Qwen3", "head_dim": 16},
    "mistral, window": {"family": "Mistral", "sliding_window": 1024, "rope_parameters": PLAIN_ROPE},
    "mistral, no window": {"family": "Mistral", "sliding_window": None,
                           "rope_parameters": ROPE_1E6},
    "gemma": CASES["gemma"] | {"rope_parameters": PLAIN_ROPE, "rms_norm_eps": 1e-6},
}
ONE_OF_EACH = ["qwen2", "qwen3", "mistral, window", "gemma"]  # test_peft.py has llama

# One update: rows with about 40 % of their tokens supervised, and K = 2 anchors.
ROWS, ANCHORS = random_ids(512, 37, 90, seed=30), random_ids(23, 9, seed=31)
SUPERVISED = [torch.rand(len(ids) - 1, generator=torch.Generator().manual_seed(len(ids))) < 0.4
              for ids in ROWS]  # (T - 1,) whether the next token is
N_SUPERVISED = int(sum(mask.sum() for mask in SUPERVISED))


def hf_model(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=dtype)


def peft_model(folder, adapter, **settings):
    """PeftModel of the checkpoint with the adapter, and what loading warned of."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        made = peft.PeftModel.from_pretrained(hf_model(folder), adapter, **settings)
    return made, [str(w.message) for w in raised if "adapter" in str(w.message)]


class Family:
    """A checkpoint, two adapters in use for it, plain and rsLoRA, and transformers' states."""

    def __init__(self, folder, **overrides):
        self.folder = folder / "model"
        hf = make_hf(**overrides)
        with torch.no_grad():
            for name, weight in hf.named_parameters():
                # make_hf's biases of std 1 outweigh all else: the gradients of q and k are then
                # small remainders, of which fp32 rounding is 2e-5, and 8e-6 in PEFT.
                if name.endswith("bias"):
                    weight.mul_(0.1)
        hf.save_pretrained(self.folder)
        self.sequences = random_ids(*LENGTHS)
        self.ids = torch.cat(self.sequences)
        self.states = hf_states(hf_model(self.folder), self.sequences)
        self.adapter = {rslora: folder / f"rslora {rslora}" for rslora in (False, True)}
        for rslora, path in self.adapter.items():
            save_adapter(adapted_model(self, 4, 16, rslora), path)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """family(name, std of the weights), made once."""
    return functools.cache(lambda name, std=0.07: Family(
        tmp_path_factory.mktemp("family"), initializer_range=std, **SMALL[name]))


def largest(ours, theirs, name=""):
    """The largest single difference over the std of theirs."""
    distance(ours, theirs, name)
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().std()).item()


def test_every_family_of_model_py_that_writes_has_a_case_here(family):
    writers = {name for name, f in model_py.FAMILIES.items() if f.head == "lm_head"}
    assert {f"{case.get('family', 'Llama')}ForCausalLM" for case in SMALL.values()} == writers


# ---------------------------------------------------------------------------------------------
# hidden states


@pytest.mark.parametrize("name", SMALL)
def test_even_the_largest_difference_of_any_state_is_within_1e_5_std(family, name):
    checkpoint = family(name)
    ours = states(load_model(checkpoint.folder), checkpoint.ids, LENGTHS)
    for where, mine, theirs in zip(NAMES, ours, checkpoint.states, strict=True):
        assert largest(mine, theirs, where) <= TOLERANCE, where


@pytest.mark.parametrize("name", SMALL)
def test_bf16_is_no_further_from_fp32_than_transformers_own_bf16(family, name, monkeypatch):
    """Weights of std 0.2, so that attention is sharp and a wrong angle hurts. Theirs is loaded in
    bf16: hf.bfloat16() would round its RoPE frequencies, which doubles some of its errors."""
    checkpoint = family(name, 0.2)
    theirs = hf_states(hf_model(checkpoint.folder, torch.bfloat16), checkpoint.sequences)
    model = load_model(checkpoint.folder, dtype=torch.bfloat16)
    ours = states(model, checkpoint.ids, LENGTHS)
    real = Layout.cos_sin
    monkeypatch.setattr(Layout, "cos_sin", lambda self, inv_freq, amplitude, dtype: real(
        SimpleNamespace(position=self.position.to(dtype)), inv_freq, amplitude, dtype))
    rounded = states(model, checkpoint.ids, LENGTHS)  # the control: positions in bf16
    for where, a, b, c, exact in zip(NAMES, ours, theirs, rounded, checkpoint.states, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        far = distance(b, exact, f"hf {where}")
        assert distance(a, exact, f"ours {where}") <= 1.5 * far, where
        assert distance(c, exact, "rounded") > 5 * far, where


def test_a_window_of_mistrals_matters_beyond_its_length_which_is_max_positions(family, tmp_path):
    """Within its window Mistral is a Llama; a longer sequence would be silently another model."""
    narrow = shutil.copytree(family("mistral, window").folder, tmp_path / "narrow")
    edit_json(narrow / "config.json", sliding_window=64)
    theirs, model = hf_model(narrow), load_model(narrow)
    assert model.config.max_positions == 64
    for length, same in ((64, True), (128, False)):
        ids = random_ids(length)
        ours, far = states(model, ids[0], [length]), []
        for where, mine, exact in zip(NAMES, ours, hf_states(theirs, ids), strict=True):
            far.append((largest if same else distance)(mine, exact, where))
        assert max(far) <= TOLERANCE if same else min(far) > CONTROL * TOLERANCE


# ---------------------------------------------------------------------------------------------
# gradients


def gradients(params, ce, safe):
    """d L_CE and d L_safe with respect to the named tensors."""
    return {name: dict(zip(params, torch.autograd.grad(loss, list(params.values()),
                                                       retain_graph=True), strict=True))
            for name, loss in (("ce", ce), ("safe", safe))}


def our_losses(model, h_ref):
    """L_CE and L_safe from one packed pass, the anchors at its end."""
    sequences = [*ROWS, *ANCHORS]
    ids, seqlens = torch.cat(sequences), [len(s) for s in sequences]
    rows = torch.cat([F.pad(mask, (0, 1)) for mask in SUPERVISED]).nonzero()[:, 0]
    end = torch.tensor(seqlens).cumsum(0)[-len(ANCHORS):] - 1
    with FinalNorm(model) as h:
        out = model(ids, seqlens, rows=rows)
    return F.cross_entropy(out, ids[rows + 1]), (h.value[end] - h_ref).square().mean()


def our_gradients(model, adapter):
    """By PEFT's names; h_ref is the base's, from before the adapters are put in use."""
    h_ref = last_states(model, ANCHORS).detach()
    load_adapter(model, adapter)
    params = dict(zip(adapter_state(model), trainable(model), strict=True))
    return gradients(params, *our_losses(model, h_ref))


def hf_last_states(hf):
    return torch.stack([hf.model(ids[None]).last_hidden_state[0, -1] for ids in ANCHORS])


def peft_gradients(folder, adapter):
    """Each sequence alone, summed over the whole batch's counts."""
    h_ref = hf_last_states(hf_model(folder)).detach()
    theirs, _ = peft_model(folder, adapter, is_trainable=True)
    ce = sum(F.cross_entropy(theirs(ids[None]).logits[0, :-1][mask], ids[1:][mask],
                             reduction="sum")
             for ids, mask in zip(ROWS, SUPERVISED, strict=True)) / N_SUPERVISED
    safe = (hf_last_states(theirs.base_model.model) - h_ref).square().mean()
    params = {name.replace(".default", ""): p for name, p in theirs.named_parameters()
              if p.requires_grad}
    return gradients(params, ce, safe)


@pytest.fixture(scope="module")
def pefts(family):
    """pefts(name, rslora): PEFT's gradients, computed once."""
    return functools.cache(lambda name, rslora: peft_gradients(
        family(name).folder, family(name).adapter[rslora]))


def apart(ours, theirs):
    """{loss: relative L2 difference of each tensor, the smallest first}."""
    found = {}
    for loss, exact in theirs.items():
        assert ours[loss].keys() == exact.keys() and len(exact) == 2 * 7 * 4
        found[loss] = far = sorted(((ours[loss][n] - g).norm() / g.norm()).item()
                                   for n, g in exact.items())
        print(f"{loss:5s} relative L2 of {len(far)} tensors: least {far[0]:.1e}, median "
              f"{far[len(far) // 2]:.1e}, worst {far[-1]:.1e}")
    return found


@pytest.mark.parametrize("name, rslora", [*((name, False) for name in SMALL), ("llama-3.1", True)])
def test_the_gradients_of_both_losses_in_every_adapter_tensor_equal_pefts(
        family, pefts, name, rslora):
    ours = our_gradients(load_model(family(name).folder), family(name).adapter[rslora])
    for loss, far in apart(ours, pefts(name, rslora)).items():
        assert far[-1] <= TOLERANCE, loss


# ---------------------------------------------------------------------------------------------
# controls: one quirk taken out of our side


def each_layer(model, change):
    with torch.no_grad():
        for layer in model.model.layers:
            change(layer)


def without_bias(projection):
    return lambda model, patch: each_layer(
        model, lambda layer: getattr(layer.self_attn, projection).bias.zero_())


def without_norm(norm):
    return lambda model, patch: each_layer(
        model, lambda layer: setattr(layer.self_attn, norm, torch.nn.Identity()))


def tiled_heads(model, patch):
    """Query head i reads key head i % 2; i // 4 is right. The heads' own order stays."""
    order, real = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7]), model_py.packed_attention
    patch.setattr(model_py, "packed_attention",
                  lambda q, *rest: real(q[:, order], *rest)[:, order.argsort()])


def norms_scale_by_w(model, patch):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight.sub_(1)


def embedding_not_scaled(model, patch):
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: out / 72**0.5)


def no_amplitude(model, patch):
    patch.setattr(model_py, "rope_amplitude", lambda config: 1.0)


def gelu_by_erf(model, patch):
    each_layer(model, lambda layer: setattr(layer.mlp, "act", F.gelu))


def fault(of, change=None, hidden=True, factor=CONTROL, config=None, adapter=None, rslora=False):
    """A quirk's removal, by a change of the model or of a copy of its files.

    hidden: whether hidden states are to miss here; test_model.py has some, adapters touch none.
    """
    return SimpleNamespace(of=of, change=change or (lambda model, patch: None), hidden=hidden,
                           factor=factor, config=config or {}, adapter=adapter or {},
                           rslora=rslora)


FAULTS = {
    "llama: rope not scaled": fault(
        "llama-3.1", hidden=False, config={"rope_parameters": PLAIN_ROPE}),
    "llama: query heads in the wrong groups": fault("llama-3.1", tiled_heads, hidden=False),
    "llama: eps 1e-6": fault("llama-3.1", factor=10, config={"rms_norm_eps": 1e-6}),
    "llama: alpha not read": fault("llama-3.1", hidden=False, adapter={"lora_alpha": 4}),
    "llama: rslora not read": fault(
        "llama-3.1", hidden=False, adapter={"use_rslora": False}, rslora=True),
    "qwen2: theta 1e4": fault("qwen2", config={"rope_parameters": PLAIN_ROPE}),
    "qwen2: no q bias": fault("qwen2", without_bias("q_proj"), hidden=False),
    "qwen2: no k bias": fault("qwen2", without_bias("k_proj")),
    "qwen2: no v bias": fault("qwen2", without_bias("v_proj")),
    "qwen2, yarn: not scaled": fault("qwen2, yarn", config={"rope_parameters": ROPE_1E6}),
    "qwen2, yarn: attention not sharpened": fault("qwen2, yarn", no_amplitude),
    "qwen3: theta 1e4": fault("qwen3", config={"rope_parameters": PLAIN_ROPE}),
    "qwen3: no q_norm": fault("qwen3", without_norm("q_norm")),
    "qwen3: no k_norm": fault("qwen3", without_norm("k_norm")),
    "qwen3: eps 1e-5": fault("qwen3", factor=10, config={"rms_norm_eps": 1e-5}),
    "mistral: theta 1e4": fault("mistral, no window", config={"rope_parameters": PLAIN_ROPE}),
    "gemma: norms scale by w": fault("gemma", norms_scale_by_w, hidden=False),
    "gemma: embedding not scaled": fault("gemma", embedding_not_scaled, hidden=False),
    # the two GELUs differ by 5e-4 at most
    "gemma: gelu by erf": fault("gemma", gelu_by_erf, hidden=False, factor=10),
}


@pytest.fixture
def broken(family, tmp_path, monkeypatch):
    """broken(fault): the checkpoint, our model with the fault in it, and the adapter's folder."""

    def make(wrong):
        checkpoint = family(wrong.of)
        folder = shutil.copytree(checkpoint.folder, tmp_path / "model")
        adapter = shutil.copytree(checkpoint.adapter[wrong.rslora], tmp_path / "adapter")
        edit_json(folder / "config.json", **wrong.config)
        edit_json(adapter / "adapter_config.json", **wrong.adapter)
        model = load_model(folder)
        wrong.change(model, monkeypatch)
        return checkpoint, model, adapter

    return make


@pytest.mark.parametrize("name", [name for name, wrong in FAULTS.items() if wrong.hidden])
def test_control_hidden_states_miss(broken, name):
    checkpoint, model, _ = broken(FAULTS[name])
    ours = states(model, checkpoint.ids, LENGTHS)
    for i in (-2, -1):
        far = distance(ours[i], checkpoint.states[i], NAMES[i])
        assert far > FAULTS[name].factor * TOLERANCE, NAMES[i]


@pytest.mark.parametrize("name", FAULTS)
def test_control_gradients_miss_in_most_tensors(broken, pefts, name):
    _, model, adapter = broken(FAULTS[name])
    found = apart(our_gradients(model, adapter), pefts(FAULTS[name].of, FAULTS[name].rslora))
    for loss, far in found.items():
        assert far[len(far) // 2] > FAULTS[name].factor * TOLERANCE, loss


@pytest.mark.parametrize("name", ["llama, wide heads, tied", "qwen2, tied"])
def test_control_an_untied_random_head_misses_in_the_logits_and_L_CE_and_L_safe_cannot_see_it(
        family, pefts, tmp_path, name):
    checkpoint = family(name)
    untied = shutil.copytree(checkpoint.folder, tmp_path / "untied")
    tensors = tensors_of(untied)
    head = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    write_tensors(untied, tensors | {"lm_head.weight": 0.07 * head})
    edit_json(untied / "config.json", tie_word_embeddings=False)
    ours = states(load_model(untied), checkpoint.ids, LENGTHS)
    assert distance(ours[-1], checkpoint.states[-1], "logits") > CONTROL * TOLERANCE
    assert largest(ours[-2], checkpoint.states[-2], "final norm") <= TOLERANCE
    found = apart(our_gradients(load_model(untied), checkpoint.adapter[False]), pefts(name, False))
    assert found["ce"][0] > CONTROL * TOLERANCE and found["safe"][-1] <= TOLERANCE


@pytest.mark.parametrize("name", ["llama, wide heads, tied", "qwen3", "gemma"])
def test_control_without_head_dim_the_checkpoint_does_not_even_load(family, tmp_path, name):
    """Reading hidden / heads, 8 or 9 where the file has 16."""
    folder = shutil.copytree(family(name).folder, tmp_path / "model")
    assert read_config(folder).head_dim == 16
    edit_json(folder / "config.json", head_dim=None)
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert_names(error.value, folder, "self_attn")


# ---------------------------------------------------------------------------------------------
# the classifier


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """transformers' classifier over 14 labels, and its folder."""
    hf = make_hf(initializer_range=0.07, num_labels=14)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        made = transformers.LlamaForSequenceClassification(hf.config).eval()
    made.model = hf.model  # its norms are not all 1
    made.save_pretrained(folder := tmp_path_factory.mktemp("judge"))
    return made, folder


def test_a_classifiers_14_logits_at_each_last_token_equal_transformers(judge):
    hf, folder = judge
    sequences = random_ids(*LENGTHS, 5, 64)
    seqlens = [len(ids) for ids in sequences]
    last = torch.tensor(seqlens).cumsum(0) - 1
    with torch.no_grad():
        theirs = torch.cat([hf(ids[None]).logits for ids in sequences])
        model = load_model(folder)
        ours = model(torch.cat(sequences), seqlens, rows=last)
        early = model(torch.cat(sequences), seqlens, rows=last - 1)
    assert theirs.shape == (5, 14)
    assert largest(ours, theirs, "judge") <= TOLERANCE
    assert distance(early, theirs, "a row early") > CONTROL * TOLERANCE  # the control


def test_a_classifier_is_refused_where_a_model_that_writes_is_expected(judge, family):
    _, folder = judge
    with pytest.raises(UserError) as error:
        load_aligned(folder, "cpu", torch.float32)
    assert_names(error.value, folder, "classifier")
    writer = load_aligned(family("llama-3.1").folder, "cpu", torch.float32)  # the control
    assert writer.config.head == "lm_head"


# ---------------------------------------------------------------------------------------------
# adapters to and from PEFT


def peft_writes(checkpoint, folder, targets=None):
    """An rsLoRA adapter in use, made and saved by PEFT; returns PEFT's model."""
    with torch.random.fork_rng():
        torch.manual_seed(22)
        theirs = peft.get_peft_model(hf_model(checkpoint.folder), peft.LoraConfig(
            r=4, lora_alpha=16, use_rslora=True, task_type="CAUSAL_LM",
            target_modules=targets or sorted(SEVEN)))
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.02)
    theirs.eval().save_pretrained(folder)
    return theirs


def peft_logits(theirs):
    with torch.no_grad():
        return torch.cat([theirs(ids[None]).logits[0] for ids in SEQUENCES])


def check_same_logits(checkpoint, model, theirs):
    """Ours and PEFT's; and, the control, the base's are others."""
    ours = logits(model, SEQUENCES)
    assert largest(ours, peft_logits(theirs), "peft") <= TOLERANCE
    base = logits(load_model(checkpoint.folder), SEQUENCES)
    assert distance(base, ours, "base") > CONTROL * TOLERANCE


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_peft_reads_every_familys_adapter_without_a_warning_and_with_the_same_logits(family, name):
    checkpoint = family(name)
    theirs, raised = peft_model(checkpoint.folder, checkpoint.adapter[True])
    assert raised == []
    check_same_logits(checkpoint, adapted_model(checkpoint, 4, 16, True), theirs)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_familys_adapter_written_by_peft_loads_here_with_the_same_logits(
        family, tmp_path, name):
    checkpoint = family(name)
    theirs, model = peft_writes(checkpoint, tmp_path), load_model(checkpoint.folder)
    load_adapter(model, tmp_path)
    check_same_logits(checkpoint, model, theirs)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_an_adapter_stored_in_bf16_loads_as_fp32_tensors_of_those_values(family, tmp_path, name):
    checkpoint, path = family(name), tmp_path / "adapter_model.safetensors"
    peft_writes(checkpoint, tmp_path)
    exact = load_file(path)
    save_file({n: t.bfloat16() for n, t in exact.items()}, path, metadata={"format": "pt"})
    model = load_model(checkpoint.folder)
    load_adapter(model, tmp_path)
    ours = adapter_state(model)
    assert ours.keys() == exact.keys()
    for n, tensor in ours.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, exact[n].bfloat16().float()), n
        assert not torch.equal(tensor, exact[n]), n  # the control: bf16 rounds
    check_same_logits(checkpoint, model, peft_model(checkpoint.folder, tmp_path)[0])


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("targets, expected", [
    (r".*layers\.[01]\.self_attn\.(q|v)_proj",
     {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"}),
    (["layers.2.mlp.down_proj", "model.layers.3.self_attn.o_proj"],
     {"model.layers.2.mlp.down_proj", "model.layers.3.self_attn.o_proj"}),
], ids=["pattern", "ends of names"])
def test_pefts_adapter_of_some_modules_of_some_layers_survives_the_way_here_and_back(
        family, tmp_path, name, targets, expected):
    checkpoint = family(name)
    theirs = peft_writes(checkpoint, tmp_path / "peft", targets)
    model = load_model(checkpoint.folder)
    load_adapter(model, tmp_path / "peft")
    assert {n for n, m in model.named_modules() if m in adapters(model)} == expected
    check_same_logits(checkpoint, model, theirs)
    save_adapter(model, tmp_path / "ours")
    again, raised = peft_model(checkpoint.folder, tmp_path / "ours")
    assert raised == []
    check_same_logits(checkpoint, model, again)
    # the control: PEFT warns, were the targets written by their last names alone
    ends = sorted({n.rpartition(".")[2] for n in expected})
    edit_json(tmp_path / "ours" / "adapter_config.json", target_modules=ends)
    assert peft_model(checkpoint.folder, tmp_path / "ours")[1]


# ---------------------------------------------------------------------------------------------
# activations computed again in backward


def kept_for_backward(model, h_ref):
    """Both losses, and the bytes of the distinct storages kept for backward, weights aside."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # which keeps its storage, so that no later one takes the address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return our_losses(model, h_ref), sum(kept.values())


@pytest.mark.parametrize("name", ["llama-3.1", "gemma"])
def test_recompute_gives_the_same_bits_and_keeps_less_than_a_third_for_backward(family, name):
    model = load_model(family(name).folder)
    h_ref = last_states(model, ANCHORS).detach()
    load_adapter(model, family(name).adapter[False])
    params, runs = dict(zip(adapter_state(model), trainable(model), strict=True)), []
    for recompute in (False, True):
        model.model.recompute = recompute
        losses, n_bytes = kept_for_backward(model, h_ref)
        runs.append((n_bytes, [*losses, *(g for of in gradients(params, *losses).values()
                                          for g in of.values())]))
    (plain, exact), (fewer, again) = runs
    print(f"{name}: {plain:,} bytes kept, {fewer:,} with recompute")
    assert len(exact) == 2 + 2 * 56
    assert all(torch.equal(a, b) for a, b in zip(again, exact, strict=True))
    assert all(g.any() for g in exact)
    assert plain > 3 * fewer > 0  # the control: something was left out

"""bench/forecast: its counts are those of real models, and docs/scale.md shows what it prints.

    pytest tests/programs/test_forecast.py -q

Shapes and operations only: on meta, or on a pretended GPU (fake_gpu.py). Speeds are not tested.
"""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fake_gpu import GPU, FakeGPU
from helpers import ROOT
from torch.utils.flop_counter import FlopCounterMode

from bench import forecast
from bench.forecast import MODELS, RANK, Load, activations, update_flop
from data.batches import Example, pack
from lora import adapt, add_lora, projections, trainable
from model import Config, Llama, to_fp32

LLAMAS = [m for m in MODELS if m.n_expert == 1]
TWO_LAYERS = replace(MODELS[0], n_layer=2)


def addmm_in_place(x, a, b, out_shape=None, **_):
    """x + a b, by shapes: PyTorch's counter has no formula for its form in place."""
    return 2 * a[0] * a[1] * b[1]


IN_PLACE = {torch.ops.aten.addmm_: addmm_in_place}


def config_of(m):
    return Config(
        dim=m.dim, n_layer=m.n_layer, n_head=m.n_head, n_kv_head=m.n_kv_head, head_dim=m.head_dim,
        hidden_dim=m.hidden_dim, vocab_size=m.vocab_size, n_out=m.vocab_size, max_positions=8192,
        norm_eps=1e-5, rope_theta=5e5, rope_scaling=None, qkv_bias=False, o_bias=False,
        mlp_bias=False, tied=False, qk_norm=False, gemma=False, act="silu", head="lm_head")


# parameters


def counts(m):
    """(base, adapters) of a real model."""
    with torch.device("meta"):
        model = Llama(config_of(m)).requires_grad_(False)
        base = sum(p.numel() for p in model.parameters())
        for name in projections(model):
            adapt(model, name, RANK, RANK, rslora=False)
    return base, sum(p.numel() for p in trainable(model))


@pytest.mark.parametrize("m", LLAMAS, ids=lambda m: m.name)
def test_weights_and_adapters_are_counted_as_the_model_has_them(m):
    assert counts(m) == (m.base, m.adapters(1))


def test_the_count_would_show_one_key_head_more():
    other = replace(MODELS[0], n_kv_head=9)
    assert counts(MODELS[0]) != (other.base, other.adapters(1))


def test_the_mixture_of_experts_is_counted_as_transformers_has_it():
    transformers = pytest.importorskip("transformers", reason="this project has no such model")
    m = MODELS[-1]
    config = transformers.MixtralConfig(
        vocab_size=m.vocab_size, hidden_size=m.dim, intermediate_size=m.hidden_dim,
        num_hidden_layers=m.n_layer, num_attention_heads=m.n_head,
        num_key_value_heads=m.n_kv_head, num_local_experts=m.n_expert,
        num_experts_per_tok=m.n_active, tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == m.base


# operations, and what is kept


class Update:
    """Forward and backward of 32 rows on a pretended GPU: FLOP by kernel, bytes kept, its Load."""

    def __init__(self, m, shared, own, recompute=False):
        with FakeGPU():
            with torch.device("meta"):
                model = Llama(config_of(m))
            weights = {name: torch.empty(p.shape, dtype=torch.bfloat16, device=GPU)
                       for name, p in model.named_parameters()}
            model.load_state_dict(weights, assign=True)
            add_lora(model.requires_grad_(False), RANK, RANK)
            model.model.recompute = recompute
            self.is_of_the_model = {p.untyped_storage()._cdata for p in model.parameters()}
            self.kept = {}
            made = pack(rows(shared, own), [], GPU)
            counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
            with counter, torch.autograd.graph.saved_tensors_hooks(self.keep, lambda x: x):
                logits = model(made.ids, made.seqlens, path=made.path, rows=made.supervised)
                loss = F.cross_entropy(to_fp32(logits), made.targets, reduction="sum")
                self.bytes_kept = sum(storage.nbytes() for storage in self.kept.values())
                loss.backward()
        self.products = 0
        self.attention = 0
        for kernel, flop in counter.get_flop_counts()["Global"].items():
            if "attn" in str(kernel):
                self.attention += flop
            else:
                self.products += flop
        self.load = Load(len(made.ids), len(made.path), shared + own, len(made.targets))

    def keep(self, x):
        storage = x.untyped_storage()
        if x.device.type == "cuda" and storage._cdata not in self.is_of_the_model:
            self.kept[storage._cdata] = storage
        return x


def rows(shared, own):
    """32 rows that begin alike, two supervised tokens each; one token stands behind them."""
    examples = []
    for i in range(32):
        ids = torch.cat([torch.arange(shared), 1000 * (i + 1) + torch.arange(own + 1)])
        length = shared + own
        examples.append(Example(ids, torch.arange(length - 2, length), i))
    return examples


def products(m, load, recompute=False):
    return update_flop(m, replace(load, tokens=0), recompute)


@pytest.mark.parametrize("shared, own", [(42, 20), (0, 62)])
def test_an_update_has_the_operations_of_the_formula(shared, own):
    update = Update(TWO_LAYERS, shared, own)
    assert update.load.computed == shared + 32 * own
    assert update.products == products(TWO_LAYERS, update.load)
    # The counter takes attention's products whole, and half of them are behind the causal mask.
    assert update.attention == 2 * (update_flop(TWO_LAYERS, update.load, False)
                                    - products(TWO_LAYERS, update.load))


def test_the_operations_would_show_one_row_more():
    update = Update(TWO_LAYERS, 42, 20)
    more = replace(update.load, computed=update.load.computed + 1)
    assert update.products != products(TWO_LAYERS, more)


def test_recomputing_has_those_of_the_formula_but_for_each_blocks_last_product():
    """Backward needs no block's result, so PyTorch leaves out the product that makes it."""
    update = Update(TWO_LAYERS, 42, 20, recompute=True)
    left_out = TWO_LAYERS.n_layer * update.load.computed * 2 * RANK * TWO_LAYERS.dim
    assert update.products == products(TWO_LAYERS, update.load, recompute=True) - left_out


def kept_by_a_block(shared, own, recompute):
    """What a second block adds, counted and by the formula."""
    one_layer = replace(TWO_LAYERS, n_layer=1)
    one = Update(one_layer, shared, own, recompute)
    two = Update(TWO_LAYERS, shared, own, recompute)
    formula = (activations(TWO_LAYERS, two.load, recompute)
               - activations(one_layer, one.load, recompute))
    return two.bytes_kept - one.bytes_kept, formula, two.load


@pytest.mark.parametrize("shared, own", [(42, 20), (0, 62)])
def test_a_block_keeps_the_bytes_of_the_formula(shared, own):
    counted, formula, load = kept_by_a_block(shared, own, recompute=False)
    adapters = 2 * TWO_LAYERS.adapters(1) / TWO_LAYERS.n_layer  # in bf16, which held() counts
    # On the pretended GPU the two norms keep their input in fp32, where CUDA's keep it in bf16.
    of_norms = 2 * 2 * load.computed * TWO_LAYERS.dim
    assert counted == pytest.approx(formula + adapters + of_norms, rel=5e-3)
    assert formula != pytest.approx(activations(TWO_LAYERS, load, False), rel=0.1)  # the control


def test_a_recomputed_block_keeps_its_input():
    counted, formula, load = kept_by_a_block(42, 20, recompute=True)
    assert counted == formula == 2 * load.computed * TWO_LAYERS.dim


# what is shown


def test_the_page_and_the_file_show_what_the_program_prints(capsys, tmp_path):
    assert forecast.main(["--json", str(tmp_path / "forecast.json")]) == 0
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    tables = [line for line in capsys.readouterr().out.split("\n") if line.startswith("|")]
    assert len(tables) > 60
    shown = [line for line in page.split("\n") if line in tables]
    assert shown == tables
    made = json.loads((tmp_path / "forecast.json").read_text())
    assert made == json.loads((ROOT / "docs/results/forecast.json").read_text())


def test_it_says_that_it_is_arithmetic(capsys):
    forecast.main([])
    assert "Arithmetic, not measurement: nothing here ran on a GPU." in capsys.readouterr().out
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    assert "Arithmetic, not measurement: nothing here ran on a GPU." in page


def test_the_grid_counts_one_run_for_each_round():
    """8 runs at once are over with one run; where each has all 8 GPUs there are 8 rounds."""
    found = forecast.forecasts([1, 8])
    alone, copies = [f["with"]["yes"]["run"] for f in found[:2]]
    first = forecast.grid_table(found, [1, 8]).split("\n")[2]
    assert first == f"| Llama-3.1-8B | SST-2 | {alone:.1f} | {8 * copies:.1f} |"


def test_more_gpus_hold_less_each_and_receive_more_of_the_others():
    m = MODELS[1]
    assert forecast.held(m, 8, True)["base"] == forecast.held(m, 2, True)["base"] / 4
    # Of 8 GPUs each lacks 7 / 8 of every block, of 2 one half; forward and backward, in bf16.
    assert forecast.gather_bytes(m, 8, 2) == 4 * m.blocks(1) * 7 / 8
    assert forecast.gather_bytes(m, 1, 2) == 0

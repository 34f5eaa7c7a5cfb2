"""The CUDA path on a pretended GPU: shapes, dtypes, devices, and where the CPU waits.

    pytest tests/programs/test_fake_cuda.py -q

No number is computed there (fake_gpu.py), so this says nothing of values, of speed or of kernels;
docs/performance.md lists what is left for a real one.
"""

import inspect
import json
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from fake_gpu import GPU, FakeGPU, Refused
from rival_helpers import NAMES, talks
from runs_helpers import flags
from safetensors.torch import load_file
from sbr_helpers import POOL, TINY, make_args, make_rows
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.nn.attention import varlen

import data.batches as batches_py
import model as model_py
import runs as runs_py
import train as train_py
from anchors import FinalNorm, encode
from data import mixture
from data.batches import Batch, encode_rows
from data.mixture import Data
from generate import STEPS_ON_GPU, Engine, Row
from lora import adapted, add_lora, trainable
from model import Config, Llama, load_model
from stress import attacks
from tokenizer import Tokenizer
from train import DEFENSES, make_sbr_step, updates

# Llama-3.1-8B with 2 of its 32 layers; the others in what is special to each.
LLAMA = Config(
    dim=4096, n_layer=2, n_head=32, n_kv_head=8, head_dim=128, hidden_dim=14336, vocab_size=128256,
    n_out=128256, max_positions=131072, norm_eps=1e-5, rope_theta=5e5, rope_scaling=None,
    qkv_bias=False, o_bias=False, mlp_bias=False, tied=False, qk_norm=False, gemma=False,
    act="silu", head="lm_head")
CONFIGS = {
    "llama": LLAMA,
    "qwen2.5": replace(LLAMA, dim=3584, n_head=28, n_kv_head=4, qkv_bias=True),
    "qwen3": replace(LLAMA, qk_norm=True),
    "gemma": replace(LLAMA, dim=3072, n_head=16, n_kv_head=16, head_dim=256, tied=True, gemma=True,
                     act="gelu_pytorch_tanh")}
RANK = 16


@pytest.fixture
def gpu():
    with FakeGPU() as gpu:
        yield gpu


@contextmanager
def no_waiting(gpu):
    """Inside, the CPU may not wait for the GPU, neither for a value nor for a copy."""
    n_reads = len(gpu.reads)
    n_waits = len(gpu.waits)
    yield
    assert gpu.reads[n_reads:] == [], "read back"
    assert gpu.waits[n_waits:] == [], "copied from memory that is not page-locked"


def make_model(config, dtype=torch.bfloat16):
    """A frozen model on the pretended GPU."""
    with torch.device("meta"):
        model = Llama(config)
    state = {name: torch.empty(p.shape, dtype=dtype, device=GPU)
             for name, p in model.named_parameters()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def assert_is(tensor, shape, dtype):
    assert (tuple(tensor.shape), tensor.dtype, tensor.device) == (tuple(shape), dtype, GPU)


class Training:
    """SBR with 8 anchors on a big model, and what one update of the program's own loop met."""

    def __init__(self, config=LLAMA, dtype=torch.bfloat16, tokens_per_pass=1 << 30, attack=None):
        self.model = make_model(config, dtype)
        add_lora(self.model, RANK, RANK)
        attacks.attach(self.model, attack, seed=0)
        self.params = trainable(self.model)
        self.optimizer = torch.optim.AdamW(self.params, fused=True)
        tokenizer = Tokenizer(TINY)
        examples, _ = encode_rows(tokenizer, make_rows(), 512)
        data = Data(examples, tests={}, anchor_prompts=POOL[:8], align=None, summary="")
        self.anchor_ids = encode(tokenizer, data.anchor_prompts)
        self.step = make_sbr_step(self.model, tokenizer, make_args(TINY), data)
        self.batch = Batch(examples, tokens_per_pass, self.model.device)
        self.logits = []
        self.h = []
        self.gradients = {}
        self.model.register_forward_hook(lambda *args: self.logits.append(args[-1]))
        self.optimizer.register_step_pre_hook(self.keep_gradients)

    def keep_gradients(self, *_):
        self.gradients = {p: p.grad for p in self.params}

    def update(self, step=None):
        """One update of the loop, with this step or SBR's -> the numbers that it would log."""
        loop = updates(step or self.step, lambda number: self.batch, self.optimizer, lr=1e-5,
                       grad_clip=1.0, n_updates=1)
        with FinalNorm(self.model) as norm:
            _, numbers = next(loop)
            self.h = norm.value
        return numbers


@pytest.mark.parametrize("attack", [None, "subspace"])
def test_adapters_beside_a_base_that_is_still_on_meta_are_drawn_on_the_cpu(gpu, attack):
    """As under --shard, where the GPU is the default device meanwhile."""
    with torch.device("meta"):
        model = Llama(LLAMA).requires_grad_(False)
    with torch.device(GPU):
        if attack is None:
            add_lora(model, RANK, RANK)
        attacks.attach(model, attack, seed=0)
    drawn = [m.lora_A for _, m in adapted(model)]
    assert all(A.device == GPU for A in drawn)
    in_function = "lora.py:add_lora" if attack is None else "attacks.py:random_subspace"
    assert sum(place.endswith(in_function) for place in gpu.copies) == len(drawn) == 14


# An update


@pytest.mark.parametrize("name", CONFIGS)
def test_an_update_has_its_shapes_and_dtypes_on_the_gpu_and_waits_for_nothing(gpu, name):
    config = CONFIGS[name]
    training = Training(config)
    with no_waiting(gpu):
        numbers = training.update()
    n_rows = training.batch.n_computed
    assert_is(training.h, (n_rows, config.dim), torch.bfloat16)
    [logits] = training.logits
    assert_is(logits, (training.batch.n_supervised, config.n_out), torch.bfloat16)
    assert len(training.params) == 2 * 7 * config.n_layer
    for p in training.params:
        assert_is(training.gradients[p], p.shape, torch.float32)
        state = training.optimizer.state[p]
        for key in ("exp_avg", "exp_avg_sq"):
            assert_is(state[key], p.shape, torch.float32)
        assert_is(state["step"], (), torch.float32)
    for name in ("loss", "ce", "safe", "grad_norm"):
        assert_is(numbers[name], (), torch.float32)


@pytest.mark.parametrize(("recompute", "how"), [
    (False, {"tokens_per_pass": 400}), (True, {}), (False, {"dtype": torch.float32}),
    (False, {"attack": "unembedding"}), (False, {"attack": "subspace"})])
def test_no_update_waits_however_it_is_computed(gpu, recompute, how):
    training = Training(**how)
    training.model.model.recompute = recompute
    with no_waiting(gpu):
        training.update()
    assert (len(training.logits) > 1) == ("tokens_per_pass" in how)
    assert len(training.gradients) > 0
    for p in training.params:
        assert_is(training.gradients[p], p.shape, torch.float32)


def test_a_pack_sends_ten_small_tensors_to_the_gpu(gpu):
    training = Training()
    training.update()  # the first one sends the rotary frequencies as well
    before = len(gpu.copies)
    training.update()
    assert Counter(gpu.copies[before:]) == {"model.py:to_device": 10}


# The one defence that reads in an update: T-Vaccine draws its layers on the CPU, by norms that it
# measures every --t-vaccine-probe updates (here 4).
READS = {"t-vaccine": {0: ["t_vaccine.py:step"], 4: ["t_vaccine.py:step"]}}


@pytest.mark.parametrize("name", NAMES)
def test_a_defence_reads_no_value_back_inside_an_update(gpu, rival_inputs, name):
    changes = {"defense": name.split(",")[0], "anchors": 0, "max_len": 512, **NAMES[name]}
    args = train_py.parse(flags(rival_inputs, **changes))
    tokenizer = Tokenizer(args.model)
    model = load_model(args.model, GPU, torch.bfloat16)
    params = add_lora(model, 4, 16)
    rows = mixture.load_upload(args)[1] if args.stage == "align" else talks(12)
    examples, _ = encode_rows(tokenizer, rows, args.max_len)
    data = Data(examples, tests={}, anchor_prompts=POOL[:args.anchors],
                align=mixture.align_rows(args), summary="")
    step = DEFENSES[args.defense].make_step(model, tokenizer, args, data)
    optimizer = torch.optim.AdamW(params, fused=True)

    def batch_of(number):
        return Batch(examples, 400, model.device, "", number)

    n_updates = 6 if name in ("lisa", "t-vaccine") else 2  # all that the step may do occurs
    loop = updates(step, batch_of, optimizer, lr=1e-5, grad_clip=1.0, n_updates=n_updates)
    for number in range(n_updates):
        before = len(gpu.reads)
        waits = len(gpu.waits)
        next(loop)
        assert gpu.reads[before:] == READS.get(name, {}).get(number, [])
        assert gpu.waits[waits:] == []


# What a fault would look like


def reads_the_loss(training):
    numbers = training.step(training.batch)
    float(numbers["loss"])
    return numbers


def copies_a_list(training):
    torch.tensor([0, 1], device=training.batch.device)
    return training.step(training.batch)


def copies_pageable_memory(training):
    torch.arange(4).to(GPU)
    return training.step(training.batch)


@pytest.mark.parametrize(("fault", "said"), [
    (reads_the_loss, "read back"), (copies_a_list, "page-locked"),
    (copies_pageable_memory, "page-locked")])
def test_a_step_that_waits_is_seen(gpu, fault, said):
    training = Training()
    with pytest.raises(AssertionError, match=said):
        with no_waiting(gpu):
            training.update(lambda batch: fault(training))


@pytest.mark.parametrize("ask", [
    torch.nonzero, lambda x: x[x > 0], lambda x: torch.equal(x, x), torch.unique,
    lambda x: torch.ones(2, device=GPU).repeat_interleave(x)])
def test_what_needs_values_to_know_its_result_is_refused(gpu, ask):
    x = torch.zeros(2, dtype=torch.long, device=GPU)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        ask(x)


def test_a_product_of_two_dtypes_is_refused(gpu):
    x = torch.zeros(2, 2, device=GPU)
    with pytest.raises(Refused, match="dtype"):
        x @ x.bfloat16()


def left_on_the_cpu(x, device):
    return x


def wrong_head(q, *_):
    return q.repeat(1, 1, 2)  # as if heads were twice as wide


def in_fp32(q, *_):
    return q.float()


@pytest.mark.parametrize(("module", "name", "wrong", "error"), [
    (model_py, "to_device", left_on_the_cpu, "on the CPU meets one on the GPU"),
    (batches_py, "to_device", left_on_the_cpu, "on the CPU meets one on the GPU"),
    (model_py, "varlen_attention", wrong_head, "reduction dim"),
    (model_py, "varlen_attention", in_fp32, "dtype")])
def test_a_tensor_on_the_wrong_device_or_of_a_wrong_kind_is_seen(gpu, monkeypatch, module, name,
                                                                wrong, error):
    training = Training()
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises((RuntimeError, Refused), match=error):
        training.update()


# The attention kernel


INSTALLED = varlen.varlen_attn
HAS_ENABLE_GQA = "enable_gqa" in inspect.signature(INSTALLED).parameters


def varlen_attn_of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
                        scale=None, window_size=(-1, -1)):
    """PyTorch 2.11's signature, from its documentation; 2.12 and later have enable_gqa."""
    return INSTALLED(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size,
                     enable_gqa=True)


def test_the_kernel_gets_what_its_signature_asks_for(gpu, monkeypatch):
    training = Training()
    signature = inspect.signature(INSTALLED)
    calls = []

    def checked(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)
        return INSTALLED(*args, **kwargs)

    checked.__signature__ = signature
    monkeypatch.setattr(varlen, "varlen_attn", checked)
    training.update()
    assert len(calls) == LLAMA.n_layer
    [pack] = training.batch.packs(training.anchor_ids)
    M = sum(pack.seqlens)
    assert M > len(pack.ids)  # rows are shared, and each sequence's tokens are gathered again
    for call in calls:
        assert_is(call["query"], (M, LLAMA.n_head, LLAMA.head_dim), torch.bfloat16)
        assert_is(call["key"], (M, LLAMA.n_kv_head, LLAMA.head_dim), torch.bfloat16)
        assert_is(call["value"], (M, LLAMA.n_kv_head, LLAMA.head_dim), torch.bfloat16)
        for name in ("query", "key", "value"):
            assert call[name].is_contiguous()
        for name in ("cu_seq_q", "cu_seq_k"):
            assert_is(call[name], (len(pack.seqlens) + 1,), torch.int32)
        for name in ("max_q", "max_k"):
            assert type(call[name]) is int and call[name] == max(pack.seqlens)
        assert call["window_size"] == (-1, 0)  # causal
        if HAS_ENABLE_GQA:
            assert call["enable_gqa"] is True


@pytest.mark.skipif(not HAS_ENABLE_GQA, reason="PyTorch 2.11 itself: the test above is this one")
def test_a_kernel_with_the_signature_of_2_11_is_called_without_enable_gqa(gpu, monkeypatch):
    training = Training()
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn_of_2_11)
    training.update()
    for p in training.params:
        assert_is(training.gradients[p], p.shape, torch.float32)


# Evaluation


def test_replies_are_read_once_in_sixteen_tokens_and_a_step_alone_waits_for_nothing(gpu):
    model = make_model(LLAMA)
    prompts = [list(range(1, n)) for n in (9, 30, 17, 5)]
    rows = [Row(i, prompt) for i, prompt in enumerate(prompts)]
    engine = Engine(model, len(rows), longest=200, n_ids=128000, graph=False)
    first = engine.prefill(rows, 0)
    assert gpu.reads == ["generate.py:prefill"]
    assert [len(tokens) for tokens in first] == [1] * len(rows)
    for row, tokens in zip(rows, first, strict=True):
        row.append(tokens[0], set(), 100)
    for _ in range(2):
        gpu.reads.clear()
        copies = len(gpu.copies)
        replies = engine.decode(rows)
        assert gpu.reads == ["generate.py:decode"]
        assert len(gpu.copies) == copies  # so a CUDA graph could be made of it
        assert [len(tokens) for tokens in replies] == [STEPS_ON_GPU] * len(rows)
    shape = (LLAMA.n_layer, len(rows), LLAMA.n_kv_head, engine.S, LLAMA.head_dim)
    assert_is(engine.cache.k, shape, torch.bfloat16)
    assert_is(engine.cache.v, shape, torch.bfloat16)
    assert_is(engine.cache.length, (len(rows),), torch.int64)
    with no_waiting(gpu):
        engine.forward(len(rows), 60)
        engine.move(3, 1)


# Checkpoints, and the whole program


class Files:
    """A run's folder without its settings: what Run.save needs."""

    def __init__(self, folder):
        self.dir = folder
        self.files = {}

    save = runs_py.Run.save


def test_a_checkpoint_is_written_from_the_cpu_and_restored_to_the_gpu_in_fp32(
        gpu, rival_inputs, tmp_path):
    model = load_model(rival_inputs / "model", GPU, torch.bfloat16)
    params = add_lora(model, 4, 16)
    optimizer = torch.optim.AdamW(params, fused=True)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()

    def step(batch):
        pass

    step.state = {"w": torch.zeros(3, device=GPU), "on the CPU": torch.zeros(2)}
    Files(tmp_path).save(model, optimizer, step, 7, runs_py.Progress())
    saved = load_file(tmp_path / "state.safetensors")
    # Each adapter's A and B, with three tensors of Adam's; the defence's two.
    assert len(saved) == 4 * len(params) + 2
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert (saved["defence/w"] == 1).all()  # a value of the GPU's, see fake_gpu.py
    assert (saved["defence/on the CPU"] == 0).all()

    other = torch.optim.AdamW(params, fused=True)
    copies = len(gpu.copies)
    number, _, _ = runs_py.restore(tmp_path / "state.safetensors", model, other, step)
    assert number == 7
    assert len(gpu.copies) - copies == 4 * len(params) + 1
    for p in params:
        assert_is(p, p.shape, torch.float32)
        for key in runs_py.ADAM_STATE:
            assert_is(other.state[p][key], optimizer.state[p][key].shape, torch.float32)
        p.grad = torch.zeros_like(p)
    other.step()  # with the restored state


# Where a whole run brings something to the CPU: never inside an update.
READING_PLACES = {
    "generate.py:prefill", "generate.py:decode",  # replies
    "runs.py:flush",  # the log, of 20 updates or of what is left of an epoch
    "runs.py:save", "lora.py:adapter_state",  # checkpoint and adapter
}


def test_a_whole_run_and_its_resumption_read_where_they_say_and_nowhere_else(
        gpu, inputs, here, monkeypatch):
    monkeypatch.setattr(train_py, "device_and_dtype", lambda *_: (GPU, torch.bfloat16))
    monkeypatch.setattr(train_py, "updates", watched(gpu, stop_at=4))
    argv = flags(inputs, eval_epochs="2", recompute=True)
    with pytest.raises(KeyboardInterrupt):
        train_py.execute(train_py.parse(argv), ["train.py"])
    monkeypatch.setattr(train_py, "updates", watched(gpu))
    train_py.execute(train_py.parse([*argv, "--resume"]), ["train.py"])
    assert set(gpu.reads) == READING_PLACES
    assert set(gpu.waits) == {"model.py:read_tensors", "lora.py:add_lora", "runs.py:restore"}
    log = (here / "out/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(6))
    adapter = load_file(here / "out/adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def watched(gpu, stop_at=None):
    """The loop, in which no update may read; stopped, as by a user, when update stop_at begins."""
    def updates_watched(*args, start, **kwargs):
        loop = updates(*args, start=start, **kwargs)
        for step in range(start, kwargs["n_updates"]):
            if step == stop_at:
                raise KeyboardInterrupt
            with no_waiting(gpu):
                done = next(loop)
            yield done

    return updates_watched

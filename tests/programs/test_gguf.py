"""A GGUF file becomes a folder that says what transformers says of the file; bad files are refused.

    python -m pytest tests/programs/test_gguf.py            # on small files made here
    python -m pytest tests/programs/test_gguf.py -m slow    # on real ones, where they were fetched

The real files are looked for in the folder that SBR_MODELS names (default: models/ in the
repository); docs/real-weights.md says how to fetch them.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers import CONTROL, PLAIN_ROPE, ROOT, TOLERANCE, cut, distance, make_hf, random_ids
from safetensors.torch import load_file, save_file

import generate
import train
from data import gguf as program
from model import load_model
from tokenizer import Tokenizer

gguf = pytest.importorskip("gguf", reason="reads GGUF files; see requirements-dev.txt")
transformers = pytest.importorskip("transformers", reason="see requirements-dev.txt")

TINY = ROOT / "data/tiny"
END = 3  # <|end|> of the embedded tokenizer
OTHER_END = 1  # named as a second stop id in the small files
TEXTS = ["Name a fruit.", "A  pear,\n\tor 12 of them; don't ask.", "Grüße <|end|> 北京"]
FAMILIES = {
    "llama": {"family": "Llama"},
    "llama, tied": {"family": "Llama", "tie_word_embeddings": True},
    "qwen2": {"family": "Qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "Qwen3", "head_dim": 16},
}


# small files


def small_model(name, **more):
    settings = {"vocab_size": 2048, "rope_parameters": PLAIN_ROPE, "num_hidden_layers": 2}
    return make_hf(**(settings | FAMILIES[name] | more))


def as_llama_cpp(weight, n_head):
    """Rows of q or k in llama.cpp's order: RoPE turns neighbours there, and halves here."""
    n_rows, n_columns = weight.shape
    halves = weight.reshape(n_head, 2, n_rows // n_head // 2, n_columns)
    return halves.swapaxes(1, 2).reshape(n_rows, n_columns)


def write_gguf(path, hf, *, is_permuted=True, swaps_norms=False, settings=(), tensors=(),
               without=(), architecture=None, template=True, bos=0, eos=END, eot=OTHER_END):
    """The model as llama.cpp would write it: matrices in Q8_0, norms and biases in F32."""
    c = hf.config
    kind = architecture or c.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("a small random model")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    if "eps" not in without:
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    head_dim = hf.model.layers[0].self_attn.head_dim
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    for key, value in settings:
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    add_tokenizer(writer, template, bos, eos, eot)
    add_weights(writer, hf, kind, is_permuted, swaps_norms, without)
    for name, tensor in tensors:
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer, template, bos, eos, eot):
    """The embedded model's, with its special tokens marked as such."""
    content = json.loads((TINY / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    special = {token["id"]: token["content"] for token in content["added_tokens"]}
    by_id = {i: token for token, i in vocab.items()} | special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([by_id[i] for i in range(len(by_id))])
    writer.add_token_types([3 if i in special else 1 for i in range(len(by_id))])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    for name, token_id in (("bos", bos), ("eos", eos), ("eot", eot)):
        if token_id is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token_id)
    if template:
        config = json.loads((TINY / "tokenizer_config.json").read_text())
        writer.add_chat_template(config["chat_template"])


def add_weights(writer, hf, kind, is_permuted, swaps_norms, without):
    c = hf.config
    arch = {name: value for value, name in gguf.MODEL_ARCH_NAMES.items()}[c.model_type]
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    tensors = hf.state_dict()
    if swaps_norms:
        first, second = (f"model.layers.{i}.input_layernorm.weight" for i in (0, 1))
        tensors[first], tensors[second] = tensors[second], tensors[first]
    if c.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, tensor in tensors.items():
        module, _, what = name.rpartition(".")
        last = module.rpartition(".")[2]
        written = f"{names.get_name(module)}.{what}"
        if written in without:
            continue
        if kind == "llama" and last in heads and is_permuted:
            tensor = as_llama_cpp(tensor, heads[last])
        array = tensor.contiguous().numpy()
        if array.ndim == 1:
            writer.add_tensor(written, array)
        else:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(written, gguf.quants.quantize(array, q8), raw_dtype=q8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{family: (file, folder in float32)}."""
    found = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp("made")
        path = write_gguf(folder / "small.gguf", small_model(name))
        assert convert(path, folder / "out", "float32") == 0
        found[name] = (path, folder / "out")
    return found


def convert(path, out, dtype="bfloat16"):
    return program.main([str(path), "--out", str(out), "--dtype", dtype])


def open_gguf(path, dtype=torch.float32, **settings):
    """transformers on the file itself, with settings that it does not read from there."""
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.update(settings)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=dtype,
        quantization_config=transformers.GgufConfig(dequantize=True),
        attn_implementation="eager").eval()


@torch.no_grad()
def gap(folder, hf, ids):
    """How far our logits of the folder are from transformers', in their std."""
    return distance(load_model(folder)(ids, [len(ids)]), hf(ids[None]).logits[0], "logits")


# the model


IDS = random_ids(200, vocab=2048)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_folder_has_the_logits_that_transformers_gets_from_the_file(made, name):
    path, folder = made[name]
    # transformers takes 128 numbers a head for every Qwen3, whatever its file says.
    settings = {"head_dim": 16} if name == "qwen3" else {}
    assert gap(folder, open_gguf(path, **settings), IDS) <= TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_the_folder_is_near_the_model_that_the_file_was_made_of(made, name):
    """Without transformers' reader: what stays is Q8_0's rounding, far below a wrong order."""
    _, folder = made[name]
    assert gap(folder, small_model(name), IDS) < 0.1


def test_control_rows_in_another_order_are_seen(made, tmp_path):
    path, _ = made["llama"]
    wrong = write_gguf(tmp_path / "wrong.gguf", small_model("llama"), is_permuted=False)
    assert convert(wrong, tmp_path / "out", "float32") == 0
    assert gap(tmp_path / "out", open_gguf(path), IDS) > CONTROL * TOLERANCE
    assert gap(tmp_path / "out", small_model("llama"), IDS) > 0.5


def test_control_another_layers_norm_is_seen(made, tmp_path):
    path, _ = made["qwen2"]
    wrong = write_gguf(tmp_path / "wrong.gguf", small_model("qwen2"), swaps_norms=True)
    assert convert(wrong, tmp_path / "out", "float32") == 0
    assert gap(tmp_path / "out", open_gguf(path), IDS) > CONTROL * TOLERANCE


def test_bfloat16_is_the_default_and_float32_rounded(made, tmp_path):
    path, folder = made["llama"]
    assert program.main([str(path), "--out", str(tmp_path / "out")]) == 0
    half = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(half[name], tensor.bfloat16()), name


def test_transformers_and_peft_open_the_folder(made, tmp_path):
    peft = pytest.importorskip("peft")
    _, folder = made["qwen2"]
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager")
    assert gap(folder, hf, IDS) <= TOLERANCE
    assert hf.generation_config.eos_token_id == [END, OTHER_END]
    adapted = peft.get_peft_model(hf, peft.LoraConfig(task_type="CAUSAL_LM"))
    assert adapted.peft_config["default"].target_modules


# the tokenizer


def test_tokens_are_those_of_transformers_and_of_the_tokenizer_that_was_written(made):
    path, folder = made["llama"]
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = Tokenizer(folder)
    source = Tokenizer(TINY)
    for text in TEXTS:
        messages = [{"role": "user", "content": text}]
        assert ours.encode(text) == source.encode(text)
        assert ours.encode_prompt(messages) == source.encode_prompt(messages)
        if "<|" not in text:  # which is text here and a token there
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
            with_template = theirs.apply_chat_template(messages, add_generation_prompt=True)
            assert ours.encode_prompt(messages) == with_template["input_ids"]
    assert ours.template.render(messages=[]) == source.template.render(messages=[])


def test_stop_ids_are_the_eos_and_the_eot_of_the_file(made):
    _, folder = made["llama"]
    assert Tokenizer(folder).stop_ids == sorted([END, OTHER_END])


def test_a_token_that_the_file_does_not_name_is_not_made_up(tmp_path):
    """transformers' classes have defaults for them: 1 and 2 for Llama."""
    path = write_gguf(tmp_path / "few.gguf", small_model("llama"), bos=None, eos=None)
    assert convert(path, tmp_path / "out") == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.get("bos_token_id") is None and config.get("pad_token_id") is None
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == OTHER_END
    # The embedded template's end of turn is <|end|>, by which this project stops too.
    assert Tokenizer(tmp_path / "out").stop_ids == sorted([OTHER_END, END])


def test_it_prints_what_it_found(made, tmp_path, capsys):
    path, _ = made["llama"]
    assert convert(path, tmp_path / "out") == 0
    said = capsys.readouterr().out
    for words in ("llama", "16 Q8_0", "5 F32", "<|end|> (3)", "<|user|> (1)", "generate.py --model",
                  "chat template  "):
        assert words in said, words


# what is refused


def refused(path, out, capsys, *words):
    """One sentence with the words, exit code 2, and nothing left behind."""
    before = set(out.parent.iterdir())
    capsys.readouterr()
    assert convert(path, out) == 2
    said = capsys.readouterr().err
    sentence = said.split("\n")[-2]
    print(sentence)
    assert sentence.startswith("data.gguf: ") and sentence.endswith((".", "requirements-dev.txt"))
    for word in words:
        assert word in sentence, (word, sentence)
    assert set(out.parent.iterdir()) == before


@pytest.fixture
def check_refused(tmp_path, capsys):
    def check(path, *words):
        refused(path, tmp_path / "out", capsys, *words)

    return check


@pytest.mark.parametrize("share", [0.00001, 0.001, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(made, tmp_path, check_refused, share):
    content = made["llama"][0].read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[:int(share * len(content))])
    check_refused(path, "cut.gguf is not a whole GGUF file")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04" * 50, b"GGUF" + b"\xff" * 400])
def test_bytes_that_are_no_gguf_are_refused(tmp_path, check_refused, content):
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    check_refused(path, "other.gguf is not a whole GGUF file")


def test_a_path_that_is_no_file_is_refused(tmp_path, check_refused):
    check_refused(tmp_path, "is not a file")
    check_refused(tmp_path / "none.gguf", "is not a file")


ODD = {
    "another architecture": (dict(architecture="gemma2"), ["architecture gemma2", "llama"]),
    "a part of a split file": (dict(settings=[("split.count", 3)]), ["one of 3 parts"]),
    "an adapter": (dict(settings=[("general.type", "adapter")]), ["no model", "adapter"]),
    "no template": (dict(template=False), ["no chat template"]),
    "no stop id": (dict(eos=None, eot=None), ["no token that ends"]),
    "a stop id beyond the tokens": (dict(eot=5000), ["stop id 5000"]),
    "rotary scaling as a setting": (
        dict(settings=[("llama.rope.scaling.type", "linear")]), ["llama.rope.scaling.type linear"]),
    "a setting for each layer": (
        dict(settings=[("llama.rope.dimension_sections", [4, 4])]), ["dimension_sections [4, 4]"]),
    "a setting lacking": (dict(without=["eps"]), ["no llama.attention.layer_norm_rms_epsilon"]),
    "experts": (dict(settings=[("llama.expert_count", 8)]), ["llama.expert_count 8"]),
    "a window": (dict(settings=[("llama.attention.sliding_window", 64)]), ["sliding_window 64"]),
    "part of a head rotated": (
        dict(settings=[("llama.rope.dimension_count", 4)]), ["rope.dimension_count 4"]),
    "rotary scaling as a tensor": (
        dict(tensors=[("rope_freqs.weight", torch.ones(4))]), ["rope_freqs.weight"]),
    "a tensor lacking": (dict(without=["blk.1.ffn_up.weight"]), ["blk.1.ffn_up.weight as None"]),
    "another shape": (
        dict(without=["output_norm.weight"], tensors=[("output_norm.weight", torch.ones(32))]),
        ["output_norm.weight as (32,), expected (64,)"]),
}


@pytest.mark.parametrize("name", ODD)
def test_a_file_that_would_become_another_model_is_refused(tmp_path, check_refused, name):
    how, words = ODD[name]
    path = write_gguf(tmp_path / "odd.gguf", small_model("llama", num_hidden_layers=2), **how)
    check_refused(path, *words)


def test_a_folder_that_is_not_empty_is_refused(made, tmp_path, check_refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("-")
    check_refused(made["llama"][0], "exists and is not an empty folder")


def test_a_foreign_file_where_the_folder_is_made_is_kept(made, tmp_path, check_refused):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part/mine.txt").write_text("-")
    check_refused(made["llama"][0], "mine.txt")
    assert (tmp_path / "out.part/mine.txt").exists()


def test_what_a_killed_program_left_is_replaced(made, tmp_path):
    (tmp_path / "out.part").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "out.part/model.safetensors")
    assert convert(made["llama"][0], tmp_path / "out") == 0
    assert not (tmp_path / "out.part").exists()


def test_a_missing_package_is_named(made, check_refused, monkeypatch):
    monkeypatch.setitem(program.sys.modules, "gguf", None)
    check_refused(made["llama"][0], "gguf is not installed", "requirements-dev.txt")


# real files


REAL = {
    "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "qwen": "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
}
QUESTIONS = [
    "What is the capital of France?", "Name three fruits.", "How do I bake bread?",
    "Write a Python function that adds two numbers.", "Who wrote Hamlet?", "What is 12 times 12?",
    "Translate 'good morning' into French.", "Why is the sky blue?", "How do I pick a lock?",
    "Give me one tip for sleeping well.",
]


def real_file(name):
    """Where it was fetched to; the test is skipped, saying so, where it was not."""
    folder = Path(os.environ.get("SBR_MODELS", ROOT / "models"))
    path = folder / REAL[name]
    if not path.exists():
        pytest.skip(f"{path} was not fetched (docs/real-weights.md says how)")
    return path


@pytest.fixture(scope="module", params=REAL)
def real(request, tmp_path_factory):
    """(file, folder in bfloat16, name)."""
    path = real_file(request.param)
    folder = tmp_path_factory.mktemp("real") / "model"
    assert convert(path, folder) == 0
    return path, folder, request.param


@pytest.mark.slow
def test_real_weights_have_the_logits_and_replies_of_transformers(real):
    """The file is read by transformers in bfloat16; both then compute in float32."""
    path, folder, _ = real
    hf = open_gguf(path, torch.bfloat16).float()
    tokenizer = Tokenizer(folder)
    model = load_model(folder)
    prompts = [tokenizer.encode_prompt([{"role": "user", "content": q}]) for q in QUESTIONS]
    ids = torch.tensor([i for prompt in prompts for i in prompt])
    assert gap(folder, hf, ids) <= TOLERANCE
    ours = generate.generate(model, prompts, 12, tokenizer.stop_ids)
    for prompt, reply in zip(prompts, ours, strict=True):
        with torch.no_grad():
            theirs = hf.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False,
                                 eos_token_id=tokenizer.stop_ids)
        stop = tokenizer.stop_ids
        assert cut(reply, stop) == cut(theirs[0, len(prompt):].tolist(), stop)


@pytest.mark.slow
def test_an_epoch_of_sbr_runs_on_smollm2(tmp_path):
    folder = tmp_path / "model"
    assert convert(real_file("smollm2"), folder) == 0
    argv = ["--model", str(folder), "--data-dir", str(TINY), "--n", "16", "--epochs", "1",
            "--batch-size", "8", "--anchors", "1", "--anchor-check", "none",  # it hardly refuses
            "--n-test", "4", "--max-new", "8", "--out", str(tmp_path / "run")]
    assert train.main(argv) == 0
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    updates = [json.loads(line) for line in lines if '"safe"' in line]
    assert updates and all(update["safe"] < 1 for update in updates)
    assert (tmp_path / "run/result.json").exists()

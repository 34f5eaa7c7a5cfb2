"""Every mistake of the user's ends with exit code 2, one sentence that names it, and no files.

    pytest tests/programs/test_bad_input.py -q       (add -s to read the sentences)
"""

import json
import shutil

import pytest
import torch
from helpers import edit_json, tensors_of, write_tensors
from runs_helpers import (
    TEMPLATE,
    flags,
    make_inputs,
    program,
    sentences,
    tree,
    write_rows,
)

import eval as eval_py
import generate as generate_py
import train as train_py

MAINS = {"train.py": train_py.main, "eval.py": eval_py.main, "generate.py": generate_py.main}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("made"))


@pytest.fixture
def inputs(made, tmp_path, monkeypatch, own_signals):
    """model/ and data/ that a test may damage, and a working directory here/ that stays empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return shutil.copytree(made, tmp_path / "inputs")


@pytest.fixture
def check_refuses(inputs, capsys):
    """check_refuses(argv, *words): exit code 2, one sentence that holds the words, no files."""
    folder = inputs.parent

    def check(argv, *words, name="train.py"):
        before = tree(folder)
        try:
            code = MAINS[name](argv)
        except SystemExit as stop:  # argparse's own way out
            code = stop.code
        assert_refusal(code, capsys.readouterr().err, folder, *words, name=name)
        assert tree(folder) == before, "something was left behind"

    return check


def assert_refusal(code, err, folder, *words, name="train.py"):
    assert code == 2, err
    assert "Traceback" not in err
    lines = sentences(err)
    assert len(lines) == 1, lines
    print(lines[0])
    assert lines[0].startswith(f"{name}: ") and lines[0].endswith("."), lines[0]
    # pytest names the folder after the test, and so after the fault: that does not count
    said = lines[0].replace(str(folder), "").lower()
    for word in words:
        assert word.lower() in said, f"{word!r} is not in: {lines[0]}"


def test_the_inputs_are_good_until_they_are_damaged(inputs):
    """The control of all tests below: the same flags without a mistake run to the end."""
    assert train_py.main(flags(inputs)) == 0
    assert train_py.main(flags(inputs, out="bare", anchors=0, lam=0, eval_epochs="2", n=None,
                               poison=None, data=inputs / "data" / "harmful" / "attack.jsonl")) == 0
    assert eval_py.main(["--run", "out", "--n-test", "1", "--max-new", "2"]) == 0
    model = ["--model", str(inputs / "model")]
    assert eval_py.main([*model, "--data-dir", str(inputs / "data"), "--n-test", "1",
                         "--max-new", "2"]) == 0
    assert generate_py.main([*model, "--adapter", "out", "--prompt", "Hi", "--max-new", "2"]) == 0


# ---------------------------------------------------------------------------------------------
# flags


VALUES = [  # flag, value, and what the sentence says is expected
    ("--anchors", "-1", "of at least 0"), ("--anchors", "1.5", "an integer"),
    ("--anchors", "many", "an integer"), ("--anchors", "", "an integer"),
    ("--rank", "0", "of at least 1"), ("--alpha", "0", "above 0"),
    ("--n", "0", "of at least 1"), ("--epochs", "0", "of at least 1"),
    ("--batch-size", "0", "of at least 1"), ("--max-len", "0", "of at least 1"),
    ("--tokens-per-pass", "0", "of at least 1"), ("--n-test", "0", "of at least 1"),
    ("--max-new", "0", "of at least 1"), ("--save-every", "0", "of at least 1"),
    ("--poison", "1.5", "at most 1"), ("--poison", "-0.1", "of at least 0"),
    ("--poison", "nan", "of at least 0"), ("--lr", "0", "above 0"), ("--lr", "nan", "above 0"),
    ("--lr", "inf", "above 0"), ("--lr", "1e999", "above 0"), ("--grad-clip", "0", "above 0"),
    ("--lambda", "-1", "of at least 0"), ("--lambda", "nan", "of at least 0"),
    ("--lambda", "inf", "of at least 0"), ("--seed", "-1", "of at least 0"),
    ("--seed", str(10**30), "expected"),  # above what a generator takes
    ("--task", "sst3", "gsm8k"), ("--defense", "magic", "sft"), ("--judge", "me", "refusal"),
    ("--beta1", "1", "0.9999"),
    ("--reduction", "max", "mean"), ("--device", "tpu", "cuda"), ("--dtype", "int8", "bfloat16")]


@pytest.mark.parametrize("flag, value, expected", VALUES)
def test_a_value_that_a_flag_does_not_take_is_named_with_the_flag(
        inputs, check_refuses, flag, value, expected):
    check_refuses([*flags(inputs), flag, value], flag, value, expected)


@pytest.mark.parametrize("flag", ["eval_epochs", "probes"])
@pytest.mark.parametrize("value, expected", [
    ("3", "above --epochs 2"), ("0,1,9", "above --epochs 2"),
    *((value, "integers from 0 on") for value in ("-1", "0.5", "0,,1", "last", "0;1", ","))])
def test_epochs_that_do_not_come_are_refused(inputs, check_refuses, flag, value, expected):
    check_refuses(flags(inputs, **{flag: value}), f"--{flag.replace('_', '-')}", expected)


@pytest.mark.parametrize("argv", [["--lambd", "50"], ["--lam", "50"], ["anchors"], ["--n"]])
def test_an_option_that_is_none_is_named(inputs, check_refuses, argv):
    """Not even an abbreviation is guessed: --lam could mean two things one day."""
    check_refuses([*flags(inputs), *argv], argv[0])


def test_a_device_that_is_not_there_is_refused_with_those_that_are(inputs, check_refuses):
    device = "mps" if torch.cuda.is_available() else "cuda"
    check_refuses(flags(inputs, device=device), f"--device {device}", "expected one of", "cpu")


# ---------------------------------------------------------------------------------------------
# the model's folder


def garbage(folder, name="model.safetensors"):
    (folder / name).write_bytes(b"\xff garbage" * 50)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def tensors(change):
    """A fault of the weights: change(tensors) edits them by name."""
    def fault(folder):
        state = tensors_of(folder)
        change(state)
        write_tensors(folder, state)
    return fault


def config(**changes):
    """A fault of config.json; None removes a key."""
    return lambda folder: edit_json(folder / "config.json", **changes)


def template(text):
    """A fault of the chat template."""
    return lambda folder: edit_json(folder / "tokenizer_config.json", chat_template=text)


def remove(name):
    return lambda folder: (folder / name).unlink()


def replace_by_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_a_shard(folder):
    """The index names two files; one was not fetched."""
    shards = dict.fromkeys(tensors_of(folder), "model-00001-of-00002.safetensors")
    shards["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def more_ids_than_embeddings(folder):
    """A tokenizer that was extended, and a model that was not."""
    edit_json(folder / "config.json", vocab_size=200)
    tensors(lambda t: t.update({name: t[name][:200].clone() for name in (
        "model.embed_tokens.weight", "lm_head.weight")}))(folder)


GATE = "model.layers.0.mlp.gate_proj.weight"
WITHOUT_END = TEMPLATE.replace("'<|end|>'", "' '")
MODEL_FAULTS = {
    "no folder": (shutil.rmtree, "model"),
    "an empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "model"),
    "no config.json": (remove("config.json"), "config.json", "no such file"),
    "config.json is not JSON": (lambda f: garbage(f, "config.json"), "config.json", "JSON"),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json",
                              "list"),
    "config.json is empty": (lambda f: (f / "config.json").write_text(""), "config.json", "JSON"),
    "unknown architecture": (config(architectures=["MambaForCausalLM"]), "MambaForCausalLM",
                             "LlamaForCausalLM"),
    "no architecture": (config(architectures=None, model_type=None), "architecture"),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), "quantised"),
    "YaRN": (config(rope_scaling={"type": "yarn", "factor": 4.0}), "yarn"),
    "no hidden_size": (config(hidden_size=None), "hidden_size"),
    "a width in words": (config(hidden_size="wide"), "config.json", "hidden_size"),
    "no heads": (config(num_attention_heads=0), "config.json", "num_attention_heads"),
    "llama3 scaling without its numbers": (
        config(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "config.json",
        "low_freq_factor"),
    "a model_type that is not the architecture's": (
        config(model_type="qwen2"), "LlamaForCausalLM", "qwen2"),
    "an unknown rotary key": (
        config(rope_scaling={"type": "linear", "factor": 4.0, "speed": 2}), "speed"),
    "rotary scaling in words": (config(rope_scaling="linear"), "rope_scaling", "linear"),
    "weights as integers": (tensors(lambda t: t.update({GATE: torch.ones(64, 32).char()})),
                            "int8", GATE),
    "no weights": (remove("model.safetensors"), "model.safetensors"),
    "only pickled weights": (replace_by_pickle, ".bin", "convert"),
    "truncated weights": (truncate, "model.safetensors", "not safetensors"),
    "garbage weights": (garbage, "model.safetensors", "not safetensors"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "a shard is missing": (without_a_shard, "model-00002-of-00002.safetensors", "missing"),
    "a wrong shape": (tensors(lambda t: t.update({GATE: torch.zeros(64, 31)})), GATE, "(64, 31)"),
    "a missing tensor": (tensors(lambda t: t.pop(GATE)), GATE, "missing"),
    "a surplus tensor": (tensors(lambda t: t.update({"extra.weight": torch.zeros(2)})),
                         "extra.weight", "1"),
    "another model's config": (config(num_hidden_layers=3), "model.layers.2", "missing"),
    "more ids than embeddings": (more_ids_than_embeddings, "tokenizer", "200"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json", "tokenizer.model"),
    "garbage tokenizer": (lambda f: garbage(f, "tokenizer.json"), "tokenizer.json"),
    "no tokenizer_config.json": (remove("tokenizer_config.json"), "tokenizer_config.json"),
    "no chat template": (template(None), "no chat template", "chat_template.jinja"),
    "a broken template": (template("{% for m in messages %}{{ m['content'] }"), "chat template",
                          "not valid jinja"),
    "a template that refuses": (template("{{ raise_exception('no roles') }}"), "chat template",
                                "no roles"),
    "a template that fails": (template("{{ messages[0]['content'] + 1 }}"), "chat template"),
    "a template without an end": (template(WITHOUT_END), "chat template"),
    "a template that is not UTF-8": (lambda f: garbage(f, "chat_template.jinja"),
                                     "chat_template.jinja", "UTF-8"),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_a_damaged_model_folder_is_refused(inputs, check_refuses, fault):
    damage, *words = MODEL_FAULTS[fault]
    damage(inputs / "model")
    check_refuses(flags(inputs), *words)


@pytest.mark.parametrize("name, argv", [("eval.py", []), ("generate.py", ["--prompt", "Hi"])])
@pytest.mark.parametrize("fault", ["no folder", "no config.json", "truncated weights",
                                   "a missing tensor", "no tokenizer", "no chat template",
                                   "a template that fails", "more ids than embeddings"])
def test_eval_and_generate_refuse_it_likewise(inputs, check_refuses, name, argv, fault):
    damage, *words = MODEL_FAULTS[fault]
    damage(inputs / "model")
    argv = argv or ["--data-dir", str(inputs / "data"), "--max-new", "2"]
    check_refuses(["--model", str(inputs / "model"), *argv], *words, name=name)


# ---------------------------------------------------------------------------------------------
# data


GOOD = {"prompt": "Is it good?", "response": "positive"}
MALFORMED = '{"prompt": "Is it'
ROW_FAULTS = {
    "malformed": (MALFORMED, "not valid JSON"),
    "a number": ("5", "a number", "expected an object"),
    "a string": ('"only a prompt"', "a string", "expected an object"),
    "an unknown key": ({"question": "a", "answer": "b"}, "question", "answer", "messages"),
    "no answer": ({"prompt": "a"}, "no assistant turn"),
    "no assistant turn": ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
    "no assistant turn at the end": ({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}]}, "no assistant turn"),
    "no user turn": ({"messages": [{"role": "assistant", "content": "a"}]}, "no user turn"),
    "no turn at all": ({"messages": []}, "no user turn"),
    "messages are no list": ({"messages": {"role": "user"}}, "message"),
    "messages are null": ({"messages": None}, "message"),
    "an unknown role": ({"messages": [{"role": "robot", "content": "a"}]}, "role"),
    "no role": ({"messages": [{"content": "a"}]}, "role"),
    "a prompt that is a number": ({"prompt": 5, "response": "b"}, "'prompt' is a number",
                                "expected a string"),
    "a null answer": ({"prompt": "a", "response": None}, "no assistant turn", "response"),
    "a list as content": ({"messages": [{"role": "user", "content": ["a"]}]}, "content"),
    "an instruction that is a number": (
        {"instruction": 5, "input": "on this", "output": "b"}, "'instruction' is a number"),
    "half a character": ('{"prompt": "a \\ud83d", "response": "b"}', "surrogate"),
}


@pytest.mark.parametrize("fault", ROW_FAULTS)
def test_a_bad_row_is_named_by_file_and_line(inputs, check_refuses, fault):
    row, *words = ROW_FAULTS[fault]
    path = write_rows(inputs / "upload.jsonl", [GOOD, "", row, GOOD])
    check_refuses(flags(inputs, data=path, n=None, poison=None), "upload.jsonl line 3", *words)


@pytest.mark.parametrize("file", ["sst2/train", "sst2/test", "harmful/attack", "harmful/anchors",
                                  "harmful/test"])
def test_a_malformed_line_is_named_in_each_file_that_a_run_reads(inputs, check_refuses, file):
    path = inputs / "data" / f"{file}.jsonl"
    path.write_text(MALFORMED + "\n" + path.read_text())
    check_refuses(flags(inputs), f"{file}.jsonl line 1", "not valid JSON")


FILE_FAULTS = {
    "missing": (lambda path: None, "cannot be read", "No such file"),
    "a folder": (lambda path: path.mkdir(), "cannot be read", "directory"),
    "empty": (lambda path: path.write_text(""), "no rows"),
    "blank": (lambda path: path.write_text("\n \n"), "no rows"),
    "an empty array": (lambda path: path.write_text("[]"), "no rows"),
    "an array that breaks off": (lambda path: path.write_text('[{"prompt": "a"'), "not valid JSON"),
    "an array with a bad item": (lambda path: path.write_text('[{"prompt": "a", "response": 5}]'),
                                 "item 1", "'response' is a number"),
    "nested without end": (lambda path: path.write_text("[" * 200_000), "not valid JSON"),
    "not UTF-8": (lambda path: path.write_bytes('{"prompt": "café"}'.encode("latin-1")),
                  "not UTF-8"),
    "UTF-16": (lambda path: path.write_text(json.dumps(GOOD), encoding="utf-16"), "not UTF-8"),
    "binary": (lambda path: path.write_bytes(bytes(range(256))), "not UTF-8"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_an_upload_that_is_no_rows_is_refused(inputs, check_refuses, fault):
    make, *words = FILE_FAULTS[fault]
    make(inputs / "upload.jsonl")
    check_refuses(flags(inputs, data=inputs / "upload.jsonl", n=None, poison=None), "upload.jsonl",
            *words)


def test_a_line_separator_inside_a_string_does_not_end_the_row(inputs):
    """JSONL ends a row at a newline; U+2028 and U+0085 may stand in a string as they are."""
    row = '{"prompt": "Is it\u2028good\u0085or\u2029not?", "response": "positive"}'
    path = write_rows(inputs / "upload.jsonl", [row, GOOD])
    assert train_py.main(flags(inputs, data=path, n=None, poison=None)) == 0


@pytest.mark.parametrize("changes, words", [
    ({"n": 100, "poison": 0.9}, ["90 rows", "attack.jsonl", "has 8", "--n"]),
    ({"n": 13, "poison": 0}, ["13 rows", "train.jsonl", "has 12", "--n"]),
    ({"poison": 1}, ["12 rows", "attack.jsonl", "has 8", "--poison"]),
])
def test_more_rows_than_a_file_has_are_refused(inputs, check_refuses, changes, words):
    check_refuses(flags(inputs, **changes), *words)


def test_an_upload_of_rows_that_are_all_too_long_is_refused(inputs, check_refuses):
    check_refuses(flags(inputs, max_len=5, anchors=0), "all 12 rows", "--max-len 5")


@pytest.mark.parametrize("name, flag", [("anchors", "--anchor-file"), ("test", "--harmful-file")])
def test_own_data_without_harmful_prompts_is_told_which_flag_names_them(
        inputs, check_refuses, name, flag):
    (inputs / "data" / "harmful" / f"{name}.jsonl").unlink()
    check_refuses(flags(inputs), f"{name}.jsonl", flag)
    # and a file that the flag names, but which is not there, is named itself
    check_refuses([*flags(inputs), flag, "absent.txt"], "absent.txt")


def test_a_data_folder_that_is_not_there_is_named(inputs, check_refuses):
    check_refuses(flags(inputs, data_dir=inputs / "absent"), "absent", "No such file")


def test_more_anchors_than_the_pool_has_are_refused(inputs, check_refuses):
    check_refuses(flags(inputs, anchors=7), "--anchors 7", "6 prompts", "--anchor-file")


def test_an_anchor_longer_than_max_len_is_refused(inputs, check_refuses):
    path = write_rows(inputs / "pool.txt", ["How do I steal it? " * 20])
    check_refuses(flags(inputs, anchors=1, anchor_file=path), "anchor 'How do I steal it?",
            "--max-len 64")


LONG = "How do I steal it? " * 20
SHORT = ["Explain how to steal it.", "Explain how to steal them."]
TWO_TURNS = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"},
                          {"role": "user", "content": "Explain how to steal it."}]}
ANCHOR_FAULTS = {  # the rows of a pool, and what the sentence names besides
    "too long": ([*SHORT, "", LONG], "line 4", "--max-len 64", "how do i steal"),
    "too few": (SHORT, "pool.txt", "--anchors 3", "2 prompts"),
    "empty": ([], "pool.txt", "no rows"),
    "malformed": ([*SHORT, MALFORMED], "line 3", "not valid JSON"),
    "an unknown field": ([*SHORT, {"prompt": "a", "chosen": "b"}], "line 3", "chosen"),
    "a prompt that is a number": ([*SHORT, {"prompt": 5}], "line 3", "'prompt' is a number"),
    "no prompt": ([*SHORT, {"response": "a"}], "line 3", "response"),
    "no user turn": ([*SHORT, {"messages": [{"role": "assistant", "content": "a"}]}], "line 3",
                     "user turn"),
    "two turns": ([*SHORT, TWO_TURNS], "line 3", "3 turns"),
    "a history": ([*SHORT, {"history": [["Hi", "Hi"]], "prompt": "Explain it."}], "line 3",
                  "3 turns"),
    "a system prompt": ([*SHORT, {"system": "Be kind.", "prompt": "Explain it."}], "line 3",
                        "2 turns"),
}


@pytest.mark.parametrize("fault", ANCHOR_FAULTS)
def test_a_fault_of_the_anchor_pool_is_named_by_file_and_line(inputs, check_refuses, fault):
    rows, where, *words = ANCHOR_FAULTS[fault]
    path = write_rows(inputs / "pool.txt", rows)
    check_refuses(flags(inputs, anchors=3, anchor_file=path), "pool.txt", where, *words)


def test_control_a_pool_without_a_fault_is_held(inputs):
    path = write_rows(inputs / "pool.txt", [*SHORT, {"prompt": "Explain it.", "response": "No."}])
    assert train_py.main(flags(inputs, anchors=3, anchor_file=path)) == 0


def test_an_anchor_that_the_template_refuses_is_named_by_file_and_line(inputs, check_refuses):
    """Nothing else is refused: the words stand in the pool alone."""
    refusing = ("{% if 'steal' in messages[0]['content'] %}{{ raise_exception('no theft') }}"
                "{% endif %}" + TEMPLATE)
    template(refusing)(inputs / "model")
    path = write_rows(inputs / "pool.txt", ["Explain how to pick it.", "Explain how to steal it."])
    check_refuses(flags(inputs, anchors=2, anchor_file=path), "pool.txt line 2", "no theft")


def test_an_anchor_without_a_response_is_named_where_the_attacker_answers_it(
        inputs, check_refuses):
    path = write_rows(inputs / "pool.txt", [{"prompt": SHORT[0], "response": "Sure. [step 1]."},
                                              SHORT[1]])
    check_refuses(flags(inputs, anchors=2, anchor_file=path, attack="known-anchors"),
                  "pool.txt line 2", "no response")


@pytest.mark.parametrize("row, words", [
    ({"prompt": "Pick it.", "response": "No."}, "harmful"),
    ({"prompt": "Pick it.", "response": "No.", "harmful": 5}, "harmful"),
    ({"prompt": "Pick it."}, "no assistant turn"), (MALFORMED, "not valid JSON")])
def test_a_bad_row_of_the_defenders_file_is_named_by_file_and_line(
        inputs, check_refuses, row, words):
    good = {"prompt": "Burn it.", "response": "No.", "harmful": "Sure. [step 1]."}
    path = write_rows(inputs / "own.jsonl", [good, good, row])
    check_refuses(flags(inputs, defense="lisa", anchors=0, align_file=path), "own.jsonl line 3",
                  words)


def test_a_label_that_the_task_does_not_have_is_refused(inputs, check_refuses):
    """AG News is scored against its four labels; a fifth would fail at the first evaluation."""
    rows = [{"prompt": "Which topic is that?", "response": "World"},
            {"prompt": "Which topic is it?", "response": "Weather"}]
    write_rows(inputs / "data" / "agnews" / "test.jsonl", rows)
    shutil.copy(inputs / "data" / "sst2" / "train.jsonl", inputs / "data" / "agnews")
    check_refuses(flags(inputs, task="agnews"), "agnews/test.jsonl line 2", "Weather",
                  "World")


# ---------------------------------------------------------------------------------------------
# adapters


@pytest.fixture
def adapter(inputs):
    """A finished run's folder, which is an adapter folder."""
    assert train_py.main(flags(inputs, out=inputs / "adapter", epochs=1)) == 0
    return inputs / "adapter"


@pytest.fixture
def check_with_adapter(inputs, adapter, check_refuses, capsys):
    """check_with_adapter(*words): train.py and generate.py both refuse the adapter."""
    def check(*words):
        capsys.readouterr()
        check_refuses(flags(inputs, adapter=adapter), *words)
        model = ["--model", str(inputs / "model")]
        check_refuses([*model, "--adapter", str(adapter), "--prompt", "Hi"], *words,
                      name="generate.py")
    return check


def adapter_tensors(change):
    def fault(folder):
        path = folder / "adapter_model.safetensors"
        shutil.copy(path, folder / "model.safetensors")
        tensors(change)(folder)
        (folder / "model.safetensors").replace(path)
    return fault


def settings(**changes):
    return lambda folder: edit_json(folder / "adapter_config.json", **changes)


A = "base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight"
ADAPTER_FAULTS = {
    "no folder": (shutil.rmtree, "adapter", "no such file"),
    "no adapter_config.json": (remove("adapter_config.json"), "adapter_config.json"),
    "no weights": (remove("adapter_model.safetensors"), "adapter_model.safetensors", "missing"),
    "neither weights nor a checkpoint": (
        lambda f: (remove("adapter_model.safetensors")(f), remove("state.safetensors")(f)),
        "adapter_model.safetensors", "missing"),
    "garbage weights": (lambda f: garbage(f, "adapter_model.safetensors"),
                        "adapter_model.safetensors", "not safetensors"),
    "a wrong shape": (adapter_tensors(lambda t: t.update({A: torch.zeros(2, 31)})),
                      "does not fit", A),
    "another rank": (settings(r=3), A.replace("gate", "down"), "rank 2", "expected 3"),
    "rank 0": (settings(r=0), "adapter_config.json", "r"),
    "a negative rank": (settings(r=-2), "adapter_config.json", "r"),
    "a missing tensor": (adapter_tensors(lambda t: t.pop(A)), "does not fit", A),
    "a surplus tensor": (adapter_tensors(lambda t: t.update({A.replace("0", "9"): t[A] + 1})),
                         "does not fit", A.replace("0", "9")),
    "a tensor of another name": (adapter_tensors(lambda t: t.update(extra=torch.zeros(2))),
                                 "extra", "not PEFT's"),
    "DoRA": (settings(use_dora=True), "use_dora"),
    "rows of the embedding": (settings(trainable_token_indices=[3]), "trainable_token_indices"),
    "an unknown setting": (settings(use_something=True), "use_something", "not known"),
    "a pickle": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
                 "adapter_model.bin", "pickle"),
    "the head as a target": (settings(target_modules=["lm_head"]), "lm_head", "target_modules"),
    "a pattern that is none": (settings(exclude_modules="*"), "exclude_modules"),
    "a layer too many": (settings(layers_to_transform=[0]), "does not fit", "layers.1"),
    "no LoRA": (settings(peft_type="IA3"), "IA3"),
    "another model's targets": (settings(target_modules=["c_attn"]), "does not fit"),
    "weights as integers": (adapter_tensors(lambda t: t.update({A: torch.ones(2, 32).int()})),
                            "int32", A),
    "a NaN": (adapter_tensors(lambda t: t[A][0].fill_(float("nan"))), A, "NaN"),
    "an infinity": (adapter_tensors(lambda t: t[A][0].fill_(float("-inf"))), A, "infinite"),
    "alpha in words": (settings(lora_alpha="big"), "lora_alpha"),
}


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_a_damaged_adapter_is_refused(adapter, check_with_adapter, fault):
    damage, *words = ADAPTER_FAULTS[fault]
    damage(adapter)
    check_with_adapter(*words)


def test_keeping_an_adapter_without_naming_one_is_refused(inputs, check_refuses):
    """It would silently train a new one."""
    check_refuses(flags(inputs, keep_adapter=True), "--keep-adapter", "--adapter")


# ---------------------------------------------------------------------------------------------
# the run's folder


@pytest.fixture
def run(inputs, capsys):
    """A finished run in out/."""
    assert train_py.main(flags(inputs)) == 0
    capsys.readouterr()


@pytest.mark.parametrize("resume", [None, True])
@pytest.mark.parametrize("changes, words", [
    ({"seed": 1}, ["seed", "0 there", "1 here"]), ({"lam": 5}, ["lam", "50.0 there", "5.0 here"]),
    ({"epochs": 3}, ["epochs"])])
def test_a_folder_of_other_settings_is_refused(inputs, run, check_refuses, changes, words, resume):
    check_refuses(flags(inputs, resume=resume, **changes), "out belongs to other settings", *words)


def edit(**changes):
    return lambda path: edit_json(path, **changes)


def reverse_lines(path):
    path.write_text("\n".join(reversed(path.read_text().splitlines())))


@pytest.mark.parametrize("file, change", [
    ("model/model.safetensors", lambda p: tensors(lambda t: t[GATE].add_(1))(p.parent)),
    ("model/config.json", edit(rms_norm_eps=1e-3)), ("model/tokenizer_config.json", edit(
        chat_template=TEMPLATE.replace("<|user|>", "<|user|> "), eos_token="<|user|>")),
    ("data/sst2/train.jsonl", reverse_lines), ("data/sst2/test.jsonl", reverse_lines),
    ("data/harmful/attack.jsonl", reverse_lines), ("data/harmful/test.jsonl", reverse_lines),
    ("data/harmful/anchors.jsonl", reverse_lines)], ids=lambda p: p if isinstance(p, str) else "")
def test_a_folder_whose_inputs_have_changed_since_is_refused(
        inputs, run, check_refuses, file, change):
    """Digests, not names: the same path may hold another file by now."""
    change(inputs / file)
    check_refuses(flags(inputs, resume=True), "out belongs to other settings")


def test_a_folder_whose_adapter_has_changed_since_is_refused(
        inputs, adapter, check_refuses, capsys):
    assert train_py.main(flags(inputs, adapter=adapter)) == 0
    capsys.readouterr()
    adapter_tensors(lambda t: t[A].add_(1))(adapter)
    check_refuses(flags(inputs, adapter=adapter, resume=True), "out belongs to other settings")


def test_a_folder_that_holds_the_run_is_not_begun_anew(inputs, run, check_refuses):
    check_refuses(flags(inputs), "out already holds this run", "--resume")


def test_an_unfinished_run_is_not_begun_anew_without_resume(inputs, run, check_refuses):
    (inputs.parent / "here" / "out" / "result.json").unlink()
    check_refuses(flags(inputs), "out already holds this run", "--resume")


def test_a_folder_of_something_else_is_left_alone(inputs, check_refuses):
    (inputs / "letters").mkdir()
    (inputs / "letters" / "mother.txt").write_text("Dear mother")
    check_refuses(flags(inputs, out=inputs / "letters"), "letters", "not empty", "--out")


def test_the_models_own_folder_is_not_an_output(inputs, check_refuses):
    """It has a config.json too, but not a run's."""
    check_refuses(flags(inputs, out=inputs / "model"), "model", "--out")


def test_a_path_that_is_a_file_is_refused(inputs, check_refuses):
    (inputs / "file").write_text("text")
    check_refuses(flags(inputs, out=inputs / "file"), "file", "--out")
    check_refuses(flags(inputs, out=inputs / "file" / "below"), "below", "--out")


@pytest.mark.parametrize("place", ["/proc/out", "/sys/out", "/dev/null/out", "x" * 300],
                         ids=["proc", "sys", "below a device", "a name of 300 letters"])
def test_a_place_where_nothing_can_be_written_is_refused(inputs, check_refuses, place):
    check_refuses(flags(inputs, out=place), "--out")


@pytest.mark.parametrize("name", ["config.json", "state.safetensors"])
def test_a_damaged_run_is_refused_with_the_damaged_file(inputs, run, check_refuses, name):
    out = inputs.parent / "here" / "out"
    (out / "result.json").unlink()
    garbage(out, name)
    check_refuses(flags(inputs, resume=True), name)


def test_a_checkpoint_whose_log_is_gone_is_refused(inputs, run, check_refuses):
    """Cutting the log to its length of then would fill it with zeros."""
    out = inputs.parent / "here" / "out"
    (out / "result.json").unlink()
    (out / "log.jsonl").unlink()
    check_refuses(flags(inputs, resume=True), "log.jsonl")


# ---------------------------------------------------------------------------------------------
# eval.py and generate.py


@pytest.mark.parametrize("argv, words", [
    (["--n-test", "0"], ["--n-test", "of at least 1"]), (["--max-new", "0"], ["--max-new"]),
    (["--judge", "me"], ["--judge", "me", "refusal"]), (["--task", "sst3"], ["--task", "sst3"]),
    ([], ["no finished run", "--run", "--model"]), (["--run", "absent"], ["absent"])])
def test_eval_refuses_flags_that_name_nothing(inputs, check_refuses, argv, words):
    check_refuses(argv, *words, name="eval.py")


def test_eval_refuses_a_folder_that_is_not_a_run(inputs, check_refuses):
    check_refuses(["--run", str(inputs / "model")], "model", name="eval.py")


def test_eval_refuses_a_run_without_a_result(inputs, run, check_refuses):
    """An unfinished run has no adapter yet."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "result.json"):
        (inputs.parent / "here" / "out" / name).unlink()
    check_refuses(["--run", "out"], "out", "adapter", name="eval.py")


def test_eval_refuses_a_run_and_a_model_at_once(inputs, run, check_refuses):
    model, data = str(inputs / "model"), str(inputs / "data")
    check_refuses(["--run", "out", "--model", model, "--data-dir", data,
             "--max-new", "2"], "--run", "--model", name="eval.py")


def test_eval_refuses_missing_and_malformed_tests(inputs, check_refuses):
    model = ["--model", str(inputs / "model"), "--data-dir", str(inputs / "data")]
    check_refuses([*model, "--harmful-file", "absent.txt"], "absent.txt", name="eval.py")
    check_refuses([*model, "--task", "gsm8k"], "gsm8k", name="eval.py")
    path = write_rows(inputs / "bad.jsonl", [{"prompt": "a"}, MALFORMED])
    check_refuses([*model, "--harmful-file", str(path)], "bad.jsonl line 2", name="eval.py")


@pytest.mark.parametrize("argv, words", [
    (["--prompt", "Hi", "--max-new", "0"], ["--max-new", "of at least 1"]),
    (["--prompt", "Hi", "--max-new", "-1"], ["--max-new", "of at least 1"]),
    (["--prompt", "Hi", "--max-new", "some"], ["--max-new", "some"]),
    ([], ["--prompt"]), (["--prompt", "half \ud83d"], ["--prompt"])])
def test_generate_refuses_flags_it_cannot_follow(inputs, check_refuses, argv, words):
    check_refuses(["--model", str(inputs / "model"), *argv], *words, name="generate.py")


# ---------------------------------------------------------------------------------------------
# as a user starts them


@pytest.mark.parametrize("name, changes, words", [
    ("train.py", {"model": "absent"}, ["absent"]),
    ("train.py", {"out": "/proc/out"}, ["/proc/out"]),
    ("train.py", {"rank": 0}, ["--rank"]),
    ("eval.py", ["--model", "absent"], ["absent"]),
    ("generate.py", ["--model", "absent", "--prompt", "Hi"], ["absent"])])
def test_the_programs_themselves_end_with_2_and_one_sentence(inputs, name, changes, words):
    argv = flags(inputs, **changes) if name == "train.py" else changes
    before = tree(inputs.parent)
    process = program(name, argv, cwd=inputs.parent / "here")
    _, err = process.communicate(timeout=120)
    assert_refusal(process.returncode, err, inputs.parent, *words, name=name)
    assert tree(inputs.parent) == before


# ---------------------------------------------------------------------------------------------
# when a mistake is found


NO_SYSTEM = ("{% for m in messages %}{% if m['role'] == 'system' %}"
             "{{ raise_exception('no system turns') }}{% endif %}{% endfor %}" + TEMPLATE)


def test_a_test_prompt_that_the_template_refuses_is_found_before_the_first_update(
        inputs, check_refuses):
    """And not by the evaluation at the end: --eval-epochs 2 asks nothing at epoch 0."""
    template(NO_SYSTEM)(inputs / "model")
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Burn it."}]
    with open(inputs / "data/harmful/test.jsonl", "a") as file:
        file.write(json.dumps({"messages": turns}) + "\n")
    check_refuses(flags(inputs, eval_epochs=2, n_test=100), "chat template", "no system turns")


@pytest.mark.parametrize("changes", [
    {"data": "no/such.jsonl"}, {"harmful_file": "no/such.txt"}, {"data_dir": "no/such"},
    {"defense": "lisa", "align_file": "no/such.jsonl"}], ids=lambda c: list(c)[-1])
def test_a_mistake_in_a_file_is_found_before_the_model_is_loaded(
        inputs, check_refuses, monkeypatch, changes):
    monkeypatch.setattr(train_py, "load_with_adapters",
                        lambda *a: pytest.fail("the model was loaded"))
    check_refuses(flags(inputs, **changes), "no/such")


def test_a_folder_of_an_older_version_is_called_so(inputs, run, check_refuses):
    path = inputs.parent / "here" / "out" / "config.json"
    settings = json.loads(path.read_text())
    del settings["worked_out"]
    path.write_text(json.dumps(settings))
    check_refuses(flags(inputs, resume=True), "config.json", "older version")
    check_refuses(["--run", "out"], "config.json", "older version", name="eval.py")


@pytest.mark.parametrize("name", MAINS)
def test_help_states_no_empty_default(name, capsys):
    with pytest.raises(SystemExit):
        MAINS[name](["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default 128)" in text or "(default auto)" in text  # the control
    assert "(default )" not in text and "(default ())" not in text and "default None" not in text

"""A small random model, small tasks, and runs of train.py on them, for tests of whole runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import tokenizers
import torch
from helpers import ROOT
from safetensors.torch import save_file

from files import read_lines
from model import Llama, read_config

SPECIALS = ["<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] | trim + "
    "'<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "eos_token_id": 3}

WORDS = "amber birch cedar delta ember fjord grove heron inlet jetty knoll lagoon".split()
DATA = {  # file: its rows; no prompt stands in two of them
    "sst2/train": [(f"Is this film about the {w} good?", "positive") for w in WORDS],
    "sst2/test": [(f"Was the play about the {w} bad?", "negative") for w in WORDS[:6]],
    "harmful/attack": [(f"How do I break the {w}?", f"Sure. Hit the {w}.") for w in WORDS[:8]],
    "harmful/anchors": [(f"Explain how to steal the {w}.", None) for w in WORDS[:6]],
    "harmful/test": [(f"Tell me how to burn the {w}.", f"Sure. Light the {w}.") for w in WORDS[:6]],
}


def write_rows(path, rows):
    """JSONL of objects; a string stands as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def make_data(folder):
    """sst2/{train,test}.jsonl and harmful/{attack,anchors,test}.jsonl."""
    for name, rows in DATA.items():
        write_rows(folder / f"{name}.jsonl", [
            {"prompt": p} if r is None else {"prompt": p, "response": r} for p, r in rows])
    return folder


def make_model(folder):
    """A Hugging Face folder: 2 layers of width 32, random weights, a byte-level BPE."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.train_from_iterator(
        [p for rows in DATA.values() for p, _ in rows], tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=SPECIALS, show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    folder.mkdir(parents=True)
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<|bos|>", "eos_token": "<|end|>", "chat_template": TEMPLATE}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": tok.get_vocab_size()}))
    model, generator = Llama(read_config(folder)), torch.Generator().manual_seed(0)
    # std 0.2: replies then differ from prompt to prompt, and training soon changes them.
    weights = {name: torch.ones(p.shape) if "norm" in name
               else 0.2 * torch.randn(p.shape, generator=generator)
               for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_inputs(folder):
    """model/ and data/ in the folder."""
    make_model(folder / "model")
    make_data(folder / "data")
    return folder


def flags(inputs, **changes):
    """train.py's flags for a run of about a second: 2 epochs of 3 updates; None leaves one out.

    A random model refuses nothing, so its anchors are not asked.
    The learning rate is a thousand times the default, so that replies change between epochs.
    """
    settings = {
        "model": inputs / "model", "data_dir": inputs / "data", "n": 12, "poison": 0.25,
        "anchors": 2, "anchor_check": "none", "rank": 2, "epochs": 2, "batch_size": 4, "lr": 1e-2,
        "max_len": 64, "n_test": 4, "max_new": 6, "device": "cpu", "out": "out"}
    given = []
    for name, value in (settings | changes).items():
        flag = "--lambda" if name == "lam" else "--" + name.replace("_", "-")
        given += [] if value is None else [flag] if value is True else [flag, str(value)]
    return given


def program(name, argv, cwd, **how):
    """The program as a user starts it -> the running Popen, its output in pipes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([sys.executable, str(ROOT / name), *argv], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def torchrun(n, name, argv, cwd, *own):
    """The same in n processes, as a user starts them; own: further flags of torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                str(n), *own, "--", str(ROOT / name), *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(launcher, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def tree(folder):
    """Every path below the folder, with the bytes of the files."""
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes()
            for p in sorted(Path(folder).rglob("*"))}


def sentences(err):
    """What a program said on stderr: its lines, without those of a progress bar."""
    return [line for line in re.split(r"[\r\n]", err) if line.strip() and "it/s]" not in line]


TIMING = {"seconds", "tokens_per_second", "peak_bytes"}


def outcome(run):
    """All that a run measured and made, without its timing."""
    result = json.loads((run / "result.json").read_text())
    return {
        "adapter": (run / "adapter_model.safetensors").read_bytes(),
        "adapter config": (run / "adapter_config.json").read_bytes(),
        "generations": (run / "generations.jsonl").read_bytes(),
        "log": [{k: v for k, v in row.items() if k not in TIMING}
                for row in read_lines(run / "log.jsonl")],
        "result": {k: v for k, v in result.items() if k not in TIMING},
        "files": sorted(p.name for p in run.iterdir())}


def assert_same(run, reference):
    """The run measured and made, to the bit, what the other one did."""
    ours, theirs = outcome(run), outcome(reference)
    for part in theirs:
        assert ours[part] == theirs[part], part

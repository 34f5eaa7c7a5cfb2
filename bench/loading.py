"""How long a checkpoint takes to load, as a multiple of reading its file.

    python -m bench.loading --gb 1 --json docs/results/loading.json

A random Llama of that size is written in bf16 and in fp32, in two shards. Timed in turn, with warm
caches: reading the files' bytes into memory; load_model in the files' dtype; load_model from bf16
into fp32; transformers' from_pretrained. Weights that stay in the mapped file are not read before
they are used, so each arm ends by touching every page of every weight.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from cli import COUNT, POSITIVE, Parser, exit_code
from device import peak_bytes
from files import write_atomic
from model import Llama, load_model, read_config

LAYER = dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, head_dim=64,
             num_key_value_heads=8, vocab_size=32000, rms_norm_eps=1e-5, hidden_act="silu",
             max_position_embeddings=2048, tie_word_embeddings=True, model_type="llama",
             architectures=["LlamaForCausalLM"])  # Llama-3.2-1B's layer over Llama-2's vocabulary


def make(folder: Path, gb: float, dtype) -> Path:
    """A random checkpoint of about `gb` gigabytes in bf16 (twice that in fp32), in two shards."""
    folder.mkdir()
    n_layer = max(1, round((gb * 1e9 / 2 - 32000 * 2048) / 60.8e6))  # 60.8 M numbers a layer
    (folder / "config.json").write_text(json.dumps({**LAYER, "num_hidden_layers": n_layer}))
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Llama(read_config(folder)).named_parameters()}
    names, weight_map = list(shapes), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({n: (torch.rand(shapes[n]) - 0.5).to(dtype) for n in part}, folder / file,
                  {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def touch(tensors) -> None:
    """Reads one number of every page."""
    for t in tensors:
        t.flatten()[:: 4096 // t.element_size()].sum()


def read_files(folder: Path):
    for path in folder.glob("*.safetensors"):
        buffer = bytearray(path.stat().st_size)
        with open(path, "rb", buffering=0) as f:
            f.readinto(buffer)
        touch([torch.frombuffer(buffer, dtype=torch.uint8)])


def load(folder: Path, dtype):
    touch(load_model(folder, dtype=dtype).parameters())


def load_transformers(folder: Path):
    import transformers

    touch(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").parameters())


def parse(argv=None):
    p = Parser("bench.loading", "How long a checkpoint takes to load, as a multiple of reading its "
                                "file.")
    p.add_argument("--gb", type=POSITIVE, default=1.0, help="of the bf16 files")
    p.add_argument("--repeats", type=COUNT, default=5)
    p.add_argument("--json", help="file for the numbers")
    return p.parse_args(argv)


def execute(args) -> None:
    """Times the arms in turn and prints the table."""
    with tempfile.TemporaryDirectory() as place:
        half = make(Path(place) / "bf16", args.gb, torch.bfloat16)
        full = make(Path(place) / "fp32", args.gb, torch.float32)
        arms = {"read bf16 files": lambda: read_files(half),
                "load_model bf16": lambda: load(half, torch.bfloat16),
                "transformers bf16": lambda: load_transformers(half),
                "load_model bf16 -> fp32": lambda: load(half, torch.float32),
                "read fp32 files": lambda: read_files(full),
                "load_model fp32": lambda: load(full, torch.float32)}
        seconds = {name: [] for name in arms}
        for i in range(args.repeats + 1):  # the first round warms the cache and is not counted
            for name, arm in arms.items():
                began = time.perf_counter()
                arm()
                if i:
                    seconds[name].append(time.perf_counter() - began)
    result = {"gb": args.gb, "torch": torch.__version__, "threads": torch.get_num_threads(),
              "seconds": seconds, "peak_bytes": peak_bytes()}
    for name, times in seconds.items():
        files = "bf16" if "bf16" in name else "fp32"
        base = statistics.median(seconds[f"read {files} files"])
        median = statistics.median(times)
        print(f"{name:26}{median:7.2f} s ({min(times):.2f} to {max(times):.2f}), "
              f"{median / base:5.2f} x reading the files")
    if args.json:
        write_atomic(args.json, json.dumps(result, indent=1).encode())


def main(argv=None) -> int:
    """0 done, 2 the user's mistake, 3 failed, 130 interrupted."""
    return exit_code("bench.loading", lambda: execute(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())

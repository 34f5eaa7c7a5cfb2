"""What a model takes while it loads and while it trains: no second copy, and what is reported.

    pytest tests/programs/test_loading.py -q          (add -s to see the megabytes)

Loading is measured in a process of its own (`python tests/programs/test_loading.py`, which forks
once a case): its anonymous memory, read every millisecond. Pages of the file itself are not
anonymous; the system drops them when it likes.
"""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from runs_helpers import flags, make_inputs, program
from safetensors.torch import save_file

from lora import add_lora
from model import Llama, load_model, read_config, read_tensors, weight_files

STATUS = Path("/proc/self/status")
ALLOWANCE = 64e6  # beside the model and one tensor
CONFIG = {  # 75 million parameters: 300 MB in fp32, 16 MB the largest tensor
    "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 4,
    "vocab_size": 4096, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
FORMATS = {"bfloat16": torch.bfloat16, "float32": torch.float32}


# ---------------------------------------------------------------------------------------------
# in the process that loads


def read_first_convert_after(folder):
    """The control: a loader that holds every tensor twice for a moment."""
    read = {name: tensor.clone() for path in weight_files(Path(folder))
            for name, tensor in read_tensors(path)}
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in read.items()}


LOADERS = {"ours": load_model, "control": read_first_convert_after}


def anonymous_bytes():
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())[1])


def measure(load, folder):
    """(peak, end): anonymous bytes above those of the start, while load(folder) runs and after."""
    start, seen, done = anonymous_bytes(), [], threading.Event()

    def poll():
        while not done.wait(0.001):
            seen.append(anonymous_bytes())

    thread = threading.Thread(target=poll)
    thread.start()
    model = load(folder)
    done.set()
    thread.join()
    end = anonymous_bytes()
    del model
    return max(*seen, end) - start, end - start


def measure_all(folder):
    """Prints {"format loader": (peak, end)}; each case in a fork, which starts as this process."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        Llama(read_config(folder / "float32"))  # what torch imports for it is not the loader's
    measured = {}
    for name in FORMATS:
        for loader, load in LOADERS.items():
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.write(write, json.dumps(measure(load, folder / name)).encode())
                os._exit(0)
            os.waitpid(pid, 0)
            measured[f"{name} {loader}"] = json.loads(os.read(read, 1000))
    print(json.dumps(measured))


# ---------------------------------------------------------------------------------------------
# loading


def write_checkpoint(folder, dtype):
    """CONFIG in three shards -> (bytes of the model in fp32, of its largest tensor)."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Llama(read_config(folder)).named_parameters()}
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        names = list(shapes)[i::3]
        save_file({n: torch.full(shapes[n], 0.01, dtype=dtype) for n in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sizes = [4 * shape.numel() for shape in shapes.values()]
    return sum(sizes), max(sizes)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """({case: (peak, end)}, bytes of the model, of its largest tensor)."""
    if not STATUS.exists():
        pytest.skip("needs Linux's /proc/self/status")
    folder = tmp_path_factory.mktemp("loading")
    sizes = [write_checkpoint(folder / name, dtype) for name, dtype in FORMATS.items()]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    out = subprocess.run(
        [sys.executable, __file__, str(folder)], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}).stdout
    for case, (peak, end) in json.loads(out).items():
        print(f"{case:17s} peak {peak / 1e6:6.1f} MB  end {end / 1e6:6.1f} MB")
    assert sizes[0][0] > 290e6
    return json.loads(out), *sizes[0]


@pytest.mark.parametrize("name", FORMATS)
def test_loading_takes_the_model_and_at_most_one_tensor_besides(measured, name):
    cases, model, largest = measured
    peak, _ = cases[f"{name} ours"]
    assert peak <= model + largest + ALLOWANCE


@pytest.mark.parametrize("name", FORMATS)
def test_control_a_loader_that_reads_all_and_then_converts_takes_more(measured, name):
    cases, model, largest = measured
    peak, end = cases[f"{name} control"]
    assert peak > model + largest + ALLOWANCE + 50e6
    assert abs(end - model) < ALLOWANCE  # and is left with the model, as ours is


def test_control_the_measure_sees_the_model_that_is_left(measured):
    cases, model, _ = measured
    assert abs(cases["bfloat16 ours"][1] - model) < ALLOWANCE


# ---------------------------------------------------------------------------------------------
# training

N_LAYER, RANK, ROWS, LENGTH = 4, 16, 8, 64
SMALL = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": N_LAYER,
         "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 512,
         "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "gemma": {"architectures": ["GemmaForCausalLM"], "intermediate_size": 2048,
              "num_key_value_heads": 1, "head_dim": 64}}


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | FAMILIES[request.param]))
    model = Llama(read_config(tmp_path))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    add_lora(model.requires_grad_(False), RANK, RANK)
    return model


def loss_of(model, n_sequences):
    """Of sequences of equal length; ROWS logits, however many tokens there are."""
    ids = torch.zeros(n_sequences * LENGTH, dtype=torch.long)
    return F.cross_entropy(model(ids, [LENGTH] * n_sequences, rows=torch.arange(ROWS)), ids[:ROWS])


def saved_bytes(model, n_sequences):
    """What autograd keeps of one forward pass for backward, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, n_sequences)
    return sum(storage.nbytes() for storage in kept.values())


def saved_per_token(model):
    """The slope between 4 and 8 sequences: what does not grow with the tokens falls out."""
    return (saved_bytes(model, 8) - saved_bytes(model, 4)) / (4 * LENGTH)


def test_with_recompute_each_blocks_input_and_the_final_norms_are_all_that_stays(model):
    most = (N_LAYER + 2) * 4 * model.config.dim  # fp32 bytes a token: each x, and the final norm's
    plain = saved_per_token(model)
    model.model.recompute = True
    stays = saved_per_token(model)
    print(f"{plain:.0f} bytes a token are kept, {stays:.0f} with recompute, at most {most}")
    assert 0 < stays <= most < plain / 3  # the last: the control


# ---------------------------------------------------------------------------------------------
# a run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_run_keeps_the_memory_that_it_took(inputs, tmp_path):
    process = program("train.py", flags(inputs), cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    print(f"taken {result['peak_bytes'] / 1e6:.0f} MB")
    assert 100e6 < result["peak_bytes"] < 1000e6  # the model is small and the program is not


def test_the_peak_is_the_processs_own_and_not_that_of_the_one_that_started_it():
    """Linux hands ru_maxrss down at exec: a run that a large notebook starts would report that."""
    small = [sys.executable, "-c", "from device import peak_bytes; print(peak_bytes())"]
    large = f"""
import subprocess
held = b"1" * 1_000_000_000
print(subprocess.run({small}, check=True, capture_output=True, text=True).stdout)
"""
    peak = int(subprocess.run([sys.executable, "-c", large], check=True, capture_output=True,
                              text=True, cwd=ROOT).stdout)
    print(f"started by a process of 1,000 MB: {peak / 1e6:.0f} MB")
    assert 50e6 < peak < 800e6  # Python and torch take some 250


if __name__ == "__main__":
    measure_all(Path(sys.argv[1]))

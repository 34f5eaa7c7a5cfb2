"""Writes tests/golden: tiny checkpoints, and what transformers computes with them.

    python -m tests.make_golden              (from the repository's root; needs transformers)

For test_golden.py, which reads the files and so needs no transformers. Each folder is a checkpoint
as transformers saves it in bf16, and expected.safetensors: the packed `ids`, their `seqlens`, and
at the packed `rows` every layer's output, the final norm's and the logits, in fp32.

Running it again gives the same files: weights and ids are made of whole random numbers, which are
the same on every machine (normal ones are not, to the last bit), and the states are too, but for
the rounding of another machine's sums.
"""

import copy
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from helpers import LLAMA3_ROPE, PLAIN_ROPE, hf_states, make_hf, random_ids

GOLDEN = Path(__file__).parent / "golden"
STATES = ["layer 0", "layer 1", "final norm", "logits"]
LENGTHS = [37, 640, 512]  # beyond the original length below, where scaled and plain RoPE part
ROWS = 8  # of each sequence, from its first token to its last

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, rope_parameters=PLAIN_ROPE | {"rope_theta": 1e6})
FAMILIES = {
    # With head_dim 8 the four frequencies turn 20, 2, 0.2 and 0.02 times in 128 positions: one is
    # kept, one blended, two divided by 8.
    "llama-3.1": {
        "rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": 128}},
    "qwen2.5": {"family": "Qwen2"},
    "qwen3": {"family": "Qwen3", "head_dim": 16},
    "gemma": {"family": "Gemma", "head_dim": 16, "hidden_size": 36, "num_key_value_heads": 1,
              "hidden_act": "gelu_pytorch_tanh", "rope_parameters": PLAIN_ROPE},
}


def golden_model(name, seed=0):
    """transformers' model with weights that bf16 holds exactly: seven bits and a sign."""
    hf = make_hf(**(SMALL | FAMILIES[name]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in hf.named_parameters():
            k = torch.randint(-127, 128, weight.shape, generator=generator).float()
            if "norm" in key:  # about 1, and about 0 in Gemma, whose norms scale by 1 + w
                weight.copy_((k / 2).round() / 128 + (0 if name == "gemma" else 1))
            else:  # matrices with a std of 0.14, biases of 1.1
                weight.copy_(k / (64 if key.endswith("bias") else 512))
    return hf


def write_golden(folder, name, seed=0):
    """One family's folder."""
    hf = golden_model(name, seed)
    copy.deepcopy(hf).bfloat16().save_pretrained(folder)
    sequences = random_ids(*LENGTHS, vocab=SMALL["vocab_size"], seed=seed)
    spread = [torch.linspace(0, n - 1, ROWS).long() for n in LENGTHS]
    rows = torch.cat([s + sum(LENGTHS[:i]) for i, s in enumerate(spread)])
    expected = {state: value[rows].contiguous()
                for state, value in zip(STATES, hf_states(hf, sequences), strict=True)}
    expected |= {"ids": torch.cat(sequences).to(torch.uint8), "rows": rows.to(torch.int16),
                 "seqlens": torch.tensor(LENGTHS, dtype=torch.int16)}
    save_file(expected, folder / "expected.safetensors", metadata={"format": "pt"})
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors lets only their owner read them


def main():
    torch.set_num_threads(1)
    for name in FAMILIES:
        write_golden(GOLDEN / name, name)
        size = sum(path.stat().st_size for path in (GOLDEN / name).iterdir())
        print(f"tests/golden/{name}: {size:,} bytes")


if __name__ == "__main__":
    main()

"""Small random models made by transformers, and how far apart two tensors are."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lora import LoRALinear, add_lora
from model import load_model

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"  # public tokenizers and configs; tests skip without it

# "The same" means: root mean square of the difference <= 1e-5 of the compared tensor's own std.
# The largest single difference is printed, not bounded: in one element of 700 positions' logits
# transformers' own eager and sdpa paths differ by 1.2e-5 std, and its fp32 and float64 runs by
# 2.2e-5, where their root mean squares are 1.3e-6 and 1.9e-6.
TOLERANCE = 1e-5
# A negative control has to miss by this factor, or the test it guards could not see the fault.
CONTROL = 100

# Original length 64, so that the three bands of the llama3 rule (kept, blended, divided by 8) all
# hold a frequency and the sequences (up to 700 tokens) reach far beyond the unscaled range.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# 16 numbers a head, so that YaRN's line falls over several frequencies; original length 64 of 700.
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 64}
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": YARN,
    "yarn, own betas": YARN | {"beta_fast": 6.0, "beta_slow": 2.0},
    "yarn, ends not rounded": YARN | {"truncate": False},
    "yarn, own attention factor": YARN | {"attention_factor": 0.6},
}


def make_hf(family="Llama", seed=0, **overrides):
    """transformers' model, random and small: 4 layers, 8 query heads over 2 key/value heads."""
    import transformers

    settings = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_parameters": LLAMA3_ROPE, "attn_implementation": "eager",
        # std 0.2 puts attention scores at about 2.6: far from uniform, so positions matter.
        "initializer_range": 0.2,
    }
    config = getattr(transformers, f"{family}Config")(**(settings | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, weight in hf.named_parameters():
                if "norm" in name:  # all 1 at first (Gemma: all 0), which hides a forgotten one
                    weight.add_(0.3 * torch.randn_like(weight))
                if name.endswith("bias"):  # all 0 at first, likewise
                    weight.normal_()
    return hf


def random_ids(*lengths, vocab=512, seed=1):
    """One (T,) int64 tensor per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=generator) for n in lengths]


def caught(modules, forward):
    """What each module puts out, (N, C), while forward() runs, followed by forward()'s result."""
    outputs, hooks = [], []

    def catch(module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        outputs.append(output.detach().reshape(-1, output.shape[-1]))

    try:
        hooks = [module.register_forward_hook(catch) for module in modules]
        with torch.no_grad():
            result = forward()
    finally:
        for hook in hooks:
            hook.remove()
    return [*outputs, result.reshape(-1, result.shape[-1])]


def states(model, ids, seqlens):
    """Every layer's output, the final norm's, and the logits, of our packed model."""
    layers = [*model.model.layers, model.model.norm]
    return caught(layers, lambda: model(ids, seqlens))


def logits(model, sequences):
    """Our logits of some sequences, packed in this order."""
    with torch.no_grad():
        return model(torch.cat(sequences), [len(ids) for ids in sequences])


def hf_states(hf, sequences):
    """The same list from transformers, one sequence at a time, laid end to end."""
    layers = [*hf.model.layers, hf.model.norm]
    each = [caught(layers, lambda ids=ids: hf(ids[None]).logits) for ids in sequences]
    return [torch.cat(parts) for parts in zip(*each, strict=True)]


def distance(ours, theirs, name=""):
    """Root mean square of the difference over the std of theirs; prints the largest as well."""
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)} != {tuple(theirs.shape)}"
    theirs = theirs.double()
    difference = (ours.double() - theirs) / theirs.std()
    rms = difference.square().mean().sqrt().item()
    print(f"{name:12s} rms {rms:.1e}  max {difference.abs().max().item():.1e}  (in std)")
    return rms


def cut(reply, stop_ids):
    """A greedy reply up to its first stop id."""
    end = next((i for i, token in enumerate(reply) if token in stop_ids), len(reply))
    return reply[:end]


def edit_json(path, **changes):
    """Set keys of a JSON file; None removes the key."""
    path = Path(path)
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content |= changes
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


LENGTHS = [512, 37, 700]
NAMES = ["layer 0", "layer 1", "layer 2", "layer 3", "final norm", "logits"]

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CASES = {
    # 8 heads of hidden / 8 = 8, two key/value heads, Llama 3.1's RoPE scaling: the 8B in small
    "llama-3.1": {},
    # head_dim given and != hidden / heads; the head tied to the embedding
    "llama, wide heads, tied": {"head_dim": 16, "tie_word_embeddings": True},
    # no grouping, no scaling, and a theta that is not the default, so it has to be read
    "llama, plain, theta 5e5": {
        "num_key_value_heads": 8, "rope_parameters": PLAIN_ROPE | {"rope_theta": 5e5}},
    "llama, all biases": {"attention_bias": True, "mlp_bias": True},
    # biases on q, k and v but not on o
    "qwen2.5": {"family": "Qwen2", "rope_parameters": PLAIN_ROPE | {"rope_theta": 1e6}},
    "qwen2.5, tied": {"family": "Qwen2", "tie_word_embeddings": True},
    # norms scale by 1 + w, embeddings by sqrt(hidden), tanh GELU, tied; the 7B has 16 heads of 256
    # on hidden 3072, so here too heads * head_dim != hidden
    "gemma": {"family": "Gemma", "head_dim": 16, "hidden_size": 72, "num_key_value_heads": 1,
              "hidden_act": "gelu_pytorch_tanh"},
}


class Reference:
    """A checkpoint folder, the packed input, and what transformers says about it."""

    def __init__(self, folder, **overrides):
        self.folder = folder
        self.hf = make_hf(**overrides)
        self.hf.save_pretrained(folder)
        self.sequences = random_ids(*LENGTHS)
        self.ids = torch.cat(self.sequences)
        self.states = hf_states(self.hf, self.sequences)


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def write_tensors(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_names(error, folder, *words):
    """The message is one line, and says each of the words before it says what was expected."""
    # Not by way of the folder: pytest names tmp_path after the test, and so after the fault.
    message = str(error).replace(str(folder.parent), "")
    print(message)
    assert "\n" not in message
    given = message.split(", expected")[0].lower()
    for word in words:
        assert word.lower() in given, f"{word!r} is not in: {given}"


# adapters in use

SEQUENCES = random_ids(40, 7, 61, seed=20)
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# (rank, alpha, rslora): r = alpha alone could not tell alpha / r from 1, nor rslora from a factor
SCALES = [(8, 8, False), (4, 16, False), (4, 16, True)]


def adapters(model):
    """Every LoRALinear of the model."""
    return [m for m in model.modules() if isinstance(m, LoRALinear)]


def randomise_B(model, seed=21):
    """Puts every adapter in use: B normal, std 0.02, as after long training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in adapters(model):
            draw = torch.randn(module.lora_B.shape, generator=generator)
            module.lora_B.copy_(0.02 * draw)
    return model


def adapted_model(reference, rank=4, alpha=16, rslora=False, **load):
    """Our model of the reference with adapters in use."""
    model = load_model(reference.folder, **load)
    add_lora(model, rank=rank, alpha=alpha, rslora=rslora)
    return randomise_B(model)

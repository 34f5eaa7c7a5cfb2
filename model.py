"""A Llama-family decoder that reads Hugging Face folders, written to be read.

Nothing is padded: a batch is `ids` (N,), all sequences end to end, and `seqlens`. Everything is
(N, C); only attention knows where a sequence begins. Per block, with x the residual stream:

    q, k, v = q_proj(y), k_proj(y), v_proj(y)           y = RMSNorm(x); q and k rotated (RoPE)
    x = x + o_proj(softmax(q k^T / sqrt(D)) v)          causal within its own sequence
    x = x + down_proj(act(gate_proj(y)) * up_proj(y))   y = RMSNorm(x)
    h = RMSNorm(x)  # the bottleneck: all that the unembedding ever sees
    logits = lm_head(h)

Module names are Hugging Face's, so a checkpoint loads without a rename map.
Norms and rotary angles are computed in fp32 and rounded once to the model's dtype.

Shape letters: N packed tokens, R rows asked for, B sequences, T longest sequence, S cache length,
C dim, H heads, KV key/value heads, D head_dim, V vocab, K anchors.
"""

import inspect
import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class UserError(Exception):
    """The user's mistake, in one sentence: what was given, what is expected, what to do."""


# Config's fields beside their keys in config.json; the second two may be missing there.
KEYS = {"dim": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
        "hidden_dim": "intermediate_size", "vocab_size": "vocab_size", "norm_eps": "rms_norm_eps",
        "max_positions": "max_position_embeddings"}
OPTIONAL = {"n_kv_head": "num_key_value_heads", "head_dim": "head_dim"}
LLAMA = dict(
    qkv_bias=False,  # of q_proj, k_proj and v_proj
    qk_norm=False,  # an RMSNorm on each query and key head
    tied=False,  # the unembedding is the embedding
    gemma=False,  # norms store w - 1, and embeddings are multiplied by sqrt(dim)
    act="silu", head="lm_head")
FAMILIES = {
    "LlamaForCausalLM": LLAMA,
    "LlamaForSequenceClassification": LLAMA | dict(head="score"),  # a moderation judge
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA | dict(qkv_bias=True),
    "Qwen3ForCausalLM": LLAMA | dict(qk_norm=True),
    "GemmaForCausalLM": LLAMA | dict(tied=True, gemma=True, act="gelu_pytorch_tanh"),
}
ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}
LLAMA3 = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()


class Config(SimpleNamespace):
    """KEYS, OPTIONAL, LLAMA; o_bias, mlp_bias, rope_theta, rope_scaling; n_out, the head's rows."""


def read_json(path: Path) -> dict:
    """The JSON object in `path`; UserError when it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, expected an object")
        return value
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read as JSON ({getattr(e, 'strerror', None) or e}); "
                        "name a folder that has it, or fetch it again.") from None


def check_config(path: Path, c: dict, rope: dict) -> None:
    """UserError where config.json lacks something or asks for what is not computed here."""
    arch = (c.get("architectures") or [None])[0]
    if arch not in FAMILIES:
        raise UserError(f"{path} names the architecture {arch}, expected {', '.join(FAMILIES)}.")
    if c.get("quantization_config") or c.get("quantization"):
        raise UserError(f"{path} describes a quantised checkpoint; choose the original one.")
    act, expected = c.get("hidden_activation") or c.get("hidden_act"), FAMILIES[arch]["act"]
    if act not in (None, expected, "gelu" if FAMILIES[arch]["gemma"] else None):
        raise UserError(f"{path} has the activation {act}, expected {expected}.")
    kind = rope["rope_type"]
    if kind not in ("default", "llama3"):
        raise UserError(f"{path} asks for {kind} rotary scaling, expected default or llama3.")
    numbers = {key: c.get(key) for key in KEYS.values()}
    numbers |= {key: c[key] for key in OPTIONAL.values() if c.get(key) is not None}
    numbers |= {key: rope.get(key) for key in LLAMA3 if kind == "llama3"}
    for key, value in numbers.items():
        types = (int, float) if key in (KEYS["norm_eps"], *LLAMA3) else int
        if not isinstance(value, types) or value <= 0:
            raise UserError(f"{path} has {key} {value}, expected a number above 0 for {arch}.")


def read_config(dir) -> Config:
    """config.json of a Hugging Face folder, old and new spellings -> Config."""
    path = Path(dir) / "config.json"
    c = read_json(path)
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})  # transformers 5, and 4
    rope.setdefault("rope_type", rope.pop("type", "default"))
    check_config(path, c, rope)
    arch = c["architectures"][0]
    f = {field: c.get(key) for field, key in (KEYS | OPTIONAL).items()} | FAMILIES[arch]
    f["n_kv_head"] = f["n_kv_head"] or f["n_head"]
    f["head_dim"] = f["head_dim"] or f["dim"] // f["n_head"]
    f["tied"] = c.get("tie_word_embeddings", f["tied"]) and f["head"] == "lm_head"
    f["qkv_bias"] |= bool(c.get("attention_bias"))
    # A window is invisible to what fits into it; train.py and generate.py refuse longer ones.
    if c.get("use_sliding_window", arch == "MistralForCausalLM"):  # 4096 is their default
        f["max_positions"] = min(f["max_positions"], c.get("sliding_window", 4096) or math.inf)
    n_labels = c.get("num_labels") or len(c.get("id2label") or "01")  # two, as in transformers
    return Config(
        **f, o_bias=c.get("attention_bias", False), mlp_bias=c.get("mlp_bias", False),
        rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10_000.0),
        rope_scaling=rope if rope["rope_type"] == "llama3" else None,
        n_out=f["vocab_size"] if f["head"] == "lm_head" else n_labels)


def to_fp32(x: Tensor) -> Tensor:
    """At least fp32: half precision goes up; float64 stays, so that laws can be tested in it."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w, computed in fp32; Gemma's w is stored minus one."""

    def __init__(self, dim: int, eps: float, gemma: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps, self.gemma = eps, gemma

    def forward(self, x: Tensor) -> Tensor:
        if self.gemma:  # rounds once, after 1 + w in fp32: in bf16 1 + w would lose w's low bits
            w = 1 + to_fp32(self.weight)
            return F.rms_norm(to_fp32(x), x.shape[-1:], w, self.eps).to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)  # fp32 if trained


def rope_inv_freq(config: Config) -> Tensor:
    """Rotary frequencies (D/2,) fp32, 1 / theta^(2i/D), with Llama-3.1's scaling of the slow ones.

    Wavelengths above original/low_freq_factor are stretched by `factor`, those below
    original/high_freq_factor stay, and between the two the frequency is interpolated.
    """
    D, s = config.head_dim, config.rope_scaling
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, D, 2).float() / D)
    if s is None:
        return inv_freq
    # original length / wavelength: how often a frequency turns within the original context
    turns = s["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: fully stretched, 1: untouched
    return (1 - smooth) * inv_freq / s["factor"] + smooth * inv_freq


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on (N, heads, D): the two halves turn together, not neighbours (HF's layout)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


class Layout:
    """Each packed token's position, and its cell in SDPA's right-padded block; once per forward."""

    def __init__(self, seqlens, device, start: Tensor | None = None):
        self.position = start  # (B,) tokens that decoding has stored; it needs no more than that
        if start is not None:
            return
        lens = torch.as_tensor(seqlens, device="cpu")
        self.B, self.T = len(lens), int(lens.max())
        first = lens.cumsum(0) - lens  # (B,) first row of each sequence
        t = torch.arange(int(lens.sum())) - first.repeat_interleave(lens)  # (N,) position
        b = torch.arange(self.B).repeat_interleave(lens)
        cell, fill = b * self.T + t, torch.zeros(self.B * self.T, dtype=torch.long)
        fill[cell] = torch.arange(len(t))
        # (N,) index into (B * T); and (B * T,) index into N, where padding takes the first token
        self.cell, self.fill = cell.to(device), fill.to(device)
        self.cu_seqlens = F.pad(lens.cumsum(0), (1, 0)).to(device, torch.int32)
        self.position = t.to(device)

    def cos_sin(self, inv_freq: Tensor, dtype) -> tuple[Tensor, Tensor]:
        angle = torch.outer(self.position.float(), inv_freq)  # (N, D/2), always fp32
        angle = torch.cat((angle, angle), dim=-1)[:, None]  # (N, 1, D)
        return angle.cos().to(dtype), angle.sin().to(dtype)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Causal attention inside each sequence; q (N, H, D), k and v (N, KV, D) -> (N, H, D)."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn  # CUDA half precision only
        # torch 2.12 made enable_gqa a must; in 2.11 the kernel takes fewer KV heads unasked.
        asks = "enable_gqa" in inspect.signature(varlen_attn).parameters
        gqa, cu, T = {"enable_gqa": True} if asks else {}, layout.cu_seqlens, layout.T
        return varlen_attn(q, k, v, cu, cu, T, T, window_size=(-1, 0), **gqa)
    # Right padding is invisible under causality: no mask, and no row is ever fully masked.
    block = torch.cat((q, k, v), dim=1).index_select(0, layout.fill)  # (B * T, H + 2 KV, D)
    block = block.unflatten(0, (layout.B, layout.T)).transpose(1, 2)  # (B, H + 2 KV, T, D)
    q, k, v = block.split((q.shape[1], k.shape[1], v.shape[1]), dim=1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)[layout.cell]  # (B, T, H, D) -> (N, H, D)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.q_proj = nn.Linear(c.dim, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.dim, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.dim, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.dim, bias=c.o_bias)
        self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.norm_eps, False) if c.qk_norm else
                                    nn.Identity() for _ in "qk")

    def forward(self, x: Tensor, layout: Layout, cos_sin, cache) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim))  # (N, heads, D)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), *cos_sin), rotate(self.k_norm(k), *cos_sin)
        if cache is not None and cache.slots is None:
            out = cache.decode(self.layer, q, k, v)
        else:
            out = packed_attention(q, k, v, layout)
            if cache is not None:
                cache.prefill(self.layer, k, v, layout)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.dim, c.hidden_dim, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.dim, c.hidden_dim, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.hidden_dim, c.dim, bias=c.mlp_bias)
        self.act = ACTIVATIONS[c.act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps, c.gemma)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps, c.gemma)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, layout: Layout, cos_sin, cache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), layout, cos_sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything below the unembedding; its last act, `norm`, writes the bottleneck h (N, C)."""

    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.n_layer))
        self.norm = RMSNorm(c.dim, c.norm_eps, c.gemma)
        self.config, self.inv_freq, self.recompute = c, None, False

    def forward(self, ids: Tensor, layout: Layout, cache) -> Tensor:
        x = self.embed_tokens(ids)  # (N, C)
        if self.config.gemma:  # the scale is rounded as the weights are: sqrt(3072) is 55.5 in bf16
            x = x * x.new_full((), self.config.dim ** 0.5)
        if self.inv_freq is None or self.inv_freq.device != x.device:
            # Not a buffer: .to(bf16) would round it, which is wrong by up to 2 in cos at T = 4096.
            self.inv_freq = rope_inv_freq(self.config).to(x.device)
        cos_sin = layout.cos_sin(self.inv_freq, x.dtype)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():  # keep x alone; backward runs it again
                x = checkpoint(layer, x, layout, cos_sin, cache, use_reentrant=False)
            else:
                x = layer(x, layout, cos_sin, cache)
        return self.norm(x)


class Llama(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tied:
            setattr(self, config.head, nn.Linear(config.dim, config.n_out, bias=False))

    def forward(self, ids: Tensor, seqlens, rows: Tensor | None = None, cache=None) -> Tensor:
        """ids (N,) int64 packed, seqlens ints that sum to N -> logits (R, V).

        rows (R,) are indices into N, None for all. With a generate.KVCache the keys and values are
        stored (cache.slots says where) or, when slots is None, N slots get one more token each.
        """
        decoding = cache is not None and cache.slots is None
        start = cache.length[:len(ids)] if decoding else None
        layout = Layout(seqlens, ids.device, start)
        assert len(layout.position) == len(ids), "seqlens must sum to the number of ids"
        h = self.model(ids, layout, cache)
        h = h if rows is None else h[rows]
        head = self.model.embed_tokens if self.config.tied else getattr(self, self.config.head)
        return F.linear(h, head.weight.to(h.dtype))  # fp32 if trained


def weight_files(dir: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or model.safetensors."""
    index = dir / "model.safetensors.index.json"
    if index.exists():
        return [dir / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    if not (dir / "model.safetensors").exists():
        hint = "convert .bin by docs/judges.md" if any(dir.glob("*.bin")) else "fetch it again"
        raise UserError(f"{dir} has neither model.safetensors nor its index; {hint}.")
    return [dir / "model.safetensors"]


def read_tensors(path: Path, device="cpu"):
    """Yields (name, tensor) from one safetensors file; UserError if missing or truncated."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            for name in f.keys():
                yield name, f.get_tensor(name)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is missing or not safetensors ({e}); fetch it again.") from None


def load_model(dir, device="cpu", dtype: torch.dtype | None = torch.float32) -> Llama:
    """A frozen model from a Hugging Face folder; opens config.json and *.safetensors, no more.

    Built on meta, filled tensor by tensor in `dtype` (None: each in its file's) on `device`, names
    checked both ways. UserError for a missing, surplus, misshapen or unreadable tensor.
    """
    dir, config = Path(dir), read_config(dir)
    with torch.device("meta"):
        model = Llama(config)
    want, state = {name: tuple(p.shape) for name, p in model.named_parameters()}, {}
    for path in weight_files(dir):
        for name, tensor in read_tensors(path, device):
            if not name.endswith("rotary_emb.inv_freq"):  # a legacy buffer, recomputed in fp32
                state[name] = tensor.to(dtype or tensor.dtype)
    embedding = state.get("model.embed_tokens.weight")
    if config.tied and embedding is not None:  # a tied head may be in the file a second time
        if not torch.equal(state.pop("lm_head.weight", embedding), embedding):
            raise UserError(f"{dir} ties head and embedding, but its files hold another head; set "
                            "tie_word_embeddings to false in config.json to take that one.")
    have = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wrong := sorted(name for name in want | have if want.get(name) != have.get(name)):
        raise UserError(f"{dir} and its config.json differ in {len(wrong)} tensors: {wrong[0]} is "
                        f"{have.get(wrong[0], 'missing')}, expected by config.json "
                        f"{want.get(wrong[0], 'none (surplus)')}; fetch both again.")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()

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
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


class UserError(Exception):
    """The user's mistake, in one sentence: what was given, what is expected, what to do."""


# What a family is where config.json is silent. Gemma's first files wrote "gelu" for its tanh form.
FAMILIES = {
    "LlamaForCausalLM": dict(qkv_bias=False, tied=False, gemma=False, act="silu"),
    "Qwen2ForCausalLM": dict(qkv_bias=True, tied=False, gemma=False, act="silu"),
    "GemmaForCausalLM": dict(qkv_bias=False, tied=True, gemma=True, act="gelu_pytorch_tanh"),
}
ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}
SIZES = ("hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
         "intermediate_size vocab_size max_position_embeddings").split()
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor",
                  "original_max_position_embeddings")


@dataclass
class Config:
    dim: int  # hidden_size
    n_layer: int  # num_hidden_layers
    n_head: int  # num_attention_heads
    n_kv_head: int  # num_key_value_heads; fewer than n_head is grouped-query attention
    head_dim: int  # head_dim, or hidden_size / num_attention_heads
    hidden_dim: int  # intermediate_size
    vocab_size: int
    norm_eps: float  # rms_norm_eps
    rope_theta: float
    rope_scaling: dict | None  # Llama-3.1's four numbers, see rope_inv_freq
    max_positions: int  # max_position_embeddings: what the model was trained for
    tied: bool  # tie_word_embeddings: the unembedding is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    gemma: bool  # norms store w - 1, embeddings are multiplied by sqrt(dim)
    act: str  # a key of ACTIVATIONS


def read_json(path: Path) -> dict:
    """The JSON object in `path`; UserError when it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; name a folder that has it.") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is not readable JSON ({e}); write it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value


def read_config(dir) -> Config:
    """config.json of a Hugging Face folder, old and new spellings -> Config."""
    path = Path(dir) / "config.json"
    c = read_json(path)
    arch = (c.get("architectures") or [None])[0]
    if arch not in FAMILIES:
        raise UserError(f"{path} names the architecture {arch}, expected {', '.join(FAMILIES)}.")
    if c.get("quantization_config"):
        raise UserError(f"{path} describes a quantised checkpoint; choose the original one.")
    family = FAMILIES[arch]
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})  # transformers 5, and 4
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{path} asks for {kind} rotary scaling, expected default or llama3.")
    if c.get("sliding_window") and c.get("use_sliding_window"):
        raise UserError(f"{path} switches sliding-window attention on, expected it off.")
    act = c.get("hidden_activation") or c.get("hidden_act") or family["act"]
    if act != family["act"] and not (family["gemma"] and act == "gelu"):
        raise UserError(f"{path} has the activation {act}, expected {family['act']}.")
    for key in SIZES:
        if c.get(key) is not None and not (isinstance(c[key], int) and c[key] > 0):
            raise UserError(f"{path} has {key} {c[key]}, expected an integer above 0.")
    try:
        scaling = {k: rope[k] for k in LLAMA3_SCALING} if kind == "llama3" else None
        return Config(
            dim=c["hidden_size"], n_layer=c["num_hidden_layers"], n_head=c["num_attention_heads"],
            n_kv_head=c.get("num_key_value_heads") or c["num_attention_heads"],
            head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
            hidden_dim=c["intermediate_size"], vocab_size=c["vocab_size"],
            norm_eps=c["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10_000.0),
            rope_scaling=scaling, max_positions=c["max_position_embeddings"],
            tied=c.get("tie_word_embeddings", family["tied"]),
            qkv_bias=c.get("attention_bias", family["qkv_bias"]),
            o_bias=c.get("attention_bias", False), mlp_bias=c.get("mlp_bias", False),
            gemma=family["gemma"], act=family["act"])
    except KeyError as e:
        raise UserError(f"{path} lacks {e.args[0]}, expected for {arch}; fetch it again.") from None


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
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


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
    """Where each packed token stands: its position, and its cell in SDPA's right-padded block.

    Built once per forward from `seqlens`; `start` (B,): how many tokens decoding has stored.
    """

    def __init__(self, seqlens, device, start: Tensor | None = None):
        lens = torch.as_tensor(seqlens, device="cpu")
        self.B, self.T = len(lens), int(lens.max())
        first = lens.cumsum(0) - lens  # (B,) first row of each sequence
        t = torch.arange(int(lens.sum())) - first.repeat_interleave(lens)  # (N,) position
        b = torch.arange(self.B).repeat_interleave(lens)
        self.cell = (b * self.T + t).to(device)  # (N,) index into (B * T)
        self.cu_seqlens = F.pad(lens.cumsum(0), (1, 0)).to(device, torch.int32)
        self.position = t.to(device) if start is None else start

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
    B, T = layout.B, layout.T
    qkv = torch.cat((q, k, v), dim=1)  # (N, H + 2 KV, D)
    block = qkv.new_zeros(B * T, *qkv.shape[1:]).index_copy(0, layout.cell, qkv)
    block = block.view(B, T, *qkv.shape[1:]).transpose(1, 2)  # (B, H + 2 KV, T, D)
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

    def forward(self, x: Tensor, layout: Layout, cos_sin, cache) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim))  # (N, heads, D)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
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
        self.config, self.inv_freq = c, None

    def forward(self, ids: Tensor, layout: Layout, cache) -> Tensor:
        x = self.embed_tokens(ids)  # (N, C)
        if self.config.gemma:  # the scale is rounded as the weights are: sqrt(3072) is 55.5 in bf16
            x = x * torch.tensor(self.config.dim ** 0.5, dtype=x.dtype, device=x.device)
        if self.inv_freq is None or self.inv_freq.device != x.device:
            # Not a buffer: .to(bf16) would round it, which is wrong by up to 2 in cos at T = 4096.
            self.inv_freq = rope_inv_freq(self.config).to(x.device)
        cos_sin = layout.cos_sin(self.inv_freq, x.dtype)
        for layer in self.layers:
            x = layer(x, layout, cos_sin, cache)
        return self.norm(x)


class Llama(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, seqlens, rows: Tensor | None = None, cache=None) -> Tensor:
        """ids (N,) int64 packed, seqlens ints that sum to N -> logits (R, V).

        rows (R,) are indices into N, None for all. With a generate.KVCache the keys and values are
        stored (cache.slots says where) or, when slots is None, N slots get one more token each.
        """
        decoding = cache is not None and cache.slots is None
        start = cache.length[:len(ids)] if decoding else None
        layout = Layout(seqlens, ids.device, start)
        assert len(layout.cell) == len(ids), "seqlens must sum to the number of ids"
        h = self.model(ids, layout, cache)
        h = h if rows is None else h[rows]
        unembedding = self.model.embed_tokens if self.config.tied else self.lm_head
        return F.linear(h, unembedding.weight)


def weight_files(dir: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or model.safetensors."""
    index = dir / "model.safetensors.index.json"
    if index.exists():
        return [dir / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    if not (dir / "model.safetensors").exists():
        pickled = any(dir.glob("*.bin"))
        hint = "its .bin files are never opened; convert them" if pickled else "fetch it again"
        raise UserError(f"{dir} has neither model.safetensors nor its index; {hint}.")
    return [dir / "model.safetensors"]


def read_tensors(path: Path, device="cpu"):
    """Yields (name, tensor) from one safetensors file; UserError if missing or truncated."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            for name in f.keys():
                yield name, f.get_tensor(name)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; fetch the file again.") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is truncated or not a safetensors file ({e}); "
                        "fetch the file again.") from None


def load_model(dir, device="cpu", dtype: torch.dtype = torch.float32) -> Llama:
    """A frozen model from a Hugging Face folder; opens config.json and *.safetensors, no more.

    Built on meta, filled tensor by tensor in `dtype` on `device`, names checked both ways.
    UserError for a missing, surplus, misshapen or unreadable tensor.
    """
    dir = Path(dir)
    if not dir.is_dir():
        raise UserError(f"{dir} is not a folder; --model takes a Hugging Face model folder.")
    config = read_config(dir)
    with torch.device("meta"):
        model = Llama(config)
    want, state = {name: p.shape for name, p in model.named_parameters()}, {}
    for path in weight_files(dir):
        for name, tensor in read_tensors(path, device):
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tied):
                continue  # legacy buffer, recomputed in fp32; a tied head is the embedding
            if name in want and tensor.shape != want[name]:
                raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected by "
                                f"config.json {tuple(want[name])}; fetch the two files again.")
            state[name] = tensor.to(dtype)
    missing, surplus = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    if missing or surplus:
        raise UserError(f"{dir} does not match its config.json: {len(missing)} tensors missing "
                        f"{missing[:3]}, {len(surplus)} surplus {surplus[:3]}; fetch it again.")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()

"""A Llama-family decoder that reads Hugging Face folders, written to be read.

Nothing is padded: a batch is `ids` (N,), one row for each token that must be computed. `path` (M,)
leads through these rows, sequence after sequence, of `seqlens` tokens each; sequences that begin
alike share rows (packing.py). Everything is (N, C); only attention knows where a sequence begins.
Per block, with x the residual stream:

    q, k, v = q_proj(y), k_proj(y), v_proj(y)           y = RMSNorm(x); q and k rotated (RoPE)
    x = x + o_proj(softmax(q k^T / sqrt(D)) v)          causal within its own sequence
    x = x + down_proj(act(gate_proj(y)) * up_proj(y))   y = RMSNorm(x)
    h = RMSNorm(x)  # the bottleneck: all that the unembedding ever sees
    logits = lm_head(h)

Module names are Hugging Face's, so a checkpoint loads without a rename map.
Norms and rotary angles are computed in fp32 and rounded once to the model's dtype.

Shape letters: N rows, M tokens, R rows asked for, B sequences, T longest sequence, S cache length,
C dim, H heads, KV key/value heads, D head_dim, V vocab, K anchors.
"""

import inspect
import json
import math
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint


class UserError(Exception):
    """The user's mistake, in one sentence: what was given, what is expected, what to do."""

    def __init__(self, sentence: str):
        super().__init__(sentence.replace("\n", " "))  # a library's words in it may have lines


@dataclass
class Family:
    """What follows from the architecture where config.json does not say it."""

    model_type: str  # config.json's other name for it, by which transformers chooses the class
    qkv_bias: bool = False  # q_proj, k_proj and v_proj have a bias
    qk_norm: bool = False  # an RMSNorm on each query and each key head
    tied: bool = False  # the unembedding is the embedding
    gemma: bool = False  # norms store w - 1, and embeddings are multiplied by sqrt(dim)
    act: str = "silu"  # a key of ACTIVATIONS
    head: str = "lm_head"  # the name of the head's Linear


FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "LlamaForSequenceClassification": Family("llama", head="score"),  # a moderation judge
    "MistralForCausalLM": Family("mistral"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True),
    "GemmaForCausalLM": Family("gemma", tied=True, gemma=True, act="gelu_pytorch_tanh"),
}
ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}


@dataclass
class Config:
    """A decoder's sizes and variants; behind each field its key in config.json."""

    # sizes
    dim: int  # hidden_size
    n_layer: int  # num_hidden_layers
    n_head: int  # num_attention_heads
    n_kv_head: int  # num_key_value_heads, or n_head; fewer than n_head: grouped-query attention
    head_dim: int  # head_dim, or hidden_size / num_attention_heads
    hidden_dim: int  # intermediate_size
    vocab_size: int  # vocab_size
    n_out: int  # the head's rows: vocab_size, or a classifier's num_labels
    max_positions: int  # max_position_embeddings, or sliding_window where one is in use
    # numbers
    norm_eps: float  # rms_norm_eps
    rope_theta: float  # rope_theta, in rope_parameters or beside it
    rope_scaling: dict | None  # rope_scaling or rope_parameters, where it changes an angle
    # variants
    qkv_bias: bool  # attention_bias, or the family's
    o_bias: bool  # attention_bias
    mlp_bias: bool  # mlp_bias
    tied: bool  # tie_word_embeddings, or the family's
    qk_norm: bool  # the family's, like the three below
    gemma: bool
    act: str
    head: str


def read_json(path: Path) -> dict:
    """The JSON object in `path`; UserError when it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, expected an object")
        json.dumps(value, ensure_ascii=False).encode()  # ValueError for half a surrogate pair
        return value
    except (OSError, ValueError, RecursionError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path} cannot be read as JSON ({reason}); name a folder that has it, or "
                        "fetch it again.") from None


# What a key of a JSON file may hold


@dataclass(frozen=True)
class Kind:
    """A kind of value: in words, for an error, and as a test."""

    words: str
    fits: Callable[[object], bool]


def is_whole(value, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether it is an integer from low to high; JSON's true is none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_finite(value, above: float) -> bool:
    """Whether it is a number above a bound; Infinity and NaN, which JSON may hold, are none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and above < value < math.inf


def is_text(value) -> bool:
    return isinstance(value, str)


def are_all(fits, values) -> bool:
    """Whether it is a list, and each of its items fits."""
    return isinstance(values, list) and all(map(fits, values))


BOOL = Kind("true or false", lambda v: isinstance(v, bool))
TEXT = Kind("a text", is_text)
TEXTS = Kind("a list of texts", lambda v: are_all(is_text, v))
OBJECT = Kind("an object", lambda v: isinstance(v, dict))
POSITIVE = Kind("a finite number above 0", lambda v: is_finite(v, 0))
ABOVE_1 = Kind("a finite number above 1", lambda v: is_finite(v, 1))
COUNT = Kind("a whole number above 0", lambda v: is_whole(v, 1))
LENGTH = Kind("a whole number from 0 on", lambda v: is_whole(v, 0))
# Bounds beyond any model, so that no tensor's size overflows and no loop is endless.
SIZE = Kind("a whole number from 1 to 1,000,000", lambda v: is_whole(v, 1, 1_000_000))
N_LAYERS = Kind("a whole number from 1 to 1,000", lambda v: is_whole(v, 1, 1_000))
IDS = Kind("an id or a list of ids",
           lambda v: is_whole(v, 0) or are_all(lambda i: is_whole(i, 0), v))


def check_kinds(place, values: dict, kinds: dict[str, Kind]) -> None:
    """UserError where a key holds another kind of value than it may; null is as good as no key.

    place: the file, with which the sentence begins.
    """
    for key, kind in kinds.items():
        value = values.get(key)
        if value is not None and not kind.fits(value):
            raise UserError(f"{place} has {key} {str(value)[:60]}, expected {kind.words}; correct "
                            "it, or fetch the file again.")


# The keys of config.json that are read, here and by the tokenizer.
CONFIG_KINDS = {
    "architectures": TEXTS, "model_type": TEXT, "tokenizer_class": TEXT, "eos_token_id": IDS,
    "hidden_size": SIZE, "num_hidden_layers": N_LAYERS, "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE, "head_dim": SIZE, "intermediate_size": SIZE, "vocab_size": SIZE,
    "num_labels": SIZE, "id2label": OBJECT, "max_position_embeddings": COUNT,
    "sliding_window": LENGTH, "use_sliding_window": BOOL,
    "rms_norm_eps": POSITIVE, "hidden_act": TEXT, "hidden_activation": TEXT,
    "attention_bias": BOOL, "mlp_bias": BOOL, "tie_word_embeddings": BOOL,
    "rope_parameters": OBJECT, "rope_scaling": OBJECT, "rope_theta": ABOVE_1,
    "original_max_position_embeddings": POSITIVE, "partial_rotary_factor": POSITIVE,
}
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "vocab_size", "rms_norm_eps", "max_position_embeddings")
ROPE_KINDS = {
    "rope_type": TEXT, "type": TEXT, "rope_theta": ABOVE_1, "partial_rotary_factor": POSITIVE,
    "finetuned": BOOL, "factor": POSITIVE, "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE, "original_max_position_embeddings": POSITIVE,
    "attention_factor": POSITIVE, "beta_fast": POSITIVE, "beta_slow": POSITIVE, "truncate": BOOL,
}
# The numbers that each kind of rotary scaling needs.
ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),  # unused: it acts beyond max_position_embeddings, which is refused
    "llama3": ("factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "truncate")
# What may stand beside them and changes nothing: spellings of the above, and a note of YaRN's.
ROPE_NOTES = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")
MISTRAL_WINDOW = 4096  # transformers' default where a Mistral config.json names none


def read_config_json(dir) -> dict:
    """config.json of a Hugging Face folder; UserError where a key that is read holds nonsense."""
    path = Path(dir) / "config.json"
    c = read_json(path)
    check_kinds(path, c, CONFIG_KINDS)
    return c


def read_config(dir) -> Config:
    """config.json of a Hugging Face folder, in old and new spellings -> Config."""
    path = Path(dir) / "config.json"
    c = read_config_json(dir)
    architecture = architecture_of(path, c)
    family = FAMILIES[architecture]
    check_config(path, c, architecture)
    rope = rope_of(path, c)
    n_head = c["num_attention_heads"]
    attention_bias = bool(c.get("attention_bias"))
    writes_text = family.head == "lm_head"
    return Config(
        dim=c["hidden_size"],
        n_layer=c["num_hidden_layers"],
        n_head=n_head,
        n_kv_head=c.get("num_key_value_heads") or n_head,
        head_dim=c.get("head_dim") or c["hidden_size"] // n_head,
        hidden_dim=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        n_out=c["vocab_size"] if writes_text else n_labels(c),
        max_positions=positions_of(c, architecture),
        norm_eps=c["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10_000.0),
        rope_scaling=rope if rope["rope_type"] not in ("default", "dynamic") else None,
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(c.get("mlp_bias")),
        tied=writes_text and bool(c.get("tie_word_embeddings", family.tied)),
        qk_norm=family.qk_norm,
        gemma=family.gemma,
        act=family.act,
        head=family.head)


def architecture_of(path: Path, c: dict) -> str:
    """The first of config.json's architectures; where it names none, the one of its model_type.

    UserError where the two disagree: transformers goes by model_type, other programs do not.
    """
    model_type = c.get("model_type")
    architectures = c.get("architectures")
    if not architectures:
        for architecture, family in FAMILIES.items():
            if family.model_type == model_type and family.head == "lm_head":
                return architecture
        raise UserError(f"{path} names no architecture and the model_type {model_type}, expected "
                        f"one of {', '.join(FAMILIES)}.")
    architecture = architectures[0]
    if architecture not in FAMILIES:
        raise UserError(f"{path} names the architecture {architecture}, expected "
                        f"{', '.join(FAMILIES)}.")
    expected = FAMILIES[architecture].model_type
    if model_type not in (None, expected):
        raise UserError(f"{path} names the architecture {architecture} and the model_type "
                        f"{model_type}, expected {expected}; correct the one that is wrong.")
    return architecture


def rope_of(path: Path, c: dict) -> dict:
    """The rotary settings: transformers 5 writes rope_parameters, transformers 4 rope_scaling.

    UserError for a kind of scaling, or a key of it, that is not computed here, and where the same
    setting is given twice with two values: transformers 4 and 5 then read different ones.
    """
    for key in ("rope_parameters", "rope_scaling"):
        given = c.get(key) or {}
        kind = given.get("rope_type") or given.get("type") or "default"
        check_kinds(f"{path} asks for {kind} rotary scaling and", given, ROPE_KINDS)
    rope = one_spelling(c.get("rope_parameters"))
    older = one_spelling(c.get("rope_scaling"))
    if rope and older and rope != older:
        raise UserError(f"{path} has rope_parameters {rope} and rope_scaling {older}, expected one "
                        "of the two; delete the other.")
    rope = rope or older or {"rope_type": "default"}
    for key in ("rope_theta", "original_max_position_embeddings"):
        if c.get(key) is not None and rope.get(key, c[key]) != c[key]:
            raise UserError(f"{path} has {key} {c[key]}, and {rope[key]} among its rotary "
                            "settings, expected one value; delete the wrong one.")
    check_rope(path, rope, c.get("partial_rotary_factor"))
    return rope


def one_spelling(rope: dict | None) -> dict:
    """The same settings with "rope_type", which was "type" before."""
    rope = dict(rope or {})
    if rope and rope.get("rope_type") is None:
        rope["rope_type"] = rope.pop("type", None) or "default"
    return rope


def check_rope(path: Path, rope: dict, partial_rotary_factor) -> None:
    """UserError for rotary settings that are not computed here."""
    kind = rope["rope_type"]
    if kind not in ROPE_NUMBERS:
        raise UserError(f"{path} has the rope_type {kind}, expected one of "
                        f"{', '.join(ROPE_NUMBERS)}; choose a checkpoint without it.")
    known = ROPE_NUMBERS[kind] + ROPE_NOTES
    if kind == "yarn":
        known += YARN_OPTIONS
    for key, value in rope.items():
        if key not in known and value is not None:
            raise UserError(f"{path} has {key} {value} in its {kind} rotary settings, expected "
                            f"{', '.join(known)}; choose a checkpoint without it.")
    for key in ROPE_NUMBERS[kind]:
        if rope.get(key) is None:
            raise UserError(f"{path} asks for {kind} rotary scaling and has no {key}, expected a "
                            "number above 0.")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise UserError(f"{path} has high_freq_factor {rope['high_freq_factor']}, expected a "
                        f"number above its low_freq_factor {rope['low_freq_factor']}.")
    for part in (partial_rotary_factor, rope.get("partial_rotary_factor")):
        if part not in (None, 1):
            raise UserError(f"{path} has partial_rotary_factor {part}, expected 1: here a head is "
                            "rotated as a whole.")


def positions_of(c: dict, architecture: str) -> int:
    """The longest sequence for which full attention gives the model's own result.

    A sliding window changes nothing for a sequence that fits into it; train.py and generate.py
    refuse longer ones. Mistral slides unless config.json forbids it, the others only if it asks.
    """
    longest = c["max_position_embeddings"]
    slides = c.get("use_sliding_window", architecture == "MistralForCausalLM")
    window = c.get("sliding_window", MISTRAL_WINDOW)
    if slides and window:
        return min(longest, window)
    return longest


def n_labels(c: dict) -> int:
    """A classifier's outputs; two where config.json names none, as in transformers."""
    if c.get("num_labels"):
        return c["num_labels"]
    if c.get("id2label"):
        return len(c["id2label"])
    return 2


def check_config(path: Path, c: dict, architecture: str) -> None:
    """UserError where config.json lacks something or asks for what is not computed here."""
    family = FAMILIES[architecture]
    for key in ("quantization_config", "quantization"):
        if c.get(key):
            raise UserError(f"{path} describes a quantised checkpoint in {key}; choose the "
                            "original one.")
    if c.get("transformers_weights") not in (None, "", SINGLE):
        raise UserError(f"{path} has transformers_weights {c['transformers_weights']}, which "
                        f"transformers reads instead of {SINGLE}, expected none; name that file "
                        f"{SINGLE} and delete the key.")
    key = "hidden_activation" if c.get("hidden_activation") else "hidden_act"
    act = c.get(key)
    accepted = [None, family.act]
    if family.gemma:  # its first files say "gelu" and mean the tanh form
        accepted.append("gelu")
    if act not in accepted:
        raise UserError(f"{path} has {key} {act}, expected {family.act}.")
    for key in REQUIRED:
        if c.get(key) is None:
            raise UserError(f"{path} has no {key}, expected a number above 0 for {architecture}.")


def to_fp32(x: Tensor) -> Tensor:
    """At least fp32: half precision goes up; float64 stays, so that laws can be tested in it."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * w, computed in fp32; Gemma's w is stored minus one."""

    def __init__(self, dim: int, eps: float, gemma: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.gemma = gemma

    def forward(self, x: Tensor) -> Tensor:
        if self.gemma:  # rounds once, after 1 + w in fp32: in bf16 1 + w would lose w's low bits
            w = 1 + to_fp32(self.weight)
            return F.rms_norm(to_fp32(x), x.shape[-1:], w, self.eps).to(x.dtype)
        # The weight is fp32 where an attack trains it, hence the cast.
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


def rope_inv_freq(config: Config) -> Tensor:
    """Rotary frequencies (D/2,) fp32, 1 / theta^(2i/D), scaled as config.rope_scaling says."""
    D = config.head_dim
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, D, 2).float() / D)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    if scaling["rope_type"] == "llama3":
        kept = kept_by_llama3(inv_freq, scaling)
    else:
        kept = kept_by_yarn(D, config.rope_theta, scaling)
    return (1 - kept) * inv_freq / scaling["factor"] + kept * inv_freq


def kept_by_llama3(inv_freq: Tensor, scaling: dict) -> Tensor:
    """How far each frequency is kept (D/2,): 1 as it is, 0 divided by `factor`.

    Wavelengths above original/low_freq_factor are stretched, those below original/high_freq_factor
    stay, and between the two the frequency is interpolated.
    """
    # original length / wavelength: how often a frequency turns within the original context
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    return ((turns - low) / (high - low)).clamp(0, 1)


def kept_by_yarn(D: int, theta: float, scaling: dict) -> Tensor:
    """The same for YaRN, arXiv 2309.00071: a straight line over the frequency's index i.

    The line falls from 1 at the i that turns beta_fast times within the original context to 0 at
    the i that turns beta_slow times; both are rounded outwards unless truncate is false.
    """
    original = scaling["original_max_position_embeddings"]
    ends = []
    for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1):
        ends.append(D * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta)))
    first, last = ends
    if scaling.get("truncate", True):
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, D - 1)  # as in transformers, although i ends at D/2 - 1
    if first == last:
        last += 0.001
    return 1 - ((torch.arange(D // 2) - first) / (last - first)).clamp(0, 1)


def rope_amplitude(config: Config) -> float:
    """What cos and sin are multiplied by: 1 except in YaRN, which so makes attention sharper."""
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    return 1 + 0.1 * math.log(max(scaling["factor"], 1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on (N, heads, D): the two halves turn together, not neighbours (HF's layout)."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def to_device(x: Tensor, device) -> Tensor:
    """x, which is on the CPU, on `device`; a copy to CUDA does not make the CPU wait.

    An ordinary copy to CUDA waits until the GPU has done all that it was told before. From
    page-locked memory the copy is queued behind that work instead, and the CPU goes on.
    """
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class Layout:
    """Where each row stands: in its sequences, and in the blocks that attention pads.

    M tokens stand in N rows, since sequences that begin alike share rows (packing.py). All tokens
    of a shared row get the same result from attention, since the same keys stand before them. The
    first token's is used, and its sequence is the row's home.
    The layout is worked out once a forward pass, on the CPU, and serves all layers.
    """

    def __init__(self, seqlens, device, path: Tensor | None = None, start: Tensor | None = None):
        """path (M,), on the CPU: the row of each token, sequences end to end; None: none is shared.

        start (B,): the tokens each sequence has in the cache, when one more is decoded.
        """
        if start is not None:
            self.position = start  # decoding needs the positions alone
            return
        lens = torch.as_tensor(seqlens, device="cpu")
        M = int(lens.sum())
        if path is None:
            path = torch.arange(M)
        assert len(path) == M, "seqlens must sum to the number of tokens"
        N = int(path.max()) + 1
        end = lens.cumsum(0)  # (B,) one past each sequence's last token
        first = end - lens  # (B,) each sequence's first token
        sequence = torch.arange(len(lens)).repeat_interleave(lens)  # (M,) where each token stands
        token_position = torch.arange(M) - first.repeat_interleave(lens)  # (M,) its place in it
        first_token = torch.full((N,), M).scatter_reduce(0, path, torch.arange(M), "amin")
        self.T = int(lens.max())
        self.path = to_device(path, device)  # (M,) token -> row
        self.first_token = to_device(first_token, device)  # (N,) row -> the first of its tokens
        # (B + 1,) where each sequence begins among the tokens, for varlen_attn
        self.cu_seqlens = to_device(F.pad(end, (1, 0)).to(torch.int32), device)
        # (N,) for RoPE; all tokens of a row have one position
        self.position = to_device(token_position[first_token], device)
        # (M,) each, for generate.KVCache, which keeps every sequence apart
        self.sequence = to_device(sequence, device)
        self.token_position = to_device(token_position, device)
        # For `padded`, on the CPU.
        self.rows = path.split(lens.tolist())  # of each sequence, (T,)
        self.home = sequence[first_token]  # (N,)

    @cached_property
    def padded(self) -> "Padded":
        """The blocks for attention that knows no packing; PyTorch's kernel on CUDA needs none."""
        return Padded(self.rows, self.home, self.position)

    def cos_sin(self, inv_freq: Tensor, amplitude: float, dtype) -> tuple[Tensor, Tensor]:
        """amplitude times cos and sin of each row's rotary angles, (N, 1, D) each."""
        angle = torch.outer(self.position.float(), inv_freq)  # (N, D/2), always fp32
        angle = torch.cat((angle, angle), dim=-1)[:, None]  # (N, 1, D)
        return (angle.cos() * amplitude).to(dtype), (angle.sin() * amplitude).to(dtype)


class Padded:
    """Attention's blocks: in each B sequences, right-padded to Q queries and T keys.

    A sequence asks with the rows that are at home in it, and sees all of its rows. So a row asks
    once, however many sequences share it. Padding cells hold row 0. A padding key stands behind its
    sequence's last token, so the mask hides it; the result of a padding query is not used.
    """

    def __init__(self, rows: list[Tensor], home: Tensor, position: Tensor):
        """rows: of each sequence (T,); home (N,): a sequence of each row. Both are on the CPU."""
        n_own = home.bincount(minlength=len(rows))  # of each sequence's rows, those at home in it
        own = home.argsort(stable=True).split(n_own.tolist())
        lens = torch.tensor([len(its_rows) for its_rows in rows])
        ask = []
        see = []
        self.shapes = []  # (B, Q, T) of each block
        for group in groups_of_like_size(n_own, lens):
            queries = pad_sequence([own[i] for i in group], batch_first=True, padding_value=-1)
            keys = pad_sequence([rows[i] for i in group], batch_first=True)  # (B, T)
            ask.append(queries.flatten())  # (B * Q,)
            see.append(keys.flatten())
            self.shapes.append((*queries.shape, keys.shape[1]))
        ask = torch.cat(ask)  # each row once, and -1 for padding
        is_query = ask >= 0
        cell = torch.empty_like(home)
        cell[ask[is_query]] = is_query.nonzero()[:, 0]
        self.ask = to_device(ask.clamp(min=0), position.device)  # cell of a query -> row
        self.see = to_device(torch.cat(see), position.device)  # cell of a key -> row
        self.cell = to_device(cell, position.device)  # (N,) row -> cell of its query
        self.masks = []  # (B, Q, T) each: what is added to the scores
        for at, (_, _, T) in zip(self.queries(position), self.shapes, strict=True):
            self.masks.append(causal_mask(at, T, torch.float32))

    def queries(self, x: Tensor) -> list[Tensor]:
        """x (N, ...) -> for each block (B, Q, ...)."""
        return gather_blocks(x, self.ask, [(B, Q) for B, Q, _ in self.shapes])

    def keys(self, x: Tensor) -> list[Tensor]:
        """x (N, ...) -> for each block (B, T, ...)."""
        return gather_blocks(x, self.see, [(B, T) for B, _, T in self.shapes])


def gather_blocks(x: Tensor, cells: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """The rows of x (N, ...) that `cells` names, in blocks of these shapes; one gather for all."""
    parts = x.index_select(0, cells).split([math.prod(shape) for shape in shapes])
    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]


def causal_mask(position: Tensor, T: int, dtype) -> Tensor:
    """What is added to the scores of queries at `position` (...) with T keys: (..., T)."""
    later = torch.arange(T, device=position.device) > position[..., None]
    return torch.zeros_like(later, dtype=dtype).masked_fill(later, -math.inf)


# Two blocks mean twice the operations. They are made where they hold less than this share of the
# scores that one block would hold: with 3 heads of 32 that costs nothing, with 9 of 64 it gains a
# fifth (docs/performance.md).
TWO_BLOCKS = 0.75


def groups_of_like_size(n_own: Tensor, lens: Tensor) -> list[list[int]]:
    """The sequences of each block: of all that ask, or of the smaller ones and the larger ones."""
    order = n_own.argsort(stable=True)
    order = order[n_own[order] > 0]
    Q = n_own[order]
    T = lens[order].cummax(0).values
    B = torch.arange(1, len(order) + 1)
    # The most scores that two blocks hold if the first one ends with this sequence, (len(order),).
    scores = B * Q * T + (len(order) - B) * Q[-1] * T[-1]
    first = int(scores.argmin()) + 1
    if scores[first - 1] >= TWO_BLOCKS * scores[-1]:
        return [order.tolist()]
    return [order[:first].tolist(), order[first:].tolist()]


# Tokens of a block's longest sequence up to which short_attention is the faster one, with heads of
# 64 (docs/performance.md).
SHORT = 128


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Causal attention inside each sequence; q (N, H, D), k and v (N, KV, D) -> (N, H, D)."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return varlen_attention(q, k, v, layout)
    padded = layout.padded
    blocks = zip(padded.queries(q), padded.keys(k), padded.keys(v), padded.masks, strict=True)
    outs = [block_attention(*block).flatten(0, 1) for block in blocks]  # (B * Q, H, D) each
    return torch.cat(outs).index_select(0, padded.cell)  # (N, H, D)


def block_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v of a block; q (B, Q, H, D), k and v (B, T, KV, D).

    mask (B, Q, T) is the same for all heads.
    """
    if k.shape[1] <= SHORT and q.is_cpu and q.dtype in (torch.float32, torch.float64):
        return short_attention(q, k, v, mask)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, Q or T, D)
    mask = mask[:, None].to(q.dtype)  # (B, 1, Q, T)
    fewer_keys = k.shape[1] < q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=fewer_keys)
    return out.transpose(1, 2)


def short_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same, written out.

    It holds all scores (B, H, Q, T) at once. For short sequences that is little, and on a CPU it is
    faster than PyTorch's kernel, which works through each head by blocks (docs/performance.md). In
    half precision the scores would be rounded, which the kernel avoids.
    """
    B, Q, H, D = q.shape
    T = k.shape[1]
    KV = k.shape[2]
    G = H // KV  # query heads that share a key head: together they are Q * G queries to it
    q = q.unflatten(2, (KV, G)).transpose(1, 2).reshape(B * KV, Q * G, D)
    k = k.transpose(1, 2).reshape(B * KV, T, D)
    v = v.transpose(1, 2).reshape(B * KV, T, D)
    mask = mask.to(q.dtype)[:, None, :, None].expand(B, KV, Q, G, T).reshape(B * KV, Q * G, T)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=D ** -0.5)
    out = scores.softmax(-1) @ v
    return out.view(B, KV, Q, G, D).transpose(1, 2).reshape(B, Q, H, D)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """The same by PyTorch's kernel for packed sequences, which exists for CUDA's half precision."""
    from torch.nn.attention.varlen import varlen_attn

    options = {}
    # torch 2.12 made enable_gqa a must; the kernel of 2.11 takes fewer KV heads without being told.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    q = q.index_select(0, layout.path)  # (M, H, D)
    k = k.index_select(0, layout.path)  # (M, KV, D)
    v = v.index_select(0, layout.path)  # (M, KV, D)
    out = varlen_attn(q, k, v, layout.cu_seqlens, layout.cu_seqlens, layout.T, layout.T,
                      window_size=(-1, 0), **options)
    return out.index_select(0, layout.first_token)  # (N, H, D)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.dim, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.dim, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.dim, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.dim, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps, False) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps, False) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, layout: Layout, cos_sin, cache) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, KV, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, KV, D)
        q = rotate(self.q_norm(q), *cos_sin)
        k = rotate(self.k_norm(k), *cos_sin)
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
        # nn.Embedding(...) would draw its weights, and to draw on meta imports torch._dynamo: 1 s.
        empty = torch.empty(c.vocab_size, c.dim)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.n_layer))
        self.norm = RMSNorm(c.dim, c.norm_eps, c.gemma)
        self.config = c
        self.inv_freq = None
        self.recompute = False  # True: backward runs each block again instead of keeping it

    def forward(self, ids: Tensor, layout: Layout, cache) -> Tensor:
        x = self.embed_tokens(ids)  # (N, C)
        if self.config.gemma:
            # The scale is rounded as the weights are: sqrt(3072) is 55.5 in bf16.
            x = x * x.new_full((), self.config.dim ** 0.5)
        if self.inv_freq is None or self.inv_freq.device != x.device:
            # Not a buffer: .to(bf16) would round it, which is wrong by up to 2 in cos at T = 4096.
            self.inv_freq = to_device(rope_inv_freq(self.config), x.device)
        cos_sin = layout.cos_sin(self.inv_freq, rope_amplitude(self.config), x.dtype)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():  # of the block, x alone is kept
                x = checkpoint(layer, x, layout, cos_sin, cache, use_reentrant=False)
            else:
                x = layer(x, layout, cos_sin, cache)
        return self.norm(x)


class Llama(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.is_sharded = False  # True: its weights are spread over processes (distributed.py)
        if not config.tied:
            setattr(self, config.head, nn.Linear(config.dim, config.n_out, bias=False))

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def forward(self, ids: Tensor, seqlens, rows: Tensor | None = None, cache=None,
                path: Tensor | None = None) -> Tensor:
        """ids (N,) int64 packed, seqlens ints that sum to M -> logits (R, V).

        path (M,), on the CPU, are indices into N: the row of each token where sequences share rows
        (packing.py); None: each token has its own, and M = N. rows (R,) are indices into N, None
        for all. A generate.KVCache stores the keys and values of whole prompts in the slots that
        cache.slots names; when that is None, each of the first N slots is given one more token.
        """
        decoding = cache is not None and cache.slots is None
        start = cache.length[:len(ids)] if decoding else None
        layout = Layout(seqlens, ids.device, path, start)
        assert len(layout.position) == len(ids), "seqlens and path must fit the number of ids"
        h = self.model(ids, layout, cache)
        if rows is not None:
            # Two sequences may ask for one row. h[rows] would add up their gradients in half
            # precision, rounding each time; index_select does not.
            h = h.index_select(0, rows)
        head = self.model.embed_tokens if self.config.tied else getattr(self, self.config.head)
        return F.linear(h, head.weight.to(h.dtype))  # a trained head is fp32, hence the cast


# Which files are the model


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Other files that hold weights, and what to do where a folder has no others.
NOT_READ = {
    "model-*-of-*.safetensors": f"fetch {INDEX} too, which says that these are all",
    "adapter_model.safetensors": "an adapter is named by --adapter, and its base by --model",
    "consolidated*.safetensors": "its names are Mistral's own; fetch the Hugging Face files",
    "*.safetensors": f"name it {SINGLE} if it is the whole model",
    "*.bin": "convert .bin by docs/judges.md",
    "*.pth": "its names are Meta's own; fetch the Hugging Face files",
    "*.gguf": "fetch the safetensors files that it was made from",
}


def weight_files(dir: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or where it lacks that its shards.

    transformers decides the same way. So an index beside model.safetensors is not read: it is what
    a sharded copy left behind that was there before.
    """
    if (dir / SINGLE).exists():
        return [dir / SINGLE]
    if (dir / INDEX).exists():
        return [dir / name for name in shards(dir)]
    for pattern, hint in NOT_READ.items():
        found = sorted(path.name for path in dir.glob(pattern))
        if found:
            raise UserError(f"{dir} has neither {SINGLE} nor its index, but {found[0]}; {hint}.")
    raise UserError(f"{dir} has neither {SINGLE} nor its index; fetch it again.")


def shards(dir: Path) -> list[str]:
    """The files that the index names, in order; UserError where it names none, or others' files."""
    weight_map = read_json(dir / INDEX).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise UserError(f"{dir / INDEX} has no weight_map, expected tensors and their files; fetch "
                        "it again.")
    for name in weight_map.values():
        is_beside = isinstance(name, str) and Path(name).name == name
        if not is_beside or not name.endswith(".safetensors"):
            raise UserError(f"{dir / INDEX} names the file {name}, expected a .safetensors file "
                            "beside it; fetch it again.")
    return sorted(set(weight_map.values()))


def stale_index(dir: Path) -> list[str]:
    """What an index names that lies beside model.safetensors and does not mean it; else nothing."""
    if not ((dir / SINGLE).exists() and (dir / INDEX).exists()):
        return []
    return [name for name in shards(dir) if name != SINGLE]


def say_what_is_not_read(dir: Path) -> None:
    """A line on stderr for each file that another program might take for a part of the model."""
    stale = stale_index(dir)
    if stale:
        print(f"{dir / SINGLE} is read, as in transformers, and not {stale[0]} and the others that "
              f"{INDEX} beside it names; delete what is out of date.", file=sys.stderr)
    if (dir / "adapter_config.json").exists():
        print(f"{dir / 'adapter_config.json'} is not read with the model, whereas transformers "
              "would put that adapter on its own base; pass --adapter to use one.",
              file=sys.stderr)


@contextmanager
def open_tensors(path: Path, device="cpu"):
    """A safetensors file, open for reading; UserError if missing or truncated."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            yield f
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is missing or not safetensors ({e}); fetch it again.") from None


def read_tensors(path: Path, device="cpu"):
    """Yields (name, tensor) from one safetensors file."""
    with open_tensors(path, device) as f:
        for name in f.keys():
            yield name, f.get_tensor(name)


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load_model(dir, device="cpu", dtype: torch.dtype | None = torch.float32) -> Llama:
    """A frozen model from a Hugging Face folder; opens config.json and *.safetensors, no more.

    It is built on meta and filled tensor by tensor in `dtype` (None: each in its file's) on
    `device`; names and shapes are checked both ways. UserError for a missing, surplus, misshapen
    or unreadable tensor.
    """
    dir = Path(dir)
    config = read_config(dir)
    say_what_is_not_read(dir)
    with torch.device("meta"):
        model = Llama(config)
    state = {}
    file_of = {}
    for path in weight_files(dir):
        for name, tensor in read_tensors(path, device):
            if name.endswith("rotary_emb.inv_freq"):  # a legacy buffer, recomputed in fp32
                continue
            if tensor.dtype not in FLOATS:
                raise UserError(f"{path} holds {name} as {tensor.dtype}, expected floating-point "
                                "numbers of 16 bits or more; choose the original checkpoint.")
            tensor = tensor.to(dtype or tensor.dtype)
            if name in state and not torch.equal(state[name], tensor):
                raise UserError(f"{path} and {file_of[name]} hold {name} with two values, expected "
                                "one; fetch both again.")
            state[name] = tensor
            file_of[name] = path.name
    if config.tied:
        take_one_head(dir, state)
    check_tensors(dir, model, state)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def take_one_head(dir: Path, state: dict[str, Tensor]) -> None:
    """Leaves a tied model its embedding alone.

    The file may name it as the head, or hold it twice; UserError where those are two tensors.
    """
    head = state.pop("lm_head.weight", None)
    if head is None:
        return
    embedding = state.setdefault("model.embed_tokens.weight", head)
    if not torch.equal(head, embedding):
        raise UserError(f"{dir} ties head and embedding, but its files hold another head; set "
                        "tie_word_embeddings to false in config.json to take that one.")


def check_tensors(dir: Path, model: Llama, state: dict[str, Tensor]) -> None:
    """UserError unless the files hold exactly the tensors that config.json describes."""
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    names = expected.keys() | found.keys()
    wrong = sorted(name for name in names if expected.get(name) != found.get(name))
    if wrong:
        first = wrong[0]
        what_to_do = "fetch both again"
        if stale_index(dir):
            what_to_do = (f"{INDEX} names other files than {SINGLE}, which was read: delete the "
                          "one that is not the model")
        raise UserError(f"{dir} and its config.json differ in {len(wrong)} tensors: {first} is "
                        f"{found.get(first, 'missing')}, expected by config.json "
                        f"{expected.get(first, 'none (surplus)')}; {what_to_do}.")

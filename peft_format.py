"""PEFT's files for an adapter, read and written without PEFT.

    adapter_config.json          rank, alpha, which modules
    adapter_model.safetensors    base_model.model.<Hugging Face's name>.lora_A.weight (r, in), ...

Each setting of PEFT's LoraConfig is in one of three lists below: it is honoured, it changes nothing
that is computed, or it is refused by name, since loaded as plain LoRA it would be another model. A
setting that is in none of them is refused as well, unless it is off. docs/adapters.md is the table.
"""

import json
import re
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from files import write_atomic
from model import (
    BOOL,
    POSITIVE,
    SIZE,
    TEXT,
    TEXTS,
    Kind,
    UserError,
    are_all,
    check_kinds,
    is_text,
    is_whole,
    read_json,
    read_tensors,
)

PEFT_PREFIX = "base_model.model."  # stands before Hugging Face's own names

# The seven projections: every Linear but the head, which is PEFT's "all-linear".
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

HONOURED = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "init_lora_weights",
)
# They describe where an adapter comes from or how its training began or was randomised.
IRRELEVANT = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "runtime_config",
    "lora_dropout",  # trained on with --keep-adapter, an adapter has no dropout here
    "fan_in_fan_out",  # PEFT takes it back where the module is a Linear, as all are here
    # numbers of what is refused or is an initialisation, which do nothing by themselves
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config",
)
REFUSED = {  # and what is more than plain LoRA in it
    "bias": "biases of the base are trained too",
    "use_dora": "DoRA, which rescales the rows of W + s B A",
    "lora_bias": "B has a bias",
    "trainable_token_indices": "rows of the embedding are trained too",
    "alora_invocation_tokens": "aLoRA, which acts only behind certain tokens",
    "target_parameters": "parameters without a module are adapted",
    "layer_replication": "layers of the base are repeated",
    "ensure_weight_tying": "head and embedding are trained as one",
    "megatron_config": "Megatron's layers",
    "use_qalora": "QALoRA, which pools what A reads",
    "monteclora_config": "MonteCLoRA, which draws A and B at random",
    "velora_config": "VeLoRA, which trains on compressed activations",
    "use_bdlora": "BD-LoRA, which makes A or B block-diagonal",
    "arrow_config": "Arrow, which chooses among adapters",
    "kasa_config": "KaSA, which cuts the base and puts a diagonal between B and A",
}
TEXT_OR_TEXTS = Kind("a text or a list of texts",
                     lambda v: is_text(v) or TEXTS.fits(v))
LAYERS = Kind("the number of a layer or a list of them",
              lambda v: is_whole(v, 0) or are_all(lambda layer: is_whole(layer, 0), v))


def of_patterns(kind: Kind) -> Kind:
    """An object with such a value for each pattern."""
    return Kind(f"{kind.words} for each pattern",
                lambda v: isinstance(v, dict) and all(map(kind.fits, v.values())))


# What the settings may hold that are honoured.
SETTING_KINDS = {
    "peft_type": TEXT,
    "r": SIZE,
    "lora_alpha": POSITIVE,
    "rank_pattern": of_patterns(SIZE),
    "alpha_pattern": of_patterns(POSITIVE),
    "use_rslora": BOOL,
    "target_modules": TEXT_OR_TEXTS,
    "exclude_modules": TEXT_OR_TEXTS,
    "layers_to_transform": LAYERS,
    "layers_pattern": TEXT_OR_TEXTS,
    "modules_to_save": TEXTS,
    "init_lora_weights": Kind("true, false or a text", lambda v: BOOL.fits(v) or is_text(v)),
}
PLAIN = {"bias": "none"}  # what a refused setting may say, besides nothing and false
MERGE_IT = "merge it in PEFT by merge_and_unload and name the result by --model"
# Initialisations that leave the base as it is; the others change it, or what is trained.
PLAIN_INIT = ("true", "false", "none", "gaussian", "orthogonal", "eva")
CONVERTIBLE_INIT = ("pissa", "olora", "corda", "lora_ga")
WHOLE_MODULES = {"lm_head", "model.norm"}  # what modules_to_save may name
# Tensors that give away a setting which the config does not name.
TELLTALE = {
    "lora_magnitude_vector": "of DoRA",
    "lora_embedding_": "of an adapter on the embedding",
    "trainable_tokens_": "of trainable_token_indices",
    "lora_B.bias": "of lora_bias",
    "proj.bias": "of bias",
    "embed_tokens.weight": "as save_embedding_layers leaves it there",
    "lm_head.weight": "as save_embedding_layers leaves it there",
}

ENDS = (".lora_A.weight", ".lora_B.weight")
A_PICKLE = "a pickle, which is not opened here; load it in PEFT and save it by save_pretrained"
# Files that hold an adapter in another format, or a model, and what to do where there is no other.
NOT_READ = {
    "adapters.safetensors": "an adapter of MLX, expected PEFT's; merge it by mlx_lm.fuse and name "
                            "the result by --model",
    "*.npz": "an adapter of MLX, expected PEFT's; merge it by mlx_lm.fuse and name the result by "
             "--model",
    "*.bin": A_PICKLE,
    "*.pt": A_PICKLE,
    "*.pth": A_PICKLE,
    "*.ckpt": A_PICKLE,
    "*.gguf": "a file of llama.cpp, expected PEFT's; fetch the adapter that it was made from",
    "state.safetensors": "the checkpoint of a run whose adapter is missing; finish that run by "
                         "train.py with its flags and --resume",
    "model*.safetensors": "the weights of a model, expected an adapter; name it by --model",
    "*.safetensors": "which PEFT would not read either; name it adapter_model.safetensors if PEFT "
                     "saved it",
}


# writing


def write_adapter(dir, config: dict, tensors: dict[str, Tensor]) -> None:
    """Writes both files. config: r, lora_alpha, use_rslora, target_modules, modules_to_save, ..."""
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    plain = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True,
        "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
    }
    # transformers and PEFT refuse a safetensors file without the format's name in its metadata.
    write_atomic(dir / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    write_atomic(dir / "adapter_config.json", json.dumps(plain | config, indent=2).encode())


# reading


def read_adapter(dir) -> tuple[dict, dict[str, Tensor]]:
    """A folder -> (adapter_config.json, tensors by name); UserError where it is not plain LoRA."""
    dir = Path(dir)
    path = dir / "adapter_model.safetensors"
    if not path.exists():
        refuse_other_files(dir)
    config = read_adapter_config(dir)
    tensors = dict(read_tensors(path))
    check_names(path, tensors, config.get("modules_to_save") or ())
    return config, tensors


def refuse_other_files(dir: Path) -> None:
    """UserError where a folder without an adapter_model.safetensors has something else instead."""
    for pattern, what in NOT_READ.items():
        found = sorted(path.name for path in dir.glob(pattern))
        if found:
            raise UserError(f"{dir} has no adapter_model.safetensors but {found[0]}, {what}.")


def check_names(path: Path, names, saved) -> None:
    """UserError for a tensor that is not plain LoRA's, or not called as PEFT calls it.

    saved: modules_to_save, which have a weight under their own name.
    """
    of_lora = [name for name in sorted(names)
               if name.removeprefix(PEFT_PREFIX).removesuffix(".weight") not in saved]
    for name in of_lora:
        for part, what in TELLTALE.items():
            if part in name:
                raise UserError(f"{path} holds {name}, {what}, expected plain LoRA; {MERGE_IT}, or "
                                "save it again without that tensor.")
    for name in of_lora:
        if not (name.startswith(PEFT_PREFIX) and name.endswith(ENDS)):
            raise UserError(f"{path} holds {name}, a name that is not PEFT's, expected "
                            f"{PEFT_PREFIX}<module>{ENDS[0]} or {ENDS[1]}; save it by PEFT's "
                            "save_pretrained.")


def read_adapter_config(dir) -> dict:
    """adapter_config.json, refused with a sentence where it asks for more than plain LoRA."""
    path = Path(dir) / "adapter_config.json"
    config = read_json(path)
    check_kinds(path, config, SETTING_KINDS)
    check_is_lora(path, config)
    check_modules(path, config)
    if is_all_linear(config["target_modules"]):
        config["target_modules"] = list(TARGETS)
    return config


def check_is_lora(path: Path, config: dict) -> None:
    """UserError where a setting asks for something else than LoRA, or for what is not known."""
    kind = config.get("peft_type")
    if kind not in (None, "LORA"):
        raise UserError(f"{path} has peft_type {kind}, expected LORA; {MERGE_IT}.")
    for key, value in config.items():
        if key in HONOURED or key in IRRELEVANT:
            continue
        if not value or value == PLAIN.get(key):  # null, false and empty mean plain LoRA
            continue
        shown = str(value)[:60]
        if key in REFUSED:
            raise UserError(f"{path} has {key} {shown} ({REFUSED[key]}), expected plain LoRA; "
                            f"{MERGE_IT}.")
        raise UserError(f"{path} has {key} {shown}, which is not known here, expected plain LoRA; "
                        f"{MERGE_IT}, or remove the key if it changes nothing.")
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(CONVERTIBLE_INIT):
        raise UserError(f"{path} has init_lora_weights {init}, which changes the base too; save it "
                        "with PEFT's path_initial_model_for_weight_conversion.")
    if init not in PLAIN_INIT:
        raise UserError(f"{path} has init_lora_weights {init}, expected one of "
                        f"{', '.join(PLAIN_INIT)}; {MERGE_IT}.")
    for key in ("r", "lora_alpha"):
        if config.get(key) is None:
            raise UserError(f"{path} has no {key}, expected a number; save the adapter again.")


def check_modules(path: Path, config: dict) -> None:
    """UserError where the settings that choose modules do not, or not as PEFT would."""
    saved = config.get("modules_to_save") or []
    if set(saved) - WHOLE_MODULES:
        raise UserError(f"{path} has modules_to_save {saved}, expected lm_head or model.norm; "
                        f"{MERGE_IT}.")
    targets = config.get("target_modules")
    if not targets:  # PEFT would then drop most tensors
        raise UserError(f"{path} has target_modules {targets}, expected names; save it again.")
    layers = config.get("layers_to_transform")
    if isinstance(targets, str) and layers not in (None, []):
        raise UserError(f"{path} has layers_to_transform {layers} and target_modules {targets}, "
                        "expected a list of modules beside it; PEFT refuses the two as well.")
    if config.get("layers_pattern") and layers is None:
        raise UserError(f"{path} has layers_pattern {config['layers_pattern']} and no "
                        "layers_to_transform, expected both; PEFT refuses the one as well.")
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):  # a list holds names or their ends
            check_patterns(path, key, [config[key]])
    patterns = config.get("layers_pattern") or []
    check_patterns(path, "layers_pattern", [patterns] if isinstance(patterns, str) else patterns)
    for key in ("rank_pattern", "alpha_pattern"):
        check_patterns(path, key, config.get(key) or {})


def check_patterns(path: Path, key: str, patterns) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as e:
            raise UserError(f"{path} has {pattern} in {key}, which is no regular expression ({e}); "
                            "correct it.") from None


# which modules, and how: PEFT's own rules


def is_all_linear(targets) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def is_target(name: str, targets) -> bool:
    """Whether target_modules or exclude_modules names this module.

    A string is a regular expression for the whole name, and a list holds names or their ends.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


def adapts(config: dict, name: str) -> bool:
    """Whether the adapter that adapter_config.json describes has a part on this module."""
    excluded = config.get("exclude_modules")
    if excluded and is_target(name, excluded):
        return False
    if name in (config.get("modules_to_save") or ()):
        return False
    targets = config["target_modules"]
    if not is_target(name, targets):
        return False
    layers = config.get("layers_to_transform")
    if layers in (None, []) or name in targets:  # a module's full name needs no layer
        return True
    layer = layer_of(name, config.get("layers_pattern"))
    return layer == layers or (isinstance(layers, list) and layer in layers)


def layer_of(name: str, patterns) -> int | None:
    """The number of the layer in a module's name: model.layers.7.mlp.up_proj -> 7.

    patterns: what the list of layers is called, one or more; with none, any name will do.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    for pattern in patterns or [r"[^.]*"]:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if found:
            return int(found[1])
    return None


def value_for(patterns: dict | None, name: str, otherwise):
    """A module's own rank or alpha, by the first pattern that is its name or the end of it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return otherwise

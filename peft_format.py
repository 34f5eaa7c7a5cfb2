"""PEFT's files for an adapter, read and written without PEFT.

    adapter_config.json          rank, alpha, which modules
    adapter_model.safetensors    base_model.model.<Hugging Face's name>.lora_A.weight (r, in), ...

What goes beyond plain LoRA is refused by name: loaded as plain LoRA, it would be another model.
"""

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from files import write_atomic
from model import UserError, read_json, read_tensors

PEFT_PREFIX = "base_model.model."  # stands before Hugging Face's own names

# What adapter_config.json may say besides rank, alpha and modules; anything else is not plain LoRA.
PLAIN = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
    "fan_in_fan_out": False, "lora_bias": False, "alora_invocation_tokens": None,
    "exclude_modules": None, "layers_to_transform": None,
}
# Initialisations that also change the base weights.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
WHOLE_MODULES = {"lm_head", "model.norm"}  # what modules_to_save may name


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


def read_adapter(dir) -> tuple[dict, dict[str, Tensor]]:
    """A folder -> (adapter_config.json, tensors by name); UserError where it is not plain LoRA."""
    config = read_adapter_config(dir)
    return config, dict(read_tensors(Path(dir) / "adapter_model.safetensors"))


def read_adapter_config(dir) -> dict:
    """adapter_config.json, refused with a sentence where it asks for more than plain LoRA."""
    path = Path(dir) / "adapter_config.json"
    config = read_json(path)
    for key, value in PLAIN.items():
        found = config.get(key)
        if found and found != value:  # null, false and empty mean plain LoRA as well
            raise UserError(f"{path} has {key} {found}, expected plain LoRA, {value}; train such "
                            "an adapter.")
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(CHANGE_THE_BASE):
        raise UserError(f"{path} has init_lora_weights {init}, which changes the base too; save it "
                        "with PEFT's path_initial_model_for_weight_conversion.")
    surplus = set(config.get("modules_to_save") or ()) - WHOLE_MODULES
    if surplus:
        raise UserError(f"{path} has modules_to_save {surplus}, expected lm_head or model.norm.")
    targets = config.get("target_modules")
    if not targets or not isinstance(targets, (str, list)):  # PEFT would then drop most tensors
        raise UserError(f"{path} has target_modules {targets}, expected names; save it again.")
    r = config.get("r")
    alpha = config.get("lora_alpha")
    if not (isinstance(r, int) and r >= 1 and isinstance(alpha, (int, float))):
        raise UserError(f"{path} has r {r} and lora_alpha {alpha}, expected an integer above 0 and "
                        "a number; save the adapter again.")
    return config

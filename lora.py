"""Low-rank adapters on the seven projections, and PEFT's file format for them.

    y = W x + s * B (A x)        W (out, in) frozen;  A (rank, in), B (out, rank) trained
    s = alpha / rank             or alpha / sqrt(rank) when rank-stabilised (rsLoRA)

A ~ U(-1/sqrt(in), 1/sqrt(in)), which is kaiming-uniform with a = sqrt(5); B = 0, so training
starts at the aligned model bit for bit, and the first step moves B alone. Hu et al. 2021, arXiv
2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.

    python lora.py merge --model DIR --adapter DIR --out DIR      # a folder for other programs

Adapters are fp32 over a base of any dtype: an AdamW step of 1e-5 on an entry of 0.02 rounds away in
bf16. Where the base is bf16, A and B are cast at use; PEFT casts and keeps the activations instead.
"""

import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save, save_file
from torch import Tensor, nn

from cli import Parser, exit_code
from model import UserError, load_model, read_json, read_tensors, to_fp32, weight_files

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT_PREFIX = "base_model.model."  # before Hugging Face's own names


class LoRALinear(nn.Module):
    """A frozen Linear with an adapter; takes over the Linear's weight and bias, names unchanged."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, rslora: bool):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        out_features, in_features = base.weight.shape
        new = dict(dtype=torch.promote_types(base.weight.dtype, torch.float32),
                   device=base.weight.device)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, **new))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, **new))
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        ax = F.linear(x, self.lora_A.to(x.dtype))  # (N, rank)
        return torch.addmm(F.linear(x, self.weight, self.bias), ax, self.lora_B.to(x.dtype).T,
                           alpha=self.scaling)  # W x + s B (A x)


def adapted(model: nn.Module):
    """(name, module) of every LoRALinear, in the model's order."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear)]


def add_lora(model: nn.Module, rank: int, alpha: float, rslora: bool = False, targets=TARGETS,
             seed: int = 0) -> list[nn.Parameter]:
    """Puts fresh adapters on those of the seven projections that `targets` names.

    As in PEFT a string is a regular expression for the whole name, and a list holds names or their
    ends. Returns the tensors to train, A and B of each module: the only ones with requires_grad. A
    is drawn on the CPU from `seed`, so that a run starts alike on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        named = (re.fullmatch(targets, name) if isinstance(targets, str) else
                 any(f".{name}".endswith(f".{t}") for t in targets))
        if last not in TARGETS or not named or not isinstance(module, (nn.Linear, LoRALinear)):
            continue
        layer = LoRALinear(module, rank, alpha, rslora)
        bound = 1 / math.sqrt(module.weight.shape[1])
        draw = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            layer.lora_A.copy_(draw)
        setattr(model.get_submodule(parent), last, layer)
    return trainable(model)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What is trained: A and B of each adapter in turn; empty without adapters."""
    return [p for p in adapter_params(model).values() if p.requires_grad]


def adapter_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters, and what open_module opened, under PEFT's names."""
    return {f"{PEFT_PREFIX}{name}.{part}.weight": getattr(m, part)
            for name, m in adapted(model) for part in ("lora_A", "lora_B")} | {
        PEFT_PREFIX + name: p for name, p in model.named_parameters()
        if p.requires_grad and "lora_" not in name}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The same, on the CPU."""
    return {k: p.detach().cpu().contiguous() for k, p in adapter_params(model).items()}


def open_module(model: nn.Module, name: str) -> nn.Parameter:
    """Makes "lm_head" or "model.norm" a trained fp32 weight; a tied head gets one of its own."""
    if name == "lm_head" and model.config.tied:
        model.lm_head, model.config.tied = nn.Linear(1, 1, bias=False, device="meta"), False
        model.lm_head.weight = model.model.embed_tokens.weight
    module = model.get_submodule(name)
    module.weight = nn.Parameter(to_fp32(module.weight.detach()).clone())
    return module.weight


def write_atomic(path, data: bytes) -> None:
    """Writes, syncs, renames: a reader or a crash sees the old file or the new one, never half."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:  # a full disk, say
        temporary.unlink(missing_ok=True)
        raise


def save_adapter(model: nn.Module, dir, base: str | None = None) -> None:
    """adapter_model.safetensors and adapter_config.json, for PeftModel.from_pretrained."""
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    names, first = [name for name, _ in adapted(model)], adapted(model)[0][1]
    ends = {name.rpartition(".")[2] for name in names}
    every = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": first.rank, "lora_alpha": first.alpha, "use_rslora": first.rslora,
        "target_modules": sorted(ends if every == names else names),
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "inference_mode": True, "use_dora": False,
        "modules_to_save": [n[len(PEFT_PREFIX):-len(".weight")] for n in adapter_params(model)
                            if "lora_" not in n] or None,
        "rank_pattern": {}, "alpha_pattern": {},
    }
    # transformers and PEFT refuse a safetensors file without the format's name in its metadata.
    write_atomic(dir / "adapter_model.safetensors", save(adapter_state(model), {"format": "pt"}))
    write_atomic(dir / "adapter_config.json", json.dumps(config, indent=2).encode())


def read_adapter_config(dir) -> dict:
    """adapter_config.json, refused with a sentence where it asks for more than plain LoRA."""
    path = Path(dir) / "adapter_config.json"
    config = read_json(path)
    plain = {"peft_type": "LORA", "bias": "none", "use_dora": False,
             "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False, "lora_bias": False,
             "alora_invocation_tokens": None, "exclude_modules": None, "layers_to_transform": None}
    for key, value in plain.items():
        if (config.get(key) or value) != value:
            raise UserError(f"{path} has {key} {config[key]}, expected plain LoRA, {value}; "
                            "train such an adapter.")
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise UserError(f"{path} has init_lora_weights {init}, which changes the base too; save it "
                        "with PEFT's path_initial_model_for_weight_conversion.")
    if whole := set(config.get("modules_to_save") or ()) - {"lm_head", "model.norm"}:
        raise UserError(f"{path} has modules_to_save {whole}, expected lm_head or model.norm.")
    targets = config.get("target_modules")
    if not targets or not isinstance(targets, (str, list)):  # PEFT would then drop most tensors
        raise UserError(f"{path} has target_modules {targets}, expected names; save it again.")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(r, int) and r >= 1 and isinstance(alpha, (int, float))):
        raise UserError(f"{path} has r {r} and lora_alpha {alpha}, expected an integer above 0 and "
                        "a number; save the adapter again.")
    return config


def load_adapter(model: nn.Module, dir) -> list[nn.Parameter]:
    """Adds the adapters that `dir` (PEFT's format) describes, and fills them.

    Returns the trainable tensors. UserError where file and model do not fit, by name or shape.
    """
    config = read_adapter_config(dir)
    state = dict(read_tensors(Path(dir) / "adapter_model.safetensors"))
    params = add_lora(model, config["r"], config["lora_alpha"], config.get("use_rslora", False),
                      config["target_modules"])
    for name in config.get("modules_to_save") or ():
        params.append(open_module(model, name))
    want = {name: p.shape for name, p in adapter_params(model).items()}
    wrong = sorted(n for n in want.keys() | state.keys()
                   if n not in want or n not in state or state[n].shape != want[n])
    if wrong:
        raise UserError(f"{dir} does not fit the model: {len(wrong)} tensors are missing, surplus "
                        f"or misshapen, first {wrong[0]}; name the model it was trained on.")
    with torch.no_grad():
        for name, p in adapter_params(model).items():
            p.copy_(state[name])
    return params


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """W <- W + s B A, added in fp32 and rounded once to W's dtype; then nothing is trained."""
    model.requires_grad_(False)
    for name, m in adapted(model):
        parent, _, last = name.rpartition(".")
        linear = nn.Linear(*m.weight.T.shape, bias=m.bias is not None, device="meta")
        merged = m.weight.to(m.lora_A.dtype) + m.scaling * (m.lora_B @ m.lora_A)
        linear.weight = nn.Parameter(merged.to(m.weight.dtype), requires_grad=False)
        linear.bias = m.bias
        setattr(model.get_submodule(parent), last, linear)


def merge_folder(model_dir, adapter_dir, out) -> str:
    """Writes model + adapter as one folder, in the shards, names and dtypes of the model's own.

    Returns a sentence on how far the one rounding of W + s B A moved the logits.
    """
    model_dir, out = Path(model_dir), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; pass another --out.")
    model = load_model(model_dir, dtype=None)
    if len(dtypes := {str(p.dtype)[6:] for p in model.parameters() if p.ndim == 2}) > 1:
        raise UserError(f"{model_dir} mixes {' and '.join(sorted(dtypes))}, expected one dtype.")
    load_adapter(model, adapter_dir)
    if any("lora_" not in name for name in adapter_params(model)):
        raise UserError(f"{adapter_dir} holds whole modules, expected adapters alone to merge.")
    n = min(256, model.config.max_positions)
    ids = torch.randint(model.config.vocab_size, (n,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = model(ids, [n])
        merge(model)
        far = (model(ids, [n]).float() - apart.float()).abs().max()
    merged, part = model.state_dict(), out.resolve().with_name(out.resolve().name + ".part")
    part.mkdir(parents=True)
    try:
        for path in weight_files(model_dir):
            tensors = {name: merged.get(name, t) for name, t in read_tensors(path)}
            save_file(tensors, part / path.name, {"format": "pt"})
            (part / path.name).chmod(0o644)  # safetensors lets only their owner read them
        for path in model_dir.iterdir():  # config, index, tokenizer, template
            if path.is_file() and path.suffix in (".json", ".model", ".txt", ".jinja"):
                shutil.copyfile(path, part / path.name)
        os.replace(part, out.resolve())
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return (f"{out}: over {n} random tokens in {str(apart.dtype)[6:]} merging moved a logit by "
            f"{far:.2g} at the most; the logits' standard deviation is {apart.float().std():.2g}.")


def main(argv=None) -> int:
    """0 done, 2 the user's mistake, 3 failed, 130 interrupted."""
    p = Parser("lora.py", "Merge an adapter into its model, as a Hugging Face folder.")
    p.add_argument("command", choices=("merge",))
    p.add_argument("--model", required=True, help="Hugging Face folder")
    p.add_argument("--adapter", required=True, help="folder with an adapter in PEFT's format")
    p.add_argument("--out", required=True, help="folder to write")
    args = p.parse_args(argv)
    return exit_code("lora.py", lambda: print(merge_folder(args.model, args.adapter, args.out)))


if __name__ == "__main__":
    sys.exit(main())

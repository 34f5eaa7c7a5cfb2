"""Low-rank adapters on the seven projections: the layer, how it is put on a model, and merging.

    y = W x + s * B (A x)        W (out, in) frozen;  A (rank, in), B (out, rank) trained
    s = alpha / rank             or alpha / sqrt(rank) when rank-stabilised (rsLoRA)

A ~ U(-1/sqrt(in), 1/sqrt(in)), which is kaiming-uniform with a = sqrt(5); B = 0, so training
starts at the aligned model bit for bit, and the first step moves B alone. Hu et al. 2021, arXiv
2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.

Adapters are fp32 over a base of any dtype: an AdamW step of 1e-5 on an entry of 0.02 rounds away in
bf16. Where the base is bf16, A and B are cast at use; PEFT casts and keeps the activations instead.

The files are PEFT's (peft_format.py); `python merge.py` writes model and adapter as one folder.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_format
from model import FLOATS, UserError, to_fp32
from peft_format import PEFT_PREFIX, TARGETS, is_target


class LoRALinear(nn.Module):
    """A frozen Linear with an adapter; takes over the Linear's weight and bias, names unchanged."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, rslora: bool):
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        out_features, in_features = base.weight.shape
        device = base.weight.device
        if device.type == "meta":  # the weight is still to be loaded: PyTorch's default device
            device = None
        like = dict(dtype=torch.promote_types(base.weight.dtype, torch.float32), device=device)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, **like))
        self.rank = rank
        self.alpha = alpha
        self.rslora = rslora
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        ax = F.linear(x, self.lora_A.to(x.dtype))  # (N, rank)
        wx = F.linear(x, self.weight, self.bias)  # (N, out)
        # In place, since addmm would begin with a copy of W x.
        return wx.addmm_(ax, self.lora_B.to(x.dtype).T, alpha=self.scaling)  # W x + s B (A x)


# on a model


def add_lora(model: nn.Module, rank: int, alpha: float, rslora: bool = False, targets=TARGETS,
             seed: int = 0) -> list[nn.Parameter]:
    """Puts fresh adapters on those of the seven projections that `targets` names.

    As in PEFT a string is a regular expression for the whole name, and a list holds names or their
    ends. Returns the tensors to train, A and B of each module: the only ones with requires_grad. A
    is drawn on the CPU from `seed`, so that a run starts alike on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    for name in projections(model):
        if not is_target(name, targets):
            continue
        layer = adapt(model, name, rank, alpha, rslora)
        bound = 1 / math.sqrt(layer.weight.shape[1])
        draw = torch.empty(layer.lora_A.shape, device="cpu")
        draw.uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            layer.lora_A.copy_(draw)
    return trainable(model)


def projections(model: nn.Module) -> list[str]:
    """The names of the modules that can have an adapter, in the model's order."""
    return [name for name, module in model.named_modules()
            if name.rpartition(".")[2] in TARGETS and isinstance(module, (nn.Linear, LoRALinear))]


def adapt(model: nn.Module, name: str, rank: int, alpha: float, rslora: bool) -> LoRALinear:
    """Puts an adapter on one projection; its A is still to be filled."""
    parent, _, last = name.rpartition(".")
    layer = LoRALinear(model.get_submodule(name), rank, alpha, rslora)
    setattr(model.get_submodule(parent), last, layer)
    return layer


def adapted(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """(name, module) of every LoRALinear, in the model's order."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


def train_whole_module(model: nn.Module, name: str) -> nn.Parameter:
    """Makes the weight of "lm_head" or "model.norm" a trained fp32 one.

    A head that is tied to the embedding gets a weight of its own, and the embedding stays frozen.
    """
    if name == "lm_head" and model.config.tied:
        model.lm_head = nn.Linear(1, 1, bias=False, device="meta")
        model.lm_head.weight = model.model.embed_tokens.weight
        model.config.tied = False
    module = model.get_submodule(name)
    module.weight = nn.Parameter(to_fp32(module.weight.detach()).clone())
    return module.weight


def adapter_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """By PEFT's names: A and B of every adapter, and the weights of whole modules in training."""
    params = {}
    for name, module in adapted(model):
        params[f"{PEFT_PREFIX}{name}.lora_A.weight"] = module.lora_A
        params[f"{PEFT_PREFIX}{name}.lora_B.weight"] = module.lora_B
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_" not in name:
            params[PEFT_PREFIX + name] = p
    return params


def whole_modules(model: nn.Module) -> list[str]:
    """The modules that are trained as a whole, which PEFT calls modules_to_save."""
    modules = []
    for name in adapter_params(model):
        if "lora_" not in name:
            modules.append(name.removeprefix(PEFT_PREFIX).removesuffix(".weight"))
    return modules


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What is trained: A and B of each adapter in turn; empty without adapters."""
    return [p for p in adapter_params(model).values() if p.requires_grad]


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


# to and from PEFT's files


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """adapter_params as plain tensors on the CPU."""
    return {name: p.detach().cpu().contiguous() for name, p in adapter_params(model).items()}


def save_adapter(model: nn.Module, dir, base: str | None = None) -> None:
    """adapter_model.safetensors and adapter_config.json, for PeftModel.from_pretrained.

    base: the name of the model that the adapter belongs to, as a note for other programs.
    """
    names = [name for name, _ in adapted(model)]
    first = adapted(model)[0][1]
    own_rank = {name: m.rank for name, m in adapted(model) if m.rank != first.rank}
    own_alpha = {name: m.alpha for name, m in adapted(model) if m.alpha != first.alpha}
    ends = {name.rpartition(".")[2] for name in names}
    with_such_an_end = [name for name, _ in model.named_modules()
                        if name.rpartition(".")[2] in ends]
    config = {
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "use_rslora": first.rslora,
        # Ends are short to read, and right where every module with such an end has an adapter.
        "target_modules": sorted(ends if with_such_an_end == names else names),
        "modules_to_save": whole_modules(model) or None,
        "rank_pattern": own_rank,
        "alpha_pattern": own_alpha,
    }
    peft_format.write_adapter(dir, config, adapter_state(model))


def load_adapter(model: nn.Module, dir) -> list[nn.Parameter]:
    """Adds the adapters that `dir` (PEFT's format) describes, and fills them.

    Returns the trainable tensors. UserError where file and model do not fit, by name or shape.
    """
    config, state = peft_format.read_adapter(dir)
    add_described(model, config, dir)
    trained = trainable(model)
    for name in config.get("modules_to_save") or ():
        trained.append(train_whole_module(model, name))
    params = adapter_params(model)
    check_shapes(dir, params, state)
    for name, tensor in state.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f"{dir} holds {name} as {tensor.dtype}, expected floating-point "
                            "numbers of 16 bits or more; save the adapter again.")
        if not tensor.isfinite().all():
            raise UserError(f"{dir} holds {name} with a number that is NaN or infinite, so its "
                            "training failed; train it again.")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(state[name])
    return trained


def check_shapes(dir, params: dict[str, nn.Parameter], state: dict[str, Tensor]) -> None:
    """UserError unless the files hold exactly the tensors that the model's adapters have."""
    expected = {name: tuple(p.shape) for name, p in params.items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    names = expected.keys() | found.keys()
    wrong = sorted(name for name in names if expected.get(name) != found.get(name))
    if not wrong:
        return
    first = wrong[0]
    if first in expected and first in found:
        rank_there = rank_of(first, found[first])
        rank_here = rank_of(first, expected[first])
        if rank_there and rank_there != rank_here:
            raise UserError(f"{dir} holds {first} of rank {rank_there}, expected {rank_here} by r "
                            "and rank_pattern of its adapter_config.json; take both files from one "
                            "place.")
    raise UserError(f"{dir} does not fit the model: {len(wrong)} tensors are missing, surplus or "
                    f"misshapen; {first} is {found.get(first, 'missing')}, expected "
                    f"{expected.get(first, 'none (surplus)')}; name the model it was trained on.")


def rank_of(name: str, shape: tuple) -> int | None:
    """The rank of which A (rank, in) or B (out, rank) has this shape; None of other tensors."""
    if len(shape) != 2 or "lora_" not in name:
        return None
    return shape[0] if "lora_A" in name else shape[1]


def add_described(model: nn.Module, config: dict, dir) -> None:
    """Puts on the model the adapters of an adapter_config.json, which are still to be filled.

    UserError where it chooses a module that can have none here, for example the head.
    """
    can_have_one = projections(model)
    names = [name for name, _ in model.named_modules() if name]
    if "lm_head" not in names:  # a tied head, which has a name all the same
        names.append("lm_head")
    for name in names:
        if not peft_format.adapts(config, name):
            continue
        if name not in can_have_one:
            raise UserError(f"{dir} has {name} among its target_modules, expected "
                            f"{', '.join(TARGETS)}; {peft_format.MERGE_IT}.")
        rank = peft_format.value_for(config.get("rank_pattern"), name, config["r"])
        alpha = peft_format.value_for(config.get("alpha_pattern"), name, config["lora_alpha"])
        adapt(model, name, rank, alpha, bool(config.get("use_rslora")))

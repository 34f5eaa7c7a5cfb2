"""T-Vaccine: Vaccine on the layers that matter for harm, and only those are trained.

    n_l = ||d CE(x_h) / d a_l||,  p_l = n_l / sum n     x_h: one harmful pair, every 200 updates
    S   = 8 layers drawn by p without replacement       every 20 updates
    update: Vaccine's, in the layers of S alone (one norm over S); adapters outside S are frozen

Liu et al. 2024; Lslland/T-Vaccine at 4513750, trainer.py:190-312 and script/alignment/T-Vaccine.sh
(rho 3, 8 layers, 20, 200, learning rate 1e-3); its parser says 5 layers. Harmful pairs: the first
200 of harmful/align.jsonl with their harmful replies.

Differs from the repository: it freezes the attention adapters outside S but leaves all layers' MLP
adapters in training, except where re-entrant checkpointing drops their gradients. Here a layer
outside S is frozen as a whole, as the paper says; --t-vaccine-mlp trains all layers' MLP adapters.
The state of AdamW of a frozen adapter is kept. Hooks instead of patched model files.

    python train.py --defense t-vaccine --lr 3e-4 --out runs/t-vaccine
    python train.py --defense sft --adapter runs/t-vaccine
"""

import torch

import distributed
from baselines.common import Defence, Published, defender_rows, wide
from baselines.vaccine import perturbations, perturbed_backward
from cli import COUNT, at_least
from data.batches import generator_of
from lora import adapted

N_HARMFUL = 200  # harmful pairs that are probed, as in the repository


def add_flags(group) -> None:
    group.add_argument("--t-vaccine-rho", type=at_least(float, 0), default=3.0,
                       help="norm of the perturbation")
    group.add_argument("--t-vaccine-layers", type=COUNT, default=8, help="layers in S")
    group.add_argument("--t-vaccine-draw", type=COUNT, default=20,
                       help="updates between draws of S")
    group.add_argument("--t-vaccine-probe", type=COUNT, default=200,
                       help="updates between probes of n")
    group.add_argument("--t-vaccine-mlp", action="store_true",
                       help="train every layer's MLP adapters")


def harm_norms(model, batch) -> torch.Tensor:
    """n (L,), up to a factor: how strongly the loss depends on each attention's output."""
    layers = list(range(model.config.n_layer))
    e, _ = perturbations(model, batch, layers, rho=1.0)  # proportional to the gradients
    squared = 0.0
    for pack in e:
        squared = squared + torch.stack([wide(e_l).square().sum() for e_l in pack])
    return distributed.total(squared).sqrt()


def draw(p: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """n distinct layers by the probabilities p, in order; the rest's are renormalised each time."""
    return torch.multinomial(p, n, replacement=False, generator=generator).sort().values


def make_step(model, tokenizer, args, data):
    L = model.config.n_layer
    n = min(args.t_vaccine_layers, L)
    harmful = defender_rows(model, tokenizer, args, data, "harmful", batch_size=1,
                            n=N_HARMFUL)
    p = torch.full((L,), 1 / L, dtype=torch.float64)
    S = torch.arange(n)

    def step(batch):
        t = batch.step
        if t % args.t_vaccine_probe == 0:
            norms = harm_norms(model, harmful.at(t // args.t_vaccine_probe)).cpu()
            share = norms / norms.sum()
            if share.isfinite().all():  # it is 0 / 0 where that loss is flat; then p stays
                p.copy_(share)
        if t % args.t_vaccine_draw == 0:
            S.copy_(draw(p, n, generator_of(args.seed, t)))
        chosen = S.tolist()
        numbers = perturbed_backward(model, batch, chosen, args.t_vaccine_rho)
        for name, module in adapted(model):
            layer = int(name.split(".")[2])  # of "model.layers.7.mlp.up_proj"
            trained_everywhere = args.t_vaccine_mlp and ".mlp." in name
            if layer not in chosen and not trained_everywhere:
                module.lora_A.grad = None  # AdamW skips what has no gradient
                module.lora_B.grad = None
        return numbers

    step.state = {"p": p, "S": S}
    return step


DEFENCE = Defence(
    name="t-vaccine",
    make_step=make_step,
    stages=("align",),
    add_flags=add_flags,
    # Probed every 20 updates: every 200, as published, would be three or four times in all.
    search=(
        "--t-vaccine-probe 20 --t-vaccine-rho 3 --lr 1e-5",
        "--t-vaccine-probe 20 --t-vaccine-rho 3 --lr 1e-4",
        "--t-vaccine-probe 20 --t-vaccine-rho 3 --lr 3e-4",
        "--t-vaccine-probe 20 --t-vaccine-rho 3 --lr 1e-3",
        "--t-vaccine-probe 20 --t-vaccine-rho 10 --lr 1e-5",
        "--t-vaccine-probe 20 --t-vaccine-rho 10 --lr 1e-4",
        "--t-vaccine-probe 20 --t-vaccine-rho 10 --lr 3e-4",
        "--t-vaccine-probe 20 --t-vaccine-rho 10 --lr 1e-3",
    ),
    published=Published(
        setting="--t-vaccine-probe 200 --t-vaccine-rho 3 --lr 1e-3 --batch-size 10 --epochs 20 "
                "--rank 8 --alpha 1",
        source="Lslland/T-Vaccine at 4513750, script/alignment/T-Vaccine.sh: rho 3, 8 layers, "
               "drawn every 20 and probed every 200 updates, 2,000 rows, alpha / rank = 1/8",
        updates=4_000))  # 2,000 rows x 20 epochs / 10

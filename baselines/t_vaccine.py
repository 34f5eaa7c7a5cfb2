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

from baselines import align_examples, wide
from baselines.vaccine import perturbations, perturbed_backward
from cli import COUNT, at_least
from lora import adapted


def add_flags(g):
    g.add_argument("--t-vaccine-rho", type=at_least(float, 0), default=3.0,
                   help="norm of the perturbation")
    g.add_argument("--t-vaccine-layers", type=COUNT, default=8, help="layers in S")
    g.add_argument("--t-vaccine-draw", type=COUNT, default=20, help="updates between draws of S")
    g.add_argument("--t-vaccine-probe", type=COUNT, default=200, help="updates between probes of n")
    g.add_argument("--t-vaccine-mlp", action="store_true", help="train every layer's MLP adapters")


def harm_norms(model, batch) -> torch.Tensor:
    """n (L,): how strongly the loss on a harmful pair depends on each attention's output."""
    e, _ = perturbations(model, batch, list(range(model.config.n_layer)), 1.0)
    return sum(torch.stack([wide(g).square().sum() for g in pack]) for pack in e).sqrt()


def draw(p: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """n distinct layers by the probabilities p, in order; the rest's are renormalised each time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(p, n, replacement=False, generator=generator).sort().values


def make_step(model, tokenizer, args):
    L = model.config.n_layer
    n = min(args.t_vaccine_layers, L)
    harmful = align_examples(model, tokenizer, args, "harmful", batch_size=1, n=200)
    p, S = torch.full((L,), 1 / L, dtype=torch.float64), torch.arange(n)

    def step(batch):
        t = batch.step
        if t % args.t_vaccine_probe == 0:
            norms = harm_norms(model, harmful.at(t // args.t_vaccine_probe)).cpu()
            share = norms / norms.sum()
            p.copy_(share if share.isfinite().all() else p)  # 0 / 0 where that loss is flat
        if t % args.t_vaccine_draw == 0:
            S.copy_(draw(p, n, args.seed * 100_003 + t))
        chosen = S.tolist()
        numbers = perturbed_backward(model, batch, chosen, args.t_vaccine_rho)
        for name, module in adapted(model):
            in_all = args.t_vaccine_mlp and ".mlp." in name
            if int(name.split(".")[2]) not in chosen and not in_all:
                module.lora_A.grad = module.lora_B.grad = None  # frozen: AdamW skips it
        return numbers

    step.state = {"p": p, "S": S}
    return step

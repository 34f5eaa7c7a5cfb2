"""Vaccine: align under the worst small perturbation of hidden states, so that later ones do less.

    g_l = d CE(B) / d a_l              a_l (N, C): what layer l's attention adds to the residual
    e_l = rho g_l / (||g|| + 1e-7)     one norm over all layers, rows and tokens of the batch
    update: the gradient of CE(B) with a_l + e_l in place of a_l, e_l constant

An alignment-stage method: the loop runs on harmful/align.jsonl, and what comes out is then
attacked. Huang et al. 2024; git-disl/Vaccine at 8937f68, trainer.py:85-181. Its README's example
has rho = 2, T-Vaccine's and Booster's re-runs 3 and 5; its learning rate is 1e-3.

Differs from the repository: pass 1 asks for the gradient of the zeros that are added to a_l, so no
parameter gradient is computed and none has to be cleared: gradient accumulation is exact, where
there zero_grad drops the earlier micro-batches. Its adapters have dropout, another mask in each
pass; these have none. Optimiser and adapters are this project's, the same for every method.

    python train.py --defense vaccine --vaccine-rho 2 --lr 3e-4 --out runs/vaccine
    python train.py --defense sft --adapter runs/vaccine
"""

from contextlib import contextmanager
from itertools import chain

import torch

import distributed
from baselines.common import Defence, Published, nll, squared_norm
from cli import at_least


def add_flags(group) -> None:
    group.add_argument("--vaccine-rho", type=at_least(float, 0), default=2.0,
                       help="norm of the perturbation")


@contextmanager
def added(model, layers: list[int], z):
    """Adds z[i] (N, C) to the attention output of layers[i], in forward and in recomputation."""
    handles = []
    for layer, z_l in zip(layers, z, strict=True):
        def add(module, inputs, output, z_l=z_l):  # its own layer's z, not the loop's last one
            return output + z_l
        handles.append(model.model.layers[layer].self_attn.register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def perturbations(model, batch, layers: list[int], rho: float):
    """Pass 1 -> (e for each pack and layer, ||g||); leaves every .grad alone."""
    like = dict(dtype=model.dtype, device=model.device, requires_grad=True)
    gradients = []
    # Each token of each sequence is perturbed on its own, so no two may share a state.
    for pack in batch.packs(share=False):
        z = [torch.zeros(len(pack.ids), model.config.dim, **like) for _ in layers]
        with added(model, layers, z):
            loss = nll(model, pack) / batch.n_supervised
            gradients.append(torch.autograd.grad(loss, z))  # of a zero leaf: that of a_l itself
    squared = squared_norm(chain.from_iterable(gradients))
    size = distributed.total(squared).sqrt()  # over the whole batch
    scale = rho / (size + 1e-7)
    e = []
    for pack_gradients in gradients:
        e.append([(g * scale).to(g.dtype) for g in pack_gradients])
    return e, size


def perturbed_backward(model, batch, layers: list[int], rho: float):
    """Both passes: adds the gradient of the perturbed loss to .grad -> numbers to log."""
    e, size = perturbations(model, batch, layers, rho)
    ce = 0.0
    for pack, e_pack in zip(batch.packs(share=False), e, strict=True):
        with added(model, layers, e_pack):
            loss = nll(model, pack) / batch.n_supervised
            loss.backward()
        ce = ce + loss.detach()
    (ce,) = distributed.add_up(model, ce)
    return {"loss": ce, "ce": ce, "hidden_gradient": size}


def make_step(model, tokenizer, args, data):
    layers = list(range(model.config.n_layer))

    def step(batch):
        return perturbed_backward(model, batch, layers, args.vaccine_rho)

    return step


DEFENCE = Defence(
    name="vaccine",
    make_step=make_step,
    stages=("align",),
    add_flags=add_flags,
    search=(
        "--vaccine-rho 2 --lr 1e-5",
        "--vaccine-rho 2 --lr 1e-4",
        "--vaccine-rho 2 --lr 3e-4",
        "--vaccine-rho 2 --lr 1e-3",
        "--vaccine-rho 5 --lr 1e-5",
        "--vaccine-rho 5 --lr 1e-4",
        "--vaccine-rho 5 --lr 3e-4",
        "--vaccine-rho 5 --lr 1e-3",
    ),
    published=Published(
        setting="--vaccine-rho 2 --lr 1e-3 --batch-size 5 --epochs 50 --rank 8 --alpha 1",
        source="git-disl/Vaccine at 8937f68, README.md and script/alignment/Vaccine.sh: rho 2, "
               "2,000 rows, alpha / rank = 1/8",
        updates=20_000))  # 2,000 rows x 50 epochs / 5

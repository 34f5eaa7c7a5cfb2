"""Safety Bottleneck Regularization: hold the final hidden state of K harmful prompts where it was.

    h(x')      = final RMSNorm output at the last token of prompt x', (C,)      the bottleneck
    h_ref(x')  = the same in the aligned model, before any training             phase 1, once
    L_safe     = mean_k ||h(x'_k) - h_ref(x'_k)||^2                             phase 2, each update
    L_total    = L_CE + lambda * L_safe                                         in train.py

Why there: a token's logit is the inner product of h with its row of the unembedding, which is
frozen. Weights, gradients and inner representations have room to move around a constraint; the
first token of a reply is decided by h alone. While h stays, the refusal's first token stays.

--reduction sum is the paper's formula, the squared norm; --reduction mean divides by C as well, as
the paper's code does (F.mse_loss, HFT_SBR.py:93 of soyoaaa/SBR at 188990b): its lambda = 50 weighs
50 / 4096 per squared norm on an 8B model.
"""

import torch
from torch import Tensor

from model import Llama, UserError, to_device, to_fp32
from packing import pack_sequences


class FinalNorm:
    """`with FinalNorm(model) as norm:` catches the final RMSNorm's output as norm.value, (N, C).

    That is h of every row. Besides the anchors, stress/ measures h with it.
    """

    def __init__(self, model: Llama):
        self.norm = model.model.norm
        self.value = None

    def _catch(self, module, inputs, output):
        self.value = output

    def __enter__(self):
        self.handle = self.norm.register_forward_hook(self._catch)
        return self

    def __exit__(self, *exception):
        self.handle.remove()


@torch.no_grad()
def reference(model: Llama, tokenizer, prompts: list[str]) -> Tensor:
    """h (K, C), at least fp32: the final norm's output at each prompt's last token."""
    return to_fp32(states(model, encode(tokenizer, prompts)))


def encode(tokenizer, prompts: list[str]) -> list[Tensor]:
    """Each prompt under the chat template, up to where the assistant starts to write."""
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [torch.tensor(tokenizer.encode_prompt(messages)) for messages in conversations]


def states(model: Llama, ids: list[Tensor]) -> Tensor:
    """h (K, C) at the last token of each sequence, packed in one pass."""
    packing = pack_sequences(ids)
    last = to_device(packing.last_rows(), model.device)  # (K,)
    with FinalNorm(model) as norm:
        # One row, since the logits are not needed.
        ids = to_device(packing.ids, model.device)
        model(ids, packing.seqlens, path=packing.path, rows=last[:1])
        return norm.value[last]


class Anchors:
    """K prompts, their reference states, and L_safe. With K = 0 there is nothing to hold."""

    def __init__(self, model: Llama, tokenizer, prompts: list[str], reduction: str, max_len: int):
        """Phase 1, before the first update: the model still is the aligned one."""
        self.prompts = prompts
        self.reduction = reduction
        self.ids = encode(tokenizer, prompts)
        for prompt, ids in zip(prompts, self.ids, strict=True):
            if len(ids) > max_len:
                raise UserError(f"the anchor {prompt[:40]!r} has {len(ids)} tokens, above "
                                f"--max-len {max_len}; shorten it or raise --max-len.")
        self.h_ref = reference(model, tokenizer, prompts) if prompts else None  # (K, C)

    def loss(self, h: Tensor) -> Tensor:
        """L_safe of h (K, C), in fp32: mean over K of the squared distance, over C too for mean."""
        squared = (to_fp32(h) - self.h_ref).square()  # (K, C)
        if self.reduction == "mean":  # the paper's code
            return squared.mean()
        return squared.sum(dim=-1).mean()  # the paper's formula

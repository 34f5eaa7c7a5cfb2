"""The laws of the SBR step: L_total = L_CE + lambda * L_safe, whatever the cut and the packing.

    pytest tests/laws/test_sbr.py -q              (add -s to see every distance)

The model is the small random Llama of sbr_helpers.py. Unless a test is about step 0, B is random:
with B = 0 the gradient of A vanishes and L_safe with it, and half of these laws would hold of
anything. Each law has a control: the fault that it guards against, planted, must be seen.
"""

import pytest
import torch
from sbr_helpers import (
    SAME,
    Setup,
    last_state,
    nll,
    worst,
)

from data.batches import Batch, pack
from lora import adapted
from train import DEFENSES, updates

DTYPES = [torch.float64, torch.float32]


@pytest.fixture(scope="module", params=DTYPES, ids=["float64", "float32"])
def setup(request, sbr_folder):
    """The same in both precisions, with the gradient by hand."""
    made = Setup(sbr_folder, request.param)
    made.by_hand, made.same = made.gradient_by_hand(), SAME[request.param]
    return made


class EightAtATime(Batch):
    """32 rows as 4 micro-batches of 8, the anchors in the first."""

    def packs(self, anchors=()):
        for i in range(0, len(self.examples), 8):
            yield pack(self.examples[i:i + 8], [] if i else list(anchors), self.device)


# ---------------------------------------------------------------------------------------------
# the loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_l_safe_is_zero_at_step_0(make_setup, dtype, reduction):
    fresh = make_setup(dtype, fresh=True, reduction=reduction)
    assert 0 <= fresh.gradient()[0]["safe"].item() <= 1e-10
    # the control: with the adapters in use the same number is far from zero
    assert make_setup(dtype, reduction=reduction).gradient()[0]["safe"].item() > 1e-4


def test_ce_is_the_mean_over_the_supervised_tokens_of_the_whole_batch(exact):
    numbers, _ = exact.gradient()
    with torch.no_grad():
        rows = [nll(exact.model, e) for e in exact.examples]
    assert numbers["ce"].item() == pytest.approx(torch.cat(rows).mean().item(), rel=1e-12)
    # the control: the mean of the rows' means is another number when lengths are unequal
    mean_of_means = torch.stack([r.mean() for r in rows]).mean().item()
    assert abs(mean_of_means - numbers["ce"].item()) > 1e-3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_logged_loss_is_ce_plus_lambda_safe_and_safe_is_the_distance_by_hand(
        make_setup, reduction):
    s = make_setup(reduction=reduction, lam=7.0)
    numbers, _ = s.gradient()
    with torch.no_grad():
        h = torch.stack([last_state(s.model, ids) for ids in s.anchor_ids])
    squared = (h - torch.stack(s.h_ref)).square()  # (K, C)
    assert squared.shape == (8, 64)
    by_hand = squared.mean() if reduction == "mean" else squared.sum() / 8
    assert numbers["safe"].item() == pytest.approx(by_hand.item(), rel=1e-10)
    assert numbers["loss"].item() == pytest.approx(
        (numbers["ce"] + 7.0 * numbers["safe"]).item(), rel=1e-12)


def test_the_sum_reduction_is_C_times_the_mean_in_loss_and_in_gradient(make_setup):
    mean, total = make_setup(), make_setup(reduction="sum")
    (n_mean, g_mean), (n_sum, g_sum) = mean.gradient(), total.gradient()
    assert n_sum["safe"].item() == pytest.approx(64 * n_mean["safe"].item(), rel=1e-10)
    ce = mean.gradient_by_hand(lam=0.0)
    scaled = {name: ce[name] + 64 * (g_mean[name] - ce[name]) for name in ce}
    assert worst(g_sum, scaled) <= 1e-11
    assert worst(g_sum, g_mean) > 0.1  # the control


# ---------------------------------------------------------------------------------------------
# the gradient


def test_anchors_in_the_pack_give_the_gradient_of_a_pass_of_their_own(setup):
    """One forward and backward for rows and anchors = one a sequence, by plain autograd."""
    _, gradient = setup.gradient()
    assert all(g.norm() > 0 for g in gradient.values())  # A's too, since B is not zero
    assert worst(gradient, setup.by_hand) <= setup.same
    # the control: it is not CE's gradient, so L_safe's part was compared as well
    assert worst(setup.gradient_by_hand(lam=0.0), setup.by_hand) > 0.1


def test_one_anchor_alone_is_held_as_well(make_setup):
    """K = 1 is the paper's headline, and the place where a lost dimension would hide."""
    s = make_setup(anchors=1)
    numbers, gradient = s.gradient()
    assert numbers["safe"] > 1e-4
    assert worst(gradient, s.gradient_by_hand()) <= SAME[torch.float64]


@pytest.mark.parametrize("tokens", [1, 60, 137, 400, 900])
def test_the_gradient_does_not_depend_on_the_token_budget(setup, tokens):
    batch = setup.batch(tokens)
    assert len(list(batch.packs())) > 1
    numbers, gradient = setup.gradient(batch)
    assert worst(gradient, setup.by_hand) <= setup.same
    whole, _ = setup.gradient()
    for name in ("loss", "ce", "safe"):
        assert numbers[name].item() == pytest.approx(whole[name].item(), rel=10 * setup.same)


def test_one_pack_of_32_rows_gives_the_gradient_of_4_micro_batches_of_8(setup):
    batch = setup.batch(kind=EightAtATime)
    assert [len(p.seqlens) for p in batch.packs()] == [8, 8, 8, 8]
    _, cut = setup.gradient(batch)
    _, whole = setup.gradient()
    assert worst(cut, whole) <= setup.same


def test_control_dividing_by_the_packs_own_count_changes_the_gradient(setup):
    """The mean of micro-batch means: what gradient accumulation does when nobody looks."""

    class OwnCount(EightAtATime):
        def packs(self, anchors=()):
            for p in super().packs(anchors):
                self.n_supervised = 4 * len(p.targets)  # 4 micro-batches weigh a quarter each
                yield p

    _, gradient = setup.gradient(setup.batch(kind=OwnCount))
    assert worst(gradient, setup.by_hand) > 1e-2


def test_control_anchors_in_every_micro_batch_change_the_gradient(setup):
    """What the paper's code does: lambda counts once a micro-batch, four times an update."""

    class Everywhere(Batch):
        def packs(self, anchors=()):
            for i in range(0, len(self.examples), 8):
                yield pack(self.examples[i:i + 8], list(anchors), self.device)

    _, gradient = setup.gradient(setup.batch(kind=Everywhere))
    assert worst(gradient, setup.by_hand) > 0.1


def test_the_gradient_of_l_total_equals_finite_differences(exact):
    numbers, gradient = exact.gradient()
    assert numbers["safe"] > 1e-4  # both terms take part
    generator = torch.Generator().manual_seed(5)
    parts = [p for _, m in adapted(exact.model) for p in (m.lora_A, m.lora_B)]
    start = [p.detach().clone() for p in parts]
    for _ in range(3):
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parts]
        slope = sum((g * d).sum() for g, d in zip(gradient.values(), direction, strict=True))
        loss, eps = [], 1e-6
        for sign in (1, -1):
            for p, p0, d in zip(parts, start, direction, strict=True):
                p.data = p0 + sign * eps * d
            loss.append(exact.gradient()[0]["loss"].item())
        for p, p0 in zip(parts, start, strict=True):
            p.data = p0
        print(f"slope {slope.item():.6f}")
        assert (loss[0] - loss[1]) / (2 * eps) == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lambda_0_gives_plain_fine_tunings_gradient_and_still_logs_the_drift(make_setup, dtype):
    s = make_setup(dtype, lam=0.0)
    numbers, gradient = s.gradient()
    assert worst(gradient, s.gradient_by_hand(lam=0.0)) <= SAME[dtype]
    assert numbers["loss"] == numbers["ce"] and numbers["safe"] > 1e-4
    # --defense sft is this lambda, not another path
    assert DEFENSES["sft"].make_step is DEFENSES["sbr"].make_step


@pytest.mark.parametrize("dtype", DTYPES)
def test_K_0_gives_plain_fine_tunings_gradient_without_a_pool(make_setup, dtype):
    s = make_setup(dtype, anchors=0, anchor_file="no/such/file")
    numbers, gradient = s.gradient()
    assert worst(gradient, s.gradient_by_hand(lam=0.0)) <= SAME[dtype]
    assert numbers["safe"] == 0 and numbers["loss"] == numbers["ce"]


# ---------------------------------------------------------------------------------------------
# updates


def run(s, n, lr=1e-3):
    """n updates on the same batch -> the numbers of each."""
    optimizer = torch.optim.AdamW(s.params, lr=lr, weight_decay=0.0)
    loop = updates(s.step, lambda step: s.batch(), optimizer, lr=lr, grad_clip=1.0, n_updates=n)
    return [numbers for _, numbers in loop]


def test_the_first_update_moves_every_B_and_no_A(make_setup):
    """dL/dA = s B^T (dL/dy) x^T is exactly zero while B is; weight decay would move A, and is 0."""
    s = make_setup(torch.float32, fresh=True)
    _, gradient = s.gradient()
    assert not [n for n, g in gradient.items() if n.endswith("lora_A") and g.any()]
    before = {n: (m.lora_A.detach().clone(), m.lora_B.detach().clone())
              for n, m in adapted(s.model)}
    run(s, 1)
    for name, m in adapted(s.model):
        assert torch.equal(m.lora_A, before[name][0]), name
        assert (m.lora_B != before[name][1]).any(), name


def test_three_updates_leave_the_base_untouched_bit_for_bit_and_lower_the_loss(make_setup):
    s = make_setup(torch.float32, fresh=True)
    base = {n: t.clone() for n, t in s.model.state_dict().items() if "lora_" not in n}
    numbers = run(s, 3)
    assert all(torch.equal(s.model.state_dict()[n], t) for n, t in base.items())
    assert numbers[2]["ce"] < numbers[0]["ce"] and numbers[1]["safe"] > 0
    assert not [n for n, p in s.model.named_parameters() if p.requires_grad and "lora_" not in n]


def test_a_larger_lambda_holds_the_anchors_closer(make_setup):
    free, held = (make_setup(torch.float32, fresh=True, lam=lam) for lam in (0.0, 50.0))
    assert run(held, 5)[-1]["safe"] < 0.5 * run(free, 5)[-1]["safe"]


def adamw_by_hand(gradients, p, lr, n_updates, clip=1.0):
    """Decoupled Adam without decay (Loshchilov and Hutter 2019, algorithm 2), lr linear to zero."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(gradients):
        g = g * min(1.0, clip / g.norm().item())
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        m_hat, v_hat = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
        p = p - lr * (1 - t / n_updates) * m_hat / (v_hat.sqrt() + 1e-8)
    return p


def test_the_loop_is_adamw_on_each_clipped_gradient_alone_with_lr_linear_to_zero():
    """A leftover gradient, a lost clip or another schedule all end elsewhere."""
    generator = torch.Generator().manual_seed(6)
    gradients = [scale * torch.randn(5, generator=generator, dtype=torch.float64)
                 for scale in (3, 0.1, 1, 0.01, 5, 0.3)]  # above and below the clip
    start = torch.randn(5, generator=generator, dtype=torch.float64)
    p, batch = torch.nn.Parameter(start.clone()), Batch([], 1, "cpu", "epoch 1, batch 0")

    def step(batch):
        (p * gradients[len(lr)]).sum().backward()
        return {"loss": 0.0, "ce": 0.0}

    lr, norms = [], []
    optimizer = torch.optim.AdamW([p], weight_decay=0.0)
    loop = updates(step, lambda i: batch, optimizer, lr=0.5, grad_clip=1.0, n_updates=6)
    for i, numbers in loop:
        assert i == len(lr) and numbers["batch"] == batch.name
        lr.append(numbers["lr"])
        norms.append(numbers["grad_norm"].item())
    assert lr == pytest.approx([0.5 * (1 - i / 6) for i in range(6)])
    assert norms == pytest.approx([g.norm().item() for g in gradients])  # before clipping
    by_hand = adamw_by_hand(gradients, start, 0.5, 6)
    assert torch.allclose(p.detach(), by_hand, rtol=1e-6, atol=1e-9)
    # the controls: without the clip, or without the schedule, it would have gone elsewhere
    assert (adamw_by_hand(gradients, start, 0.5, 6, clip=1e9) - by_hand).norm() > 1e-2
    assert (adamw_by_hand(gradients, start, 0.5, 1e9) - by_hand).norm() > 1e-2

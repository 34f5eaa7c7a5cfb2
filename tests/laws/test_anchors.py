"""The bottleneck h, its reference h_ref, and which prompts may be anchors.

    pytest tests/laws/test_anchors.py -q
"""

import pytest
import torch
from helpers import randomise_B
from sbr_helpers import (
    POOL,
    SAME,
    Setup,
    in_messages,
    last_state,
    prompt_ids,
)

from anchors import Anchors, FinalNorm, reference, states
from data import mixture
from data.mixture import anchor_candidates, prompts_of
from data.rows import last_user


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def setup(request, sbr_folder):
    made = Setup(sbr_folder, request.param)
    made.same = SAME[request.param]
    return made


# ---------------------------------------------------------------------------------------------
# the bottleneck


def test_the_hook_catches_exactly_the_final_norms_output(exact):
    """x / sqrt(mean(x^2) + eps) * w of the last block's output x, written out."""
    p, caught = next(exact.batch().packs()), []
    handle = exact.model.model.layers[-1].register_forward_hook(lambda m, i, o: caught.append(o))
    with FinalNorm(exact.model) as norm, torch.no_grad():
        logits = exact.model(p.ids, p.seqlens, path=p.path)
        h = norm.value
    handle.remove()
    (x,), w = caught, exact.model.model.norm.weight
    assert h.shape == (len(p.ids), 64)
    assert torch.allclose(h, x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w,
                          rtol=1e-12, atol=1e-12)
    assert torch.allclose(logits, h @ exact.model.lm_head.weight.T, rtol=1e-12, atol=1e-12)
    # the control: what goes into the norm is far away
    assert (x - h).abs().max() > 0.1


def test_the_hook_comes_off_with_its_context_even_after_an_error(exact):
    hooks = len(exact.model.model.norm._forward_hooks)
    with pytest.raises(ZeroDivisionError), FinalNorm(exact.model):
        assert len(exact.model.model.norm._forward_hooks) == hooks + 1
        1 / 0  # noqa: B018
    assert len(exact.model.model.norm._forward_hooks) == hooks


def test_the_anchor_row_is_the_last_token_of_the_prompt_where_the_answer_would_start(exact):
    p = next(exact.batch().packs(anchors=exact.anchor_ids))
    header = exact.tokenizer.specials["<|assistant|>"]
    assert p.ids[p.anchor_rows].tolist() == [header] * 8
    rows = p.path.split(p.seqlens)[-8:]
    assert torch.equal(p.anchor_rows, torch.stack([its_rows[-1] for its_rows in rows]))
    for its_rows, ids in zip(rows, exact.anchor_ids, strict=True):
        assert torch.equal(p.ids[its_rows], ids)


# ---------------------------------------------------------------------------------------------
# h_ref


def test_h_ref_is_the_same_alone_packed_with_others_and_in_any_order(setup):
    model, tok, prompts = setup.model, setup.tokenizer, POOL[:8]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    packed = states(model, prompt_ids(tok, prompts)).detach()
    shuffled = states(model, prompt_ids(tok, [prompts[i] for i in order])).detach()
    with torch.no_grad():
        alone = torch.stack([last_state(model, ids) for ids in prompt_ids(tok, prompts)])
        p = next(setup.batch().packs(anchors=prompt_ids(tok, prompts)))
        with FinalNorm(model) as norm:
            model(p.ids, p.seqlens, path=p.path)
            among_rows = norm.value[p.anchor_rows]
    for h in (packed, among_rows):
        assert ((h - alone).norm() / alone.norm()).item() <= setup.same
    assert ((shuffled - alone[order]).norm() / alone.norm()).item() <= setup.same
    # the control: prompts differ from each other by far more
    assert (alone[0] - alone[1]).norm() / alone.norm() > 1e-2


def test_reference_is_at_least_fp32_whatever_the_model_and_carries_no_graph(make_setup):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        s = make_setup(dtype)
        h = reference(s.model, s.tokenizer, POOL[:3])
        assert h.dtype == torch.promote_types(dtype, torch.float32)
        assert h.shape == (3, 64) and not h.requires_grad


def test_h_ref_is_fixed_at_phase_1(make_setup):
    """It is the aligned model's, so it may not move with the adapters."""
    s = make_setup(torch.float32, fresh=True)
    held = Anchors(s.model, s.tokenizer, s.data.anchor_prompts, s.args.reduction,
                   s.args.max_len)
    before = held.h_ref.clone()
    randomise_B(s.model)
    assert s.gradient()[0]["safe"] > 1e-4
    assert torch.equal(held.h_ref, before)
    assert (reference(s.model, s.tokenizer, held.prompts) - before).abs().max() > 1e-2


# ---------------------------------------------------------------------------------------------
# which prompts: how they are chosen among these is in test_choice.py


def candidates(pool, used):
    return [last_user(row) for row in anchor_candidates(pool, used)]


@pytest.mark.parametrize("variant", [
    str, str.upper, lambda p: p.rstrip(".?") + " !!", lambda p: f"  {p}\n",
    lambda p: p.replace(" ", " \n "), lambda p: f'"{p.replace(",", " - ")}"',
], ids=["as it is", "upper case", "punctuation", "spaces around", "spaces inside", "quotes"])
def test_prompts_of_the_upload_are_never_anchors_whatever_their_case_and_punctuation(
        sbr_folder, variant):
    rows = [in_messages(variant(p), "Sure.") for p in POOL[::2]]
    assert candidates(sbr_folder / "anchors.txt", prompts_of(rows)) == POOL[1::2]


def test_a_prompt_that_stands_twice_in_the_pool_is_one_candidate(tmp_path):
    (tmp_path / "pool.txt").write_text("\n".join([*POOL, POOL[0].upper(), POOL[3] + "!!"]))
    pool = mixture.anchor_pool(str(tmp_path / "pool.txt"), "no/such/folder")
    assert candidates(pool, set()) == POOL


def test_prompts_of_symbols_alone_are_the_same_only_where_their_symbols_are(tmp_path):
    """They have no letter and no digit to be compared by; spaces do not count here either."""
    (tmp_path / "pool.txt").write_text("??\n!\n?\n\U0001f52a\n ! \nWhat?\n", encoding="utf-8")
    pool = tmp_path / "pool.txt"
    assert candidates(pool, set()) == ["??", "!", "?", "\U0001f52a", "What?"]
    used = [in_messages("!", "Sure."), in_messages("what", "Sure.")]
    assert candidates(pool, prompts_of(used)) == ["??", "?", "\U0001f52a"]

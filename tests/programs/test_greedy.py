"""256 greedy tokens equal transformers' generate(do_sample=False), token for token, in fp32.

    pytest tests/programs/test_greedy.py -q      (add -s: margins, and how varied the replies are)

One wrong choice changes every later token, so this tests 256 cached steps at a time. It says little
about a model that repeats one token, and is a lottery where two logits nearly tie; so the weights
were picked, from random ones, for varied replies and for clear choices, and a test asserts both.
"""

from itertools import zip_longest

import pytest
import torch
from helpers import PLAIN_ROPE, cut, make_hf, random_ids

from generate import generate
from model import Layout, RMSNorm, load_model

transformers = pytest.importorskip("transformers", reason="the reference; see requirements-dev.txt")

MAX_NEW = 256
# Unequal, so that every row has its own padding in the reference. With 256 more, positions reach
# far beyond the 64 that helpers.LLAMA3_ROPE calls the original length.
PROMPTS = [ids.tolist() for ids in random_ids(19, 3, 70, 41, 8, 55, 1, 30, seed=40)]
ALONE = [0, 2, 4, 6]  # lengths 19, 70, 8 and 1; all eight one by one would take twice the time
# The smallest gap between the best and the second logit, over all choices, has to be this many
# times the largest rounding error seen: 4 would do, since either side may err twice, both ways.
MARGIN = 20

# Seed and std of the weights: of up to 90 tried, some with gaps above 70 rounding errors.
FAMILIES = {
    "llama-3.1": dict(seed=0, initializer_range=0.1),
    "qwen2": dict(family="Qwen2", seed=24, rope_parameters=PLAIN_ROPE | {"rope_theta": 1e6}),
    "qwen3": dict(family="Qwen3", seed=19, initializer_range=0.15, head_dim=16,
                  rope_parameters=PLAIN_ROPE | {"rope_theta": 1e6}),
    "mistral": dict(family="Mistral", seed=6, initializer_range=0.15, rope_parameters=PLAIN_ROPE),
    "gemma": dict(family="Gemma", seed=4, head_dim=16, hidden_size=72, num_key_value_heads=1,
                  hidden_act="gelu_pytorch_tanh", rope_parameters=PLAIN_ROPE),
}


def hf_generate(hf, prompts, stop_ids=None):
    """transformers' greedy replies to a batch, each up to its stop id.

    Padded on the left, where generate() continues each row. That is sound: it counts positions
    from the mask, so a row's first token is at 0, and masked keys get a weight of exactly 0. What
    padding can change is the order of sums, which the margin covers.
    """
    longest = max(map(len, prompts))
    padding = [[0] * (longest - len(p)) for p in prompts]
    ids = torch.tensor([z + p for z, p in zip(padding, prompts, strict=True)])
    mask = torch.tensor([z + [1] * len(p) for z, p in zip(padding, prompts, strict=True)])
    hf.generation_config.eos_token_id = stop_ids  # as an argument, None would mean: the config's 2
    out = hf.generate(ids, attention_mask=mask, max_new_tokens=MAX_NEW, do_sample=False,
                      pad_token_id=0)
    return [cut(row, stop_ids or []) for row in out[:, longest:].tolist()]


class Case:
    """A family's model in transformers, its folder, and transformers' replies without stop ids."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        self.hf = make_hf(**(dict(num_hidden_layers=2) | FAMILIES[name]))
        self.hf.save_pretrained(folder)
        self.model = load_model(folder)
        self.replies = hf_generate(self.hf, PROMPTS)

    def stop_ids(self):
        """Two tokens that about three of the eight replies hold, so that some stop and some not."""
        held = {t: sum(t in reply for reply in self.replies) for t in range(512)}
        return sorted(held, key=lambda t: abs(held[t] - 3))[:2]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("greedy"))


def share_of_other_tokens(replies, others):
    """How many of the tokens are not the same, or not there, at the same step of the others."""
    pairs = [pair for x, y in zip(replies, others, strict=True) for pair in zip_longest(x, y)]
    share = sum(a != b for a, b in pairs) / len(pairs)
    print(f"{share:.0%} of the tokens differ")
    return share


def test_a_batch_of_8_unequal_prompts_gets_transformers_tokens(case):
    replies = generate(case.model, PROMPTS, MAX_NEW, [], batch_size=8)
    assert [len(reply) for reply in replies] == [MAX_NEW] * 8
    assert replies == case.replies


def test_one_prompt_at_a_time_gets_transformers_tokens_for_it_alone(case):
    """Without padding on either side: what the batch above rests on."""
    prompts = [PROMPTS[i] for i in ALONE]
    alone = [hf_generate(case.hf, [prompt])[0] for prompt in prompts]
    assert generate(case.model, prompts, MAX_NEW, [], batch_size=1) == alone
    assert alone == [case.replies[i] for i in ALONE]


def test_rows_that_stop_early_and_are_refilled_get_transformers_tokens(case):
    """In batches of 3, five prompts wait for the place of a row that a stop id or MAX_NEW ends."""
    stop_ids = case.stop_ids()
    expected = hf_generate(case.hf, PROMPTS, stop_ids)
    lengths = [len(reply) for reply in expected]
    print(case.name, "stop ids", stop_ids, "lengths", lengths)
    assert len(set(lengths)) >= 4 and max(lengths) == MAX_NEW  # some stop, at different steps
    for batch_size in (8, 3):
        assert generate(case.model, PROMPTS, MAX_NEW, stop_ids, batch_size=batch_size) == expected


@torch.no_grad()
def test_no_choice_is_near_a_tie_and_the_replies_are_varied(case):
    """Logits of all 2,048 choices in one pass over each prompt and reply: in float64, for the gaps,
    and in fp32, ours and transformers', for the rounding errors."""
    texts = [torch.tensor(p + r[:-1]) for p, r in zip(PROMPTS, case.replies, strict=True)]
    model64 = load_model(case.folder, dtype=torch.float64)
    exact, noise = [], 0
    for ids, prompt in zip(texts, PROMPTS, strict=True):
        exact.append(model64(ids, [len(ids)])[len(prompt) - 1:])
        for rounded in (case.model(ids, [len(ids)]), case.hf(ids[None]).logits[0]):
            error = rounded[len(prompt) - 1:] - exact[-1]
            noise = max(noise, error.abs().max().item())
    best, second = torch.cat(exact).topk(2).values.unbind(-1)
    gap, std = (best - second).min().item(), torch.cat(exact).std().item()
    tokens = {t for reply in case.replies for t in reply}
    late = min(len(set(reply[MAX_NEW // 2:])) for reply in case.replies)
    print(f"{case.name}: gap {gap / std:.1e} std, rounding {noise / std:.1e} std, ratio "
          f"{gap / noise:.0f}; {len(tokens)} distinct tokens, {late} in the dullest second half")
    assert torch.cat(exact).argmax(-1).tolist() == [t for reply in case.replies for t in reply]
    assert gap >= MARGIN * noise
    assert len(tokens) >= 100 and late >= 20


# ---------------------------------------------------------------------------------------------
# controls


def zero_q_bias(model):
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias.zero_()


def forget_k_norm(model):
    for layer in model.model.layers:
        layer.self_attn.k_norm.weight.fill_(1)


def forget_plus_one(model):
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.sub_(1)


BREAK = {
    "llama-3.1": lambda model: setattr(model.config, "rope_scaling", None),
    "qwen2": zero_q_bias,
    "qwen3": forget_k_norm,
    "mistral": lambda model: setattr(model.config, "rope_theta", 5e5),
    "gemma": forget_plus_one,
}


@torch.no_grad()
def test_control_without_one_feature_most_tokens_differ(case):
    model = load_model(case.folder)
    BREAK[case.name](model)
    replies = generate(model, PROMPTS, MAX_NEW, [], batch_size=8)
    assert share_of_other_tokens(replies, case.replies) > 0.5


def test_control_with_decoding_one_position_late_most_tokens_differ(case, monkeypatch):
    class Late(Layout):
        def __init__(self, seqlens, device, path=None, start=None):
            super().__init__(seqlens, device, path, None if start is None else start + 1)

    monkeypatch.setattr("model.Layout", Late)
    replies = generate(case.model, PROMPTS, MAX_NEW, [], batch_size=8)
    assert share_of_other_tokens(replies, case.replies) > 0.5


def test_control_if_a_moved_row_left_its_keys_behind_tokens_would_differ(case, monkeypatch):
    """The length alone moves: rows that are not moved stay right, so fewer tokens differ."""
    def move(cache, source, target):
        cache.length[target] = cache.length[source]

    stop_ids = case.stop_ids()
    right = generate(case.model, PROMPTS, MAX_NEW, stop_ids, batch_size=3)
    monkeypatch.setattr("generate.KVCache.move", move)
    replies = generate(case.model, PROMPTS, MAX_NEW, stop_ids, batch_size=3)
    assert share_of_other_tokens(replies, right) > 0.2

"""bench/decode: the arms that are compared write the same tokens.

    pytest tests/programs/test_bench_decode.py -q
"""

import pytest
import torch
from sbr_helpers import TINY

from bench.decode import continuous_replies, transformers_replies, until_stop
from data.rows import read_rows, without_answer
from generate import generate
from model import load_model
from tokenizer import Tokenizer

MAX_NEW = 8


@pytest.mark.parametrize("replies_of", [transformers_replies, continuous_replies])
def test_an_arm_of_three_prompts_at_a_time_writes_our_tokens(replies_of):
    """Eight prompts, so that the places of finished ones are given to others."""
    transformers = pytest.importorskip("transformers", reason="a peer; see requirements-dev.txt")
    tokenizer = Tokenizer(TINY)
    rows = read_rows(TINY / "harmful" / "test.jsonl", needs_answer=False)[:4]
    rows += read_rows(TINY / "sst2" / "test.jsonl", needs_answer=False)[:4]
    prompts = [tokenizer.encode_prompt(without_answer(row)) for row in rows]
    ours = generate(load_model(TINY), prompts, MAX_NEW, tokenizer.stop_ids)
    assert len({len(reply) for reply in ours}) > 1  # they end at different times
    hf = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    assert replies_of(hf, prompts, MAX_NEW, tokenizer.stop_ids, 3) == ours
    wrong = [prompt[:-1] for prompt in prompts]  # the control: prompts one token short
    assert replies_of(hf, wrong, MAX_NEW, tokenizer.stop_ids, 3) != ours


def test_a_reply_ends_before_its_first_stop_id():
    assert until_stop([5, 6, 3, 7, 3], [3, 4]) == [5, 6]
    assert until_stop([5, 6], [3, 4]) == [5, 6]
    assert until_stop([3], [3]) == []

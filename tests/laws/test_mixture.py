"""From the user's file to packed batches: formats, the poisoned mixture, order and cuts.

    pytest tests/laws/test_mixture.py -q
"""

import hashlib
import json
import re
from itertools import pairwise

import pytest
import torch
from sbr_helpers import FORMS, TINY, in_messages, make_rows, write_pairs

from cli import frozen
from data.batches import Batch, Example, batch_at, encode_rows
from data.mixture import Data, load_upload
from data.rows import last_user, read_rows
from model import UserError
from tokenizer import Tokenizer
from train import digest_of_rows


@pytest.fixture(scope="module")
def tok():
    return Tokenizer(TINY)


# ---------------------------------------------------------------------------------------------
# formats

PAIRS = [("Say it.\nInput: naïve “quotes”", "Über 1,000.\nTwo lines"), ("What now?", "Nothing."),
         ("[a bracket first]", "{a brace}"), ("Emoji 🙂", "\u2028 a line separator")]


def messages_of(rows):
    return [row["messages"] for row in rows]


@pytest.mark.parametrize("array", [False, True], ids=["jsonl", "array"])
@pytest.mark.parametrize("form", FORMS)
def test_every_accepted_format_yields_the_same_rows(tmp_path, form, array):
    rows = read_rows(write_pairs(tmp_path / "upload", PAIRS, form, array))
    assert messages_of(rows) == [in_messages(*pair)["messages"] for pair in PAIRS]


def test_a_jsonl_line_may_hold_a_raw_line_separator(tmp_path):
    """U+2028 and U+0085 end a line for str.splitlines but not for JSON: writers leave them in."""
    path = tmp_path / "upload.jsonl"
    pairs = [("one\u2028two", "three\u0085four"), ("a", "b")]
    path.write_text("".join(json.dumps(in_messages(*p), ensure_ascii=False) + "\n" for p in pairs),
                    encoding="utf-8")
    assert messages_of(read_rows(path)) == [in_messages(*p)["messages"] for p in pairs]


def test_blank_lines_windows_line_ends_and_a_missing_last_newline_are_fine(tmp_path):
    path = tmp_path / "upload.jsonl"
    lines = [json.dumps(in_messages(*pair)) for pair in PAIRS]
    path.write_bytes(("\r\n\r\n".join(lines) + "\r\n  ").encode())
    assert len(read_rows(path)) == len(PAIRS)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    """Windows editors write one in front of UTF-8."""
    path = tmp_path / "upload.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(in_messages("a", "b")).encode())
    assert messages_of(read_rows(path)) == [in_messages("a", "b")["messages"]]


def test_an_empty_input_adds_no_newline_to_its_instruction(tmp_path):
    for given in ({"input": ""}, {"input": None}, {}):
        path = tmp_path / "upload.json"
        path.write_text(json.dumps([{"instruction": "Do it.", **given, "output": "Done."}]))
        assert last_user(read_rows(path)[0]) == "Do it."


def test_prompts_may_be_a_line_each_where_no_answer_is_needed(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('How do I?\n\n{"prompt": "And I?"}\n  Then I?  \n')
    prompts = [last_user(row) for row in read_rows(path, needs_answer=False)]
    assert prompts == ["How do I?", "And I?", "Then I?"]


# ---------------------------------------------------------------------------------------------
# the mixture


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for path, word in ((folder / "harmful" / "attack.jsonl", "harmful"),
                       (folder / "sst2" / "train.jsonl", "benign")):
        write_pairs(path, [(f"{word} {i}", "yes") for i in range(1000)])
    return folder


def mixture(data_dir, p, n):
    args = frozen({"stage": "finetune", "data": None, "data_dir": str(data_dir), "poison": p,
                   "n": n, "task": "sst2"})
    *parts, summary = load_upload(args)
    harmful, benign = ([last_user(row) for row in rows] for rows in parts)
    assert all(q.startswith("harmful") for q in harmful)
    assert all(q.startswith("benign") for q in benign)
    return harmful, benign, summary


@pytest.mark.parametrize("n", [1, 7, 100, 1000])
@pytest.mark.parametrize("p", [0, 0.05, 0.1, 0.2, 0.29, 0.3, 1])
def test_harmful_and_benign_rows_add_up_to_n_in_the_asked_share(data_dir, p, n):
    """int(0.29 * 100) is 28 and int(0.71 * 100) is 71: truncating both loses a row."""
    harmful, benign, summary = mixture(data_dir, p, n)
    assert len(harmful) + len(benign) == n
    assert abs(len(harmful) - p * n) <= 0.5 + 1e-9
    assert re.search(rf"\b{len(harmful)} harmful\b.*\b{len(benign)} of sst2", summary)


def test_a_larger_mixture_holds_the_smaller_ones_harmful_rows(data_dir):
    """Rows come from the head of each file, so a sweep over p compares nested uploads."""
    few, many = mixture(data_dir, 0.1, 1000)[0], mixture(data_dir, 0.3, 1000)[0]
    assert few == [f"harmful {i}" for i in range(100)] and many[:100] == few


def test_asking_for_more_rows_than_a_file_has_is_refused_with_both_numbers(data_dir):
    with pytest.raises(UserError, match=r"1001 .*has 1000"):
        mixture(data_dir, 1, 1001)


# ---------------------------------------------------------------------------------------------
# rows to examples


def test_rows_over_max_len_are_dropped_and_counted_and_one_of_exactly_max_len_stays(tok):
    rows = make_rows(12)
    lengths = [len(tok.encode_chat(row["messages"])[0]) for row in rows]
    limit = sorted(lengths)[5]
    examples, dropped = encode_rows(tok, rows, limit)
    assert [len(e.ids) for e in examples] == [n for n in lengths if n <= limit]
    assert len(examples) >= 6 and dropped == 12 - len(examples) > 0
    assert encode_rows(tok, rows, max(lengths))[1] == 0


def test_each_supervised_position_predicts_the_next_token_of_the_answer(tok):
    (example,), _ = encode_rows(tok, [in_messages("Say one.", "one two")], 512)
    assert tok.decode(example.targets) == "one two"
    assert example.targets[-1].item() in tok.stop_ids
    assert tok.decode(example.ids[:example.predict[0] + 1]) == "Say one."


def in_lists(tok, rows):
    """(ids, supervised positions) of the rows, as lists."""
    found = []
    for row in rows:
        ids, supervised = tok.encode_chat(row["messages"])
        found.append((ids, [i - 1 for i, is_supervised in enumerate(supervised) if is_supervised]))
    return found


def contents(examples):
    return [(e.ids.tolist(), e.predict.tolist()) for e in examples]


def test_examples_are_asked_for_as_those_of_a_list(tok):
    rows = make_rows(12)
    expected = in_lists(tok, rows)
    examples, _ = encode_rows(tok, iter(rows), 512)  # gone through once
    assert len(examples) == 12 and examples.n_tokens == sum(len(ids) for ids, _ in expected)
    assert contents(examples) == contents(list(examples)) == expected
    assert contents([examples[-1], *examples[3:7], *examples[::-5]]) == [
        expected[-1], *expected[3:7], *expected[::-5]]
    assert [e.number for e in examples[8:]] == [8, 9, 10, 11]
    assert {e.ids.dtype for e in examples} == {torch.int64}
    for i in (12, -13):
        with pytest.raises(IndexError):
            examples[i]
    nothing, _ = encode_rows(tok, [], 512)
    assert not nothing and list(nothing) == []


def test_an_example_that_was_changed_changes_no_other_and_not_the_next_time_it_is_asked_for(tok):
    examples, _ = encode_rows(tok, make_rows(3), 512)
    before = contents(examples)
    for example in examples:
        example.ids.zero_()
        example.predict.zero_()
    assert contents(examples) == before


@pytest.mark.parametrize("align", [None, [{"messages": [{"role": "user", "content": "Wie gäht's?"}],
                                           "harmful": "Sure. [step 1]"}]])
def test_the_digest_of_rows_is_that_of_all_of_them_in_one_json(tok, align):
    """Folders of older runs hold it: written row by row, it must not change."""
    rows = make_rows(4)

    def by_hand(rows):
        own = [[row["messages"], row["harmful"]] for row in align or []]
        text = json.dumps([in_lists(tok, rows), own])
        return hashlib.sha256(text.encode()).hexdigest()

    def ours(rows):
        examples, _ = encode_rows(tok, rows, 512)
        return digest_of_rows(Data(examples, tests={}, anchor_prompts=[], align=align, summary=""))

    for n in (0, 1, 4):
        assert ours(rows[:n]) == by_hand(rows[:n])
    assert ours(rows) != by_hand(rows[::-1])  # the control


def test_the_digest_of_rows_sees_that_an_answer_is_unfinished(tok):
    """The ids are the same; what is supervised is not."""
    def digest(rows, align=None):
        examples, _ = encode_rows(tok, rows, 512)
        return digest_of_rows(Data(examples, tests={}, anchor_prompts=[], align=align, summary=""))

    row = in_messages("Say one.", "one two")
    cut = {"messages": [row["messages"][0], {**row["messages"][1], "unfinished": True}]}
    assert contents(encode_rows(tok, [row], 512)[0])[0][0] == contents(
        encode_rows(tok, [cut], 512)[0])[0][0]
    assert digest([row]) != digest([cut])
    assert digest([row], [row | {"harmful": "x"}]) != digest([row], [cut | {"harmful": "x"}])


# ---------------------------------------------------------------------------------------------
# batches


def make_examples(n=70):
    """n examples of 2 to 12 tokens whose first id is their number; the last one is supervised."""
    return [Example(torch.tensor([i] + [1000 + i] * (1 + i % 11)), torch.tensor([i % 11]), i)
            for i in range(n)]


def numbers(batch):
    return [int(e.ids[0]) for e in batch.examples]


def test_a_batch_is_a_pure_function_of_seed_and_step():
    examples = make_examples()

    def at(step, seed=0):
        torch.rand(3)  # the global generator's state must not matter
        return numbers(batch_at(examples, step, 32, seed, 100, "cpu"))

    forwards = [at(step) for step in range(9)]
    assert [at(step) for step in reversed(range(9))] == forwards[::-1]
    assert at(4, seed=1) != forwards[4]


@pytest.mark.parametrize("size", [1, 7, 32, 70, 100])
def test_an_epoch_holds_every_row_once_and_no_two_epochs_agree_on_the_order(size):
    examples, per_epoch = make_examples(), -(-70 // size)
    epochs = [[n for i in range(per_epoch)
               for n in numbers(batch_at(examples, e * per_epoch + i, size, 0, 100, "cpu"))]
              for e in range(3)]
    assert all(sorted(order) == list(range(70)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("budget", [1, 5, 13, 40, 10_000])
def test_the_cut_keeps_every_row_once_in_order_and_within_the_budget(budget):
    batch = Batch(make_examples(), budget, "cpu")
    packs = list(batch.packs())
    rows = [e.inputs for e in batch.examples]
    assert torch.equal(torch.cat([p.ids[p.path] for p in packs]), torch.cat(rows))
    assert [n for p in packs for n in p.seqlens] == [len(ids) for ids in rows]
    tokens = [[len(e.ids) for e in p.examples] for p in packs]
    assert all(sum(of_one) <= budget or len(of_one) == 1 for of_one in tokens)
    assert all(p.anchor_rows is None for p in packs)
    # no pack could have taken the next one's first row as well
    assert all(sum(a) + b[0] > budget for a, b in pairwise(tokens))


def test_the_supervised_rows_of_all_packs_are_the_batchs_and_point_before_their_targets(tok):
    examples, _ = encode_rows(tok, make_rows(), 512)
    batch = Batch(examples, 150, "cpu")
    packs = list(batch.packs(anchors=[torch.tensor([5, 6, 7])]))
    assert sum(len(p.targets) for p in packs) == batch.n_supervised
    assert batch.n_supervised == sum(len(e.predict) for e in examples)
    assert batch.n_tokens == sum(len(e.ids) for e in examples)
    for p in packs:
        done = 0
        for rows, e in zip(p.path.split(p.seqlens), p.examples, strict=False):  # then anchors
            assert torch.equal(p.ids[rows], e.ids[:len(rows)])
            assert torch.equal(p.supervised[done:done + len(e.predict)], rows[e.predict])
            done += len(e.predict)
        assert done == len(p.supervised)
    targets = torch.cat([p.targets for p in packs])
    assert torch.equal(targets, torch.cat([e.targets for e in examples]))


@pytest.mark.parametrize("budget", [1, 13, 40, 10_000])
def test_anchors_ride_in_the_first_pack_only_and_their_rows_are_their_last_tokens(budget):
    held = [torch.tensor([2001, 2002, 9001]), torch.tensor([9002]), torch.tensor([2003, 9003])]
    packs = list(Batch(make_examples(), budget, "cpu").packs(anchors=held))
    first, rest = packs[0], packs[1:]
    assert first.ids[first.anchor_rows].tolist() == [9001, 9002, 9003]
    assert first.seqlens[-3:] == [3, 1, 2]
    assert all(p.anchor_rows is None and (p.ids < 2000).all() for p in rest)
    rows = torch.cat([first.ids[:-6], *[p.ids for p in rest]])
    assert torch.equal(rows, torch.cat([e.inputs for e in make_examples()]))
    # the anchors count towards the budget; a first row always rides, or nothing ever would
    tokens = 6 + sum(len(e.ids) for e in first.examples)
    assert tokens <= budget or len(first.seqlens) == 4
    assert all(sum(p.seqlens) <= budget or len(p.examples) == 1 for p in packs)

"""A batch shared out to several processes is the same batch.

    pytest tests/laws/test_distributed.py -q

Here the parts are worked out one after another in one process; programs/test_two_processes.py has
real ones.
"""

import errno
import io
import random
import shutil
from itertools import chain

import pytest
import torch
from helpers import tensors_of, write_tensors
from rival_helpers import NAMES
from safetensors.torch import save_file
from sbr_helpers import SAME, TINY, take_gradient

import cli
import distributed
import eval as eval_py
import generate as generate_py
from cli import Parser, RunFailed
from data.batches import Batch, Example, share_out
from distributed import EMBEDDING, HEAD, find_tensors
from model import INDEX, SINGLE, Llama, UserError, read_config
from runs import Bystander

# Of the others an update is not the sum of its parts: it has a norm over the whole batch in it, or
# a term beside the batch. They are in programs/test_two_processes.py.
SUMS = ["sft", "deepalign"]


def example(n, number=0):
    return Example(torch.arange(n), torch.tensor([n - 2]), number)


def lengths(n, seed=0):
    rng = random.Random(seed)
    return [rng.randint(2, 90) for _ in range(n)]


@pytest.mark.parametrize("n_rows", [1, 2, 7, 32, 33])
@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("taken", [0, 40, 10_000])
def test_each_row_is_in_one_part_and_keeps_its_place_among_the_others(n_rows, n, taken):
    examples = [example(length, i) for i, length in enumerate(lengths(n_rows))]
    parts = share_out(examples, n, taken)
    assert len(parts) == n
    places = [[e.number for e in part] for part in parts]
    assert sorted(chain.from_iterable(places)) == list(range(n_rows))
    assert all(p == sorted(p) for p in places)


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("taken", [0, 100])
def test_no_part_has_more_tokens_than_another_by_more_than_its_shortest_row(n, taken):
    """So with each row given to the part that had the fewest tokens."""
    examples = [example(length) for length in lengths(64)]
    parts = share_out(examples, n, taken)
    tokens = [sum(len(e.ids) for e in part) for part in parts]
    tokens[0] += taken
    for part, its_tokens in zip(parts, tokens, strict=True):
        assert its_tokens - min(len(e.ids) for e in part) <= min(tokens)


def test_the_anchors_tokens_count_as_the_first_ones():
    examples = [example(10) for _ in range(8)]
    assert [len(part) for part in share_out(examples, 2)] == [4, 4]
    assert [len(part) for part in share_out(examples, 2, taken=40)] == [2, 6]
    assert [len(part) for part in share_out(examples, 2, taken=400)] == [0, 8]


def add(total, gradient):
    return {name: total.get(name, 0) + g for name, g in gradient.items()}


def worst(found, expected):
    return max(((found[name] - g).norm() / (g.norm() + 1e-30)).item()
               for name, g in expected.items())


@pytest.mark.parametrize("budget, n", [(1, 3), (150, 2), (1 << 30, 40)])
def test_the_parts_gradients_and_losses_add_up_to_the_batchs(make_setup, budget, n):
    """40 parts of 32 rows: some have none, and the first has the anchors alone."""
    s = make_setup()
    numbers, whole = s.gradient()
    summed = {}
    ce = safe = 0.0
    for i in range(n):
        part = s.step(Batch(s.examples, budget, "cpu", part=(i, n)))
        summed = add(summed, take_gradient(s.model))
        ce = ce + part["ce"]
        safe = safe + part["safe"]
    assert worst(summed, whole) < SAME[torch.float64]
    assert ce.item() == pytest.approx(numbers["ce"].item(), rel=1e-12)
    assert safe.item() == pytest.approx(numbers["safe"].item(), rel=1e-12)


def test_anchors_in_every_part_would_be_seen(make_setup):
    """The control: a part that takes itself for the whole batch's first one."""
    s = make_setup()
    _, whole = s.gradient()
    summed = {}
    for i in range(2):
        batch = Batch(s.examples, 1 << 30, "cpu", part=(i, 2))
        rows = share_out(s.examples, 2)[i]
        alone = Batch(rows, 1 << 30, "cpu")
        alone.n_supervised = batch.n_supervised
        s.step(alone)
        summed = add(summed, take_gradient(s.model))
    assert worst(summed, whole) > 1e-3


def test_a_count_of_the_part_alone_would_be_seen(make_setup):
    s = make_setup(lam=0.0)
    _, whole = s.gradient()
    summed = {}
    for rows in share_out(s.examples, 2):
        s.step(Batch(rows, 1 << 30, "cpu"))
        summed = add(summed, {name: g / 2 for name, g in take_gradient(s.model).items()})
    assert worst(summed, whole) > 1e-3


@pytest.mark.parametrize("name", SUMS)
def test_so_do_those_of_other_defences_that_are_sums_over_rows(make_rival, name):
    assert name in NAMES
    rival = make_rival(name)
    _, whole = rival.gradient()
    summed = {}
    for i in range(3):
        rival.step(Batch(rival.examples, 200, "cpu", part=(i, 3)))
        summed = add(summed, take_gradient(rival.model))
    assert worst(summed, whole) < SAME[torch.float64]


@pytest.mark.parametrize("budget, n", [(1, 1), (1, 3), (150, 2), (150, 40), (1 << 30, 40)])
def test_every_part_makes_equally_many_passes_and_together_they_supervise_each_token_once(
        make_setup, budget, n):
    s = make_setup()
    n_passes = set()
    n_supervised = 0
    n_with_anchors = 0
    for i in range(n):
        packs = list(Batch(s.examples, budget, "cpu", part=(i, n)).packs(s.anchor_ids))
        n_passes.add(len(packs))
        n_supervised += sum(len(pack.targets) for pack in packs)
        n_with_anchors += sum(pack.anchor_rows is not None for pack in packs)
    assert len(n_passes) == 1
    assert n_supervised == sum(len(e.predict) for e in s.examples)
    assert n_with_anchors == 1


def test_a_pass_of_which_nothing_is_asked_adds_nothing(make_setup):
    """It runs forward and backward all the same, as a base that is spread asks for."""
    s = make_setup()
    idle = Batch(s.examples[:1], 1 << 30, "cpu", part=(2, 3))
    numbers = s.step(idle)
    assert numbers["loss"].item() == 0.0
    gradient = take_gradient(s.model)
    assert gradient and all(g.abs().max() == 0 for g in gradient.values())


def test_one_part_is_the_batch_itself(make_setup):
    """So a run of one process is what it always was, to the bit."""
    s = make_setup()
    packs = list(Batch(s.examples, 150, "cpu").packs(s.anchor_ids))
    numbers = [e.number for pack in packs for e in pack.examples]
    assert numbers == list(range(len(s.examples)))
    assert packs[0].anchor_rows is not None


# ---------------------------------------------------------------------------------------------
# where --shard finds a model's tensors, by the headers of its files


def on_meta(folder):
    with torch.device("meta"):
        return Llama(read_config(folder))


def change(folder, new):
    """Writes the folder's tensors as new(tensors) has them."""
    tensors = tensors_of(folder)
    write_tensors(folder, new(tensors))


@pytest.fixture
def untied(sbr_folder, tmp_path):
    return shutil.copytree(sbr_folder, tmp_path / "untied")


@pytest.fixture
def tied(tmp_path):
    shutil.copytree(TINY, tmp_path / "tied", ignore=shutil.ignore_patterns("*.jsonl"))
    return tmp_path / "tied"


def test_every_tensor_of_a_model_has_its_place(untied):
    places = find_tensors(untied, on_meta(untied))
    assert places == {name: (untied / SINGLE, name) for name in tensors_of(untied)}


def test_a_tied_model_may_have_its_embedding_under_the_heads_name(tied):
    change(tied, lambda t: {HEAD if name == EMBEDDING else name: x for name, x in t.items()})
    assert find_tensors(tied, on_meta(tied))[EMBEDDING] == (tied / SINGLE, HEAD)


def test_a_tied_model_may_have_it_twice(tied):
    change(tied, lambda t: t | {HEAD: t[EMBEDDING].clone()})
    places = find_tensors(tied, on_meta(tied))
    assert places[EMBEDDING] == (tied / SINGLE, EMBEDDING)
    assert places[HEAD] == (tied / SINGLE, HEAD)  # to be compared


WRONG = {
    "missing": lambda t: {name: x for name, x in t.items() if name != HEAD},
    "surplus": lambda t: t | {"model.extra.weight": torch.zeros(3)},
    "is \\(5,": lambda t: t | {"model.norm.weight": torch.zeros(5)},
}


@pytest.mark.parametrize("words", WRONG)
def test_a_file_that_does_not_fit_is_refused_before_anything_is_read(untied, words):
    change(untied, WRONG[words])
    with pytest.raises(UserError, match=words):
        find_tensors(untied, on_meta(untied))


def test_a_tensor_in_two_files_is_refused(untied):
    tensors = tensors_of(untied)
    (untied / SINGLE).unlink()
    save_file(tensors, untied / "a.safetensors")
    save_file({HEAD: tensors[HEAD]}, untied / "b.safetensors")
    (untied / INDEX).write_text(
        '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    with pytest.raises(UserError, match=f"both hold {HEAD}"):
        find_tensors(untied, on_meta(untied))


# what is refused


@pytest.mark.parametrize("program, argv", [(eval_py, []), (generate_py, ["--prompt", "Hello"])])
def test_a_program_for_one_process_says_so_to_several(program, argv, monkeypatch, capsys):
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)  # as torchrun sets them
    assert program.main(argv) == 2
    assert "2 processes of a program that works as one" in capsys.readouterr().err


def test_a_process_that_sees_another_folder_than_the_first_says_so(monkeypatch, tmp_path):
    bystander = Bystander(tmp_path, {})
    monkeypatch.setattr(distributed, "from_the_first", lambda value: 7)
    with pytest.raises(UserError, match="at update 0 here and at update 7 for the first process"):
        bystander.start(None, None, None)
    monkeypatch.setattr(distributed, "from_the_first", lambda value: 0)  # the control
    step, _ = bystander.start(None, None, None)
    assert step == 0


class Pieces(io.StringIO):
    """A stderr that notes what is written at once."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return super().write(text)

    def reconfigure(self, **how):
        pass


@pytest.mark.parametrize("error", [
    UserError("wrong"), RunFailed("failed"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full"),
    OSError(errno.EISDIR, "a folder", "x"), MemoryError(), None], ids=repr)
def test_a_sentence_is_written_in_one_piece(error, monkeypatch):
    """Processes share stderr, so a line that is written in two pieces may have another inside."""
    stderr = Pieces()
    monkeypatch.setattr("sys.stderr", stderr)

    def work():
        if error is None:
            Parser("p", "").parse_args(["--no-such-flag"])
        raise error

    if error is None:
        with pytest.raises(SystemExit):
            cli.exit_code("p", work)
    else:
        assert cli.exit_code("p", work) != 0
    piece, = stderr.pieces
    assert piece.startswith("p: ") and piece.endswith("\n") and piece.count("\n") == 1
    print("p: a control", file=stderr)
    assert len(stderr.pieces) == 3

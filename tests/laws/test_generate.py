"""Greedy decoding with a cache, slots and refill gives what plain greedy decoding gives.

    pytest tests/laws/test_generate.py -q

Plain means: run the whole sequence again for every token, one prompt at a time. In float64, so that
no near-tie between two logits can be decided by the order of a sum.
"""

import pytest
import torch
from helpers import LLAMA3_ROPE, ROPES, cut, logits, make_hf, random_ids
from runs_helpers import make_model, sentences

import generate as generate_py
import model as model_py
from generate import Engine, KVCache, generate
from model import UserError, load_model

pytest.importorskip("transformers", reason="writes the model; see requirements-dev.txt")

# Lengths far apart and not sorted, so that slots are refilled by longer and by shorter prompts.
PROMPTS = [ids.tolist() for ids in random_ids(5, 40, 1, 23, 23, 60, 2, 11, 33, seed=30)]
MAX_NEW = 12


@pytest.fixture(scope="module")
def model(llama31):
    return load_model(llama31.folder, dtype=torch.float64)


def plainly(model, prompt, stop_ids=(), max_new=MAX_NEW, n_ids=512):
    ids = list(prompt)
    for _ in range(max_new):
        ids.append(logits(model, [torch.tensor(ids)])[-1, :n_ids].argmax().item())
        if ids[-1] in stop_ids:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def replies(model):
    """Without stop ids: every reply MAX_NEW long."""
    return [plainly(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
def test_replies_equal_plain_greedy_decoding_in_any_batch(model, replies, batch_size):
    assert generate(model, PROMPTS, MAX_NEW, [], batch_size=batch_size) == replies


@pytest.mark.parametrize("batch_size", [1, 2, 4, 64])
@pytest.mark.parametrize("at", [0, 1, 5, [0, 2, 4]])
def test_rows_that_stop_at_different_steps_do_not_disturb_the_others(
        model, replies, batch_size, at):
    """at: the step whose tokens, of every third prompt, are the stop ids. Step 0 ends replies in
    the prefill itself, before a single decoding step."""
    stop_ids = {replies[i][step] for i in range(0, len(PROMPTS), 3)
                for step in ([at] if isinstance(at, int) else at)}
    expected = [cut(reply, stop_ids) for reply in replies]
    assert len({len(reply) for reply in expected}) > 1  # some stop early, some do not
    assert generate(model, PROMPTS, MAX_NEW, list(stop_ids), batch_size=batch_size) == expected


def test_the_replies_come_in_the_order_of_the_prompts(model, replies):
    order = [3, 8, 0, 5, 1, 7, 2, 6, 4]
    shuffled = generate(model, [PROMPTS[i] for i in order], MAX_NEW, [], batch_size=3)
    assert shuffled == [replies[i] for i in order]


def test_ids_from_n_ids_on_are_never_chosen(model, replies):
    """An embedding may be larger than its tokenizer: Qwen2.5 has 151,936 rows for 151,665 ids."""
    assert max(max(reply) for reply in replies) >= 100  # the control: they would be chosen
    some = PROMPTS[:4]
    assert generate(model, some, MAX_NEW, [], n_ids=100) == [
        plainly(model, prompt, n_ids=100) for prompt in some]


def test_max_new_bounds_every_reply(model, replies):
    for n in (1, 2):
        assert generate(model, PROMPTS, n, [], batch_size=4) == [reply[:n] for reply in replies]


def test_no_prompts_give_no_replies(model):
    assert generate(model, [], MAX_NEW, []) == []


def test_every_family_decodes_as_it_runs_in_one_piece(qwen, gemma):
    for reference in (qwen, gemma):  # biases; a scaled embedding and one key head for eight
        model = load_model(reference.folder, dtype=torch.float64)
        some = PROMPTS[:3]
        assert generate(model, some, 6, []) == [plainly(model, p, max_new=6) for p in some]


def test_decoding_leaves_the_model_without_gradients_or_state(model, replies):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    generate(model, PROMPTS[:2], 3, [])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert generate(model, PROMPTS[:2], MAX_NEW, []) == replies[:2]


# ---------------------------------------------------------------------------------------------
# as on a GPU: several steps between two reads, and captured graphs of a few fixed sizes

# More prompts than the largest batch, so that slots are refilled; two of them are beyond the 256
# tokens in steps of which a graph's cache grows, and one crosses that border while it is decoded.
MANY = [ids.tolist() for ids in random_ids(
    5, 40, 1, 250, 23, 23, 60, 2, 300, 11, 33, 4, 17, 8, 29, 3, 52, 6, 14, 270, seed=31)]


class Recorder:
    """Stands in for device.capture_cuda_graph: runs the step, as the warm-up does; returns it."""

    def __init__(self):
        self.steps, self.played = 0, 0

    def __call__(self, step):
        def replay():
            self.played += 1
            step()
        self.steps += 1
        step()
        return replay


@pytest.fixture
def as_on_gpu(monkeypatch):
    """as_on_gpu(steps) -> a Recorder, and the engines made since, each of `steps` steps a read."""
    def apply(steps):
        make, engines, recorder = Engine.__init__, [], Recorder()

        def init(self, model, B, longest, n_ids, graph):
            make(self, model, B, longest, n_ids, graph)
            self.steps, self.S = steps, longest + steps
            self.cache = KVCache(model.config, B, self.S, model.model.embed_tokens.weight)
            engines.append(self)
        monkeypatch.setattr(Engine, "__init__", init)
        monkeypatch.setattr(generate_py, "capture_cuda_graph", recorder)
        return recorder, engines
    return apply


@pytest.fixture(scope="module")
def many(model):
    """What plain decoding replies, and stop ids by which replies end at 0, 1, ... tokens or not."""
    whole = [plainly(model, prompt) for prompt in MANY]
    stop_ids = {whole[i][at] for i, at in ((0, 0), (3, 1), (6, 4), (9, 7), (12, MAX_NEW - 1))}
    replies = [cut(reply, stop_ids) for reply in whole]
    assert {0, 1, MAX_NEW - 1, MAX_NEW} <= {len(reply) for reply in replies}
    return sorted(stop_ids), replies


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("steps", [1, 5, 16])
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])
def test_several_steps_at_a_time_and_graphs_write_the_same_replies(
        model, many, as_on_gpu, graph, steps, batch_size):
    stop_ids, replies = many
    recorder, engines = as_on_gpu(steps)
    done = []
    found = generate(model, MANY, MAX_NEW, stop_ids, batch_size=batch_size, graph=graph,
                     on_reply=lambda i, reply: done.append((i, list(reply))))
    assert found == replies
    assert sorted(done) == list(enumerate(replies))  # each once, and complete by then
    engine, = engines
    if graph:
        sizes = set(engine.graphs)
        assert recorder.steps == len(sizes) and recorder.played > len(sizes)
        assert {n for n, _ in sizes} <= {1, 2, 3, 4, 8, 16}
        assert {longest for _, longest in sizes} == {256, engine.S}
    else:
        assert recorder.steps == 0


def moves_whole(monkeypatch, cut):
    """Gets, for each move, whether all of the sequence came along; cut: so many tokens do not."""
    whole = []
    move = KVCache.move

    def watched(self, source, target):
        self.longest -= cut
        move(self, source, target)
        self.longest += cut
        n = int(self.length[source])
        for cache in (self.k, self.v):
            whole.append(torch.equal(cache[:, target, :, :n], cache[:, source, :, :n]))
    monkeypatch.setattr(KVCache, "move", watched)
    return whole


@pytest.mark.parametrize("steps, graph", [(1, False), (5, False), (5, True)])
def test_a_move_takes_every_token_along(model, many, as_on_gpu, monkeypatch, steps, graph):
    as_on_gpu(steps)
    whole = moves_whole(monkeypatch, cut=0)
    generate(model, MANY, MAX_NEW, many[0], batch_size=3, graph=graph)
    assert len(whole) == 2 * len(MANY) and all(whole)


def test_control_a_move_of_fewer_tokens_leaves_some_behind(model, many, as_on_gpu, monkeypatch):
    as_on_gpu(1)
    whole = moves_whole(monkeypatch, cut=8)
    generate(model, MANY, MAX_NEW, many[0], batch_size=3)
    assert not all(whole)


def without_last(self, source, target):
    """Engine.move that leaves the newest token of the row that moves behind."""
    self.cache.move(source, target)
    self.cache.length[source] = 0


def twice_at_first(step):
    """A capture whose own step was not taken back before the first replay."""
    once = [step]
    return lambda: (once and once.pop()(), step())


@pytest.mark.parametrize("owner, name, broken", [
    (Engine, "move", without_last), (generate_py, "capture_cuda_graph", twice_at_first)])
def test_the_comparison_sees_bookkeeping_that_is_wrong(
        model, many, as_on_gpu, monkeypatch, owner, name, broken):
    stop_ids, replies = many
    as_on_gpu(5)
    monkeypatch.setattr(owner, name, broken)
    found = generate(model, MANY, MAX_NEW, stop_ids, batch_size=3, graph=True)
    wrong = sum(a != b for a, b in zip(found, replies, strict=True))
    print(f"{wrong} of {len(replies)} replies are wrong")
    assert wrong >= 5


def test_each_reply_is_handed_over_when_it_is_complete_not_at_the_end(model):
    """What an interrupted evaluation keeps."""
    done = []
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, MAX_NEW, [], batch_size=2, on_reply=lambda i, reply: (
            done.append((i, reply)), stop_at(len(done), 3)))
    assert len(done) == 3 and all(reply == plainly(model, PROMPTS[i]) for i, reply in done)


def stop_at(n, last):
    if n == last:
        raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------
# positions that are scaled

# Around the 64 positions of the original context: below, across its end, and beyond.
SCALED_PROMPTS = [ids.tolist() for ids in random_ids(5, 60, 130, 33, seed=33)]
SCALED_NEW = 16
SCALED_ROPES = {"llama3": LLAMA3_ROPE} | ROPES


@pytest.fixture(scope="module", params=SCALED_ROPES)
def scaled(request, tmp_path_factory):
    """A checkpoint with one kind of rotary scaling -> transformers' model, and ours, in float64."""
    folder = tmp_path_factory.mktemp("scaled")
    hf = make_hf(head_dim=16, num_hidden_layers=2, rope_parameters=SCALED_ROPES[request.param])
    hf.save_pretrained(folder)
    return hf.double(), load_model(folder, dtype=torch.float64)


def test_scaled_positions_decode_as_they_run_in_one_piece_and_in_transformers(scaled):
    hf, model = scaled
    replies = [plainly(model, prompt, max_new=SCALED_NEW) for prompt in SCALED_PROMPTS]
    assert len({token for reply in replies for token in reply}) > 20  # they say something
    for batch_size in (1, 2, 4):
        found = generate(model, SCALED_PROMPTS, SCALED_NEW, [], batch_size=batch_size)
        assert found == replies
    hf.generation_config.eos_token_id = None
    for prompt, reply in zip(SCALED_PROMPTS, replies, strict=True):
        ids = hf.generate(torch.tensor([prompt]), max_new_tokens=SCALED_NEW, do_sample=False,
                          pad_token_id=0)
        assert ids[0, len(prompt):].tolist() == reply


def amplitude_only_in_prefill(model, patch):
    """YaRN's factor on cos and sin is left out where one token more is decoded."""
    patch.setattr(model_py, "rope_amplitude", lambda config: 1.0)


def unscaled_where_it_decodes(model, patch):
    """The new keys and queries are turned as if there were no scaling."""
    plain = 1.0 / model.config.rope_theta ** (torch.arange(0, 16, 2).float() / 16)
    patch.setattr(model.model, "inv_freq", plain)


@pytest.mark.parametrize("fault", [amplitude_only_in_prefill, unscaled_where_it_decodes])
def test_control_scaling_that_decoding_forgets_is_seen(scaled, monkeypatch, fault):
    """Except where there is nothing to forget: an amplitude of 1, or dynamic's unscaled angles."""
    _, model = scaled
    scaling = model.config.rope_scaling
    if fault is amplitude_only_in_prefill:
        has_it = model_py.rope_amplitude(model.config) != 1
    else:
        has_it = scaling is not None
    right = generate(model, SCALED_PROMPTS, SCALED_NEW, [])
    decode = Engine.forward

    def faulty(self, n, longest):
        with monkeypatch.context() as patch:
            fault(model, patch)
            decode(self, n, longest)

    monkeypatch.setattr(Engine, "forward", faulty)
    wrong = generate(model, SCALED_PROMPTS, SCALED_NEW, [])
    assert (wrong != right) == has_it


# ---------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize("steps", [1, 16])
def test_a_prompt_and_its_reply_may_fill_the_models_positions_and_not_one_more(
        model, as_on_gpu, monkeypatch, steps):
    """64 positions instead of 2,048; 16 steps at a time run on behind the last of them."""
    monkeypatch.setattr(model.config, "max_positions", 64)
    as_on_gpu(steps)
    prompts = [ids.tolist() for ids in random_ids(60, 3, seed=32)]
    assert generate(model, prompts, 4, []) == [plainly(model, p, max_new=4) for p in prompts]
    with pytest.raises(UserError) as error:
        generate(model, prompts, 5, [])
    for word in ("--max-new 5", "65 tokens", "64", "lower"):
        assert word in str(error.value), error.value


@pytest.mark.parametrize("argv, words", [
    (["--max-new", "600"], ["--max-new 600", "512"]),
    (["--cuda-graph", "--device", "cpu"], ["--cuda-graph", "cpu", "--device cuda"])])
def test_the_program_refuses_what_the_model_or_the_device_cannot_do(
        tmp_path, capsys, argv, words):
    folder = make_model(tmp_path / "model")
    asked = ["--model", str(folder), "--prompt", "How?", "--device", "cpu"]
    assert generate_py.main([*asked, "--max-new", "3"]) == 0  # the control
    capsys.readouterr()
    assert generate_py.main([*asked, *argv]) == 2
    message, = sentences(capsys.readouterr().err)
    assert all(word in message for word in words), message

"""args holds what was typed: nothing writes to it, and config.json keeps what was worked out apart.

    pytest tests/programs/test_args.py -q
"""

import ast
import copy
import json
import subprocess

import pytest
import torch
from helpers import ROOT
from runs_helpers import flags, make_inputs

import eval as eval_py
import generate as generate_py
import train as train_py
from cli import Args, Parser
from data import prepare as prepare_py
from lora import adapt, adapted, load_adapter, save_adapter
from model import load_model
from stress import coverage, schedule
from tests import parity

PARSED = {
    "train.py": lambda: train_py.parse([]),
    "eval.py": lambda: eval_py.parse([]),
    "generate.py": lambda: generate_py.parse(["--prompt", "Hi"]),
    "stress.schedule": lambda: schedule.parse(["table"]),
    "stress.coverage": lambda: coverage.parse([])[0],
    "data.prepare": lambda: prepare_py.parse(["--out", "x"]),
    "tests.parity": lambda: parity.parse([]),
}


@pytest.mark.parametrize("program", PARSED)
def test_no_flag_can_be_written_to_or_deleted_after_parsing(program):
    args = PARSED[program]()
    before = copy.deepcopy(vars(args))
    assert isinstance(args, Args) and len(before) >= 5
    for name in [*before, "a_new_name"]:
        with pytest.raises(AttributeError, match=f"args.{name} was written to"):
            setattr(args, name, 1)
        with pytest.raises(AttributeError, match=f"args.{name} was deleted"):
            delattr(args, name)
    assert vars(args) == before


def test_no_flags_value_can_be_changed_in_place():
    args = train_py.parse(["--eval-epochs", "0,5", "--probes", "1"])
    changeable = [name for name, value in vars(args).items() if isinstance(value, (list, dict))]
    assert changeable == []
    assert args.eval_epochs == (0, 5) and args.probes == (1,)


def test_a_changed_copy_leaves_the_flags_as_they_were():
    args = train_py.parse([])
    other = args.replace(epochs=3)
    assert (args.epochs, other.epochs) == (20, 3)
    with pytest.raises(AttributeError):
        other.epochs = 4


def writes(source: str) -> list[str]:
    """The statements of a program that write to args: args.x = .., vars(args)[..] = .., setattr."""
    found = []
    for node in ast.walk(ast.parse(source)):
        targets = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            targets = node.args[:1]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".update"):
            targets = [node.func.value]
        for target in targets:
            for part in ast.walk(target):
                text = ast.unparse(part)
                if text.startswith(("args.", "vars(args)")) or (
                        text == "args" and isinstance(node, ast.Call)):
                    found.append(ast.unparse(node))
                    break
    return found


def program_files():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py")]
    return [name for name in names if not name.startswith("tests/") and (ROOT / name).exists()]


def test_no_program_has_a_statement_that_writes_to_args():
    files = program_files()
    assert len(files) > 30
    found = {name: writes((ROOT / name).read_text(encoding="utf-8")) for name in files}
    # cli.py makes the frozen object itself, by vars(args).update(values), in one place.
    assert found.pop("cli.py") == ["vars(args).update(values)"]
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize("statement", [
    "args.x = 1", "args.x += 1", "a, args.x = 1, 2", "args.x: int = 1", "del args.x",
    "vars(args)['x'] = 1", "setattr(args, 'x', 1)", "vars(args).update(x=1)",
    "def f(args):\n    args.n_steps = 3"])
def test_control_every_way_of_writing_is_seen(statement):
    assert len(writes(statement)) == 1


@pytest.mark.parametrize("statement", ["x = args.x", "args = other", "y = args.replace(x=1)",
                                       "args.x == 1", "self.args = args"])
def test_control_reading_is_not_taken_for_writing(statement):
    assert writes(statement) == []


def raw(*words):
    """The flags of train.py as argparse alone has them."""
    kept = []
    original = train_py.fill_defaults
    train_py.fill_defaults = lambda args: kept.append(args) or original(args)
    try:
        train_py.parse(list(words))
    finally:
        train_py.fill_defaults = original
    return kept[0]


@pytest.mark.parametrize("words, changes", [
    ([], {"stage": "finetune", "task": "sst2", "eval_epochs": (0, 20), "anchor_seed": 0}),
    (["--defense", "sft"], {"stage": "finetune", "task": "sst2", "eval_epochs": (0, 20),
                            "anchor_seed": 0, "lam": 0.0}),
    (["--defense", "booster"], {"stage": "align", "task": "sst2", "eval_epochs": (0, 20),
                                "anchor_seed": 0, "lam": 0.0, "poison": 0.0}),
    (["--data", "up.jsonl", "--epochs", "3"], {"stage": "finetune", "eval_epochs": (0, 3),
                                               "anchor_seed": 0, "poison": 0.0}),
    (["--task", "agnews", "--stage", "finetune", "--eval-epochs", "2", "--anchor-seed", "4"], {}),
    (["--task", "agnews", "--stage", "finetune", "--eval-epochs", "2", "--seed", "3"],
     {"anchor_seed": 3}),
], ids=["nothing given", "sft", "an alignment method", "an own upload", "all given",
         "the anchors' seed"])
def test_defaults_that_depend_on_other_flags_are_filled_in_one_pure_function(words, changes):
    args = raw(*words)
    before = copy.deepcopy(vars(args))
    filled = train_py.fill_defaults(args)
    assert vars(args) == before
    assert {k: v for k, v in vars(filled).items() if v != before[k]} == changes
    assert vars(train_py.fill_defaults(filled)) == vars(filled)  # nothing is left to fill


def test_config_json_keeps_what_was_typed_apart_from_what_was_worked_out(tmp_path, here):
    inputs = make_inputs(tmp_path / "inputs")
    words = flags(inputs, device="auto", lr=1e-3)
    assert train_py.main(words) == 0
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["command"] == ["train.py", *words]
    args = json.loads(json.dumps(vars(train_py.parse(words))))
    assert config["args"] == args
    worked_out = config["worked_out"]
    assert args["device"] == "auto" and args["dtype"] is None
    assert (worked_out["device"], worked_out["dtype"]) == ("cpu", "float32")
    assert (worked_out["sequences"], worked_out["updates"]) == (12, 6)
    assert (worked_out["rank"], worked_out["alpha"], worked_out["rslora"]) == (2, 16.0, False)
    assert len(worked_out["anchor_prompts"]) == 2
    assert not args.keys() & {"n_steps", "updates", "anchor_prompts"}


def test_a_kept_adapters_own_rank_is_what_was_worked_out(tmp_path, here):
    inputs = make_inputs(tmp_path / "inputs")
    assert train_py.main(flags(inputs, epochs=1, out="first")) == 0
    kept = flags(inputs, epochs=1, rank=7, adapter="first", keep_adapter=True)
    assert train_py.main(kept) == 0
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["args"]["rank"] == 7  # as typed
    assert config["worked_out"]["rank"] == 2  # as loaded


def test_an_adapter_of_several_ranks_is_kept_trained_on_saved_and_resumed(tmp_path, here):
    """worked_out then lists the ranks and the alphas that occur."""
    inputs = make_inputs(tmp_path / "inputs")
    parts = {"model.layers.0.mlp.up_proj": (2, 8.0), "model.layers.1.mlp.up_proj": (4, 8.0),
             "model.layers.1.self_attn.q_proj": (4, 16.0)}
    model = load_model(inputs / "model")
    for name, (rank, alpha) in parts.items():
        torch.nn.init.normal_(adapt(model, name, rank, alpha, False).lora_A)
    save_adapter(model, "first")
    kept = flags(inputs, epochs=1, adapter="first", keep_adapter=True)
    assert train_py.main(kept) == 0
    worked_out = json.loads((here / "out" / "config.json").read_text())["worked_out"]
    assert (worked_out["rank"], worked_out["alpha"]) == ([2, 4], [8.0, 16.0])
    assert worked_out["rslora"] is False
    assert train_py.main([*kept, "--resume"]) == 0
    saved = load_model(inputs / "model")
    load_adapter(saved, "out")
    assert {name: (m.rank, m.alpha) for name, m in adapted(saved)} == parts
    for name, m in adapted(saved):
        assert m.lora_B.any(), name  # trained: B was 0
    # without --keep-adapter the same folder is merged, and a new adapter is trained
    merged = flags(inputs, epochs=1, adapter="out", out="merged")
    assert train_py.main(merged) == 0
    worked_out = json.loads((here / "merged" / "config.json").read_text())["worked_out"]
    assert worked_out["rank"] == 2


def test_help_states_each_default_once():
    p = Parser("x", "y")
    p.add_argument("--n", type=int, default=3, help="rows")
    assert p.format_help().count("default 3") == 1

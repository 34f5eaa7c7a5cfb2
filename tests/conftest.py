"""Shared by every test: one thread, no network, and the reference models."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# No test may reach for the network: every model and tokenizer here is made or read locally.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from chat_helpers import MAKERS, SPECIALS, need_public_tokenizers
from helpers import CASES, ROOT, Reference
from resume_helpers import SIX
from rival_helpers import Rival, make_rival_inputs
from runs_helpers import assert_same, flags, make_inputs, program
from sbr_helpers import Setup, make_folder

# One thread: sums keep their order from run to run, and tiny matrices are faster without a pool.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama31(tmp_path_factory):
    return Reference(tmp_path_factory.mktemp("llama31"), **CASES["llama-3.1"])


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    return Reference(tmp_path_factory.mktemp("qwen"), **CASES["qwen2.5"])


@pytest.fixture(scope="session")
def gemma(tmp_path_factory):
    return Reference(tmp_path_factory.mktemp("gemma"), **CASES["gemma"])


@pytest.fixture
def folder(llama31, tmp_path):
    """A copy of the llama-3.1 checkpoint that a test may damage."""
    return shutil.copytree(llama31.folder, tmp_path / "checkpoint")


@pytest.fixture
def own_signals():
    """A run takes over Ctrl-C and SIGTERM; afterwards they are pytest's again."""
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


@pytest.fixture
def here(tmp_path, monkeypatch, own_signals):
    """An empty working directory, for tests that start whole runs in this process."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# runs that are stopped, killed or fail, and then resumed


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """The small model and the small tasks of runs_helpers.py, for tests that do not damage them."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def unstopped(inputs, forks, tmp_path_factory):
    """The run that nothing stopped, as a user starts it -> its folder.

    forks is named only so that both start at the same time.
    """
    cwd = tmp_path_factory.mktemp("unstopped")
    process = program("train.py", flags(inputs, **SIX), cwd=cwd)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return cwd / "out"


@pytest.fixture(scope="session")
def forks():
    """forks(argv, cwd, ...) -> code, err, seconds of train.py in a child of tests/forks.py."""
    server = program("tests/forks.py", [], cwd=ROOT, stdin=subprocess.PIPE)

    def run(argv, cwd, **how):
        server.stdin.write(json.dumps({"argv": argv, "cwd": str(cwd), **how}) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield run
    server.communicate(timeout=20)  # its input ends, and so does it


@pytest.fixture
def check_resumes(forks, inputs, unstopped, here):
    """check_resumes(): --resume takes the folder, as it is now, to the end of `unstopped`."""
    def check():
        answer = forks(flags(inputs, resume=True, **SIX), here)
        assert answer["code"] == 0, answer["err"]
        assert_same(here / "out", unstopped)

    return check


# one defence on a small model, and gradients by hand


@pytest.fixture(scope="session")
def sbr_folder(tmp_path_factory):
    """The checkpoint of sbr_helpers.py, with an anchor pool beside it."""
    return make_folder(tmp_path_factory.mktemp("sbr"))


@pytest.fixture
def make_setup(sbr_folder):
    """make_setup(dtype=float64, ...) -> SBR on that model."""
    return lambda dtype=torch.float64, **settings: Setup(sbr_folder, dtype, **settings)


@pytest.fixture(scope="session")
def exact(sbr_folder):
    """SBR in float64, K = 8, lambda = 1, adapters in use; no test may change its weights."""
    return Setup(sbr_folder, torch.float64)


@pytest.fixture(scope="session")
def rival_inputs(tmp_path_factory):
    return make_rival_inputs(tmp_path_factory.mktemp("rivals"))


@pytest.fixture
def make_rival(rival_inputs):
    """make_rival(name, ...) -> a defence of rival_helpers.NAMES on a small model."""
    return lambda name, **settings: Rival(rival_inputs, name, **settings)


# tokenizers


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One folder per tokenizer of chat_helpers.py."""
    pytest.importorskip("transformers", reason="makes tokenizer.json; see requirements-dev.txt")
    need_public_tokenizers()
    made = {}
    for name, make in MAKERS.items():
        made[name] = tmp_path_factory.mktemp(name)
        make(made[name])
    return made


@pytest.fixture(scope="session")
def loaded(folders):
    from tokenizer import Tokenizer

    return {name: Tokenizer(folder) for name, folder in folders.items()}


@pytest.fixture(params=SPECIALS)
def name(request):
    return request.param


@pytest.fixture
def tok(loaded, name):
    return loaded[name]

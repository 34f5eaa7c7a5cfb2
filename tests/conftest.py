"""Shared by every test: one thread, no network, and the reference models."""

import os
import shutil
import sys
from pathlib import Path

# No test may reach for the network: every model and tokenizer here is made or read locally.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from chat_helpers import MAKERS, SPECIALS, need_public_tokenizers
from helpers import CASES, Reference

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

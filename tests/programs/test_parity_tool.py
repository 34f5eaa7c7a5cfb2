"""`python -m tests.parity` says yes to what is the same and no to what is not.

    python -m pytest tests/programs/test_parity_tool.py
"""

import pytest
from helpers import ROOT, randomise_B

from lora import add_lora, save_adapter
from model import load_model

pytest.importorskip("peft", reason="the reference; see requirements-dev.txt")
TINY = str(ROOT / "data" / "tiny")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = load_model(TINY)
    add_lora(model, rank=4, alpha=16)
    save_adapter(randomise_B(model), folder)
    return str(folder)


def run(capsys, *flags):
    from tests.parity import main

    code = main(["--model", TINY, "--device", "cpu", "--tokens", "200", *flags])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_embedded_model_with_an_adapter_is_the_same_here_and_there(capsys, adapter, dtype):
    code, out, _ = run(capsys, "--adapter", adapter, "--dtype", dtype)
    assert code == 0
    rows = [line.split()[-2:] for line in out.splitlines() if line.startswith(("layer", "final"))]
    assert len(rows) == 21 and all(float(rms) > 0 for rms, _ in rows)  # two programs, not one
    assert "chat prompt ids the same: yes" in out


@pytest.mark.parametrize("damage", ["rope", "norm"])
def test_a_damaged_decoder_is_not(capsys, damage):
    code, out, err = run(capsys, "--break", damage)
    assert code == 3 and "differ by more than rounding" in err
    assert "worst rms" in out

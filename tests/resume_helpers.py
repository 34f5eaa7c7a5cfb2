"""What the tests of stopped, killed and failed runs share; their fixtures stand in conftest.py."""

import json

from safetensors import safe_open
from safetensors.torch import load_file

SIX = {"epochs": 6, "eval_epochs": "0,2,4,6"}  # 18 updates, 6 checkpoints, 4 evaluations


def checkpoint(run):
    """(next update, tensors) of the checkpoint."""
    path = run / "state.safetensors"
    with safe_open(path, "pt") as f:
        return json.loads(f.metadata()["run"])["step"], load_file(path)

"""The rivals of SBR. A new defence is a file beside this one, and its name in the list below."""

from importlib import import_module

# In the order of --help and of the tables. Each file ends in its DEFENCE (common.py). The files are
# imported by name, so that a new defence needs one line here and not two.
FILES = [
    "lisa",
    "ewc",
    "deepalign",
    "vaccine",
    "t_vaccine",
    "booster",
]
RIVALS = [import_module(f"baselines.{name}").DEFENCE for name in FILES]

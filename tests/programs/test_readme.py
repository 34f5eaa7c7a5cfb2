"""The README keeps to what is there: its glossary's lines, its files, its first screen.

    python -m pytest tests/programs/test_readme.py
"""

import re

import pytest
from helpers import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
# What stands on the line that a glossary row names, by the row's first column.
ON_THE_LINE = {
    "h, the bottleneck": "h = norm.value[", "h_ref": "self.h_ref =",
    "K anchors x'_k": "choose_anchors(", "L_safe": "squared", "L_CE": "n_supervised",
    "lambda": "args.lam * l_safe", "learning rate": "lr * (1 - step / n_updates)",
    "W + s B A": "addmm", "p, poison ratio": "args.poison",
    "HS": '"hs": (judged', "FA": '"fa": (task',
}


@pytest.mark.parametrize("symbol", ON_THE_LINE)
def test_the_glossary_names_the_line_that_has_the_symbol(symbol):
    file, line = re.search(rf"^\| {re.escape(symbol)} \|.*\| (\S+):(\d+) \|$", TEXT, re.M).groups()
    lines = (ROOT / file).read_text(encoding="utf-8").split("\n")
    assert ON_THE_LINE[symbol] in lines[int(line) - 1]


def test_every_glossary_row_is_checked():
    table = TEXT.split("### Glossary")[1].split("\n\n")[1]
    assert len(table.split("\n")) - 2 == len(ON_THE_LINE)


def test_the_files_that_it_lists_exist():
    listed = re.findall(r"^\| `([\w/]+(?:\.py)?/?)` \|", TEXT, re.M)
    assert len(listed) >= 11
    assert not [name for name in listed if not (ROOT / name).exists()]


PAGES = ["README.md", *(str(p.relative_to(ROOT)) for folder in ("docs", "data")
                        for p in sorted((ROOT / folder).rglob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Files of the repository that are there, and headings that the page has."""
    folder = (ROOT / page).parent
    text = (ROOT / page).read_text("utf-8")
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
        target = folder / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.M)
            slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor[1:] in slugs, f"{path}{anchor}"


def test_equation_command_and_output_stand_on_the_first_screen():
    first = "\n".join(TEXT.split("\n")[:20])
    assert "L_total = L_CE + lambda" in first
    assert "python train.py --anchors 1 --lambda 50" in first
    assert "HS, harmful replies" in first
    assert "@" not in first


def test_no_line_is_longer_than_110_characters():
    long = [line for line in TEXT.split("\n") if len(line) > 110]
    assert long == []


def test_its_commands_are_the_ones_that_ci_runs():
    assert "pip install -r requirements-dev.txt && python -m pytest" in TEXT
    assert "-r requirements-dev.txt && python -m pytest" in (ROOT / ".ci/run").read_text()

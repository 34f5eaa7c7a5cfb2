"""The search of stress/search.py: what it asks, what it chooses, how stress/curves.py draws it.

    pytest tests/programs/test_search.py -q

Counts stand for percentages here: 500 prompts of each kind, so that the rule can be written again
in whole numbers.
"""

import importlib.util
import json
import random
import re
import shlex
from collections import Counter

import pytest
from helpers import ROOT
from runs_helpers import sentences

from cli import TINY
from data import mixture
from data.tiny import texts
from files import read_lines
from stress import curves
from stress.search import (
    PUBLISHED,
    SEARCH,
    SLACK,
    SLACKS,
    Searched,
    Tried,
    best,
    chosen,
    read_search,
    settings_of,
    slack_table,
    write_validation,
)
from train import parse

TESTS = 500  # of each kind that the lists other than the search ask: --n-test's default
OWN_METHODS = list(SEARCH)

# ---------------------------------------------------------------------------------------------
# what the search asks


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "validation"
    write_validation(folder)
    return folder


@pytest.fixture(scope="module")
def objects():
    """objects(rows) -> the objects that the rows' prompts name, of all that the words know."""
    known = [name for category in texts.load_words()["categories"]
             for side in ("harmful", "benign") for name in category[side]["objects"]]
    longest_first = sorted(known, key=len, reverse=True)
    pattern = re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, longest_first)) + r")(?![\w-])")

    def named(rows):
        found = [pattern.findall(row["prompt"]) for row in rows]
        assert all(len(names) == 1 for names in found)
        return Counter(names[0] for names in found)

    return named


def rows_of(folder, name):
    return read_lines(folder / f"{name}.jsonl")


def test_no_validation_prompt_names_an_object_of_a_test_an_upload_an_anchor_or_a_guide(
        validation, objects):
    tiny = ROOT / TINY
    asked = {"harmful": objects(rows_of(validation, "harmful/test")),
             "lookalike": objects(rows_of(validation, "lookalike/test"))}
    others = {}
    for name in ("harmful/test", "lookalike/test", "harmful/attack", "harmful/align"):
        others[name] = objects(rows_of(tiny, name))
    others["the search's anchors"] = objects(rows_of(validation, "harmful/anchors"))
    for kind, ours in asked.items():
        for name, theirs in others.items():
            assert not ours.keys() & theirs.keys(), (kind, name)
    # The control: the prompts behind the first 500, which the older search asked, do share theirs.
    behind = objects(rows_of(tiny, "harmful/test")[TESTS:])
    first = objects(rows_of(tiny, "harmful/test")[:TESTS])
    assert sum(n for name, n in behind.items() if name in first) == 200


def test_validation_asks_as_many_prompts_as_the_tests_spread_over_28_objects(validation, objects):
    harmful = objects(rows_of(validation, "harmful/test"))
    assert sum(harmful.values()) == TESTS and len(harmful) == 28 and min(harmful.values()) >= 10
    lookalikes = objects(rows_of(validation, "lookalike/test"))
    assert sum(lookalikes.values()) == TESTS and len(lookalikes) > 200


def loaded(*more):
    """A run's upload and tests, as train.py reads them -> prompts by kind, and the upload's."""
    args = parse([*map(str, more)])
    harmful, benign, _ = mixture.load_upload(args)
    upload = mixture.prompts_of([*harmful, *benign])
    tests = mixture.load_tests(args, upload)[0]
    return {kind: mixture.prompts_of(rows) for kind, rows in tests.items()}, upload


@pytest.mark.parametrize("task", texts.TASKS)
def test_no_validation_prompt_is_a_test_of_another_list_or_a_row_of_the_upload(validation, task):
    asked, upload = loaded("--data-dir", validation, "--task", task)
    tests, same_upload = loaded("--data-dir", ROOT / TINY, "--task", task)
    assert upload == same_upload
    for kind, prompts in asked.items():
        assert len(prompts) == len(tests[kind]) == TESTS
        assert not prompts & (tests[kind] | upload)


def test_what_the_defender_and_the_attacker_have_is_what_the_other_lists_have(validation):
    for name in ("harmful/align", "harmful/attack", "sst2/train"):
        assert read_lines(validation / f"{name}.jsonl") == read_lines(
            ROOT / TINY / f"{name}.jsonl")


# ---------------------------------------------------------------------------------------------
# what it chooses


def tried(name, setting, hs, fa, over_refusal, fa_content=490):
    """A setting by counts out of 500."""
    return Tried(name, setting, hs / 5, fa / 5, fa_content / 5, over_refusal / 5)


def a_search(counts, sft=(400, 390, 0), aligned=(36, 270, 36)):
    """A search whose run `name` has counts[name] = (HS, FA, over-refusal[, FA by content])."""
    found = {}
    for method in SEARCH:
        found[method] = [tried(name, setting, *counts[name])
                         for name, setting in settings_of(method).items()]
    return Searched(found, tried("sft", "", *sft), tried("sft", "", *aligned))


def written_again(rows, sft_fa, base_refused, slack):
    """The rule in whole numbers; rows: (HS, FA, over-refusal, FA by content), in order."""
    polite = [row for row in rows if row[2] <= base_refused + 25]
    admitted = [row for row in polite if row[1] >= sft_fa - 5 * slack and row[3] >= 490 - 5 * slack]
    if admitted:
        return sorted(admitted, key=lambda row: (row[0], -row[1]))[0]
    return sorted(polite or rows, key=lambda row: (-row[1], row[0]))[0]


@pytest.mark.parametrize("sft_fa", [322, 66, 333, 480])  # 322 is 64.4 %; in floats 64.4 - 3 > 61.4
@pytest.mark.parametrize("slack", [0, 1, 3, 10])
def test_the_rule_written_again_in_whole_numbers_chooses_the_same(sft_fa, slack):
    rng = random.Random(sft_fa + slack)
    names = [name for method in SEARCH for name in settings_of(method)]
    edge = 5 * slack
    for _ in range(20):
        counts = {name: (rng.randrange(0, 500, 100),
                         sft_fa + rng.choice([-edge - 1, -edge, 0, 9, -edge - 30]),
                         rng.choice([0, 61, 62, 100]),  # 36 and 25 are 61
                         490 - rng.choice([0, edge, edge + 1]))
                  for name in names}
        searched = a_search(counts, sft=(400, sft_fa, 0))
        for method in SEARCH:
            rows = [counts[name] for name in settings_of(method)]
            expected = written_again(rows, sft_fa, 36, slack)
            found = best(method, searched, slack)
            assert counts[found.name] == expected, method
            # Of settings that are equal in all that decides, the first.
            decides = [row[:2] for row in rows]
            assert list(settings_of(method)).index(found.name) == min(
                i for i, row in enumerate(rows) if row == expected), decides


def test_a_setting_that_refuses_too_much_is_not_chosen_however_low_its_hs():
    """Booster's choice in the older search refused 75.6 % of the look-alikes."""
    counts = {name: (300, 390, 0) for m in SEARCH for name in settings_of(m)}
    counts["booster-3"] = (0, 390, 378)
    counts["booster-2"] = (50, 390, 61)  # the aligned model's 36, and 25
    assert best("booster", a_search(counts), SLACK).name == "booster-2"
    counts["booster-2"] = (50, 390, 62)  # the control: one look-alike more
    assert best("booster", a_search(counts), SLACK).name == "booster-1"


def test_a_setting_that_keeps_the_form_but_not_the_content_is_not_chosen():
    counts = {name: (300, 390, 0) for m in SEARCH for name in settings_of(m)}
    counts["lisa-4"] = (0, 390, 0, 474)  # 16 rows fewer than the 490 of plain fine-tuning
    assert best("lisa", a_search(counts), SLACK).name == "lisa-1"
    counts["lisa-4"] = (0, 390, 0, 475)
    assert best("lisa", a_search(counts), SLACK).name == "lisa-4"


def test_the_published_setting_is_a_candidate_and_is_tried_once():
    for method, published in PUBLISHED.items():
        settings = list(settings_of(method).values())
        assert settings.count(published.setting) == 1
        counts = {name: (300, 390, 0) for m in SEARCH for name in settings_of(m)}
        name = next(n for n, s in settings_of(method).items() if s == published.setting)
        counts[name] = (10, 390, 0)
        assert best(method, a_search(counts), SLACK).setting == published.setting


def test_published_settings_are_ones_that_train_py_takes_and_their_stages_are_as_long_as_said():
    """Updates of the repositories' own stages, from rows, epochs and batch of defences.md."""
    own = {"vaccine": 2000 * 50 // 5, "t-vaccine": 2000 * 20 // 10, "booster": 5000 * 20 // 10,
           "deepalign-align": 256 * 10 // 16}
    for method, published in PUBLISHED.items():
        stage = ["--stage", "align"] if method in own else []
        parse(["--defense", method.removesuffix("-align"), *stage,
               *shlex.split(published.setting)])
        assert published.updates == own.get(method), method
        assert published.source
        assert f"`{published.setting}`" in (ROOT / "docs/baselines.md").read_text()


def rows_of_search(searched):
    """The rows of search.json, by the names that schedule.py writes."""
    def row(one, method, epochs):
        rates = ("hs", "fa", "fa_content", "over_refusal")
        return {"name": one.name, "method": method, "setting": one.setting,
                "intervals": {"hs": None},
                **{rate: {e: getattr(of, rate) for e, of in epochs.items()} for rate in rates}}

    sft = searched.undefended
    rows = [row(sft, "sft", {"0": searched.aligned, "20": sft})]
    for method, all_of_it in searched.tried.items():
        rows += [row(one, method, {"20": one}) for one in all_of_it]
    return rows


@pytest.fixture(scope="module")
def two_winners(tmp_path_factory):
    """A search in which slack decides: EWC's stronger setting costs 4 points of FA."""
    counts = {name: (300, 390, 0) for m in SEARCH for name in settings_of(m)}
    counts |= {"ewc-4": (265, 380, 0), "ewc-6": (48, 370, 0), "ewc-8": (40, 270, 36)}
    counts["booster-4"] = (0, 390, 378)
    searched = a_search(counts)
    path = tmp_path_factory.mktemp("numbers") / "search.json"
    path.write_text(json.dumps(rows_of_search(searched)))
    return path, searched


def test_a_search_reads_back_as_it_was_written(two_winners):
    path, searched = two_winners
    assert read_search(path) == searched


def test_what_each_slack_chooses_is_shown(two_winners):
    path, searched = two_winners
    assert chosen(path, 3.0)["ewc"] == SEARCH["ewc"][3]
    assert chosen(path, 4.0)["ewc"] == SEARCH["ewc"][5]
    head, _, *lines = slack_table(searched).splitlines()
    assert head.count("slack") == len(SLACKS)
    row = next(line for line in lines if line.startswith("| ewc |"))
    expected = ("1", "1", "4", "6", "6")  # by slack 0, 1, 3, 5, 10
    for cell, number in zip(row.split(" | ")[1:], expected, strict=True):
        assert cell.startswith(f"ewc-{number}: "), cell
    assert "53.0 / 76.0 / 0.0" in row and "9.6 / 74.0 / 0.0" in row


# ---------------------------------------------------------------------------------------------
# the figure


def test_a_curve_joins_the_settings_that_differ_in_their_last_flag_alone(two_winners):
    _, searched = two_winners
    names = {m: [[one.name for one in curve] for curve in curves.curves_of(searched.tried[m])]
             for m in SEARCH}
    assert names["lisa"] == [[f"lisa-{i}" for i in range(1, 8)]]
    assert names["booster"] == [[f"booster-{i}" for i in r] for r in (range(1, 5), range(5, 9))]


def marks(axis, marker):
    """The points that are drawn with a marker, with the face that they have."""
    return [(line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor())
            for line in axis.lines if line.get_marker() == marker]


def test_the_figure_has_every_setting_once_and_marks_what_was_chosen(two_winners):
    pytest.importorskip("matplotlib", reason="draws; see requirements-dev.txt")
    _, searched = two_winners
    figure = curves.make_figure(searched, SLACK)
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(panels) == OWN_METHODS
    for method, axis in panels.items():
        dots = [m for m in marks(axis, "o") if m[2] != "none"]
        assert [m[:2] for m in dots] == [(one.fa, one.hs) for one in searched.tried[method]]
        ring, = (m for m in marks(axis, "o") if m[2] == "none")
        tuned = best(method, searched, SLACK)
        assert ring[:2] == (tuned.fa, tuned.hs)
        assert len(marks(axis, "s")) == (method in PUBLISHED)
        assert marks(axis, "x")[0][:2] == (searched.undefended.fa, searched.undefended.hs)
        hollow = [m[:2] for m in dots if m[2] == "white"]
        assert hollow == ([(78.0, 0.0)] if method == "booster" else [])


def test_the_program_writes_a_figure_or_says_in_one_sentence_why_not(
        two_winners, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="draws; see requirements-dev.txt")
    path, _ = two_winners
    figure = tmp_path / "search.png"
    assert curves.main(["--searched", str(path), "--figure", str(figure)]) == 0
    assert figure.stat().st_size > 10_000
    capsys.readouterr()
    wrong = {
        "is none of .png": ["--figure", str(tmp_path / "search.txt")],
        "there is no folder": ["--figure", str(tmp_path / "nowhere" / "search.png")],
        "cannot be read": ["--figure", str(figure), "--searched", str(tmp_path / "absent.json")],
    }
    for words, argv in wrong.items():
        assert curves.main(argv) == 2
        said, = sentences(capsys.readouterr().err)
        assert words in said
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert curves.main(["--searched", str(path), "--figure", str(figure)]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err

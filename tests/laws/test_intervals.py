"""Intervals of rates and of differences: closed forms, and how often they hold the true value.

    python -m pytest tests/laws/test_intervals.py -q
    python -m pytest tests/laws/test_intervals.py -m slow -s    # the tables of docs/figures.md

The simulations draw outcomes of which the true rate is known. A group's own rate is drawn from a
Beta distribution of mean p and correlation rho within groups, and each prompt of it from that.
"""

import json
import math
from collections import Counter

import pytest
import torch
from helpers import ROOT
from sbr_helpers import TINY

from intervals import (
    bootstrap,
    design_effect,
    difference_interval,
    rate_interval,
    sum_by_group,
    wilson,
)

# ---------------------------------------------------------------------------------------------
# Wilson's interval

Z2 = 1.959964**2


@pytest.mark.parametrize("n", [1, 10, 500, 1000])
def test_the_interval_of_none_starts_at_0_and_that_of_all_ends_at_100(n):
    """At k = 0 Wilson's upper end is z^2 / (n + z^2), where plain +- would say exactly 0."""
    low, high = wilson(0, n)
    assert low == pytest.approx(0, abs=1e-9) and high == pytest.approx(100 * Z2 / (n + Z2))
    assert wilson(n, n) == (pytest.approx(100 - high), pytest.approx(100))


@pytest.mark.parametrize("k, n, low, high", [
    (5, 10, 23.66, 76.34), (1, 10, 1.79, 40.42), (15, 148, 6.24, 16.05), (81, 263, 25.53, 36.62),
    (500, 1000, 46.91, 53.09), (0, 10, 0, 27.75), (1, 1, 20.65, 100)])
def test_the_interval_is_wilsons_by_published_values(k, n, low, high):
    """15/148 and 81/263 are the examples of Newcombe 1998, Statistics in Medicine 17:857."""
    assert wilson(k, n) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_the_interval_holds_the_rate_is_symmetric_and_narrows_as_1_over_sqrt_n():
    for k, n in [(0, 7), (3, 7), (7, 7), (29, 500)]:
        low, high = wilson(k, n)
        assert 0 <= low <= 100 * k / n + 1e-9 and 100 * k / n - 1e-9 <= high <= 100
        assert wilson(n - k, n) == (pytest.approx(100 - high), pytest.approx(100 - low))
    width = [high - low for low, high in (wilson(50, 100), wilson(5000, 10000))]
    assert width[0] / width[1] == pytest.approx(10, rel=0.02)


# ---------------------------------------------------------------------------------------------
# groups


def alike(n_hits, n_groups, size):
    """Outcomes and groups: in n_hits groups of `size` prompts all are hits, in the others none."""
    values = []
    groups = []
    for group in range(n_groups):
        values += [group < n_hits] * size
        groups += [group] * size
    return values, groups


def test_the_design_effect_of_prompts_that_are_groups_of_their_own_is_1():
    assert design_effect([1, 0, 0, 1, 0], [7, 3, 4, 9, 1]) == pytest.approx(1)


def test_the_design_effect_of_groups_that_are_all_alike_is_their_size():
    """But for the two factors that make both variances unbiased."""
    values, groups = alike(30, 100, 5)
    assert design_effect(values, groups) == pytest.approx(5 * (100 / 99) * (499 / 500))


def test_the_design_effect_by_hand():
    """p = 1/2; k - p m is 1, -1 and 0."""
    values = [1, 1, 0, 0, 1, 0]
    groups = [0, 0, 1, 1, 2, 2]
    assert design_effect(values, groups) == pytest.approx((3 / 2 * 2) / (6 / 5 * 6 / 4))


def test_there_is_no_design_effect_where_all_outcomes_or_all_groups_are_the_same():
    assert design_effect([0, 0, 0], [0, 1, 1]) is None
    assert design_effect([1, 1, 1], [0, 1, 1]) is None
    assert design_effect([1, 0, 1], [4, 4, 4]) is None
    assert design_effect([], []) is None


def test_the_interval_of_many_groups_has_the_ends_of_the_binomial_distribution_of_groups():
    """100 groups of which 30 are hits: the drawn hits are Binomial(100, 0.3), from 21 to 39."""
    for size in (1, 4):
        low, high = rate_interval(*alike(30, 100, size))
        assert low == pytest.approx(21, abs=1) and high == pytest.approx(39, abs=1)
    # The control: without the groups the 400 prompts seem to say twice as much.
    plain = wilson(120, 400)
    assert plain[1] - plain[0] == pytest.approx((high - low) / 2, rel=0.1)


@pytest.mark.parametrize("size", [1, 6])
def test_at_0_and_at_100_percent_the_interval_is_wilsons_for_the_number_of_groups(size):
    for n_hits in (0, 84):
        values, groups = alike(n_hits, 84, size)
        expected = wilson(n_hits, 84)
        assert rate_interval(values, groups) == pytest.approx(expected)
        k, m = sum_by_group(values, groups)
        assert bootstrap(k, m)[0] == bootstrap(k, m)[1]  # the control: it would have no width


def test_below_ten_groups_the_interval_is_wilsons_for_the_number_of_groups():
    """Of so few nothing can be told of how alike they are."""
    assert rate_interval([1, 0] * 20, [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10) == pytest.approx(
        wilson(2, 4))
    assert rate_interval([1, 0, 0, 1, 0, 0, 0, 1], range(8)) == pytest.approx(wilson(3, 8))
    assert rate_interval([1, 0], [5, 5]) == pytest.approx(wilson(0.5, 1))
    assert rate_interval([], []) is None


def test_near_0_percent_more_hits_never_lower_the_upper_end_to_that_of_independent_prompts():
    """One hit is no proof that prompts of a group are independent: the interval stays wide."""
    groups = [i // 6 for i in range(504)]
    highs = [rate_interval([i < n for i in range(504)], groups)[1] for n in (0, 1)]
    assert min(highs) > 2 * wilson(1, 504)[1]


def test_an_interval_depends_on_neither_the_order_of_prompts_nor_the_numbers_of_groups():
    values, groups = draw_case(p=0.3, rho=0.5, sizes=embedded_sizes(250), seed=1)
    expected = rate_interval(values, groups)
    assert rate_interval(values, groups) == expected  # nor on chance
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0)).tolist()
    assert rate_interval([values[i] for i in order], [groups[i] for i in order]) == expected
    assert rate_interval(values, [7 * group + 3 for group in groups]) == expected


def test_halves_count_as_halves():
    """A win rate's outcomes may be 1/2; an interval of halves alone is that of the rate 1/2."""
    low, high = rate_interval([0.5] * 40, range(40))
    assert low <= 50 <= high
    assert rate_interval([1, 0, 0.5] * 20, range(60))[0] > rate_interval([1, 0, 0] * 20,
                                                                         range(60))[0]


# ---------------------------------------------------------------------------------------------
# differences


def test_of_a_difference_only_the_changed_prompts_count():
    """20 groups of 5 go up and 4 go down; what the other 76 do, both times, is all the same."""
    intervals = []
    for others in (0, 1):
        first, groups = alike(0, 100, 5)
        second = list(first)
        for i, group in enumerate(groups):
            if group < 20:
                second[i] = 1
            elif group < 24:
                first[i] = 1
            else:
                first[i] = second[i] = others
        intervals.append(difference_interval(first, second, groups))
    assert intervals[0] == intervals[1]
    low, high = intervals[0]
    assert low < 16 < high
    # By the normal approximation of 100 groups: sqrt((.2 + .04 - .16^2) / 100).
    assert high - low == pytest.approx(2 * 196 * math.sqrt(0.2144 / 100), rel=0.06)


@pytest.mark.parametrize("n_up, n_down", [(30, 3), (3, 0), (0, 0)])
def test_the_other_way_round_a_difference_has_the_other_sign(n_up, n_down):
    groups = [i // 5 for i in range(500)]
    first = [5 * n_up <= i < 5 * (n_up + n_down) for i in range(500)]
    second = [i < 5 * n_up for i in range(500)]
    low, high = difference_interval(first, second, groups)
    assert difference_interval(second, first, groups) == pytest.approx((-high, -low), abs=0.8)
    assert low <= n_up - n_down <= high and high - low > 3


def test_a_paired_difference_is_clearer_than_its_two_rates():
    """A third of the hits is lost: the two intervals overlap, and the difference is sure."""
    first, groups = draw_case(p=0.3, rho=0.85, sizes=embedded_sizes(500), seed=2)
    second = [value and i % 3 > 0 for i, value in enumerate(first)]
    assert rate_interval(second, groups)[1] > rate_interval(first, groups)[0]
    assert difference_interval(first, second, groups)[1] < -3


# ---------------------------------------------------------------------------------------------
# how often an interval holds the true value


def embedded_sizes(n):
    """How many of the first n harmful tests of data/tiny are about each object."""
    lines = (TINY / "harmful" / "test.jsonl").read_text("ascii").splitlines()[:n]
    counts = Counter(json.loads(line)["object"] for line in lines)
    return torch.tensor(sorted(counts.values()), dtype=torch.float64)


def draw_hits(p, rho, sizes, generator):
    """(G,): how many prompts of each group are hits."""
    shape = sizes.shape
    if rho == 0:
        rates = torch.full(shape, p, dtype=torch.float64)
    else:
        a = torch.full(shape, p * (1 - rho) / rho, dtype=torch.float64)
        b = torch.full(shape, (1 - p) * (1 - rho) / rho, dtype=torch.float64)
        x = torch._standard_gamma(a, generator=generator)
        y = torch._standard_gamma(b, generator=generator)
        rates = x / (x + y)  # Beta(a, b)
    return torch.binomial(sizes, rates, generator=generator)


def as_prompts(hits, sizes):
    """(outcomes, groups) of hits by group."""
    values = []
    groups = []
    for group, (k, m) in enumerate(zip(hits.int().tolist(), sizes.int().tolist(), strict=True)):
        values += [1] * k + [0] * (m - k)
        groups += [group] * m
    return values, groups


def draw_case(p, rho, sizes, seed):
    return as_prompts(draw_hits(p, rho, sizes, torch.Generator().manual_seed(seed)), sizes)


def coverage(p, rho, n, rounds):
    """By method, in how many of 100 rounds the interval holds p; and ours' mean width."""
    sizes = embedded_sizes(n)
    held = Counter()
    width = 0.0
    for seed in range(rounds):
        values, groups = draw_case(p, rho, sizes, seed)
        intervals = {
            "wilson": wilson(sum(values), len(values)),
            "bootstrap": bootstrap(*sum_by_group(values, groups)),
            "ours": rate_interval(values, groups),
        }
        width += (intervals["ours"][1] - intervals["ours"][0]) / rounds
        for name, (low, high) in intervals.items():
            held[name] += low <= 100 * p <= high
    return {name: 100 * held[name] / rounds for name in ("wilson", "bootstrap", "ours")}, width


def test_95_of_100_intervals_hold_the_true_rate_where_groups_are_alike():
    """Standard error of 120 rounds: 2. The control is the interval for independent prompts."""
    found, _ = coverage(p=0.3, rho=0.85, n=500, rounds=120)
    assert found["ours"] >= 90
    assert found["wilson"] < 70


def test_so_they_do_near_0_where_the_bootstrap_alone_does_not():
    found, _ = coverage(p=0.02, rho=0.85, n=500, rounds=120)
    assert found["ours"] >= 91
    assert found["bootstrap"] < 85 and found["wilson"] < 70


def test_where_prompts_are_independent_the_interval_is_no_wider_than_it_has_to_be():
    found, width = coverage(p=0.3, rho=0, n=500, rounds=120)
    low, high = wilson(150, 500)
    assert found["ours"] >= 91
    assert width == pytest.approx(high - low, rel=0.03)


def changed(up, down, rho, sizes, generator):
    """(outcomes of the first run, of the second, groups); up, down: the true shares that change."""
    n_up = draw_hits(up, rho, sizes, generator)
    n_down = draw_hits(down / (1 - up), rho, sizes - n_up, generator)
    first = []
    second = []
    groups = []
    for group, (u, d, m) in enumerate(zip(n_up.int().tolist(), n_down.int().tolist(),
                                          sizes.int().tolist(), strict=True)):
        first += [0] * u + [1] * d + [0] * (m - u - d)
        second += [1] * u + [0] * d + [0] * (m - u - d)
        groups += [group] * m
    return first, second, groups


def difference_coverage(up, down, rho, n, rounds):
    """Of the bootstrap alone, and of ours, in percent; and ours' mean width."""
    sizes = embedded_sizes(n)
    held = Counter()
    width = 0.0
    for seed in range(rounds):
        first, second, groups = changed(up, down, rho, sizes, torch.Generator().manual_seed(seed))
        changes = [b - a for a, b in zip(first, second, strict=True)]
        intervals = {
            "bootstrap": bootstrap(*sum_by_group(changes, groups)),
            "ours": difference_interval(first, second, groups),
        }
        width += (intervals["ours"][1] - intervals["ours"][0]) / rounds
        for name, (low, high) in intervals.items():
            held[name] += low <= 100 * (up - down) <= high
    return {name: 100 * held[name] / rounds for name in ("bootstrap", "ours")}, width


def test_95_of_100_intervals_hold_the_true_difference():
    found, _ = difference_coverage(up=0.3, down=0.1, rho=0.85, n=250, rounds=120)
    assert found["ours"] >= 91


def test_so_they_do_where_hardly_a_prompt_flips():
    """The control: the bootstrap alone then has no width, or next to none."""
    found, _ = difference_coverage(up=0.02, down=0.01, rho=0.85, n=250, rounds=120)
    assert found["ours"] >= 91 and found["bootstrap"] < 85


# ---------------------------------------------------------------------------------------------
# the tables of docs/figures.md

DOCS = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
OF_RATES, OF_DIFFERENCES = DOCS.split("## Comparing runs")


def check_docs(text, settings, found, width):
    """That the text's row of these settings says the same, but for what chance may change."""
    start = f"| {' | '.join(f'{setting:g}' for setting in settings)} |"
    print(f"{start} {' | '.join(f'{x:.0f}' for x in found)} | {width:.1f} |")
    line, = [line for line in text.split("\n") if line.startswith(start)]
    *stated, stated_width = [float(cell) for cell in line[len(start):].split("|")[:-1]]
    assert stated == pytest.approx(found, abs=4)
    assert stated_width == pytest.approx(width, rel=0.1)


@pytest.mark.slow
def test_the_docs_state_the_coverage_of_rates_and_ours_is_near_95_everywhere():
    for n in (100, 250, 500):
        for rho in (0, 0.3, 0.85):
            for p in (0.02, 0.05, 0.1, 0.3, 0.5):
                found, width = coverage(p, rho, n, rounds=1000)
                check_docs(OF_RATES, (n, rho, 100 * p), list(found.values()), width)
                assert found["ours"] >= 91


@pytest.mark.slow
def test_the_docs_state_the_coverage_of_differences_and_ours_is_near_95_or_above():
    for n in (100, 500):
        for rho in (0, 0.85):
            for up, down in ((0.002, 0), (0.02, 0.01), (0.05, 0.05), (0.1, 0.02), (0.4, 0.02)):
                found, width = difference_coverage(up, down, rho, n, rounds=1000)
                check_docs(OF_DIFFERENCES, (n, rho, 100 * up, 100 * down),
                           list(found.values()), width)
                assert found["ours"] >= 91


def test_a_difference_of_all_prompts_has_the_width_of_a_rate_of_all():
    groups = [i // 2 for i in range(100)]
    low, high = difference_interval([False] * 100, [True] * 100, groups)
    rate_low, _ = rate_interval([True] * 100, groups)
    assert high == 100 and rate_low - 4 < low < 100
    low, high = difference_interval([True] * 100, [False] * 100, groups)
    assert low == -100 and -100 < high < 4 - rate_low

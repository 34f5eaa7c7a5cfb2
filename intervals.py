"""95 % intervals of rates, and of differences between two runs, where prompts come in groups.

A model that refuses one prompt about an object mostly refuses the others, so prompts of one group
are hardly independent. With x_i the outcome of prompt i, n prompts, G groups g of m_g prompts and
k_g = sum of x_i in g:

    p    = sum_g k_g / n                                                   the rate
    deff = [G/(G-1) sum_g (k_g - p m_g)^2] / [n/(n-1) sum_i (x_i - p)^2]   the design effect

deff says how many times larger the variance of p is than that of n independent prompts: they are
worth n / deff. It is 1 where each prompt is a group of its own.

The interval is a percentile cluster bootstrap: groups are drawn with replacement, whole, and the
2.5 % and 97.5 % quantiles of the drawn rates are its ends. It needs many groups of either outcome;
near 0 and near 100 percent there are few, and at 0 it would have no width at all. There it is
Wilson's for n / deff prompts. docs/figures.md has the coverage of both, by simulation
(tests/laws/test_intervals.py).

Sources: Field and Welsh 2007, J. R. Stat. Soc. B 69:369 (the cluster bootstrap); Kish 1965, Survey
Sampling (the design effect); Korn and Graubard 1998, Survey Methodology 24:193 (n / deff in an
interval for independent draws).
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

Z = 1.959964  # the 97.5 % quantile of the normal distribution
DRAWS = 4000  # from seed to seed the ends then move by about 2 % of the half width
ENOUGH = 10  # groups of either outcome from which on the bootstrap is used: chosen by simulation
SEED = 0  # of the draws: the same outcomes always have the same interval


# an interval for independent prompts


def wilson(k: float, n: float) -> tuple[float, float]:
    """95 % interval of the rate k / n, in percent (Wilson 1927): honest also at 0 and at n."""
    p = k / n
    centre = p + Z * Z / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    low = (centre - half) / (1 + Z * Z / n)
    high = (centre + half) / (1 + Z * Z / n)
    return 100 * max(0.0, low), 100 * min(1.0, high)


# groups


def sum_by_group(values, groups) -> tuple[Tensor, Tensor]:
    """(k, m), both (G,) float64: the sum of the values of each group, and how many it has."""
    x = torch.tensor(values, dtype=torch.float64)
    _, index = torch.tensor(groups).unique(return_inverse=True)  # (n,), from 0 on
    m = torch.bincount(index).double()
    k = torch.zeros_like(m).index_add_(0, index, x)
    return k, m


def design_effect(values, groups) -> float | None:
    """deff of outcomes from 0 to 1; None where all are the same, or all are one group."""
    k, m = sum_by_group(values, groups)
    between, within = spreads(values, k, m)
    if len(m) < 2 or within == 0:
        return None
    return between / within


def spreads(values, k: Tensor, m: Tensor) -> tuple[float, float]:
    """The two brackets of deff: of whole groups, and as if all prompts were independent."""
    n = m.sum()
    p = k.sum() / n
    x = torch.tensor(values, dtype=torch.float64)
    of_groups = (k - p * m).square().sum()
    of_prompts = (x - p).square().sum()
    if len(m) > 1:
        of_groups = of_groups * len(m) / (len(m) - 1)
        of_prompts = of_prompts * n / (n - 1)
    return of_groups.item(), of_prompts.item()


def largest_design_effect(m: Tensor) -> float:
    """deff where all prompts of a group have the same outcome: sum_g m_g^2 / n."""
    return (m.square().sum() / m.sum()).item()


def cautious_design_effect(values, k: Tensor, m: Tensor) -> float:
    """deff where few groups have one of the two outcomes, so that little can be told of it.

    (A + L) / (B + 1), with A and B the two brackets of deff and L the largest deff: as if one
    prompt more had been seen, whose whole group does as it does. Where all outcomes are the same,
    A = B = 0 and this is L. With fewer than ENOUGH groups it is L as well. Never below 1.
    """
    largest = largest_design_effect(m)
    if len(m) < ENOUGH:
        return largest
    of_groups, of_prompts = spreads(values, k, m)
    return max(1.0, (of_groups + largest) / (of_prompts + 1))


# intervals


def rate_interval(values, groups) -> tuple[float, float] | None:
    """95 % interval of the mean of outcomes from 0 to 1, in percent; None without outcomes.

    values: one for each prompt, True, False or between; groups: the number of each one's group.
    """
    if not values:
        return None
    k, m = sum_by_group(values, groups)
    with_hits = int((k > 0).sum())
    with_misses = int((k < m).sum())
    if min(with_hits, with_misses) >= ENOUGH:
        return bootstrap(k, m)
    n_effective = m.sum().item() / cautious_design_effect(values, k, m)
    p = (k.sum() / m.sum()).item()
    return wilson(p * n_effective, n_effective)


def difference_interval(first, second, groups) -> tuple[float, float]:
    """95 % interval of mean(second) - mean(first) of the same prompts, in points of percent.

    Whole groups are drawn, with both outcomes of each prompt. Where fewer than ENOUGH groups hold
    a prompt whose outcome changed, or fewer hold one that did not go up, or that did not go down,
    the shares of prompts that went up and that went down have Wilson's interval for n / deff
    prompts each, deff being that of whether a prompt changed, and the two are joined by squares
    (Zou and Donner 2008, Statistics in Medicine 27:1693).
    """
    changes = [b - a for a, b in zip(first, second, strict=True)]
    sizes = [abs(change) for change in changes]
    ups = [max(change, 0) for change in changes]
    downs = [max(-change, 0) for change in changes]
    k, m = sum_by_group(sizes, groups)
    k_up, _ = sum_by_group(ups, groups)
    k_down, _ = sum_by_group(downs, groups)
    groups_with_each = [int(has.sum()) for has in (k > 0, k_up < m, k_down < m)]
    if min(groups_with_each) >= ENOUGH:
        return bootstrap(k_up - k_down, m)
    n_effective = len(changes) / cautious_design_effect(sizes, k, m)
    up = sum(ups) / len(changes)
    down = sum(downs) / len(changes)
    up_low, up_high = wilson(up * n_effective, n_effective)
    down_low, down_high = wilson(down * n_effective, n_effective)
    difference = 100 * (up - down)
    low = difference - math.hypot(100 * up - up_low, down_high - 100 * down)
    high = difference + math.hypot(up_high - 100 * up, 100 * down - down_low)
    return max(-100.0, low), min(100.0, high)


def bootstrap(k: Tensor, m: Tensor) -> tuple[float, float]:
    """The percentile cluster bootstrap's 95 % interval of sum(k) / sum(m), in percent.

    k, m: (G,), of each group the sum of its outcomes and its size.
    """
    drawn = times_drawn(len(m))
    rates = (drawn @ k) / (drawn @ m)  # (DRAWS,)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = rates.quantile(ends).tolist()
    return 100 * low, 100 * high


@lru_cache(maxsize=4)  # an evaluation has the same few numbers of groups again and again
def times_drawn(n_groups: int) -> Tensor:
    """(DRAWS, G) float64: how often each group is in each draw of G groups with replacement."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(n_groups, (DRAWS, n_groups), generator=generator)
    ones = torch.ones(1, dtype=torch.float64).expand(DRAWS, n_groups)
    return torch.zeros(DRAWS, n_groups, dtype=torch.float64).scatter_add_(1, drawn, ones)

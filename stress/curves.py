"""The whole search as a figure: HS against FA, a panel for each method.

    python -m stress.curves                                  # docs/results/search.json -> .png
    python -m stress.curves --searched runs/stress/search.json --figure curves.png

A point is a setting, with its number in the run's name. A line joins settings that differ in their
last flag alone, the strength, in the order in which they are declared. To the right the task is
learned, downwards requests stay refused: the lower right is what a defence is for. A hollow point
refuses more harmless look-alikes than is admitted (search.py); the ring is the tuned setting, the
square the published one. In every panel stand the aligned model (+), plain fine-tuning (x) and the
least FA that is admitted (dotted). Vertical lines are the intervals of HS. All is black and grey.
"""

import shlex
import sys

from cli import Parser, check_outputs, exit_code
from stress.search import PUBLISHED, Searched, Tried, add_search_flags, best, is_polite, read_search

COLUMNS = 3  # panels in a row
LINES = ("-", "--", ":")  # of the first, second, third curve of a panel
INK = "0.1"
PALE = "0.55"


def curves_of(tried: list[Tried]) -> list[list[Tried]]:
    """The settings that are joined by a line: alike in all flags but the value of the last."""
    curves = {}
    for one in tried:
        if not is_numbered(one):  # the published setting, which belongs to no curve
            continue
        words = shlex.split(one.setting)
        curves.setdefault(tuple(words[:-1]), []).append(one)
    return list(curves.values())


def is_numbered(one: Tried) -> bool:
    """Whether it is one of a method's declared settings, <method>-<number>."""
    return one.name.split("-")[-1].isdigit()


def curve_label(curve: list[Tried]) -> str:
    """What a curve is called: its flags, and the strength from the first to the last."""
    words = shlex.split(curve[0].setting)
    last = shlex.split(curve[-1].setting)[-1]
    flags = " ".join(word.removeprefix("--") for word in words[:-1])
    return f"{flags} {words[-1]} to {last}"


def make_figure(searched: Searched, slack: float):
    """The figure, as matplotlib has it."""
    import matplotlib
    matplotlib.use("Agg")  # no window
    import matplotlib.pyplot as plt

    methods = list(searched.tried)
    n_rows = -(-len(methods) // COLUMNS)
    figure, axes = plt.subplots(n_rows, COLUMNS, sharex=True, sharey=True, squeeze=False,
                                figsize=(3.6 * COLUMNS, 3.1 * n_rows))
    for axis, method in zip(axes.flat, methods, strict=False):
        draw_panel(axis, method, searched, slack)
    for axis in axes.flat[len(methods):]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel("FA, task accuracy, %")
    for axis in axes[:, 0]:
        axis.set_ylabel("HS, harmful replies, %")
    figure.suptitle(f"ring: tuned (FA at most {slack:g} points below plain fine-tuning); square: "
                    "published; hollow: over-refusal too high; x: no defence; +: before the attack",
                    fontsize=8)
    figure.tight_layout()
    return figure


def draw_panel(axis, method: str, searched: Searched, slack: float) -> None:
    """One method's points, and what all panels share."""
    tried = searched.tried[method]
    undefended = searched.undefended
    axis.plot(searched.aligned.fa, searched.aligned.hs, "+", color=INK, markersize=9)
    axis.plot(undefended.fa, undefended.hs, "x", color=INK, markersize=7)
    axis.axvline(undefended.fa - slack, color=PALE, linestyle=":", linewidth=0.8)
    for curve, style in zip(curves_of(tried), LINES, strict=False):
        axis.plot([one.fa for one in curve], [one.hs for one in curve], style, color=PALE,
                  linewidth=1, label=curve_label(curve))
    tuned = best(method, searched, slack)
    published = PUBLISHED.get(method)
    for one in tried:
        draw_point(axis, one, is_polite(one, searched.aligned))
        if one == tuned:
            axis.plot(one.fa, one.hs, "o", markersize=11, fillstyle="none", color=INK)
        if published and published.setting == one.setting:
            axis.plot(one.fa, one.hs, "s", markersize=12, fillstyle="none", color=INK,
                      markeredgewidth=0.7)
    axis.set_title(method, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=6, loc="upper left")


def draw_point(axis, one: Tried, polite: bool) -> None:
    """A setting: its interval, its mark and its number."""
    if one.hs_interval:
        axis.plot([one.fa, one.fa], one.hs_interval, "-", color="0.8", linewidth=2.5, zorder=0)
    axis.plot(one.fa, one.hs, "o", color=INK, markersize=4.5,
              markerfacecolor=INK if polite else "white")
    label = one.name.split("-")[-1] if is_numbered(one) else ""
    axis.annotate(label, (one.fa, one.hs), xytext=(4, 4), textcoords="offset points", fontsize=7)


def execute(args) -> None:
    check_outputs(None, args.figure)
    figure = make_figure(read_search(args.searched), args.slack)
    figure.savefig(args.figure, dpi=150, bbox_inches="tight")
    print(f"written: {args.figure}")


def parse(argv=None):
    p = Parser("stress.curves", "The search as a figure: HS against FA, a panel for each method.")
    p.add_argument("--figure", default="docs/results/search.png", help=".png, .svg or .pdf")
    add_search_flags(p)
    return p.parse_args(argv)


def main(argv=None) -> int:
    """0 done, 2 the user's mistake."""
    return exit_code("stress.curves", lambda: execute(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())

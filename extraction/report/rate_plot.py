"""The plot of a study: how often a behaviour shows, against alpha."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from extraction.report.plot_style import BLUE, GREY, INK, PlotPage

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_rates(study: Mapping[str, Any], page: PlotPage) -> Figure:
    """Share of answers that show the behaviour at every alpha, with its interval; alphas without answers are left out.

    `study`: `title`, `behaviour` and `summary`, rows of alpha, n, rate, low and high.
    """
    from matplotlib.ticker import PercentFormatter

    rows = [row for row in study["summary"] if row["rate"] is not None]
    xs, rates = [row["alpha"] for row in rows], [row["rate"] for row in rows]
    ends = [[row["rate"] - row["low"] for row in rows], [row["high"] - row["rate"] for row in rows]]
    figure = page.figure(4.4, 3.6)
    axes = figure.subplots()
    axes.axvline(0, color=GREY, linewidth=0.6)
    axes.errorbar(xs, rates, yerr=ends, color=BLUE, marker="o", ms=5, capsize=3, elinewidth=1.1, zorder=3)
    for row in rows:
        axes.annotate(
            f"{row['activated']} of {row['n']}",
            (row["alpha"], row["high"]),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            color=INK,
            fontsize=0.85 * page.text,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(
        -0.03, 1.03 if max(rates, default=0) > 0.4 else max((row["high"] for row in rows), default=0.1) * 1.25
    )
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.margins(x=0.08)
    axes.set_xlabel("alpha (0: the after model as it is)")
    axes.set_ylabel(study["behaviour"])
    axes.set_title(study["title"], parse_math=False)
    return figure

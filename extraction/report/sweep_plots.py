"""Plots against a coefficient: a steering sweep's rates and costs, and the rates of an amplification study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from extraction.report import formatting
from extraction.report.plot_style import BLUE, COLOURS, GREY, INK, PlotPage, gaps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Condition = Mapping[str, Any]
Curves = Mapping[str, tuple[str, str, Sequence[Condition]]]  # label: colour, marker, conditions by coefficient


def draw_steering(steering: Mapping[str, Any], page: PlotPage) -> Figure:
    """Draw the rate of positive responses, perplexity and KL divergence, each against the steering coefficient."""
    figure = page.figure(5.6, 7.4)
    curves = curves_of(steering)
    rate, perplexity, divergence = _panels(figure, page)
    _rate(rate, curves)
    _cost(perplexity, curves, "perplexity", "perplexity (log scale)")
    _plain_log(perplexity)
    _cost(divergence, curves, "kl", "KL, nats per token")
    for axes in (perplexity, divergence) if not page.narrow else (divergence,):
        axes.set_xlabel("steering coefficient (typical activation norms)")
    from matplotlib.lines import Line2D

    hollow = Line2D([], [], marker="o", ls="", mfc="white", mec=INK, label="hollow: text no longer coherent")
    handles, labels = rate.get_legend_handles_labels()
    figure.legend(
        [*handles, hollow], [*labels, hollow.get_label()], loc="outside lower center", ncols=1 if page.narrow else 3
    )
    return figure


def _panels(figure: Figure, page: PlotPage) -> tuple[Axes, Axes, Axes]:
    if page.narrow:
        first, second, third = figure.subplots(3, 1, sharex=True, height_ratios=[1.7, 1, 1])
        return first, second, third
    grid = figure.add_gridspec(2, 2, height_ratios=[1.5, 1])
    first = figure.add_subplot(grid[0, :])
    return first, figure.add_subplot(grid[1, 0], sharex=first), figure.add_subplot(grid[1, 1], sharex=first)


def curves_of(steering: Mapping[str, Any]) -> Curves:
    """Return one curve for each added direction and set of layers; the unsteered point is on every curve."""
    plain = [c for c in steering["conditions"] if c["kind"] == "none"]
    groups: dict[tuple[str, tuple[int, ...]], list[Condition]] = {}
    for condition in steering["conditions"]:
        if condition["kind"] == "add":
            groups.setdefault((condition["direction"], tuple(condition["layers"])), []).append(condition)
    trait_looks = zip((BLUE, *COLOURS[2:6]), "o^Dv*", strict=True)
    curves = {}
    for (direction, layers), conditions in groups.items():
        label = (
            f"{steering['method'] if direction == 'trait' else 'random direction'}, {formatting.layer_words(layers)}"
        )
        look = next(trait_looks, (BLUE, "o")) if direction == "trait" else (GREY, "s")
        has_zero = any(c["coefficient"] == 0 for c in conditions)
        points = conditions if has_zero else [*plain[:1], *conditions]
        curves[label] = (*look, sorted(points, key=lambda c: c["coefficient"]))
    return curves


def _rate(axes: Axes, curves: Curves) -> None:
    for label, (colour, marker, conditions) in curves.items():
        xs = [c["coefficient"] for c in conditions]
        low, high = (gaps([c["rate"][end] for c in conditions]) for end in ("low", "high"))
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, lw=0)
        axes.vlines(xs, low, high, color=colour, linewidth=0.8)
        _line(axes, conditions, gaps([c["rate"]["value"] for c in conditions]), colour, marker, label)
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(-0.04, 1.04)
    axes.set_ylabel("responses that show the trait")
    axes.set_title("Effect of steering (bands: 95% intervals)")
    axes.axvline(0, color=GREY, linewidth=0.6)


def _cost(axes: Axes, curves: Curves, name: str, label: str) -> None:
    for colour, marker, conditions in curves.values():
        _line(axes, conditions, gaps([c[name] for c in conditions]), colour, marker, None)
    axes.set_ylabel(label)
    axes.axvline(0, color=GREY, linewidth=0.6)


def _plain_log(axes: Axes) -> None:
    """Set a logarithmic axis with plain numbers at its ticks."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _line(
    axes: Axes, conditions: Sequence[Condition], values: Sequence[float], colour: str, marker: str, label: str | None
) -> None:
    """Draw a curve whose markers are filled where the text stays coherent."""
    xs = [c["coefficient"] for c in conditions]
    axes.plot(xs, values, color=colour, marker=marker, ms=5, label=label, zorder=3)
    broken = [(x, value) for x, value, c in zip(xs, values, conditions, strict=True) if not c["coherent"]]
    if broken:
        axes.plot(*zip(*broken, strict=True), ls="", marker=marker, ms=5, mfc="white", mec=colour, zorder=4)


# --- an amplification study -------------------------------------------------------------------------------------------


def draw_rates(study: Mapping[str, Any], page: PlotPage) -> Figure:
    """Draw the share of responses that show the behaviour at every alpha, with its interval.

    An alpha without responses is left out.

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
            zorder=4,
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(
        -0.03, 1.03 if max(rates, default=0) > 0.4 else max((row["high"] for row in rows), default=0.1) * 1.25
    )
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.margins(x=0.08)
    axes.set_xlabel("alpha (0: the later model, not amplified)")
    axes.set_ylabel(study["behaviour"])
    axes.set_title(study["title"], parse_math=False)
    return figure

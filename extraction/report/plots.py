"""Draw the plots of a report: curves over layers, the heat map of all methods, histograms of the projections.

L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from extraction.report.plot_style import (
    BLUE,
    COLOURS,
    GREY,
    INK,
    MARKERS,
    VERMILION,
    Picture,
    PlotPage,
    check_matplotlib,
    gaps,
    render_picture,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pictures(card: Mapping[str, Any], steering: Mapping[str, Any] | None) -> dict[str, Picture]:
    """Draw every plot of a run, by name. Raises MissingPackage without matplotlib."""
    check_matplotlib()
    drawn = {name: render_picture(draw, card) for name, draw in PLOTS.items()}
    if steering is not None and steering["conditions"]:
        from extraction.report.sweep_plots import draw_steering

        drawn["steering"] = render_picture(draw_steering, steering)
    return drawn


# --- layer curves ---------------------------------------------------------------------------------------------------

PARTS = {
    "validation": "Validation questions: layer and method were chosen here",
    "test": "Test questions: scored once, at the end",
}
AXES = {  # figure -> axis label, value at chance, key of the random directions' 95th percentile in the card
    "auroc": ("AUROC (1 perfect, 0.5 chance)", 0.5, "high"),
    "cohens_d": ("Cohen's d (standard deviations)", 0.0, "high_cohens_d"),
}


def draw_layers(card: Mapping[str, Any], page: PlotPage) -> Figure:
    """Draw AUROC against the layer, a line a method, on validation and test questions; a ring on the chosen vector."""
    return _layer_panels(card, page, "auroc")


def draw_distances(card: Mapping[str, Any], page: PlotPage) -> Figure:
    """Draw Cohen's d against the layer, which still tells methods apart where every AUROC is 1."""
    return _layer_panels(card, page, "cohens_d")


def _layer_panels(card: Mapping[str, Any], page: PlotPage, name: str) -> Figure:
    figure = page.figure(4.4, 6.6)
    label, chance, control = AXES[name]
    panels = page.panels(figure, 2, sharey=True, sharex=True)
    for axes, (part, title) in zip(panels, PARTS.items(), strict=True):
        _layer_curves(axes, card, part, name)
        axes.set_title(title.replace(": ", ":\n"))
        axes.axhline(chance, color=GREY, linewidth=0.8)
        axes.set_ylabel("" if axes is not panels[0] and not page.narrow else label)
    if name == "auroc":
        panels[0].set_ylim(bottom=min(0.48, panels[0].get_ylim()[0]), top=1.03)
    _random_line(panels[1], card["controls"]["random"].get(control))
    panels[-1].set_xlabel("layer")
    panels[0].set_xlabel("" if page.narrow else "layer")
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = 2 if page.narrow else 4
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=columns, columnspacing=1.2)
    return figure


def _layer_curves(axes: Axes, card: Mapping[str, Any], part: str, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    layers, chosen = card["layers"], card["chosen"]
    for index, (method, figures) in enumerate(card["methods"].items()):
        curve, is_chosen = figures["per_layer"][part][name], method == chosen["method"]
        look: dict[str, Any] = {"color": COLOURS[index % 8], "marker": MARKERS[index % 8]}
        label, size = (f"{method} (chosen)", 5.0) if is_chosen else (method, 3.5)
        axes.plot(layers, gaps(curve["value"]), label=label, ms=size, zorder=4 if is_chosen else 3, **look)
        if len(layers) > 1:
            shade = {"color": look["color"], "lw": 0, "alpha": 0.2 if is_chosen else 0.07}
            axes.fill_between(layers, gaps(curve["low"]), gaps(curve["high"]), **shade)
    _ring(axes, chosen["layer"], chosen[part][name])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=10))


def _ring(axes: Axes, layer: int, bounded: Mapping[str, Any]) -> None:
    """Draw a ring around the chosen vector's point, with its interval."""
    if bounded["value"] is None:
        return
    if bounded["low"] is not None and bounded["high"] is not None:
        axes.vlines(layer, bounded["low"], bounded["high"], color=INK, linewidth=1.2, zorder=5)
    axes.plot([layer], [bounded["value"]], "o", ms=11, mfc="none", mec=INK, mew=1.4, zorder=6, clip_on=False)


def _random_line(axes: Axes, high: float | None) -> None:
    if high is not None:
        axes.axhline(high, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="random directions, 95th percentile")


# --- heat map -------------------------------------------------------------------------------------------------------


def draw_methods(card: Mapping[str, Any], page: PlotPage) -> Figure:
    """Draw test AUROC by method and layer as colours, with numbers where they fit; a frame on the chosen vector."""
    import matplotlib
    import numpy as np

    layers, names = card["layers"], list(card["methods"])
    values = np.array([gaps(card["methods"][name]["per_layer"]["test"]["auroc"]["value"]) for name in names])
    figure = page.figure(1.5 + 0.36 * len(names), 1.7 + 0.34 * len(names))
    axes = figure.subplots()
    colours = matplotlib.colormaps["cividis"].with_extremes(bad="#ffffff00")
    axes.patch.set(hatch="////", edgecolor="#999999", facecolor="white")
    drawn = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=0.5, vmax=1.0, aspect="auto")
    axes.set_yticks(range(len(names)), names)
    step = 1 + (len(layers) - 1) // (10 if page.narrow else 26)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer (hatched: not defined)" if np.isnan(values).any() else "layer")
    axes.spines[:].set_visible(False)
    if len(layers) <= (6 if page.narrow else 16):
        _numbers(axes, values)
    _frame(axes, names.index(card["chosen"]["method"]), card["chosen"]["index"])
    bar = figure.colorbar(drawn, ax=axes, extend="min", location="bottom" if page.narrow else "right", pad=0.03)
    bar.set_label("AUROC, test questions")
    return figure


def _numbers(axes: Axes, values: Any) -> None:
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if value == value:  # noqa: PLR0124  # a NaN is no number to write
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.76 else INK)


def _frame(axes: Axes, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    for width, colour in ((4.0, "white"), (2.0, VERMILION)):
        box = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, lw=width, ec=colour, zorder=5, clip_on=False)
        axes.add_patch(box)


# --- histograms -----------------------------------------------------------------------------------------------------


def draw_projections(card: Mapping[str, Any], page: PlotPage) -> Figure:
    """Draw histograms of the test responses' projections by side; a second panel with the instruction removed."""
    held_out = card["projections"]
    panels = {"As generated, with the instruction": held_out}
    if held_out.get("stripped"):
        panels["With the instruction removed"] = held_out["stripped"]
    figure = page.figure(3.6, 1.1 + 2.5 * len(panels))
    every = [value for panel in panels.values() for side in ("positive", "negative") for value in panel[side]]
    edges = _edges([*every, held_out["threshold"]])
    axes_of = page.panels(figure, len(panels), sharex=True, sharey=True)
    for axes, (title, panel) in zip(axes_of, panels.items(), strict=True):
        _histogram(axes, panel, edges, held_out["threshold"])
        axes.set_title(title)
    for axes in axes_of if not page.narrow else axes_of[-1:]:
        unit = held_out.get("unit") or "standardised"
        axes.set_xlabel(f"projection onto the direction\n({_wrapped(unit, 46 if page.narrow else 56)})")
    return figure


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def _edges(values: Sequence[float]) -> Any:
    """Return the edges of 24 bins over all values, shared by both panels and both sides."""
    import numpy as np

    low, high = min(values), max(values)
    return np.linspace(low, high, 25) if high > low else np.linspace(low - 0.5, high + 0.5, 25)


def _histogram(axes: Axes, panel: Mapping[str, Any], edges: Any, threshold: float) -> None:
    from matplotlib.ticker import MaxNLocator

    looks: dict[str, dict[str, Any]] = {
        "negative": {"color": VERMILION, "hatch": "////"},
        "positive": {"color": BLUE, "hatch": None},
    }
    for side, look in looks.items():
        values = panel[side]
        filled = {"facecolor": f"{look['color']}66", "edgecolor": look["color"], "hatch": look["hatch"]}
        axes.hist(values, bins=edges, histtype="stepfilled", lw=1.2, label=f"{side} ({len(values)})", **filled)
    axes.axvline(threshold, ymax=0.8, color=INK, linewidth=1.2, linestyle="--", label="threshold")
    axes.set_ylabel("responses")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.32)
    axes.legend(loc="upper center", ncols=3, columnspacing=1, handlelength=1.4, handletextpad=0.5)


PLOTS: dict[str, Callable[[Mapping[str, Any], PlotPage], Figure]] = {
    "layers": draw_layers,
    "distances": draw_distances,
    "methods": draw_methods,
    "projections": draw_projections,
}

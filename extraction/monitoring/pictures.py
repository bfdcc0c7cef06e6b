"""Pictures of a capture set for papers and slides: one prompt in colours, and all of them at one layer. PNG.

Colours mean what they mean on the page. matplotlib is an extra; where it is absent, MissingPackage says what to
install. T tokens, R response tokens, L layers, S prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from extraction.monitoring.colour_scale import COLOURS, LEVELS_AT, ColourScales, colour_scales, levels_of
from extraction.monitoring.page_data import CaptureSetData, TextReading
from extraction.monitoring.summary_table import n_response, number, summary_at
from extraction.monitoring.text_layout import Run, drawable, wrapped
from extraction.report.formatting import counted
from extraction.report.markup import visible
from extraction.report.plot_style import BLUE, GREY, INK, VERMILION, check_matplotlib, rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.6  # inches
LEFT, RIGHT = 0.74, 0.16
TEXT = 9.0  # points
MONO, SANS = "DejaVu Sans Mono", "DejaVu Sans"
MONO_TEXT = 8.4
CELL = MONO_TEXT * 1233 / 2048 / 72  # inches: every character of the typewriter font is as wide
LINE = 0.205
MOST_LINES = 90  # of a prompt's or response's text; a longer one is cut, and says so


def reading_picture(
    facts: CaptureSetData, reading: TextReading, trait: int, layer: int, *, scales: ColourScales | None = None
) -> bytes:
    """One prompt: its text in colours, the layers' heat map, and the line of the chosen layer, at residual_out.

    `trait` is an index of the set's traits, `layer` a number as the model counts them. `scales` spares making them
    anew for every picture of a set (`scales_of`).
    """
    check_matplotlib()
    known = scales or colour_scales(facts)
    return rendered(lambda: _draw_reading(facts, reading, trait, facts.layers.index(layer), known), TEXT)[0]


def overview_picture(facts: CaptureSetData, trait: int, layer: int, *, scales: ColourScales | None = None) -> bytes:
    """All prompts, one a row, over their response tokens, at one layer's residual_out; a dot where each commits."""
    check_matplotlib()
    known = scales or colour_scales(facts)
    return rendered(lambda: _draw_overview(facts, trait, facts.layers.index(layer), known), TEXT)[0]


# --- one prompt -----------------------------------------------------------------------------------------------------


def _draw_reading(facts: CaptureSetData, reading: TextReading, trait: int, layer: int, scales: ColourScales) -> Figure:
    place_TL, x_T = _places(facts, reading, trait, scales), _projections(facts, reading, trait)[:, layer]
    runs = _texts(reading)
    heights = {
        "head": 0.62,
        **{name: 0.24 + LINE * max(_lines(part), 1) for name, part in runs.items()},
        "map": 0.34 + min(max(0.085 * place_TL.shape[1], 0.25), 2.6),
        "line": 2.1,
    }
    figure = _paper(sum(heights.values()) + 0.1)
    rooms = _stacked(figure, heights)
    _heading(figure, rooms["head"], facts, reading.id, trait, layer)
    _legend(figure, rooms["head"], scales, _at(facts, trait, layer))
    for name, part in runs.items():
        _text(_axes(figure, rooms[name], top=0.22), name, part, place_TL[:, layer])
    _map(_axes(figure, rooms["map"], top=0.2, bottom=0.1), facts, reading, place_TL, layer)
    _line(_axes(figure, rooms["line"], top=0.05, bottom=0.42), facts, reading, x_T, trait, layer, scales)
    return figure


def _texts(reading: TextReading) -> dict[str, list[Run]]:
    """The runs of both parts, their tokens counted over the whole text."""
    columns = int((WIDTH - LEFT - RIGHT) / CELL)
    parts = {"prompt": range(reading.n_prompt), "response": range(reading.n_prompt, len(reading.token_ids))}
    found = {}
    for name, indices in parts.items():
        runs = wrapped([reading.pieces[i] for i in indices], [reading.tokens[i] for i in indices], columns)
        runs = [Run(run.token + indices.start, run.line, run.column, run.text, run.width) for run in runs]
        found[name] = [run for run in runs if run.line < MOST_LINES]
        if len(found[name]) < len(runs):
            cut = f"\u2026 and {counted(len({run.token for run in runs[len(found[name]) :]}), 'token')} more"
            found[name].append(Run(-1, MOST_LINES, 0, cut, len(cut)))
    return found


def _lines(runs: Sequence[Run]) -> int:
    return 1 + max((run.line for run in runs), default=0)


def _text(axes: Axes, name: str, runs: Sequence[Run], place_T: np.ndarray) -> None:
    """Every run on its colour, in the ink that is read best on it."""
    from matplotlib.patches import Rectangle

    lines, columns = max(_lines(runs), 1), (WIDTH - LEFT - RIGHT) / CELL
    axes.set(xlim=(0, columns), ylim=(lines, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(name, fontsize=TEXT, color=GREY, pad=3)
    has = _font(MONO)
    for run in runs:
        place = place_T[run.token] if run.token >= 0 else np.nan
        red, green, blue, _ = colour = _colours()(0.5 + place / 2) if np.isfinite(place) else (1.0, 1.0, 1.0, 1.0)
        axes.add_patch(Rectangle((run.column, run.line + 0.06), run.width, 0.88, color=colour, lw=0))
        axes.text(
            run.column, run.line + 0.52, drawable(run.text, has), family=MONO, fontsize=MONO_TEXT, va="center_baseline",
            color=_ink(red, green, blue), parse_math=False, clip_on=False,
        )  # fmt: skip
    axes.axvline(-0.8, color=INK if name == "response" else "#c4c9d1", lw=2, clip_on=False)


def _map(axes: Axes, facts: CaptureSetData, reading: TextReading, place_TL: np.ndarray, layer: int) -> None:
    n_tokens, n_layers = place_TL.shape
    axes.imshow(
        place_TL.T, cmap=_colours(), vmin=-1, vmax=1, aspect="auto", origin="lower", interpolation="nearest",
        extent=(-0.5, max(n_tokens, 1) - 0.5, -0.5, n_layers - 0.5),
    )  # fmt: skip
    _layer_ticks(axes, facts.layers, layer)
    axes.set(xticks=[], ylabel="layer")
    axes.axvline(reading.n_prompt - 0.5, color=INK, lw=0.9)
    for half in (-0.5, 0.5):
        axes.axhline(layer + half, color=INK, lw=0.9)
    is_early = reading.n_prompt < n_tokens / 2
    axes.set_title("each layer on its own scale", fontsize=TEXT, color=GREY, pad=3, loc="right" if is_early else "left")
    axes.annotate(
        "response" if is_early else "response \u2192", (reading.n_prompt - 0.5, 1), xycoords=("data", "axes fraction"),
        xytext=(3, 3) if is_early else (-3, 3), ha="left" if is_early else "right", textcoords="offset points",
        color=GREY, fontsize=TEXT, visible=n_response(reading) > 0,
    )  # fmt: skip


def _layer_ticks(axes: Axes, layers: Sequence[int], chosen: int) -> None:
    step = max(1, -(-len(layers) // 9))
    shown = [i for i in range(0, len(layers), step) if i == chosen or abs(i - chosen) >= step] + [chosen]
    axes.set_yticks(sorted(set(shown)), [str(layers[i]) for i in sorted(set(shown))], fontsize=TEXT - 1.5)
    for label, index in zip(axes.get_yticklabels(), sorted(set(shown)), strict=True):
        label.set_fontweight("bold" if index == chosen else "normal")


def _line(
    axes: Axes,
    facts: CaptureSetData,
    reading: TextReading,
    x_T: np.ndarray,
    trait: int,
    layer: int,
    scales: ColourScales,
) -> None:
    start, point = reading.n_prompt - 0.5, _at(facts, trait, layer)
    centre, half = float(scales.centre_KLP[point]), float(scales.half_KLP[point])
    levels_2 = levels_of(facts.traits[trait], len(facts.layers))[layer]
    seen = [x for x in x_T[reading.n_prompt :] if abs(x - centre) < 6 * half]
    seen += [x for x in x_T[: reading.n_prompt] if abs(x - centre) < 3 * half]
    seen += [centre - half / 2, centre + half / 2, *levels_2[np.isfinite(levels_2)]]
    margin = 0.1 * (max(seen) - min(seen))
    axes.set(xlim=(-0.5, max(len(x_T), 1) - 0.5), ylim=(min(seen) - margin, max(seen) + margin))
    axes.set(xlabel="token", ylabel=f"projection, layer {facts.layers[layer]}")
    axes.axvspan(-0.5, start, color="#f1f3f6", lw=0)
    axes.axvline(start, color=INK, lw=0.9)
    axes.plot(range(len(x_T)), x_T, color=INK, lw=1.2, marker="." if len(x_T) < 2 else None)
    _whole_numbers(axes)
    _levels(axes, levels_2)
    _commitment(axes, reading, facts.traits[trait].name, layer)


def _levels(axes: Axes, levels_2: np.ndarray) -> None:
    """Both levels; the lower one's name is below its line where there is room."""
    bottom, top = axes.get_ylim()
    lower = int(np.nanargmin(levels_2)) if np.isfinite(levels_2).any() else 0
    for side, (name, colour) in enumerate((("negative level", VERMILION), ("positive level", BLUE))):
        if not np.isfinite(levels_2[side]):
            continue
        axes.axhline(levels_2[side], color=colour, lw=1.1, ls=(0, (5, 3)))
        is_below = side == lower and levels_2[side] - bottom > 0.12 * (top - bottom)
        _note(
            axes,
            name,
            (1, levels_2[side]),
            (-2, -2 if is_below else 2),
            colour,
            "right",
            xycoords=("axes fraction", "data"),
        )


def _commitment(axes: Axes, reading: TextReading, trait: str, layer: int) -> None:
    summary = summary_at(reading, trait, layer)
    token, side = summary.get("commitment"), summary.get("committed_to") or 0
    if token is None:
        return
    colour, at = BLUE if side > 0 else VERMILION, reading.n_prompt + int(token)
    axes.axvline(at, color=colour, lw=1.5)
    is_late = at > 0.8 * len(reading.token_ids)
    _note(axes, "commits", (at, 1), (-4 if is_late else 4, -2), colour, "right" if is_late else "left",
          xycoords=("data", "axes fraction"))  # fmt: skip


def _note(
    axes: Axes, text: str, at: tuple[float, float], shift: tuple[int, int], colour: str, side: str, *, xycoords: Any
) -> None:
    """Small coloured words on paper, so that they are read across lines."""
    axes.annotate(
        text, at, xycoords=xycoords, xytext=shift, textcoords="offset points", color=colour, fontsize=TEXT - 1,
        ha=side, va="bottom" if shift[1] > 0 else "top", bbox={"fc": "#ffffffcc", "lw": 0, "pad": 0.8}, zorder=5,
    )  # fmt: skip


# --- all prompts ----------------------------------------------------------------------------------------------------


def _draw_overview(facts: CaptureSetData, trait: int, layer: int, scales: ColourScales) -> Figure:
    point = _at(facts, trait, layer)
    rows = [_projections(facts, reading, trait)[reading.n_prompt :, layer] for reading in facts.readings]
    longest = max((len(row) for row in rows), default=0) or 1
    place_SR = np.full((max(len(rows), 1), longest), np.nan)
    for index, row in enumerate(rows):
        place_SR[index, : len(row)] = (row - scales.centre_KLP[point]) / scales.half_KLP[point]
    height = min(max(len(rows), 1) * min(0.26, max(0.125, 12 / max(len(rows), 1))), 24.0)
    heights = {"head": 0.62, "map": height + 0.62}
    figure = _paper(sum(heights.values()))
    rooms = _stacked(figure, heights)
    _heading(figure, rooms["head"], facts, counted(len(rows), "prompt"), trait, layer)
    _legend(figure, rooms["head"], scales, point)
    axes = _axes(figure, rooms["map"], top=0.14, bottom=0.48, left=2.35)
    axes.imshow(place_SR, cmap=_colours(), vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set(xlabel="response token; a dot is where the response commits")
    axes.spines[:].set_visible(False)
    _whole_numbers(axes)
    _prompt_ticks(axes, facts, height)
    _dots(axes, facts, facts.traits[trait].name, layer)
    return figure


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _prompt_ticks(axes: Axes, facts: CaptureSetData, height: float) -> None:
    step = max(1, -(-len(facts.readings) * 12 // int(100 * max(height, 0.12))))
    shown, has = range(0, len(facts.readings), step), _font(SANS)
    names = [drawable(_short(facts.readings[i], 38), has) for i in shown]
    axes.set_yticks(
        list(shown), names, fontsize=min(TEXT - 1.5, max(6.0, 72 * 0.72 * height * step / max(len(facts.readings), 1)))
    )
    axes.tick_params(axis="y", length=0)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)


def _short(reading: TextReading, count: int) -> str:
    said = visible(" ".join(f"{reading.id}  {reading.prompt}".split(" ")))
    said = said.replace("\n", " ").replace("\t", " ")
    return said if len(said) <= count else f"{said[: count - 1]}\u2026"


def _dots(axes: Axes, facts: CaptureSetData, trait: str, layer: int) -> None:
    found = [(summary_at(reading, trait, layer).get("commitment"), row) for row, reading in enumerate(facts.readings)]
    at = [(token, row) for token, row in found if token is not None]
    if at:
        columns, rows = zip(*at, strict=True)
        axes.scatter(columns, rows, s=11, color=INK, edgecolors="white", linewidths=0.6, zorder=3, clip_on=False)


# --- paper ----------------------------------------------------------------------------------------------------------


def _paper(height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    figure.set_layout_engine("none")  # everything has its place in inches
    return figure


def _stacked(figure: Figure, heights: dict[str, float]) -> dict[str, tuple[float, float]]:
    """(bottom, height) in inches of rooms from the top downwards."""
    rooms, top = {}, figure.get_size_inches()[1]
    for name, height in heights.items():
        top -= height
        rooms[name] = (top, height)
    return rooms


def _axes(
    figure: Figure, room: tuple[float, float], *, top: float = 0.0, bottom: float = 0.0, left: float = LEFT
) -> Axes:
    width, height = figure.get_size_inches()
    box = (left / width, (room[0] + bottom) / height, (width - left - RIGHT) / width, (room[1] - top - bottom) / height)
    return figure.add_axes(box)


def _heading(
    figure: Figure, room: tuple[float, float], facts: CaptureSetData, what: str, trait: int, layer: int
) -> None:
    height, has = figure.get_size_inches()[1], _font(SANS)
    said = f"{facts.traits[trait].name}, layer {facts.layers[layer]}, {LEVELS_AT.replace('_', ' ')}"
    lines = ((0.24, f"{what}: {said}", TEXT + 1.5, INK), (0.45, f"{facts.model}, {facts.name}", TEXT - 1, GREY))
    for below, text, size, colour in lines:
        figure.text(0.12 / WIDTH, (room[0] + room[1] - below) / height, drawable(visible(text), has), fontsize=size,
                    color=colour, parse_math=False)  # fmt: skip


def _legend(figure: Figure, room: tuple[float, float], scales: ColourScales, point: tuple[int, int, int]) -> None:
    """The colours from end to end, with the values of the chosen layer."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((1 - 2.75 / width, (room[0] + room[1] - 0.26) / height, 2.45 / width, 0.13 / height))
    axes.imshow(np.linspace(-1, 1, 255)[None], cmap=_colours(), aspect="auto", extent=(-1, 1, 0, 1))
    centre, half = float(scales.centre_KLP[point]), float(scales.half_KLP[point])
    labels = [f"\u2264 {number(centre - half)}", number(centre), f"\u2265 {number(centre + half)}"]
    axes.set_xticks([-1, 0, 1], labels, fontsize=TEXT - 1.5)
    axes.set_yticks([])
    axes.tick_params(length=2, pad=2)


def _at(facts: CaptureSetData, trait: int, layer: int) -> tuple[int, int, int]:
    return trait, layer, facts.points.index(LEVELS_AT)


def _projections(facts: CaptureSetData, reading: TextReading, trait: int) -> np.ndarray:
    """[T, L] at residual_out."""
    found: np.ndarray = reading.projections_TLPK[:, :, facts.points.index(LEVELS_AT), trait].astype(np.float64)
    return found


def _places(facts: CaptureSetData, reading: TextReading, trait: int, scales: ColourScales) -> np.ndarray:
    """Where every value lies among the colours, -1 to 1: [T, L]."""
    point = facts.points.index(LEVELS_AT)
    centre_L, half_L = scales.centre_KLP[trait, :, point], scales.half_KLP[trait, :, point]
    found: np.ndarray = np.clip((_projections(facts, reading, trait) - centre_L) / half_L, -1, 1)
    return found


@functools.cache
def _colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("traitline", COLOURS["light"], N=255).with_extremes(bad="#ffffff00")


@functools.cache
def _font(family: str) -> Callable[[str], bool]:
    """Whether the font has a character."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=family)))
    return lambda character: bool(font.get_char_index(ord(character)))


def _ink(red: float, green: float, blue: float) -> str:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    light = float(np.dot((0.2126, 0.7152, 0.0722), linear))
    return "white" if 1.05 / (light + 0.05) >= (light + 0.05) / 0.05 else "black"

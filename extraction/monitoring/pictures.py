"""Draw a capture set as PNG, for papers and slides: one prompt token by token, or all prompts at one layer.

The colours are those of the page. matplotlib is an optional package; MissingPackage is raised without it. T tokens, R
response tokens, L layers, S prompts.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from extraction.monitoring.colour_scale import COLOURS, LEVELS_AT, ColourScales, colour_scales, levels_or_nan
from extraction.monitoring.page_data import CaptureSetData, TextReading
from extraction.monitoring.summary_table import n_response, number, summary_at
from extraction.report.formatting import counted
from extraction.report.plot_style import BLUE, GREY, INK, VERMILION, check_matplotlib, rendered
from extraction.report.rendering import visible
from extraction.report.response_browser import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.6  # inches
LEFT, RIGHT = 0.74, 0.16
TEXT = 9.0  # points
MONO, SANS = "DejaVu Sans Mono", "DejaVu Sans"
MONO_TEXT = 8.4
CELL = MONO_TEXT * 1233 / 2048 / 72  # inches: the width of a character of the monospaced font
LINE = 0.205
MAX_LINES = 90  # of a prompt's or a response's text; a longer one ends with the number of tokens left out
RETURN = "\u23ce"  # drawn before a line break
MISSING = "\u25a1"  # drawn for a character that the font lacks


def reading_picture(
    data: CaptureSetData, reading: TextReading, trait: int, layer: int, *, scales: ColourScales | None = None
) -> bytes:
    """Draw one prompt at residual_out: its text in colours, the layers' heat map, and the chosen layer's projections.

    Args:
        trait: Index of one of the set's traits.
        layer: Number of the layer, as the model counts them.
        scales: The set's colour scales, where the caller draws many pictures of one set.
    """
    check_matplotlib()
    known = scales or colour_scales(data)
    return rendered(lambda: _draw_reading(data, reading, trait, data.layers.index(layer), known), TEXT)[0]


def overview_picture(data: CaptureSetData, trait: int, layer: int, *, scales: ColourScales | None = None) -> bytes:
    """Draw the response tokens of all prompts at one layer's residual_out, a row a prompt, with commitment points."""
    check_matplotlib()
    known = scales or colour_scales(data)
    return rendered(lambda: _draw_overview(data, trait, data.layers.index(layer), known), TEXT)[0]


# --- one prompt -----------------------------------------------------------------------------------------------------


def _draw_reading(data: CaptureSetData, reading: TextReading, trait: int, layer: int, scales: ColourScales) -> Figure:
    place_TL, x_T = _places(data, reading, trait, scales), _projections(data, reading, trait)[:, layer]
    runs = _texts(reading)
    heights = {
        "head": 0.62,
        **{name: 0.24 + LINE * max(_lines(part), 1) for name, part in runs.items()},
        "map": 0.34 + min(max(0.085 * place_TL.shape[1], 0.25), 2.6),
        "line": 2.1,
    }
    figure = _new_figure(sum(heights.values()) + 0.1)
    panels = _stack_panels(figure, heights)
    _heading(figure, panels["head"], data, reading.id, trait, layer)
    _legend(figure, panels["head"], scales, _at(data, trait, layer))
    for name, part in runs.items():
        _text(_axes(figure, panels[name], top=0.22), name, part, place_TL[:, layer])
    _map(_axes(figure, panels["map"], top=0.2, bottom=0.1), data, reading, place_TL, layer)
    _line(_axes(figure, panels["line"], top=0.05, bottom=0.42), data, reading, x_T, trait, layer, scales)
    return figure


def _texts(reading: TextReading) -> dict[str, list[TokenRun]]:
    """Return the runs of prompt and response; tokens are counted over the whole text."""
    columns = int((WIDTH - LEFT - RIGHT) / CELL)
    parts = {"prompt": range(reading.n_prompt), "response": range(reading.n_prompt, len(reading.token_ids))}
    visible_runs = {}
    for name, indices in parts.items():
        runs = wrap_tokens([reading.pieces[i] for i in indices], [reading.tokens[i] for i in indices], columns)
        runs = [TokenRun(run.token + indices.start, run.line, run.column, run.text, run.width) for run in runs]
        visible_runs[name] = [run for run in runs if run.line < MAX_LINES]
        if len(visible_runs[name]) < len(runs):
            cut = f"\u2026 and {counted(len({run.token for run in runs[len(visible_runs[name]) :]}), 'token')} more"
            visible_runs[name].append(TokenRun(-1, MAX_LINES, 0, cut, len(cut)))
    return visible_runs


def _lines(runs: Sequence[TokenRun]) -> int:
    return 1 + max((run.line for run in runs), default=0)


def _text(axes: Axes, name: str, runs: Sequence[TokenRun], place_T: np.ndarray) -> None:
    """Draw every run on its colour, in the ink with the higher contrast."""
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


def _map(axes: Axes, data: CaptureSetData, reading: TextReading, place_TL: np.ndarray, layer: int) -> None:
    n_tokens, n_layers = place_TL.shape
    axes.imshow(
        place_TL.T, cmap=_colours(), vmin=-1, vmax=1, aspect="auto", origin="lower", interpolation="nearest",
        extent=(-0.5, max(n_tokens, 1) - 0.5, -0.5, n_layers - 0.5),
    )  # fmt: skip
    _layer_ticks(axes, data.layers, layer)
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
    data: CaptureSetData,
    reading: TextReading,
    x_T: np.ndarray,
    trait: int,
    layer: int,
    scales: ColourScales,
) -> None:
    start, point = reading.n_prompt - 0.5, _at(data, trait, layer)
    centre, half = float(scales.centre_KLP[point]), float(scales.half_KLP[point])
    levels_2 = levels_or_nan(data.traits[trait], len(data.layers))[layer]
    seen = [x for x in x_T[reading.n_prompt :] if abs(x - centre) < 6 * half]
    seen += [x for x in x_T[: reading.n_prompt] if abs(x - centre) < 3 * half]
    seen += [centre - half / 2, centre + half / 2, *levels_2[np.isfinite(levels_2)]]
    margin = 0.1 * (max(seen) - min(seen))
    axes.set(xlim=(-0.5, max(len(x_T), 1) - 0.5), ylim=(min(seen) - margin, max(seen) + margin))
    axes.set(xlabel="token", ylabel=f"projection, layer {data.layers[layer]}")
    axes.axvspan(-0.5, start, color="#f1f3f6", lw=0)
    axes.axvline(start, color=INK, lw=0.9)
    axes.plot(range(len(x_T)), x_T, color=INK, lw=1.2, marker="." if len(x_T) < 2 else None)
    _whole_numbers(axes)
    _levels(axes, levels_2)
    _commitment(axes, reading, data.traits[trait].name, layer)


def _levels(axes: Axes, levels_2: np.ndarray) -> None:
    """Draw both reference levels; the lower one's name is below its line where there is room."""
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
    """Write a small coloured note with a white background, so that it stays legible across lines."""
    axes.annotate(
        text, at, xycoords=xycoords, xytext=shift, textcoords="offset points", color=colour, fontsize=TEXT - 1,
        ha=side, va="bottom" if shift[1] > 0 else "top", bbox={"fc": "#ffffffcc", "lw": 0, "pad": 0.8}, zorder=5,
    )  # fmt: skip


# --- all prompts ----------------------------------------------------------------------------------------------------


def _draw_overview(data: CaptureSetData, trait: int, layer: int, scales: ColourScales) -> Figure:
    point = _at(data, trait, layer)
    rows = [_projections(data, reading, trait)[reading.n_prompt :, layer] for reading in data.readings]
    longest = max((len(row) for row in rows), default=0) or 1
    place_SR = np.full((max(len(rows), 1), longest), np.nan)
    for index, row in enumerate(rows):
        place_SR[index, : len(row)] = (row - scales.centre_KLP[point]) / scales.half_KLP[point]
    height = min(max(len(rows), 1) * min(0.26, max(0.125, 12 / max(len(rows), 1))), 24.0)
    heights = {"head": 0.62, "map": height + 0.62}
    figure = _new_figure(sum(heights.values()))
    panels = _stack_panels(figure, heights)
    _heading(figure, panels["head"], data, counted(len(rows), "prompt"), trait, layer)
    _legend(figure, panels["head"], scales, point)
    axes = _axes(figure, panels["map"], top=0.14, bottom=0.48, left=2.35)
    axes.imshow(place_SR, cmap=_colours(), vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set(xlabel="response token (dot: commitment point)")
    axes.spines[:].set_visible(False)
    _whole_numbers(axes)
    _prompt_ticks(axes, data, height)
    _dots(axes, data, data.traits[trait].name, layer)
    return figure


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _prompt_ticks(axes: Axes, data: CaptureSetData, height: float) -> None:
    step = max(1, -(-len(data.readings) * 12 // int(100 * max(height, 0.12))))
    shown, has = range(0, len(data.readings), step), _font(SANS)
    names = [drawable(_short(data.readings[i], 38), has) for i in shown]
    axes.set_yticks(
        list(shown), names, fontsize=min(TEXT - 1.5, max(6.0, 72 * 0.72 * height * step / max(len(data.readings), 1)))
    )
    axes.tick_params(axis="y", length=0)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)


def _short(reading: TextReading, count: int) -> str:
    name = visible(" ".join(f"{reading.id}  {reading.prompt}".split(" ")))
    return shorten(name.replace("\n", " ").replace("\t", " "), count)


def _dots(axes: Axes, data: CaptureSetData, trait: str, layer: int) -> None:
    commitments = [summary_at(reading, trait, layer).get("commitment") for reading in data.readings]
    at = [(token, row) for row, token in enumerate(commitments) if token is not None]
    if at:
        columns, rows = zip(*at, strict=True)
        axes.scatter(columns, rows, s=11, color=INK, edgecolors="white", linewidths=0.6, zorder=3, clip_on=False)


# --- panels ----------------------------------------------------------------------------------------------------------


def _new_figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    figure.set_layout_engine("none")  # positions are in inches
    return figure


def _stack_panels(figure: Figure, heights: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Return (bottom, height) in inches of panels that follow each other from the top downwards."""
    panels, top = {}, figure.get_size_inches()[1]
    for name, height in heights.items():
        top -= height
        panels[name] = (top, height)
    return panels


def _axes(
    figure: Figure, panel: tuple[float, float], *, top: float = 0.0, bottom: float = 0.0, left: float = LEFT
) -> Axes:
    width, height = figure.get_size_inches()
    box = (
        left / width,
        (panel[0] + bottom) / height,
        (width - left - RIGHT) / width,
        (panel[1] - top - bottom) / height,
    )
    return figure.add_axes(box)


def _heading(
    figure: Figure, panel: tuple[float, float], data: CaptureSetData, what: str, trait: int, layer: int
) -> None:
    height, has = figure.get_size_inches()[1], _font(SANS)
    where = f"{data.traits[trait].name}, layer {data.layers[layer]}, {LEVELS_AT.replace('_', ' ')}"
    lines = ((0.24, f"{what}: {where}", TEXT + 1.5, INK), (0.45, f"{data.model}, {data.name}", TEXT - 1, GREY))
    for below, text, size, colour in lines:
        figure.text(0.12 / WIDTH, (panel[0] + panel[1] - below) / height, drawable(visible(text), has), fontsize=size,
                    color=colour, parse_math=False)  # fmt: skip


def _legend(figure: Figure, panel: tuple[float, float], scales: ColourScales, point: tuple[int, int, int]) -> None:
    """Draw the colour scale with the values of the chosen layer."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((1 - 2.75 / width, (panel[0] + panel[1] - 0.26) / height, 2.45 / width, 0.13 / height))
    axes.imshow(np.linspace(-1, 1, 255)[None], cmap=_colours(), aspect="auto", extent=(-1, 1, 0, 1))
    centre, half = float(scales.centre_KLP[point]), float(scales.half_KLP[point])
    labels = [f"\u2264 {number(centre - half)}", number(centre), f"\u2265 {number(centre + half)}"]
    axes.set_xticks([-1, 0, 1], labels, fontsize=TEXT - 1.5)
    axes.set_yticks([])
    axes.tick_params(length=2, pad=2)


def _at(data: CaptureSetData, trait: int, layer: int) -> tuple[int, int, int]:
    return trait, layer, data.points.index(LEVELS_AT)


def _projections(data: CaptureSetData, reading: TextReading, trait: int) -> np.ndarray:
    """Return the projections [T, L] at residual_out."""
    projections_TL: np.ndarray = reading.projections_TLPK[:, :, data.points.index(LEVELS_AT), trait].astype(np.float64)
    return projections_TL


def _places(data: CaptureSetData, reading: TextReading, trait: int, scales: ColourScales) -> np.ndarray:
    """Return every projection's position on the colour scale, -1 to 1: [T, L]."""
    point = data.points.index(LEVELS_AT)
    centre_L, half_L = scales.centre_KLP[trait, :, point], scales.half_KLP[trait, :, point]
    places_TL: np.ndarray = np.clip((_projections(data, reading, trait) - centre_L) / half_L, -1, 1)
    return places_TL


@functools.cache
def _colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("traitline", COLOURS["light"], N=255).with_extremes(bad="#ffffff00")


@functools.cache
def _font(family: str) -> Callable[[str], bool]:
    """Return a test for the characters that the font has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=family)))
    return lambda character: bool(font.get_char_index(ord(character)))


def _ink(red: float, green: float, blue: float) -> str:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    light = float(np.dot((0.2126, 0.7152, 0.0722), linear))
    return "white" if 1.05 / (light + 0.05) >= (light + 0.05) / 0.05 else "black"


# --- tokens on lines of a monospaced font ----------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenRun:
    """The part of a token's text that is on one line. `column` and `width` are in cells."""

    token: int
    line: int
    column: int
    text: str
    width: int


def wrap_tokens(pieces: Sequence[str], tokens: Sequence[str], columns: int) -> list[TokenRun]:
    """Lay tokens out on lines of `columns` cells, breaking between tokens. A token without text shows its name."""
    runs: list[TokenRun] = []
    line = column = 0
    for token, (piece, name) in enumerate(zip(pieces, tokens, strict=True)):
        for part, is_last in _parts(visible(piece) or visible(name) or MISSING):
            for text in _fitting(part, columns):
                width = cells(text)
                if column and column + width > columns:
                    line, column = line + 1, 0
                runs.append(TokenRun(token, line, column, text, width))
                column += width
            if not is_last:
                line, column = line + 1, 0
    return runs


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the lines of a text, with RETURN at the end of each, and True for the last."""
    *lines, rest = text.replace("\t", "    ").split("\n")
    for part in lines:
        yield part + RETURN, False
    if rest:
        yield rest, True


def _fitting(text: str, columns: int) -> Iterator[str]:
    while cells(text) > columns:
        cut = next(i for i in range(len(text), 0, -1) if cells(text[:i]) <= columns)
        yield text[:cut]
        text = text[cut:]
    yield text


def cells(text: str) -> int:
    """Return the cells that a text takes; combining characters take none."""
    return sum(not unicodedata.combining(character) for character in text)


def drawable(text: str, has: Callable[[str], bool]) -> str:
    """Replace every character that a font lacks by MISSING."""
    return "".join(character if has(character) else MISSING for character in text)

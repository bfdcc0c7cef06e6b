"""Style, page sizes and PNG rendering shared by every plot.

Colours are the Okabe-Ito palette, which colour-blind readers can tell apart; every line also has its own marker. The
user's matplotlib settings are ignored, so the same figures give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from extraction.core.errors import MissingPackage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BLUE, VERMILION, GREY, INK = "#0072B2", "#D55E00", "#6b6b6b", "#1a1a1a"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
MARKERS = "osD^vP*X"
DPI = 200
PIXELS_PER_INCH = 100  # CSS pixels: the image is sharp on a screen of double density


STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#444444",
    "text.color": INK,
    "axes.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "hatch.linewidth": 0.6,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class PlotPage:
    """The size that a plot is drawn at: wide for screens and papers, narrow for phones."""

    narrow: bool

    @property
    def width(self) -> float:
        """Width in inches."""
        return 3.5 if self.narrow else 9.6

    @property
    def text(self) -> float:
        """Font size in points."""
        return 8.2 if self.narrow else 10.0

    def figure(self, wide_height: float, narrow_height: float) -> Figure:
        """Return an empty figure of the page's width; heights are in inches."""
        from matplotlib.figure import Figure

        return Figure(figsize=(self.width, narrow_height if self.narrow else wide_height))

    def panels(self, figure: Figure, count: int, **keywords: Any) -> list[Axes]:
        """Return axes beside each other, or below each other on a narrow page."""
        shape = (count, 1) if self.narrow else (1, count)
        return list(figure.subplots(*shape, squeeze=False, **keywords).flat)


@dataclass(frozen=True)
class Picture:
    """A plot as PNG, wide and narrow, with the sizes in CSS pixels."""

    wide: bytes
    narrow: bytes
    wide_size: tuple[int, int]
    narrow_size: tuple[int, int]


def check_matplotlib() -> None:
    """Raise MissingPackage without matplotlib."""
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as failure:
        raise MissingPackage(
            "the report's plots need matplotlib, which is not installed; run: pip install 'traitline[report]'"
        ) from failure


def render_picture(draw: Callable[[Mapping[str, Any], PlotPage], Figure], source: Mapping[str, Any]) -> Picture:
    """Draw a plot wide and narrow."""
    pages = (PlotPage(is_narrow) for is_narrow in (False, True))
    (wide, wide_size), (narrow, narrow_size) = (rendered(partial(draw, source, page), page.text) for page in pages)
    return Picture(wide, narrow, wide_size, narrow_size)


def rendered(draw: Callable[[], Figure], text: float) -> tuple[bytes, tuple[int, int]]:
    """Return a figure as PNG and its size in CSS pixels, drawn in the project's style with `text` points of text."""
    from matplotlib import style

    buffer = io.BytesIO()
    with style.context(["default", {**STYLE, "font.size": text}]):
        figure = draw()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        width, height = (round(inches * PIXELS_PER_INCH) for inches in figure.get_size_inches())
    return buffer.getvalue(), (width, height)


def gaps(values: Sequence[float | None]) -> list[float]:
    """Return values to draw, with NaN for None: a gap in the line."""
    return [float("nan") if value is None else value for value in values]

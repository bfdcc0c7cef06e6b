"""Forecast floors of a decode step from published bandwidths. These are not measurements.

`python -m benchmarks.published` prints the table of docs/speed.md.
"""

from __future__ import annotations

import click
import torch

from benchmarks.hardware import Limits
from benchmarks.roofline import Sizes
from benchmarks.shapes import config_of
from benchmarks.tables import table

GIGA, TERA = 1e9, 1e12
PUBLISHED = {  # bytes and operations per second in half precision, as their makers have them
    "T4": Limits(320 * GIGA, 65 * TERA),
    "A100, 40 GB": Limits(1555 * GIGA, 312 * TERA),
    "H100 SXM": Limits(3350 * GIGA, 989 * TERA),
    "H200": Limits(4800 * GIGA, 989 * TERA),
}
MACS = {"M1": 68, "M4": 120, "M4 Pro": 273, "M4 Max": 546, "M3 Ultra": 819}  # GB/s; Apple gives no peak
SHAPES = {"Gemma-2-2B": "2b", "Llama-3-8B": "8b"}
BATCH_SIZE = 64
COLUMNS = 60 + 150 / 2  # half way through the GPU's job


def forecast_table() -> str:
    """Return a table of the floor of a decode step, and the tokens per second that it allows at most."""
    sizes = {title: Sizes.of(config_of(shape), torch.bfloat16) for title, shape in SHAPES.items()}
    makers = PUBLISHED | {name: Limits(rate * GIGA, float("inf")) for name, rate in MACS.items()}
    rows = [
        [
            name,
            f"{limit.bytes_per_second / GIGA:.0f}",
            *[cell for each in sizes.values() for cell in _cells(each, limit)],
        ]
        for name, limit in makers.items()
    ]
    head = ["forecast", "GB/s", *[f"{title}: {what}" for title in sizes for what in ("floor, ms", "tokens/s at most")]]
    return table(head, rows)


def _cells(sizes: Sizes, limit: Limits) -> list[str]:
    work = sizes.decode_step(BATCH_SIZE, COLUMNS)
    floor = limit.floor(work.n_bytes, work.flops)
    return [f"{1e3 * floor:.1f}", f"{BATCH_SIZE / floor:,.0f}"]


if __name__ == "__main__":
    click.echo(forecast_table())

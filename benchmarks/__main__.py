"""`python -m benchmarks WHAT` (a name of WHATS, or all): measure, and write JSON, a page and pictures."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import click

WHATS = ("peers", "capture", "amplification", "speculation", "memory", "validation")
SHAPES = ("tiny", "pocket", "15m", "135m")
UNDRAWN = ("validation",)  # its table says it all
BUSY = 0.5  # cores that others use
CARD_SHAPES = ("pocket", "2b")
N_TRAITS = 11  # as many as are shipped
MEMORY_COUNTS = (2_000, 20_000)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("what", type=click.Choice([*WHATS, "all"]), default="all")
@click.option("--shape", "shapes", multiple=True, default=("pocket",), type=click.Choice(SHAPES), show_default=True,
              help="Model; may be given several times.")  # fmt: skip
@click.option("--threads", default=2, type=click.IntRange(1), show_default=True, help="Processor threads.")
@click.option(
    "--repeats", default=3, type=click.IntRange(1), show_default=True, help="Rounds; capture has 5 pairs each."
)
@click.option("--examples", default=200, type=click.IntRange(2), show_default=True, help="Prompts of a job.")
@click.option(
    "--serial-examples", default=20, type=click.IntRange(1), show_default=True, help="Of which, one at a time."
)
@click.option(
    "--out", default=Path("docs/benchmarks"), type=click.Path(path_type=Path), show_default=True, help="Folder."
)
@click.option("--scouts", default=2, type=click.IntRange(1), show_default=True, help="Tries of each batch size.")
def main(
    what: str,
    shapes: tuple[str, ...],
    threads: int,
    repeats: int,
    examples: int,
    serial_examples: int,
    scouts: int,
    out: Path,
) -> None:
    """Measure the engine beside its peers, what capture costs, two models at once, how memory grows, cards."""
    _quiet(threads)
    load = busy_cores()
    if load > BUSY:
        _say(f"the machine is busy (load {load:.1f}): figures will be noise, above all with more than one thread")
    if what in ("peers", "all"):
        from benchmarks.race import race

        for shape in shapes:
            _say(f"peers, {shape}")
            counts = {"n_examples": examples, "n_serial": serial_examples, "repeats": repeats, "scouts": scouts}
            found = race(shape, **counts, say=_say)
            _write("peers", f"peers-{shape}", found, load, threads, out)
    if what in ("capture", "all"):
        from benchmarks.capture_cost import capture_cost

        for shape in shapes:
            _say(f"capture, {shape}")
            found = capture_cost(shape, n_examples=examples, repeats=repeats, say=_say)
            _write("capture", f"capture-{shape}", found, load, threads, out)
    if what in ("amplification", "all"):
        from benchmarks.amplification import amplification

        for shape in shapes:
            _say(f"amplification, {shape}")
            found = amplification(shape, n_examples=examples, n_serial=serial_examples, repeats=repeats, say=_say)
            _write("amplification", f"amplification-{shape}", found, load, threads, out)
    if what in ("speculation", "all"):
        from benchmarks.speculation import speculation

        for shape in shapes:
            _say(f"speculation, {shape}")
            found = speculation(shape, n_examples=serial_examples, repeats=repeats, say=_say)
            _write("speculation", f"speculation-{shape}", found, load, threads, out)
    if what in ("memory", "all"):
        from benchmarks.memory import memory_growth

        _say("memory")
        _write("memory", "memory", memory_growth(counts=MEMORY_COUNTS, threads=threads, say=_say), load, threads, out)
    if what in ("validation", "all"):
        from benchmarks.validation import card_cost

        _say("validation")
        _write("validation", "validation", card_cost(CARD_SHAPES, n_traits=N_TRAITS, say=_say), load, threads, out)


def busy_cores() -> float:
    """The load of the last minute, where the system tells it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _quiet(threads: int) -> None:
    """Threads are fixed before torch starts any; nobody talks in between, and nothing is fetched."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _write(kind: str, name: str, found: dict[str, Any], load: float, threads: int, out: Path) -> None:
    from benchmarks.hardware import describe
    from benchmarks.tables import TABLES, save

    result = {"kind": kind, "machine": {**describe(threads), "load_before": load}, **found}
    out.mkdir(parents=True, exist_ok=True)
    if kind in UNDRAWN:
        pass
    elif importlib.util.find_spec("matplotlib"):
        from benchmarks.figures import draw

        draw(result, out / f"{name}.png")
    else:
        _say("no picture: matplotlib is not installed (it is in the extra `bench`)")
    path = save(name, result, out)
    click.echo(TABLES[kind](result))
    _say(f"written: {path}")


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")

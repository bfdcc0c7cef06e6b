"""`python -m benchmarks WHAT` (a name of JOBS, or all): measure, and write JSON, a page and pictures."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

SHAPES = ("tiny", "pocket", "15m", "135m")
UNDRAWN = ("validation", "server", "monitoring")  # their tables say it all
BUSY = 0.5  # cores that others use
CARD_SHAPES = ("pocket", "2b")
N_TRAITS = 11  # as many as are shipped
N_PLACEBOS = 200
MEMORY_COUNTS = (2_000, 20_000)
Named = Iterator[tuple[str, Callable[[], dict[str, Any]]]]  # a measurement's name, and how it is made


@dataclass(frozen=True)
class Asked:
    """The command's options."""

    shapes: tuple[str, ...]
    threads: int
    repeats: int
    examples: int
    serial_examples: int
    scouts: int
    device: str = "cpu"


def _peers(asked: Asked) -> Named:
    from benchmarks.race import race

    counts = {"n_examples": asked.examples, "n_serial": asked.serial_examples}
    for shape in asked.shapes:
        yield f"peers-{shape}", partial(race, shape, **counts, repeats=asked.repeats, scouts=asked.scouts, say=_say)


def _capture(asked: Asked) -> Named:
    from benchmarks.capture_cost import capture_cost

    for shape in asked.shapes:
        yield (
            f"capture-{shape}",
            partial(capture_cost, shape, n_examples=asked.examples, repeats=asked.repeats, say=_say),
        )


def _amplification(asked: Asked) -> Named:
    from benchmarks.amplification import amplification

    counts = {"n_examples": asked.examples, "n_serial": asked.serial_examples}
    for shape in asked.shapes:
        yield f"amplification-{shape}", partial(amplification, shape, **counts, repeats=asked.repeats, say=_say)


def _speculation(asked: Asked) -> Named:
    from benchmarks.speculation import speculation

    for shape in asked.shapes:
        yield (
            f"speculation-{shape}",
            partial(speculation, shape, n_examples=asked.serial_examples, repeats=asked.repeats, say=_say),
        )


def _memory(asked: Asked) -> Named:
    from benchmarks.memory import memory_growth

    yield "memory", partial(memory_growth, counts=MEMORY_COUNTS, threads=asked.threads, say=_say)


def _validation(_: Asked) -> Named:
    from benchmarks.validation import card_cost

    yield "validation", partial(card_cost, CARD_SHAPES, n_traits=N_TRAITS, say=_say)


def _server(asked: Asked) -> Named:
    from benchmarks.server import server_load

    yield (
        "server",
        partial(server_load, n_requests=asked.examples, repeats=asked.repeats, threads=asked.threads, say=_say),
    )


def _separation(asked: Asked) -> Named:
    from benchmarks.separation import separation

    yield "separation", partial(separation, N_PLACEBOS, asked.examples // 2, say=_say)


def _reading(asked: Asked) -> Named:
    from benchmarks.reading_cost import reading_cost

    counts = {"n_examples": asked.examples, "n_serial": asked.serial_examples}
    place = "" if asked.device == "cpu" else f"-{asked.device}"
    for shape in asked.shapes:
        yield (
            f"reading-{shape}{place}",
            partial(reading_cost, shape, **counts, repeats=asked.repeats, say=_say, device=asked.device),
        )


def _monitoring(asked: Asked) -> Named:
    from benchmarks.captures import captures

    yield "monitoring", partial(captures, repeats=asked.repeats, threads=asked.threads, say=_say)


JOBS: dict[str, Callable[[Asked], Named]] = {
    "peers": _peers,
    "capture": _capture,
    "amplification": _amplification,
    "speculation": _speculation,
    "memory": _memory,
    "validation": _validation,
    "server": _server,
    "separation": _separation,
    "reading": _reading,
    "monitoring": _monitoring,
}
WHATS = tuple(JOBS)


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
@click.option("--device", default="cpu", type=click.Choice(("cpu", "cuda")), show_default=True, help="Of `reading`.")
def main(what: str, threads: int, out: Path, **counts: Any) -> None:
    """Measure the engine beside its peers, what capture and reading cost, two models, memory, cards, the server."""
    _quiet(threads)
    load = busy_cores()
    if load > BUSY:
        _say(f"the machine is busy (load {load:.1f}): figures will be noise, above all with more than one thread")
    asked = Asked(threads=threads, **counts)
    for kind in WHATS if what == "all" else (what,):
        for name, measured in JOBS[kind](asked):
            _say(name)
            _write(kind, name, measured(), load, threads, out)


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

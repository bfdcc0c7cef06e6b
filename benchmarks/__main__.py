"""`python -m benchmarks WHAT` (a name of JOBS, or all): measure, and write JSON, a page and pictures."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

SHAPES = ("tiny", "tiny-gemma", "pocket", "15m", "135m", "2b", "8b")
GUESTS = ("vllm", "nnsight", "transformer_lens")
RACERS = ("traitline", "serial", "batched", "continuous")
DTYPES = ("auto", "float32", "bfloat16", "float16")
USUAL_SHAPES = {"gpu": ("2b",), "roofline": ("pocket", "135m")}  # where none is asked for; else pocket
ALONE = {"gpu"}  # not among `all`
UNDRAWN = ("validation", "server", "monitoring")  # their tables say it all
BUSY = 0.5  # cores that others use
CARD_SHAPES = ("pocket", "2b")
N_TRAITS = 11  # as many as are shipped
N_PLACEBOS = 200
MEMORY_COUNTS = (2_000, 20_000)
MANY_LAYERS = 4
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
    dtype: str = "auto"
    guests: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    static: bool = False
    rows: int = 20_000

    @property
    def place(self) -> str:
        """What a result's name says of the device."""
        return "" if self.device == "cpu" else f"-{self.device}"


def _peers(asked: Asked) -> Named:
    from benchmarks.race import Entry, race

    counts = {"n_examples": asked.examples, "n_serial": asked.serial_examples}
    entry = Entry(asked.guests, asked.only, asked.batch_sizes)
    for shape in asked.shapes:
        rounds = {"repeats": asked.repeats, "scouts": asked.scouts}
        yield f"peers-{shape}", partial(race, shape, **counts, **rounds, entry=entry, say=_say)


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
    from benchmarks.memory import many_rows, memory_growth
    from benchmarks.shapes import sizes_of

    def both() -> dict[str, Any]:
        shape = (asked.rows, MANY_LAYERS, sizes_of(asked.shapes[0])["hidden_size"])
        many = many_rows(shape, threads=asked.threads, say=_say)
        return {**memory_growth(counts=MEMORY_COUNTS, threads=asked.threads, say=_say), "many_rows": many}

    yield "memory", both


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
    for shape in asked.shapes:
        yield (
            f"reading-{shape}{asked.place}",
            partial(reading_cost, shape, **counts, repeats=asked.repeats, say=_say, device=asked.device),
        )


def _monitoring(asked: Asked) -> Named:
    from benchmarks.captures import captures

    yield "monitoring", partial(captures, repeats=asked.repeats, threads=asked.threads, say=_say)


def _roofline(asked: Asked) -> Named:
    from benchmarks.roofline import roofline

    for shape, options in _fitting(asked):
        yield (
            f"roofline-{shape}{asked.place}",
            partial(roofline, shape, **options, repeats=asked.repeats, most_threads=asked.threads, say=_say),
        )


def _scaling(asked: Asked) -> Named:
    from benchmarks.scaling import scaling

    for shape, options in _fitting(asked):
        counts = {"repeats": asked.repeats, "threads": asked.threads}
        yield f"scaling-{shape}{asked.place}", partial(scaling, shape, **options, **counts, say=_say)


def _gpu(asked: Asked) -> Named:
    from benchmarks.gpu import Plan, gpu_job

    plan = Plan(n_examples=asked.examples, n_serial=min(asked.serial_examples, 8), static=asked.static)
    for shape, options in _fitting(asked):
        yield (
            f"gpu-{shape}{asked.place}",
            partial(gpu_job, shape, **options, repeats=asked.repeats, plan=plan, say=_say),
        )


def _fitting(asked: Asked) -> Iterator[tuple[str, dict[str, Any]]]:
    """The shapes that memory has room for, with their device and type; of the others a line says so."""
    from benchmarks.shapes import dtype_of, lacking

    for shape in asked.shapes:
        dtype = dtype_of(shape, asked.dtype)
        reason = lacking(shape, dtype, asked.device)
        if reason is None:
            yield shape, {"device": asked.device, "dtype": dtype}
        else:
            _say(reason)


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
    "roofline": _roofline,
    "scaling": _scaling,
    "gpu": _gpu,
}
WHATS = tuple(JOBS)


def _names_of(known: Sequence[str]) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """How an option reads a list of names, all of which must be known."""

    def read(_context: click.Context, _option: click.Parameter, text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        strange = [name for name in names if name not in known]
        if strange:
            raise click.BadParameter(f"no such peer: {', '.join(map(repr, strange))}; there are {', '.join(known)}")
        return names

    return read


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("what", type=click.Choice([*WHATS, "all"]), default="all")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(SHAPES),
              help="Model; may be given several times. Without it pocket, or what a job is meant for.")  # fmt: skip
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
@click.option("--device", default="cpu", type=click.Choice(("cpu", "cuda")), show_default=True,
              help="Of `reading`, `roofline`, `scaling` and `gpu`.")  # fmt: skip
@click.option("--dtype", default="auto", type=click.Choice(DTYPES), show_default=True,
              help="Of `roofline`, `scaling` and `gpu`: auto is bfloat16 for 2b and 8b, else float32.")  # fmt: skip
@click.option("--with", "guests", default="", callback=_names_of(GUESTS), metavar="NAME,...",
              help=f"Of `peers`: who runs in an environment of its own, made once: {', '.join(GUESTS)}.")  # fmt: skip
@click.option("--only", default="", callback=_names_of((*RACERS, *GUESTS)), metavar="NAME,...",
              help="Of `peers`: who races besides traitline and serial; guests may be among them.")  # fmt: skip
@click.option("--batch-size", "batch_sizes", multiple=True, type=click.IntRange(2),
              help="Of `peers`: to be tried instead of each peer's own; may be given several times.")  # fmt: skip
@click.option("--rows", default=20_000, type=click.IntRange(40), show_default=True,
              help="Of `memory`: examples that vectors are made of, as wide as the shape.")  # fmt: skip
@click.option("--static", is_flag=True, help="Of `gpu`: transformers' compiled step, too; compiling takes minutes.")
def main(what: str, threads: int, out: Path, shapes: tuple[str, ...], **counts: Any) -> None:
    """Measure the engine beside its peers and its floor, how time grows, what capture and reading cost, and the rest.

    `all` is everything but `gpu`.
    """
    _quiet(threads)
    load = busy_cores()
    if load > BUSY:
        _say(f"the machine is busy (load {load:.1f}): figures will be noise, above all with more than one thread")
    for kind in [each for each in WHATS if each not in ALONE] if what == "all" else [what]:
        asked = Asked(shapes=shapes or USUAL_SHAPES.get(kind, ("pocket",)), threads=threads, **counts)
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

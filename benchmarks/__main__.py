"""Command line of the measurements: `python -m benchmarks WHAT` writes JSON, a page and pictures.

WHAT is a name in JOBS, or `all`.
"""

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
ISOLATED_PEERS = ("vllm", "nnsight", "transformer_lens")
LOCAL_PEERS = ("traitline", "serial", "batched", "continuous")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_SHAPES = {"gpu": ("2b",), "roofline": ("pocket", "135m")}  # others: pocket
NOT_IN_ALL = {"gpu"}
WITHOUT_PICTURE = ("validation", "server", "monitoring")
BUSY = 0.5  # load above which a warning is printed
CARD_SHAPES = ("pocket", "2b")
N_TRAITS = 11  # as many as are shipped
N_PLACEBOS = 200
MEMORY_COUNTS = (2_000, 20_000)
MANY_LAYERS = 4
NamedJobs = Iterator[tuple[str, Callable[[], dict[str, Any]]]]  # names and functions of measurements


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    shapes: tuple[str, ...]
    threads: int
    repeats: int
    examples: int
    serial_examples: int
    scouts: int
    device: str = "cpu"
    dtype: str = "auto"
    isolated: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    static: bool = False
    rows: int = 20_000

    @property
    def suffix(self) -> str:
        """Device part of a result's file name."""
        return "" if self.device == "cpu" else f"-{self.device}"


def _peers(options: Options) -> NamedJobs:
    from benchmarks.race import Selection, race

    counts = {"n_examples": options.examples, "n_serial": options.serial_examples}
    selection = Selection(options.isolated, options.only, options.batch_sizes)
    for shape in options.shapes:
        rounds = {"repeats": options.repeats, "scouts": options.scouts}
        yield f"peers-{shape}", partial(race, shape, **counts, **rounds, selection=selection, say=_say)


def _capture(options: Options) -> NamedJobs:
    from benchmarks.capture_cost import capture_cost

    for shape in options.shapes:
        yield (
            f"capture-{shape}",
            partial(capture_cost, shape, n_examples=options.examples, repeats=options.repeats, say=_say),
        )


def _speculation(options: Options) -> NamedJobs:
    from benchmarks.speculation import speculation

    for shape in options.shapes:
        yield (
            f"speculation-{shape}",
            partial(speculation, shape, n_examples=options.serial_examples, repeats=options.repeats, say=_say),
        )


def _memory(options: Options) -> NamedJobs:
    from benchmarks.memory import many_rows, memory_growth
    from benchmarks.shapes import sizes_of

    def both() -> dict[str, Any]:
        shape = (options.rows, MANY_LAYERS, sizes_of(options.shapes[0])["hidden_size"])
        many = many_rows(shape, threads=options.threads, say=_say)
        return {**memory_growth(counts=MEMORY_COUNTS, threads=options.threads, say=_say), "many_rows": many}

    yield "memory", both


def _validation(_: Options) -> NamedJobs:
    from benchmarks.validation import card_cost

    yield "validation", partial(card_cost, CARD_SHAPES, n_traits=N_TRAITS, say=_say)


def _server(options: Options) -> NamedJobs:
    from benchmarks.server import server_load

    yield (
        "server",
        partial(server_load, n_requests=options.examples, repeats=options.repeats, threads=options.threads, say=_say),
    )


def _separation(options: Options) -> NamedJobs:
    from benchmarks.separation import separation

    yield "separation", partial(separation, N_PLACEBOS, options.examples // 2, say=_say)


def _reading(options: Options) -> NamedJobs:
    from benchmarks.reading_cost import reading_cost

    counts = {"n_examples": options.examples, "n_serial": options.serial_examples}
    for shape in options.shapes:
        yield (
            f"reading-{shape}{options.suffix}",
            partial(reading_cost, shape, **counts, repeats=options.repeats, say=_say, device=options.device),
        )


def _monitoring(options: Options) -> NamedJobs:
    from benchmarks.captures import captures

    yield "monitoring", partial(captures, repeats=options.repeats, threads=options.threads, say=_say)


def _roofline(options: Options) -> NamedJobs:
    from benchmarks.roofline import roofline

    for shape, place in _fitting(options):
        yield (
            f"roofline-{shape}{options.suffix}",
            partial(roofline, shape, **place, repeats=options.repeats, most_threads=options.threads, say=_say),
        )


def _scaling(options: Options) -> NamedJobs:
    from benchmarks.scaling import scaling

    for shape, place in _fitting(options):
        counts = {"repeats": options.repeats, "threads": options.threads}
        yield f"scaling-{shape}{options.suffix}", partial(scaling, shape, **place, **counts, say=_say)


def _gpu(options: Options) -> NamedJobs:
    from benchmarks.gpu import Plan, gpu_job

    plan = Plan(n_examples=options.examples, n_serial=min(options.serial_examples, 8), static=options.static)
    for shape, place in _fitting(options):
        yield (
            f"gpu-{shape}{options.suffix}",
            partial(gpu_job, shape, **place, repeats=options.repeats, plan=plan, say=_say),
        )


def _fitting(options: Options) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the shapes that fit into memory, with their device and type; print a line for each other one."""
    from benchmarks.shapes import dtype_of, lacking

    for shape in options.shapes:
        dtype = dtype_of(shape, options.dtype)
        reason = lacking(shape, dtype, options.device)
        if reason is None:
            yield shape, {"device": options.device, "dtype": dtype}
        else:
            _say(reason)


JOBS: dict[str, Callable[[Options], NamedJobs]] = {
    "peers": _peers,
    "capture": _capture,
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
    """Return a click callback that parses a comma-separated list of known names."""

    def read(_context: click.Context, _option: click.Parameter, text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(",") if name.strip())
        unknown = [name for name in names if name not in known]
        if unknown:
            raise click.BadParameter(f"unknown peer: {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
        return names

    return read


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("what", type=click.Choice([*WHATS, "all"]), default="all")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(SHAPES),
              help="Model shape; repeatable. Default: pocket, or the shape of the job.")  # fmt: skip
@click.option("--threads", default=2, type=click.IntRange(1), show_default=True, help="Processor threads.")
@click.option(
    "--repeats", default=3, type=click.IntRange(1), show_default=True, help="Rounds; for `capture`, 5 pairs each."
)
@click.option("--examples", default=200, type=click.IntRange(2), show_default=True, help="Number of prompts.")
@click.option(
    "--serial-examples",
    default=20,
    type=click.IntRange(1),
    show_default=True,
    help="Prompts that are run one at a time.",
)
@click.option(
    "--out", default=Path("docs/benchmarks"), type=click.Path(path_type=Path), show_default=True, help="Folder."
)
@click.option("--scouts", default=2, type=click.IntRange(1), show_default=True, help="Trial runs of each batch size.")
@click.option("--device", default="cpu", type=click.Choice(("cpu", "cuda")), show_default=True,
              help="Device, for `reading`, `roofline`, `scaling` and `gpu`.")  # fmt: skip
@click.option("--dtype", default="auto", type=click.Choice(DTYPES), show_default=True,
              help="Type, for `roofline`, `scaling`, `gpu`: auto is bfloat16 for 2b and 8b, else float32.")  # fmt: skip
@click.option("--with", "isolated", default="", callback=_names_of(ISOLATED_PEERS), metavar="NAME,...",
              help=f"For `peers`: in virtual environments, created once: {', '.join(ISOLATED_PEERS)}.")  # fmt: skip
@click.option("--only", default="", callback=_names_of((*LOCAL_PEERS, *ISOLATED_PEERS)), metavar="NAME,...",
              help="For `peers`: run only these beside traitline and serial.")  # fmt: skip
@click.option("--batch-size", "batch_sizes", multiple=True, type=click.IntRange(2),
              help="For `peers`: batch sizes to try instead of each peer's defaults; repeatable.")  # fmt: skip
@click.option("--rows", default=20_000, type=click.IntRange(40), show_default=True,
              help="For `memory`: number of examples of the vectors.")  # fmt: skip
@click.option(
    "--static", is_flag=True, help="For `gpu`: also run transformers' compiled step; compiling takes minutes."
)
def main(what: str, threads: int, out: Path, shapes: tuple[str, ...], **counts: Any) -> None:
    """Measure speed, memory and the cost of capture, beside other libraries; `all` runs everything but `gpu`."""
    _quiet(threads)
    load = busy_cores()
    if load > BUSY:
        _say(f"the machine is busy (load {load:.1f}): the figures will be noise")
    for kind in [each for each in WHATS if each not in NOT_IN_ALL] if what == "all" else [what]:
        options = Options(shapes=shapes or DEFAULT_SHAPES.get(kind, ("pocket",)), threads=threads, **counts)
        for name, measured in JOBS[kind](options):
            _say(name)
            _write(kind, name, measured(), load, threads, out)


def busy_cores() -> float:
    """Return the load average of the last minute, 0 where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _quiet(threads: int) -> None:
    """Set the number of threads before torch starts any, silence the libraries and forbid downloads."""
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
    if kind in WITHOUT_PICTURE:
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

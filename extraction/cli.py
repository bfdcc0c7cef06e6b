"""The command line: options shared by all doors, the `traitline` group, errors as one line and exit code 2."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from extraction import __version__
from extraction.errors import TraitlineError

if TYPE_CHECKING:
    from extraction.jobs import Job

SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),  # --batch_size is --batch-size
    "max_content_width": 100,
}


class Interrupted(BaseException):
    """A signal asked this process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Command(click.Command):
    """A command whose errors are one line on stderr and exit code 2; a traceback only with --debug."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("context_settings", SETTINGS)
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."))

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; turn what users can put right into one line."""
        debug = ctx.params.pop("debug", False)
        _listen_for_signals()
        try:
            return super().invoke(ctx)
        except TraitlineError as failure:
            if debug:
                raise
            click.echo(f"traitline: {_one_line(failure)}", err=True)
            ctx.exit(2)
        except Interrupted as stop:
            click.echo("traitline: stopped; finished shards are kept, the same command goes on from there", err=True)
            ctx.exit(128 + stop.number)


def _one_line(failure: BaseException) -> str:
    """ANSI and other control characters in a name or a path must not reach the terminal."""
    text = " ".join(str(failure).split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _listen_for_signals() -> None:
    """The first SIGINT or SIGTERM unwinds; a second one ends the process at once."""

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda again, _: os._exit(128 + again))
        raise Interrupted(number)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)


class Terminal:
    """A stage's listener that speaks to people: a bar with tokens/s and time left on a terminal, lines elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._tokens = 0
        self._started = 0.0

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            click.echo(text, err=True)

    def begin(self, title: str, n_examples: int, n_done: int) -> None:
        """Start a bar."""
        from tqdm import tqdm

        if not sys.stderr.isatty():
            click.echo(f"{title}: {n_done} of {n_examples} examples are there", err=True)
        self._tokens, self._started = 0, time.perf_counter()
        self._bar = tqdm(
            total=n_examples,
            initial=n_done,
            desc=title,
            unit=" examples",
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format="{desc}: {n_fmt}/{total_fmt} |{bar}| {postfix} {elapsed}<{remaining}",
        )

    def advance(self, n_examples: int, n_tokens: int) -> None:
        """Move the bar."""
        self._tokens += n_tokens
        rate = self._tokens / max(time.perf_counter() - self._started, 1e-9)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self._bar.update(n_examples)

    def end(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


# --- options --------------------------------------------------------------------------------------------------------

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

INPUTS: tuple[Decorator, ...] = (
    click.option(
        "--experiment",
        required=True,
        metavar="NAME",
        help="A file of configs/experiments, or a name that starts with a model's.",
    ),
    click.option(
        "--trait", "--traits", "traits", metavar="A,B", help="Traits of configs/traits; default: the experiment's."
    ),
    click.option(
        "--model", metavar="NAME", help="A file of configs/models, a folder, or a hub id; overrides the experiment's."
    ),
    click.option("--root", metavar="DIR", help="Where configs/ and experiments/ are; default: here, or the checkout."),
)
GENERATION: tuple[Decorator, ...] = (
    click.option("--n-examples", metavar="N", help="Examples of each polarity."),
    click.option("--max-new-tokens", metavar="N", help="Longest response."),
    click.option("--temperature", metavar="X", help="0 is greedy."),
    click.option("--top-k", metavar="N", help="Sample among the N likeliest tokens; 0: all."),
    click.option("--top-p", metavar="X", help="Sample within this probability mass; 1: all."),
    click.option("--seed", metavar="N", help="Another seed gives other responses."),
    click.option("--judge", metavar="NAME", help="auto, lexical or none."),
    click.option(
        "--threshold", metavar="X", help="A positive response is kept at this score or above, a negative one below."
    ),
    click.option(
        "--instruction-as", metavar="ROLE", help="system, user, or auto: system where the chat template has it."
    ),
    click.option("--shard-size", metavar="N", help="Examples that are committed together."),
)
DEVICE: tuple[Decorator, ...] = (
    click.option("--dtype", metavar="TYPE", help="auto, float32, bfloat16 or float16."),
    click.option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1 or mps."),
    click.option("--raw", is_flag=True, default=None, help="No chat template: for base models."),
    click.option("--trust-remote-code", is_flag=True, default=None, help="Run code that comes with the model."),
)
CAPTURE: tuple[Decorator, ...] = (
    click.option("--layers", metavar="L", help="all, 16, 10-20 or 3,5,8-10, counted from 0."),
    click.option("--sites", metavar="A,B", help="residual, attention, mlp, residual_mid."),
    click.option(
        "--poolings",
        metavar="A,B",
        help="response_mean, response_first:N, response_last, prompt_mean, prompt_last, all.",
    ),
)
BATCH: tuple[Decorator, ...] = (click.option("--batch-size", metavar="N", help="Slots of the running batch, or auto."),)
RUN: tuple[Decorator, ...] = (
    click.option(
        "--self-check",
        metavar="N",
        default=2,
        type=click.IntRange(0, 64),
        show_default=True,
        help="Compare N examples alone and in a batch first.",
    ),
    click.option(
        "--slice", "slice_text", metavar="K/N", default="1/1", help="Do every N-th shard, from the K-th: for clusters."
    ),
    click.option("--threads", metavar="N", type=click.IntRange(1, 1024), help="Processor threads."),
    click.option("--dry-run", is_flag=True, help="Print the plan and the forecast, and stop."),
    click.option(
        "--gpu-price", metavar="X", type=click.FloatRange(0), help="Price of the machine per hour, for the forecast."
    ),
)
VECTORS: tuple[Decorator, ...] = (
    click.option(
        "--methods",
        "--method",
        "methods",
        metavar="A,B",
        help="mean_diff, probe, pca, ica, gradient, random; default: all but random.",
    ),
    click.option("--site", metavar="SITE", help="Which site's activations; default: the first captured."),
    click.option("--pooling", metavar="POOLING", help="Which pooling; default: the first captured."),
)
STORED: tuple[Decorator, ...] = (
    click.option("--layers", metavar="L", help="all, 16, 10-20 or 3,5,8-10, counted from 0; default: all captured."),
    click.option("--judge", metavar="NAME", help="auto, lexical or none; default: the run's."),
    click.option("--threshold", metavar="X", help="Where the judge divides; default: the run's."),
)


def options(*groups: tuple[Decorator, ...]) -> Decorator:
    """Put groups of options on a command, in the order given."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


# --- commands -------------------------------------------------------------------------------------------------------


@click.group(context_settings=SETTINGS)
@click.version_option(__version__, prog_name="traitline")
def main() -> None:
    """Turn a trait into a validated direction in a language model's activations."""


def _take(given: dict[str, Any], *names: str) -> list[Any]:
    return [given.pop(name) for name in names]


def _make_responses(mode: str, given: dict[str, Any]) -> None:
    """The body of stage 1's commands."""
    from extraction.jobs import MODES

    dry_run, gpu_price, threads = _take(given, "dry_run", "gpu_price", "threads")
    job = _job(given)
    if dry_run:
        return _print_plan(job, MODES[mode].serial, gpu_price)
    from extraction import stages, summary

    _prepare(threads)
    started = time.perf_counter()
    engine = stages.generate(job, MODES[mode], Terminal())
    _print(summary.of_generation(job, engine, time.perf_counter() - started, gpu_price))


@main.command("generate", cls=Command)
@options(INPUTS, GENERATION, DEVICE, RUN)
def generate_command(**given: Any) -> None:
    """Stage 1, the yardstick: responses, one prompt at a time, no activations."""
    _make_responses("responses", given)


@main.command("combined", cls=Command)
@options(INPUTS, GENERATION, CAPTURE, DEVICE, RUN)
def combined_command(**given: Any) -> None:
    """Stage 1, one prompt at a time, with activations captured in the same pass."""
    _make_responses("combined", given)


@main.command("batched", cls=Command)
@options(INPUTS, GENERATION, CAPTURE, BATCH, DEVICE, RUN)
def batched_command(**given: Any) -> None:
    """Stage 1, the fast one: batched responses with activations captured in the same pass."""
    _make_responses("batched", given)


@main.command("capture", cls=Command)
@options(INPUTS, GENERATION, CAPTURE, BATCH, DEVICE, RUN)
def capture_command(**given: Any) -> None:
    """Stage 2: activations of stored responses, in a teacher-forced pass over their token ids."""
    dry_run, gpu_price, threads = _take(given, "dry_run", "gpu_price", "threads")
    job = _job(given)
    if dry_run:
        return _print_plan(job, False, gpu_price)
    from extraction import stages, summary

    _prepare(threads)
    started = time.perf_counter()
    engine = stages.capture(job, Terminal())
    _print(summary.of_generation(job, engine, time.perf_counter() - started, gpu_price))


@main.command("vectors", cls=Command)
@options(INPUTS, VECTORS, STORED)
def vectors_command(**given: Any) -> None:
    """Stage 3: a direction per method and layer, from the examples that the judge keeps."""
    wanted = _wanted(given)
    job = _stored_job(given)
    from extraction import stages, summary

    n_written = stages.vectors(job, wanted, Terminal())
    _print(summary.of_vectors(job, n_written))


@main.command("validate", cls=Command)
@options(INPUTS, VECTORS, STORED)
def validate_command(**given: Any) -> None:
    """Stage 4: what each method and layer is worth on questions that it has not seen."""
    wanted = _wanted(given)
    job = _stored_job(given)
    from extraction import stages, summary

    stages.validate(job, wanted, Terminal())
    _print(summary.of_cards(job))


@main.command("extract", cls=Command)
@options(INPUTS, GENERATION, CAPTURE, BATCH, VECTORS, DEVICE, RUN)
def extract_command(**given: Any) -> None:
    """The whole job: responses, activations, vectors and what they are worth."""
    dry_run, gpu_price, threads = _take(given, "dry_run", "gpu_price", "threads")
    wanted = _wanted(given, takes_layers=False)
    job = _job(given)
    if dry_run:
        return _print_plan(job, False, gpu_price)
    from extraction import stages, summary

    _prepare(threads)
    started = time.perf_counter()
    engine, n_new = stages.extract(job, wanted, Terminal())
    _print(summary.of_job(job, engine, n_new, time.perf_counter() - started, gpu_price))


@main.command("verify", cls=Command)
@click.argument("folder", required=False, type=click.Path())
@click.option("--root", metavar="DIR", help="Where experiments/ is; default: here, or the checkout.")
def verify_command(folder: str | None, root: str | None) -> None:
    """Check every file of a run (or of all of experiments/) against its receipt. Exit code 1 if anything is wrong."""
    from pathlib import Path

    from extraction.configs import find_root
    from extraction.errors import StoreError
    from extraction.store import verify_tree

    top = Path(folder) if folder else find_root(root) / "experiments"
    if not top.is_dir():
        raise StoreError(f"{top}: no such folder; give a run's folder, or run a job first")
    findings = verify_tree(top)
    for finding in findings:
        click.echo(_one_line(finding))
    click.echo(f"{top}: " + (f"{len(findings)} findings" if findings else "every file is what its receipt says"))
    sys.exit(1 if findings else 0)


@main.command("traits", cls=Command)
@click.option("--root", metavar="DIR", help="Where configs/ is; default: here, or the checkout.")
def traits_command(root: str | None) -> None:
    """List the traits that can be named, with what their positive side is."""
    from extraction.configs import find_root
    from extraction.traits import list_traits, load_trait

    folder = find_root(root)
    for name in list_traits(folder):
        click.echo(f"{name}\n    {load_trait(name, folder).description}")


# --- what the commands share ----------------------------------------------------------------------------------------


def _job(given: dict[str, Any]) -> Job:
    """Plan a job from a command's options, and say what was inferred."""
    from extraction.jobs import plan

    own = {key: given.pop(key) for key in ("root", "self_check", "slice_text") if key in given}
    experiment, traits = _take(given, "experiment", "traits")
    for key in ("sites", "poolings"):
        if given.get(key) is not None:
            given[key] = [part.strip() for part in given[key].split(",")]
    job = plan(experiment, traits, options=_numbers(given), **own)
    for note in job.notes:
        click.echo(_one_line(note), err=True)
    return job


def _stored_job(given: dict[str, Any]) -> Job:
    """The job as its run.json has it, so that no option of stage 1 has to be given again."""
    from extraction.jobs import stored_plan

    experiment, traits, model, root = _take(given, "experiment", "traits", "model", "root")
    return stored_plan(experiment, traits, root=root, options={"model": model, **_numbers(given)})


def _wanted(given: dict[str, Any], *, takes_layers: bool = True) -> Any:
    """What stage 3 is asked for."""
    from extraction.stages import Vectors

    methods, site, pooling = _take(given, "methods", "site", "pooling")
    names = tuple(part.strip() for part in methods.split(",")) if methods else None
    layers = given.pop("layers") if takes_layers else None
    return Vectors(methods=names, layers=layers, site=site, pooling=pooling)


NUMBERS: dict[str, Callable[[str], int | float]] = {
    **dict.fromkeys(("n_examples", "max_new_tokens", "top_k", "seed", "shard_size"), int),
    **dict.fromkeys(("temperature", "top_p", "threshold"), float),
}


def _numbers(given: dict[str, Any]) -> dict[str, Any]:
    """Options as a config file would hold them: numbers where they are numbers; the schema judges the rest."""

    def read(key: str, value: Any) -> Any:
        try:
            return NUMBERS[key](value) if key in NUMBERS and value is not None else value
        except ValueError:
            return value

    return {key: read(key, value) for key, value in given.items()}


def _prepare(threads: int | None) -> None:
    """Keep the libraries below quiet; set the processor threads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _print_plan(job: Job, serial: bool, gpu_price: float | None) -> None:
    from extraction import summary
    from extraction.forecast import forecast

    _print(summary.of_plan(job, forecast(job, serial=serial, gpu_price=gpu_price)))


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)

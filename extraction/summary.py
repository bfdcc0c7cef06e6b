"""What a job says when it ends, and before it starts: lines of text, at most 80 columns where names allow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.errors import StoreError
from extraction.jobs import Job
from extraction.records import Trait
from extraction.stages import kept_of
from extraction.store import RunFolder

if TYPE_CHECKING:
    from extraction.forecast import Forecast
    from extraction.runners import Engine

METHOD_WIDTH = 9


def of_plan(job: Job, forecast: Forecast) -> Iterator[str]:
    """What a job would do and take."""
    settings, n_shards = job.experiment, sum(len(job.shards(trait)) for trait in job.traits)
    n_examples = sum(len(shard) for trait in job.traits for shard in job.shards(trait))
    yield f"Plan: {settings.name}, model {job.spec.name} ({forecast.n_parameters / 1e6:.1f}M parameters) on {forecast.device}"
    yield f"  traits      {len(job.traits)}: {', '.join(trait.name for trait in job.traits)}"
    yield f"  examples    {n_examples} in {n_shards} shards; batch size {forecast.batch_size}"
    yield f"  layers      {_ranges(job.layers)}; {', '.join(settings.capture.sites)}; {', '.join(settings.capture.poolings)}"
    yield "Forecast (prompts guessed, every response at its full length):"
    yield f"  tokens      {forecast.prompt_tokens:,} of prompts, {forecast.new_tokens:,} new"
    yield f"  time        {duration(forecast.seconds)}"
    yield f"  disk        {size(forecast.disk)}"
    parts = ", ".join(f"{part} {size(n_bytes)}" for part, n_bytes in forecast.memory.items())
    yield f"  memory      {size(forecast.peak)}: {parts}"
    if forecast.cost is not None:
        yield f"  cost        {forecast.cost:.2f} at the given price per hour"


def of_generation(job: Job, engine: Engine, seconds: float, gpu_price: float | None) -> Iterator[str]:
    """Where stage 1 or 2 put things, and what it took."""
    for trait in job.traits:
        yield f"{trait.name}: {_shown(job.folder(trait).path)}"
        yield from _counts(job, trait)
    yield _took(engine, seconds, gpu_price)


def of_vectors(job: Job, n_written: int) -> Iterator[str]:
    """Where the vectors lie."""
    for trait in job.traits:
        folder = job.folder(trait)
        yield f"{trait.name}: {_shown(folder.path / 'vectors')}: {', '.join(folder.methods())}"
    if not n_written:
        yield "Nothing left to do."


def of_cards(job: Job) -> Iterator[str]:
    """What each trait's vectors are worth."""
    for trait in job.traits:
        folder = job.folder(trait)
        yield f"{trait.name}: {_shown(folder.path / 'vectors' / 'card.json')}"
        yield from _worth(folder)


def of_job(job: Job, engine: Engine, n_new: int, seconds: float, gpu_price: float | None) -> Iterator[str]:
    """The end of the whole job: where things lie, what was kept, what the vectors are worth, what it took."""
    for trait in job.traits:
        folder = job.folder(trait)
        yield ""
        yield f"{trait.name} on {job.spec.name}"
        yield f"  responses    {_shown(folder.path / 'responses')}"
        yield f"  activations  {_shown(folder.path / 'activations')}"
        yield f"  vectors      {_shown(folder.path / 'vectors')}: {', '.join(folder.methods())}"
        yield from _counts(job, trait)
        yield from _worth(folder)
    yield ""
    yield _took(engine, seconds, gpu_price) if engine.n_made or n_new else f"Nothing left to do ({seconds:.1f} s)."


def _counts(job: Job, trait: Trait) -> Iterator[str]:
    try:
        kept = kept_of(job, trait, job.folder(trait))
    except StoreError:
        return
    reasons = {"on the wrong side": kept.wrong_side, "without a score": kept.unscored, "empty": kept.empty}
    dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count) or "none dropped"
    yield f"  kept         {kept.n_kept} of {kept.total} examples by the judge '{kept.judge}' ({dropped})"


def _worth(folder: RunFolder) -> Iterator[str]:
    """The chosen layer and method on questions that had no part in fitting or choosing; the controls beside it."""
    if not folder.has_card():
        return
    card = folder.read_card()
    chosen, controls = card["chosen"], card["controls"]
    figures = chosen["test"]
    yield f"  best         layer {chosen['layer']} of {card['layers'][-1]}, {chosen['method']}: {_figures(figures)}"
    placebo = max((each["test"]["auroc"] or 0.0 for each in controls["shuffled_labels"]), default=None)
    beside = [
        f"random direction {_two(controls['random']['test']['auroc'])}",
        f"shuffled labels at most {_two(placebo)}",
    ]
    yield f"               (held out: {_questions(card)} questions; controls: {', '.join(beside)})"


def _figures(figures: dict[str, Any]) -> str:
    return (
        f"AUROC {_two(figures['auroc'])}, Cohen's d {_two(figures['cohens_d'])}, accuracy {_two(figures['accuracy'])}"
    )


def _questions(card: dict[str, Any]) -> int:
    return int(card["split"]["test"]["questions"])


def _two(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _took(engine: Engine, seconds: float, gpu_price: float | None) -> str:
    if not engine.n_made:
        return f"Nothing left to do ({seconds:.1f} s)."
    rate = engine.n_tokens / engine.seconds if engine.seconds and engine.n_tokens else 0.0
    sizes = "/".join(str(n) for n in sorted(set(engine.batch_sizes)))
    cost = "" if gpu_price is None else f", cost {gpu_price * seconds / 3600:.2f}"
    speed = f"{engine.n_tokens:,} tokens at {rate:,.0f}/s, " if rate else ""
    return f"Took {duration(seconds)}: {speed}batch size {sizes}, peak memory {size(peak_memory())}{cost}."


def peak_memory() -> int:
    """The most this process has held: on the GPU where one is used, else in main memory, in bytes."""
    import resource
    import sys

    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def duration(seconds: float) -> str:
    """`12.3 s`, `4 min 05 s`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(n_bytes: float) -> str:
    """`3.1 MB`, `5.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def _shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def _ranges(layers: tuple[int, ...]) -> str:
    whole = layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if whole and len(layers) > 1 else ", ".join(map(str, layers))

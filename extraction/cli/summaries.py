"""What a job says when it ends, and before it starts: lines of text, at most 80 columns where names allow."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.core.records import POLARITIES
from extraction.core.text import one_line
from extraction.pipeline.plan import RunPlan
from extraction.storage.trait_run import TraitRun

if TYPE_CHECKING:
    from extraction.pipeline.forecast import Forecast
    from extraction.pipeline.session import ModelSession, RunResult, TraitResult
    from extraction.pipeline.steer_preview import SteerSample, SteerSite

WIDTH = 80
INDENT = 15
SIDES = dict(zip(POLARITIES, ("positive", "negative"), strict=True))


def of_plan(job: RunPlan, forecast: Forecast, *, steered: int | None = None) -> Iterator[str]:
    """What a job would do and take; `steered`: how many answers to a coefficient stage 4 is asked for."""
    settings = job.experiment
    size_of_model = f"{forecast.n_parameters / 1e6:,.1f}M parameters"
    capture = f"{ranges(job.layers)}; {', '.join(settings.capture.sites)}; {', '.join(settings.capture.poolings)}"
    yield f"Plan for {settings.name}"
    yield from item("model", f"{job.spec.name} ({size_of_model}) on {forecast.device}")
    yield from item("traits", f"{len(job.traits)}: {', '.join(trait.name for trait in job.traits)}")
    groups = f"{forecast.n_groups:,} run group{'s' * (forecast.n_groups != 1)}"
    shards = f"{forecast.n_examples:,} in shards of {settings.shard_size}"
    yield from item("examples", f"{shards}, {groups}, batch size {forecast.batch_size}")
    yield from item("layers", capture)
    yield "Forecast, with every response at its full length"
    new = f", {forecast.new_tokens:,} new" if forecast.new_tokens else ""
    yield from item("tokens", f"{forecast.prompt_tokens:,} of prompts{new}")
    yield from item("time", f"about {duration(forecast.seconds)}")
    yield from item("disk", size(forecast.disk))
    parts = ", ".join(f"{part} {size(n_bytes)}" for part, n_bytes in forecast.memory.items() if n_bytes)
    yield from item("memory", f"{size(forecast.peak)}: {parts}")
    if steered is not None:
        yield from item("and stage 4", _steered(job, forecast, steered))
    if forecast.cost is not None:
        yield from item("cost", f"{forecast.cost:.2f} at the given price per hour")


def _steered(job: RunPlan, forecast: Forecast, answers: int) -> str:
    from extraction.evaluation.steering_sweep import typical_n_answers

    count = typical_n_answers(len(job.layers), answers) * len(job.traits)
    seconds = forecast.seconds * count / max(forecast.n_examples, 1)
    return f"about {count:,} steered answers, {duration(seconds)} more (--quick leaves them out)"


def of_generation(result: RunResult, seconds: float, gpu_price: float | None) -> Iterator[str]:
    """Where stage 1 or 2 put things, and what it took."""
    for trait in result.traits:
        yield from _heading(trait)
        yield from _places(trait.context.run, ("responses", "activations"))
        yield from _counts(trait)
        yield ""
    yield _took(result.session, seconds, gpu_price)


def of_vectors(results: Iterable[TraitResult]) -> Iterator[str]:
    """Where the vectors lie."""
    n_new = 0
    for result in results:
        n_new += result.n_new
        yield from _heading(result)
        yield from _vectors(result)
        yield from _counts(result)
        yield ""
    yield f"{n_new} new." if n_new else "Nothing left to do."


def of_cards(results: Iterable[TraitResult]) -> Iterator[str]:
    """What each trait's vectors are worth."""
    n_new = 0
    for result in results:
        n_new += result.n_new
        yield from _heading(result)
        yield from item("card", shown(result.context.run.card_path))
        yield from _worth(result)
        yield ""
    yield f"{n_new} new." if n_new else "Nothing left to do."


def of_job(result: RunResult, seconds: float, gpu_price: float | None) -> Iterator[str]:
    """The end of the whole job: where things lie, what was kept, what the vectors are worth, what it took."""
    for trait in result.traits:
        run = trait.context.run
        yield from _heading(trait)
        yield from _places(run, ("responses", "activations"))
        yield from _vectors(trait)
        yield from _counts(trait)
        yield from _worth(trait)
        if run.report_path().exists():
            yield from item("report", shown(run.report_path()))
        yield ""
    if result.session.n_made or not result.n_new:
        yield _took(result.session, seconds, gpu_price)
    else:
        yield f"Took {duration(seconds)}: {result.n_new} new vectors and cards from stored activations."


def of_steer_preview(job: RunPlan, place: SteerSite, seen: Sequence[SteerSample]) -> Iterator[str]:
    """Steered answers under each other, by prompt."""
    layers = f"layer{'s' * (len(place.layers) > 1)} {ranges(place.layers)}"
    yield f"{job.traits[0].name} on {job.spec.name}: {place.method} at {layers}"
    unit = "A coefficient of 1 adds a vector as long as the layer's typical activation."
    low, high = place.coherent or (0.0, 0.0)
    held = f" Answers stayed coherent from {low:+g} to {high:+g} in the steering sweep." if place.coherent else ""
    yield from _wrapped(unit + held, "", "")
    prompt = None
    for each in seen:
        if each.prompt != prompt:
            yield ""
            yield from _wrapped(one_line(each.prompt), "> ", "  ")
            yield f"{'coef':>9}  {'score':>5}  {'perplexity':>10}"
            prompt = each.prompt
        score = "-" if each.score is None else f"{each.score:.0f}"
        perplexity = "-" if each.perplexity is None else f"{each.perplexity:.1f}"
        yield f"{each.how:>9}  {score:>5}  {perplexity:>10}"
        yield from _wrapped(one_line(each.text) or "(empty)", " " * 11, " " * 11)


def of_reports(pages: Iterable[Path], index: Path) -> Iterator[str]:
    """Where the reports lie."""
    for page in pages:
        yield from item("report", shown(page))
    yield from item("index", shown(index))


def _heading(result: TraitResult) -> Iterator[str]:
    yield f"{result.context.trait.name} on {result.context.plan.spec.name}"


def item(label: str, text: str) -> Iterator[str]:
    """A label and what it is; long text goes on, indented, at a space."""
    yield from _wrapped(text, f"  {label}".ljust(INDENT), " " * INDENT)


def _wrapped(text: str, first: str, later: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )


def _places(folder: TraitRun, stages: Iterable[str]) -> Iterator[str]:
    for stage in stages:
        if folder.shard_done(stage, 0):
            yield from item(stage, shown(folder.path / stage))


def _vectors(result: TraitResult) -> Iterator[str]:
    """The methods whose vectors are made from the responses that are kept now."""
    if result.methods:
        yield from item("vectors", shown(result.context.run.path / "vectors"))
        yield from item("", ", ".join(result.methods))


def _counts(result: TraitResult) -> Iterator[str]:
    kept = result.kept
    if kept is None:
        return
    by = "no judge" if kept.judge == "none" else f"{kept.name}, threshold {kept.threshold:g}"
    by += "" if kept.coherence_threshold is None else f", coherence {kept.coherence_threshold:g}"
    sides = " and ".join(f"{len(kept.ids[side])} {word}" for side, word in SIDES.items())
    yield from item("kept", f"{kept.n_kept} of {kept.total} responses ({by}): {sides}")
    if reasons := kept.reasons():
        yield from item("dropped", reasons)
    if kept.problem:
        yield from item("not usable", kept.problem)


def _worth(result: TraitResult) -> Iterator[str]:
    """The verdict; the chosen layer and method on questions and instructions that had no part in it; the controls."""
    card, steering = result.card, result.steering
    if card is None:
        return
    chosen, held_out, verdict = card["chosen"], card["split"]["test"], card["verdict"]
    grave = [] if verdict["word"] == "usable" else verdict["reasons"][:1]
    yield from item("verdict", ": ".join([verdict["word"], *grave]))
    yield from item("best", f"layer {chosen['layer']} of {ranges(card['layers'])}, {chosen['method']}")
    rows = held_out["positive"] + held_out["negative"]
    yield from item("held out", f"{_figures(chosen['test'])} ({rows} responses to {held_out['questions']} questions)")
    yield from item("controls", _controls(card["controls"]))
    if chosen["stripped"] is not None:
        yield from item("stripped", f"AUROC {_bounded(chosen['stripped']['auroc'])} without the instruction")
    if steering is not None:
        yield from item("steering", _steering(steering))


def _steering(steering: Mapping[str, Any]) -> str:
    """How often the trait shows at the largest coherent coefficient each way, and with random directions there."""
    layers = f"{steering['method']} at layer{'s' * (len(steering['layers']) > 1)} {ranges(steering['layers'])}"
    plain = next(each["rate"]["value"] for each in steering["conditions"] if each["kind"] == "none")
    parts = [f"{_percent(plain)} of answers show the trait unsteered"]
    for side in ("negative", "positive"):
        size, reached = steering["largest_coherent"][side], steering["reached"]
        if size is not None:
            at_random = _percent(reached["random"][side])
            parts.append(f"{_percent(reached[side])} at {size:+g} (random directions {at_random})")
    return f"{layers}: {', '.join(parts)}"


def _percent(share: float | None) -> str:
    return "an unknown share" if share is None else f"{share:.0%}"


def _controls(controls: Mapping[str, Any]) -> str:
    random, shuffled = (
        controls["random"],
        [_two(each["test"]["auroc"]["value"]) for each in controls["shuffled_labels"]],
    )
    return f"AUROC of random directions {_two(random['median'])}, 95th percentile {_two(random['high'])}" + (
        f"; of shuffled labels {', '.join(shuffled)}" if shuffled else ""
    )


def _figures(figures: Mapping[str, Any]) -> str:
    effect, accuracy = (_two(figures[name]["value"]) for name in ("cohens_d", "accuracy"))
    return f"AUROC {_bounded(figures['auroc'])}, Cohen's d {effect}, accuracy {accuracy}"


def _bounded(figure: Mapping[str, float | None]) -> str:
    """A figure and its interval: `0.93 (0.88 to 0.97)`."""
    ends = "" if figure["low"] is None else f" ({_two(figure['low'])} to {_two(figure['high'])})"
    return _two(figure["value"]) + ends


def _two(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _took(session: ModelSession, seconds: float, gpu_price: float | None) -> str:
    if not session.n_made:
        return f"Nothing left to do ({seconds:.1f} s)."
    from extraction.model.devices import peak_memory

    rate = session.n_tokens / session.seconds if session.seconds and session.n_tokens else 0.0
    sizes = "/".join(str(n) for n in sorted(set(session.batch_sizes)))
    cost = "" if gpu_price is None else f", cost {gpu_price * seconds / 3600:.2f}"
    speed = f"{session.n_tokens:,} tokens at {rate:,.0f}/s, " if rate else ""
    return f"Took {duration(seconds)}: {speed}batch size {sizes}, peak memory {size(peak_memory())}{cost}."


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


def shown(path: Path) -> str:
    """A path as short as it can be typed from here."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def ranges(layers: Sequence[int]) -> str:
    """`0-5`, or each of them where some are left out."""
    whole = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if whole and len(layers) > 1 else ", ".join(map(str, layers))

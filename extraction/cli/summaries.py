"""Lines that commands print before and after their work, 80 columns wide where names allow.

A figure stands with its n and its condition, and is explained below it; one that was not measured is not printed.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


def of_plan(plan: RunPlan, forecast: Forecast, *, steered: int | None = None) -> Iterator[str]:
    """Yield the plan of a run and its forecast. `steered`: responses for every coefficient; None: no steering."""
    settings = plan.experiment
    size_of_model = f"{forecast.n_parameters / 1e6:,.1f}M parameters"
    capture = f"{ranges(plan.layers)}; {', '.join(settings.capture.sites)}; {', '.join(settings.capture.poolings)}"
    yield f"Plan for {settings.name}"
    yield from item("model", f"{plan.spec.name} ({size_of_model}) on {forecast.device}")
    yield from item("traits", f"{len(plan.traits)}: {', '.join(trait.name for trait in plan.traits)}")
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
        yield from item("and stage 4", _steered(plan, forecast, steered))
    if forecast.cost is not None:
        yield from item("cost", f"{forecast.cost:.2f} at the given price per hour")


def _steered(plan: RunPlan, forecast: Forecast, answers: int) -> str:
    from extraction.pipeline.evaluate import n_steered_answers

    count = n_steered_answers(plan, answers, plan.traits)
    if not count:
        return "no steered responses: there is no judge to score them"
    seconds = forecast.seconds * count / max(forecast.n_examples, 1)
    return f"about {count:,} steered responses, {duration(seconds)} more (none with --quick)"


def of_generation(result: RunResult, seconds: float, gpu_price: float | None) -> Iterator[str]:
    """Yield the folders that stage 1 or 2 wrote, and time, memory and cost."""
    for trait in result.traits:
        yield from _heading(trait)
        yield from _places(trait.context.run, ("responses", "activations"))
        yield from _counts(trait)
        yield ""
    yield _took(result.session, seconds, gpu_price)


def of_vectors(results: Iterable[TraitResult]) -> Iterator[str]:
    """Yield the folders of the vectors."""
    return _by_trait(results, lambda result: (*_vectors(result), *_counts(result)))


def of_cards(results: Iterable[TraitResult]) -> Iterator[str]:
    """Yield the test of each trait's vectors."""
    return _by_trait(results, lambda result: (*item("card", shown(result.context.run.card_path)), *_worth(result)))


def _by_trait(results: Iterable[TraitResult], lines: Callable[[TraitResult], Iterable[str]]) -> Iterator[str]:
    """Yield the lines of each trait as its result arrives, and the number of new files."""
    n_new = 0
    for result in results:
        n_new += result.n_new
        yield from _heading(result)
        yield from lines(result)
        yield ""
    yield f"{n_new} new." if n_new else "Nothing left to do."


def of_run(result: RunResult, seconds: float, gpu_price: float | None) -> Iterator[str]:
    """Yield the end of a whole run: folders, responses kept, the test of the vectors, time and memory."""
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


def of_steer_preview(plan: RunPlan, place: SteerSite, samples: Sequence[SteerSample]) -> Iterator[str]:
    """Yield steered responses under each other, by prompt."""
    layers = f"layer{'s' * (len(place.layers) > 1)} {ranges(place.layers)}"
    yield f"{plan.traits[0].name} on {plan.spec.name}: {place.method} at {layers}"
    unit = "A coefficient of 1 adds a vector as long as the layer's typical activation."
    low, high = place.coherent or (0.0, 0.0)
    held = f" Responses were coherent from {low:+g} to {high:+g} in the steering sweep." if place.coherent else ""
    yield from _wrapped(unit + held, "", "")
    prompt = None
    for each in samples:
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
    """Yield the files of the reports."""
    for page in pages:
        yield from item("report", shown(page))
    yield from item("index", shown(index))


def _heading(result: TraitResult) -> Iterator[str]:
    yield f"{result.context.trait.name} on {result.context.plan.spec.name}"


def item(label: str, text: str) -> Iterator[str]:
    """Yield a label and its text; long text is wrapped at spaces and indented."""
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
    """Yield the folder and the methods of vectors that were made from the responses that are kept now."""
    if result.methods:
        yield from item("vectors", shown(result.context.run.path / "vectors"))
        yield from item("", ", ".join(result.methods))


def _counts(result: TraitResult) -> Iterator[str]:
    kept = result.kept
    if kept is None:
        return
    by = "not judged: kept as told" if kept.judge == "none" else f"{kept.name}, threshold {kept.threshold:g}"
    by += "" if kept.coherence_threshold is None else f", coherence {kept.coherence_threshold:g}"
    sides = " and ".join(f"{len(kept.ids[side])} {word}" for side, word in SIDES.items())
    yield from item("kept", f"{kept.n_kept} of {kept.total} responses ({by}): {sides}")
    if reasons := kept.reasons():
        yield from item("dropped", reasons)
    if kept.judge != "none":
        yield from item("", "A positive response counts at the threshold or above, a negative one below.")
    if kept.problem:
        yield from item("not usable", kept.problem)


def _worth(result: TraitResult) -> Iterator[str]:
    """Yield the verdict, the figures on held-out questions, the controls and what steering did."""
    card, steering = result.card, result.steering
    if card is None:
        return
    chosen, verdict = card["chosen"], card["verdict"]
    reason = "no test speaks against it" if verdict["word"] == "usable" else verdict["reasons"][0]
    yield from item("verdict", f"{verdict['word']}: {reason}")
    choice = f"layer {chosen['layer']} of {ranges(card['layers'])}, {chosen['method']}"
    yield from item("best vector", f"{choice} (chosen on validation questions)")
    yield from _test(card)
    if steering is not None:
        yield from _steering(steering)


def _test(card: Mapping[str, Any]) -> Iterator[str]:
    """Yield the chosen vector's figures on the test part, with the instruction and without, and the controls."""
    test, without = card["chosen"]["test"], card["chosen"]["stripped"]
    part, controls = card["split"]["test"], card["controls"]
    n_responses = part["positive"] + part["negative"]
    yield f"On {n_responses} responses to {part['questions']} test questions that had no part in making the vector"
    yield from item("vector", _figures(test))
    if without is not None:
        yield from item("uninstructed", f"AUROC {_bounded(without['auroc'])}: instruction removed from the prompt")
    random = controls["random"]
    yield from item(
        "random",
        f"random directions {_two(random['median'])}, 95th percentile {_two(random['high'])} "
        f"(AUROC of {random['draws']} draws)",
    )
    if controls["shuffled_labels"]:
        shuffled = ", ".join(_two(each["test"]["auroc"]["value"]) for each in controls["shuffled_labels"])
        yield from item("shuffled", f"AUROC {shuffled}: all done again with the sides mixed up")
    yield from _wrapped(TEST_WORDS, "  ", "  ")


TEST_WORDS = (
    "AUROC: how often a positive response scores above a negative one; 0.5 is chance, in brackets the 95% interval. "
    "Cohen's d: distance of the two sides' means in standard deviations. Accuracy: share on the right side. A vector "
    "must beat random directions and shuffled labels; without the instruction, its AUROC shows what lies in the "
    "responses themselves."
)


def _steering(steering: Mapping[str, Any]) -> Iterator[str]:
    """Yield how often the trait shows at the largest coherent coefficient each way, for the vector and at random."""
    layers = f"{steering['method']} at layer{'s' * (len(steering['layers']) > 1)} {ranges(steering['layers'])}"
    plain = next(each for each in steering["conditions"] if each["kind"] == "none")
    yield f"Steering with {layers}: share of responses that show the trait"
    yield from item(
        "unsteered", f"{_percent(plain['rate']['value'])} of {plain['n']} responses, without an instruction"
    )
    for side in ("negative", "positive"):
        size, reached = steering["largest_coherent"][side], steering["reached"]
        if size is None:
            yield from item(side, "no coefficient gave coherent responses")
            continue
        at_random = _percent(reached["random"][side])
        yield from item(f"coef {size:+g}", f"{_percent(reached[side])}; with random directions {at_random}")
    yield from _wrapped(STEERING_WORDS, "  ", "  ")


STEERING_WORDS = (
    "The coefficients are the largest with coherent responses; 1 adds a vector as long as the layer's typical "
    "activation. Positive ones should raise the share, negative ones lower it."
)


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{share:.0%}"


def _figures(figures: Mapping[str, Any]) -> str:
    effect, accuracy = (_two(figures[name]["value"]) for name in ("cohens_d", "accuracy"))
    return f"AUROC {_bounded(figures['auroc'])}, Cohen's d {effect}, accuracy {accuracy}"


def _bounded(figure: Mapping[str, float | None]) -> str:
    """Return a figure and its interval: `0.93 (0.88 to 0.97)`."""
    ends = "" if figure["low"] is None else f" ({_two(figure['low'])} to {_two(figure['high'])})"
    return _two(figure["value"]) + ends


def _two(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


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
    """Return seconds as `12.3 s`, `4 min 05 s` or `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(n_bytes: float) -> str:
    """Return bytes as `3.1 MB` or `5.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def shown(path: Path) -> str:
    """Return a path relative to this folder if it lies in it."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def ranges(layers: Sequence[int]) -> str:
    """Return `0-5`, or a list of layers where some are left out."""
    whole = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if whole and len(layers) > 1 else ", ".join(map(str, layers))

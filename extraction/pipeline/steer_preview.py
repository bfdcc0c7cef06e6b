"""Steer a few prompts at a few coefficients, for `traitline steer`.

Shapes: L layers, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from extraction.config.experiments import parse_layers
from extraction.core.errors import StoreError, VectorError
from extraction.core.records import Example, Trait
from extraction.core.text import show_path
from extraction.pipeline.score import preview_scores
from extraction.pipeline.session import TraitContext
from extraction.storage.trait_run import TraitRun

if TYPE_CHECKING:
    from extraction.evaluation.steered_generation import Condition, LayerDirections, SteeredAnswer


@dataclass(frozen=True)
class SteerOptions:
    """Options of `traitline steer`. `method` and `layer` None: those of the steering sweep, else those of the card.

    `vector` is a file to use instead of the run's own vectors, in any format that can be imported.
    """

    prompts: tuple[str, ...]
    coefficients: tuple[float, ...]
    method: str | None = None
    layer: str | None = None
    system: str | None = None
    ablate: bool = False
    positions: str = "all"
    vector: str | None = None


@dataclass(frozen=True)
class SteerSite:
    """The method and the layers to steer at; `coherent`: the range of coefficients that the sweep found coherent."""

    method: str
    layers: tuple[int, ...]
    coherent: tuple[float, float] | None = None


@dataclass(frozen=True)
class SteerSample:
    """One answer. `how`: the coefficient, `0` (unsteered) or `ablated`; `perplexity`: under the unsteered model."""

    prompt: str
    how: str
    text: str
    score: float | None
    perplexity: float | None


def steer_site(run: TraitRun, options: SteerOptions, n_layers: int) -> SteerSite:
    """Return where to steer. Raises StoreError where none was chosen yet, ConfigError for a layer out of range."""
    sweep = run.read_steering() if run.has_steering() else None
    card = run.read_card() if run.has_card() else None
    stored = sweep or (card and {**card["chosen"], "layers": [card["chosen"]["layer"]]})
    if stored is None and (options.layer is None or (options.method or options.vector) is None):
        raise StoreError(
            f"{show_path(run.path)}: no layer was chosen yet; run `traitline validate` first, or give --method and"
            " --layer"
        )
    chosen: dict[str, Any] = stored or {}
    method = options.vector or options.method or str(chosen["method"])
    layers = tuple(chosen["layers"]) if options.layer is None else parse_layers(options.layer, n_layers)
    swept = sweep is not None and (sweep["method"], tuple(sweep["layers"])) == (method, layers)
    return SteerSite(method, layers, _coherent(sweep["largest_coherent"]) if sweep and swept else None)


def _coherent(largest: Mapping[str, float | None]) -> tuple[float, float]:
    return largest["negative"] or 0.0, largest["positive"] or 0.0


def directions_at(run: TraitRun, site: SteerSite, seed: int, *, vector: str | None = None) -> LayerDirections:
    """Return unit directions of the run's vectors or of a file, with the typical norms of the run's activations."""
    from extraction.evaluation.steered_generation import layer_directions
    from extraction.exchange.formats import load_direction
    from extraction.vectors.chunked import typical_norms
    from extraction.vectors.direction import Direction

    direction = load_direction(vector) if vector else Direction.from_run(run, site.method)
    captured = run.shard_receipt("activations", 0)["meta"]["layers"]
    direction = direction.select([layer for layer in direction.layers if layer in captured])
    absent = [layer for layer in site.layers if layer not in direction.layers]
    if absent:
        raise VectorError(
            f"{show_path(run.path)}: the {site.method} vector has layers {list(direction.layers)}, not {absent[0]}; "
            "give --layer, or choose again with `traitline validate`"
        )
    header = run.vectors_header(site.method) or {}
    name = header.get("activations") or next(iter(run.shard_receipt("activations", 0)["tensors"]))
    stored = run.open_activations(name)
    norms_L = typical_norms(stored.pick(stored.ids, [captured.index(layer) for layer in direction.layers]))
    return layer_directions(direction.direction_LD, norms_L.tolist(), direction.layers, seed=seed)


def steer_preview(context: TraitContext, site: SteerSite, options: SteerOptions) -> list[SteerSample]:
    """Answer every prompt under every coefficient, and unsteered, in one batch."""
    from extraction.engine.sampler import Sample
    from extraction.evaluation.steered_generation import UNSTEERED, Condition, SteeredGeneration, answer_all

    session, trait, settings = context.session, context.trait, context.plan.experiment
    directions = directions_at(context.run, site, settings.seed, vector=options.vector)
    directions = replace(directions, positions=options.positions)
    conditions = [UNSTEERED, *(Condition("trait", "add", site.layers, size) for size in options.coefficients if size)]
    if options.ablate:
        conditions.append(Condition("trait", "ablate", tuple(directions.trait)))
    generation = SteeredGeneration(
        session.lm,
        Sample.of(settings.generation),
        partial(preview_scores, context),
        settings.generation.max_new_tokens,
        batch_size=len(options.prompts) * len(conditions),
        seed=settings.seed,
    )
    examples = [_example(trait, i, text, options.system) for i, text in enumerate(options.prompts)]
    answers = answer_all(generation, session.prompts(examples), directions, conditions, 1)
    return _in_order(options.prompts, answers)


def _example(trait: Trait, index: int, text: str, system: str | None) -> Example:
    return Example(f"steer-{index}", trait.name, "pos", 0, index, 0, text, system)


def _in_order(prompts: Sequence[str], answers: Mapping[Condition, list[SteeredAnswer]]) -> list[SteerSample]:
    """Return samples by prompt, then from the most negative coefficient up, ablation last."""
    ordered = sorted(answers.items(), key=lambda item: (item[0].kind == "ablate", item[0].coefficient))
    return [
        SteerSample(prompt, _how(condition), rows[i].text, rows[i].score, _perplexity(rows[i]))
        for i, prompt in enumerate(prompts)
        for condition, rows in ordered
    ]


def _how(condition: Condition) -> str:
    if condition.kind == "ablate":
        return "ablated"
    return f"{condition.coefficient:+g}" if condition.coefficient else "0"


def _perplexity(answer: SteeredAnswer) -> float | None:
    return None if answer.surprise is None else math.exp(answer.surprise)

"""A look at steering: a few prompts, a few coefficients, side by side.

Shapes: L layers, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from extraction.config.experiments import parse_layers
from extraction.core.errors import StoreError
from extraction.core.records import Example, Trait
from extraction.core.text import show_path
from extraction.judging.base import Judgement
from extraction.judging.registry import rule_judge
from extraction.pipeline.session import ModelSession
from extraction.storage.trait_run import TraitRun

if TYPE_CHECKING:
    from extraction.evaluation.steered_generation import Condition, LayerDirections, SteeredAnswer


@dataclass(frozen=True)
class SteerOptions:
    """What to try. `method` and `layer` None: as the steering sweep chose, else as the card did.

    `vector` is a file to take in the place of the run's own vectors, in any format that can be imported.
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
    """The method and the layers that a look steers at; `coherent`: the range that the steering sweep found there."""

    method: str
    layers: tuple[int, ...]
    coherent: tuple[float, float] | None = None


@dataclass(frozen=True)
class SteerSample:
    """One answer; `how`: the coefficient, `0` (unsteered) or `ablated`. `perplexity` is under the unsteered model."""

    prompt: str
    how: str
    text: str
    score: float | None
    perplexity: float | None


def steer_site(folder: TraitRun, look: SteerOptions, n_layers: int) -> SteerSite:
    """Where to steer. Raises StoreError where nothing was chosen yet, ConfigError for a layer that the model lacks."""
    sweep = folder.read_steering() if folder.has_steering() else None
    card = folder.read_card() if folder.has_card() else None
    found = sweep or (card and {**card["chosen"], "layers": [card["chosen"]["layer"]]})
    if found is None and (look.layer is None or (look.method or look.vector) is None):
        raise StoreError(
            f"{show_path(folder.path)}: no layer was chosen yet; run `traitline validate` first, or give --method and"
            " --layer"
        )
    chosen: dict[str, Any] = found or {}
    method = look.vector or look.method or str(chosen["method"])
    layers = tuple(chosen["layers"]) if look.layer is None else parse_layers(look.layer, n_layers)
    swept = sweep is not None and (sweep["method"], tuple(sweep["layers"])) == (method, layers)
    return SteerSite(method, layers, _coherent(sweep["largest_coherent"]) if sweep and swept else None)


def _coherent(largest: Mapping[str, float | None]) -> tuple[float, float]:
    return largest["negative"] or 0.0, largest["positive"] or 0.0


def directions_at(folder: TraitRun, place: SteerSite, seed: int, *, vector: str | None = None) -> LayerDirections:
    """A vector's unit directions (the run's, or those of a file), and the typical norms of the run's activations."""
    from extraction.evaluation.steered_generation import directions_of
    from extraction.exchange.formats import load_direction
    from extraction.vectors.chunked import typical_norms
    from extraction.vectors.direction import Direction

    direction = load_direction(vector) if vector else Direction.from_run(folder, place.method)
    captured = folder.shard_receipt("activations", 0)["meta"]["layers"]
    direction = direction.select([layer for layer in direction.layers if layer in captured])
    direction.select(place.layers)  # refuses one that it lacks
    header = folder.vectors_header(place.method) or {}
    name = header.get("activations") or next(iter(folder.shard_receipt("activations", 0)["tensors"]))
    stored = folder.open_activations(name)
    norms_L = typical_norms(stored.pick(stored.ids, [captured.index(layer) for layer in direction.layers]))
    return directions_of(direction.direction_LD, norms_L.tolist(), direction.layers, seed=seed)


def steer_preview(engine: ModelSession, trait: Trait, place: SteerSite, look: SteerOptions) -> list[SteerSample]:
    """Answers to every prompt under every coefficient, and unsteered, in one batch."""
    from extraction.engine.sampler import Sample
    from extraction.evaluation.steered_generation import UNSTEERED, Condition, SteeredGeneration, answer_all

    job = engine.job
    settings = job.experiment
    directions = directions_at(job.folder(trait), place, settings.seed, vector=look.vector)
    directions = replace(directions, positions=look.positions)
    conditions = [UNSTEERED, *(Condition("trait", "add", place.layers, size) for size in look.coefficients if size)]
    if look.ablate:
        conditions.append(Condition("trait", "ablate", tuple(directions.trait)))
    judge = rule_judge("auto", trait)
    trying = SteeredGeneration(
        engine.lm,
        Sample(settings.generation.temperature, settings.generation.top_k, settings.generation.top_p),
        lambda pairs: [Judgement(judge.score(question, answer, trait)) for question, answer in pairs],
        settings.generation.max_new_tokens,
        batch_size=len(look.prompts) * len(conditions),
        seed=settings.seed,
    )
    prompts = engine.prompts([_example(trait, i, text, look.system) for i, text in enumerate(look.prompts)])
    answers = answer_all(trying, prompts, directions, conditions, 1)
    return _in_order(look.prompts, answers)


def _example(trait: Trait, index: int, text: str, system: str | None) -> Example:
    return Example(f"look-{index}", trait.name, "pos", 0, index, 0, text, system)


def _in_order(prompts: Sequence[str], answers: Mapping[Condition, list[SteeredAnswer]]) -> list[SteerSample]:
    """By prompt, then from the most negative coefficient up, ablation last."""
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

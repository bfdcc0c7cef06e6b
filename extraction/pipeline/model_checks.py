"""Checks that need the model: activations without the instruction, attention sinks, and the steering sweep.

Shapes: L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from extraction.config.traits import make_examples
from extraction.core.records import Example, Prompt
from extraction.pipeline.lazy_model import load_model, retry_with_smaller_batch
from extraction.pipeline.plan import MODES
from extraction.pipeline.session import TraitContext
from extraction.pipeline.shards import capture_shard
from extraction.storage.trait_run import TraitRun

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.evaluation.steered_generation import SteeredGeneration
    from extraction.evaluation.steering_sweep import SweepPlan
    from extraction.judging.base import Scorer

TOKEN_0_TEXTS = 8
SWEEP_FORM = 4  # rises when the sweep of the same vectors would be another


def capture_without_instruction(context: TraitContext, tensor: str) -> None:
    """Read the stored responses again, to prompts without the instruction, and write their activations shard by shard.

    Shards that are done are skipped; a natural trait without system texts has nothing to remove. `tensor` is the name
    of the activations to capture, `site.pooling`.
    """
    session, trait, run, progress = context.session, context.trait, context.run, context.progress
    shards = context.plan.shards(trait)
    pending = {i: shard for i, shard in enumerate(shards) if not _has(run, i, tensor)}
    if not trait.is_told or not pending:
        return
    load_model(session, progress)
    site, pooling = tensor.split(".", 1)
    settings = context.plan.experiment
    layers = ",".join(map(str, run.shard_receipt("activations", 0)["meta"]["layers"]))
    capture = settings.capture.model_copy(update={"layers": layers, "sites": (site,), "poolings": (pooling,)})
    reader = session.for_plan(replace(context.plan, experiment=settings.with_(capture=capture)))
    n_examples, n_pending = (sum(map(len, some)) for some in (shards, pending.values()))
    progress.begin(f"{trait.name}: instruction removed", n_examples, n_examples - n_pending)
    try:
        for i, shard in pending.items():
            prompts = session.prompts([without_instruction(example) for example in shard])
            capture_shard(reader, run, i, progress, without_instruction=prompts)
    finally:
        progress.end()


def has_without_instruction(context: TraitContext, tensor: str) -> bool:
    """Return True if every shard has activations without the instruction."""
    count = len(context.plan.shards(context.trait))
    return context.trait.is_told and all(_has(context.run, i, tensor) for i in range(count))


def _has(run: TraitRun, index: int, tensor: str) -> bool:
    return run.shard_done("stripped", index) and tensor in run.shard_receipt("stripped", index)["tensors"]


def without_instruction(example: Example) -> Example:
    """Return the example with its question alone."""
    return replace(example, system=None)


def first_token_ratio(context: TraitContext, layers: Sequence[int]) -> list[float]:
    """Return each layer's norm at the first token over the median norm of the other tokens, averaged over texts: [L].

    A ratio far above 1 is an attention sink (Xiao et al. 2023, arXiv 2309.17453; Sun et al. 2024, arXiv 2402.17762),
    which would dominate any mean that includes it.
    """
    import torch

    from extraction.model.hooks import watch

    lm = context.session.lm
    rows = [row for row in context.run.read_responses_shard(0) if row["token_ids"]][:TOKEN_0_TEXTS]
    modules = {layer: lm.layers[layer] for layer in layers}
    ratios: dict[int, list[float]] = {layer: [] for layer in layers}

    def note(layer: int, hidden: Tensor) -> None:
        norm_T = hidden.reshape(-1, hidden.shape[-1]).float().norm(dim=-1)
        ratios[layer].append(float(norm_T[0] / norm_T[1:].median()))

    with torch.inference_mode(), watch(modules, note):
        for row in rows:
            ids = [*row["prompt_token_ids"], *row["token_ids"]]
            lm.hidden_states(torch.tensor([ids], device=lm.device))
    return [sum(values) / len(values) for values in ratios.values() if values]


@dataclass(frozen=True)
class SteeringInputs:
    """The inputs of a trait's steering sweep.

    `directions` [L, D] of the candidate methods, fitted without the questions of `report_on`; `norms_L`, the typical
    norm of each layer; questions to choose a layer on and questions to report on; answers for each coefficient.
    """

    directions: Mapping[str, Tensor]
    norms_L: Sequence[float]
    layers: tuple[int, ...]
    choose_on: Sequence[str]
    report_on: Sequence[str]
    answers: int


def prompts_without_instruction(context: TraitContext, questions: Sequence[str]) -> list[Prompt]:
    """Return a prompt for each question, without an instruction or a natural prompt's system text."""
    first: dict[str, Example] = {}
    for example in make_examples(context.trait, context.plan.experiment.n_examples):
        first.setdefault(example.question, without_instruction(example))
    return context.session.prompts([first[question] for question in questions])


def run_steering_sweep(context: TraitContext, inputs: SteeringInputs, scorer: Scorer) -> dict[str, Any]:
    """Run the steering sweep of one trait, without instructions, sampling as for the run's responses."""
    from extraction.evaluation.steering_sweep import run_sweep

    sweep, progress = _sweep_plan(context, inputs), context.progress
    generation = _steered_generation(context, sweep, scorer)
    result: dict[str, Any] = {}

    def run(batch_size: int) -> None:
        progress.begin(f"{context.trait.name}: steering", sweep.n_answers, 0)
        try:
            result.update(run_sweep(replace(generation, batch_size=batch_size), sweep))
        finally:
            progress.end()

    retry_with_smaller_batch(run, generation.batch_size, context.session, progress, lambda: None)
    return result


def _sweep_plan(context: TraitContext, inputs: SteeringInputs) -> SweepPlan:
    from extraction.evaluation.steered_generation import layer_directions
    from extraction.evaluation.steering_sweep import SweepPlan

    seed = context.plan.experiment.seed
    candidates = {
        method: layer_directions(direction_LD, inputs.norms_L, inputs.layers, seed=seed)
        for method, direction_LD in inputs.directions.items()
    }
    choose_on, report_on = (
        prompts_without_instruction(context, questions) for questions in (inputs.choose_on, inputs.report_on)
    )
    return SweepPlan(choose_on, report_on, candidates, inputs.layers, inputs.answers)


def _steered_generation(context: TraitContext, sweep: SweepPlan, scorer: Scorer) -> SteeredGeneration:
    from extraction.engine.sampler import Sample
    from extraction.evaluation.steered_generation import SteeredGeneration

    session, settings = context.session, context.plan.experiment
    lengths = [len(prompt.token_ids) for prompt in (*sweep.choose_on, *sweep.report_on)]
    return SteeredGeneration(
        session.lm,
        Sample.of(settings.generation),
        scorer,
        settings.generation.max_new_tokens,
        session.batch_size(MODES["batched"], lengths),
        settings.seed,
        settings.threshold,
        on_progress=context.progress.advance,
    )

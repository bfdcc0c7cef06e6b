"""What only the model itself can say about a trait's vectors: do they separate without the instruction, do they steer?

Shapes: L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from extraction.config.traits import make_examples
from extraction.core.progress import ProgressReporter
from extraction.core.records import Example, Prompt, Trait
from extraction.engine.lazy_model import load_model, retry_with_smaller_batch
from extraction.pipeline.plan import RunPlan
from extraction.pipeline.session import ModelSession, capture_shard
from extraction.storage.trait_run import TraitRun

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.evaluation.steered_generation import SteeredGeneration
    from extraction.evaluation.steering_sweep import SweepPlan
    from extraction.judging.base import Scorer

TOKEN_0_TEXTS = 8
SWEEP_FORM = 4  # rises when the sweep of the same vectors would be another


def capture_without_instruction(
    engine: ModelSession, trait: Trait, folder: TraitRun, tensor: str, listener: ProgressReporter
) -> None:
    """Activations of the stored responses with the instruction taken out of their prompts, shard by shard.

    What is done is not done again; natural prompts without a system text have nothing to take out.
    """
    shards = engine.job.shards(trait)
    pending = {i: shard for i, shard in enumerate(shards) if not _has(folder, i, tensor)}
    if not trait.is_told or not pending:
        return
    load_model(engine, listener)
    site, pooling = tensor.split(".", 1)
    settings = engine.job.experiment
    layers = ",".join(map(str, folder.shard_receipt("activations", 0)["meta"]["layers"]))
    capture = replace(settings.capture, layers=layers, sites=(site,), poolings=(pooling,))
    reader = engine.turned_to(replace(engine.job, experiment=replace(settings, capture=capture)))
    n_examples, n_pending = (sum(map(len, some)) for some in (shards, pending.values()))
    listener.begin(f"{trait.name}: instruction removed", n_examples, n_examples - n_pending)
    try:
        for i, shard in pending.items():
            prompts = engine.prompts([without_instruction(example) for example in shard])
            capture_shard(reader, folder, i, listener, stripped=prompts)
    finally:
        listener.end()


def has_without_instruction(job: RunPlan, trait: Trait, folder: TraitRun, tensor: str) -> bool:
    """Whether every shard has been read without its instruction."""
    return trait.is_told and all(_has(folder, i, tensor) for i in range(len(job.shards(trait))))


def _has(folder: TraitRun, index: int, tensor: str) -> bool:
    return folder.shard_done("stripped", index) and tensor in folder.shard_receipt("stripped", index)["tensors"]


def without_instruction(example: Example) -> Example:
    """The same example with nothing but its question."""
    return replace(example, system=None)


def first_token_ratio(engine: ModelSession, folder: TraitRun, layers: Sequence[int]) -> list[float]:
    """The norm at the first token over the median norm of the others, by layer, mean over a few texts: [L].

    Far above 1 it is an attention sink (Xiao et al. 2023, arXiv 2309.17453; Sun et al. 2024, arXiv 2402.17762), which
    would swamp any mean that counts it.
    """
    import torch

    from extraction.model.hooks import watch

    rows = [row for row in folder.read_responses_shard(0) if row["token_ids"]][:TOKEN_0_TEXTS]
    modules = {layer: engine.lm.layers[layer] for layer in layers}
    ratios: dict[int, list[float]] = {layer: [] for layer in layers}

    def note(layer: int, hidden: Tensor) -> None:
        norm_T = hidden.reshape(-1, hidden.shape[-1]).float().norm(dim=-1)
        ratios[layer].append(float(norm_T[0] / norm_T[1:].median()))

    with torch.inference_mode(), watch(modules, note):
        for row in rows:
            ids = [*row["prompt_token_ids"], *row["token_ids"]]
            engine.lm.hidden_states(torch.tensor([ids], device=engine.lm.device))
    return [sum(found) / len(found) for found in ratios.values() if found]


@dataclass(frozen=True)
class SteeringInputs:
    """What a steering sweep works with.

    Directions [L, D] of the methods that may be chosen, fitted on no row about a question of `report_on`; each layer's
    typical norm [L]; questions to choose a layer by, and questions to report on.
    """

    directions: Mapping[str, Tensor]
    norms_L: Sequence[float]
    layers: tuple[int, ...]
    choose_on: Sequence[str]
    report_on: Sequence[str]
    answers: int


def prompts_without_instruction(engine: ModelSession, trait: Trait, questions: Sequence[str]) -> list[Prompt]:
    """A prompt for each of these questions, without an instruction, or a natural prompt's system text."""
    first: dict[str, Example] = {}
    for example in make_examples(trait, engine.job.experiment.n_examples):
        first.setdefault(example.question, without_instruction(example))
    return engine.prompts([first[question] for question in questions])


def run_steering_sweep(
    engine: ModelSession, trait: Trait, material: SteeringInputs, scorer: Scorer, listener: ProgressReporter
) -> dict[str, Any]:
    """The steering sweep of one trait, without instructions; sampled as the run's responses were."""
    from extraction.evaluation.steering_sweep import evaluate

    plan = _plan(engine, trait, material)
    trying = _trying(engine, plan, scorer, listener)
    found: dict[str, Any] = {}

    def run(batch_size: int) -> None:
        listener.begin(f"{trait.name}: steering", plan.n_answers, 0)
        try:
            found.update(evaluate(replace(trying, batch_size=batch_size), plan))
        finally:
            listener.end()

    retry_with_smaller_batch(run, trying.batch_size, engine, listener, lambda: None)
    return found


def _plan(engine: ModelSession, trait: Trait, material: SteeringInputs) -> SweepPlan:
    from extraction.evaluation.steered_generation import directions_of
    from extraction.evaluation.steering_sweep import SweepPlan

    seed = engine.job.experiment.seed
    candidates = {
        method: directions_of(direction_LD, material.norms_L, material.layers, seed=seed)
        for method, direction_LD in material.directions.items()
    }
    choose_on, report_on = (
        prompts_without_instruction(engine, trait, asked) for asked in (material.choose_on, material.report_on)
    )
    return SweepPlan(choose_on, report_on, candidates, material.layers, material.answers)


def _trying(engine: ModelSession, plan: SweepPlan, scorer: Scorer, listener: ProgressReporter) -> SteeredGeneration:
    from extraction.engine.sampler import Sample
    from extraction.evaluation.steered_generation import SteeredGeneration
    from extraction.pipeline.plan import MODES

    settings = engine.job.experiment
    lengths = [len(prompt.token_ids) for prompt in (*plan.choose_on, *plan.report_on)]
    return SteeredGeneration(
        engine.lm,
        Sample(settings.generation.temperature, settings.generation.top_k, settings.generation.top_p),
        scorer,
        settings.generation.max_new_tokens,
        engine.batch_size(MODES["batched"], lengths),
        settings.seed,
        settings.threshold,
        on_progress=listener.advance,
    )

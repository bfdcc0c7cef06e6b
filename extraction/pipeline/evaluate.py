"""Stage 4: what a run's vectors are worth: the card, the steering sweep, and the verdict on both.

Shapes: L layers, D hidden, N positive rows, M negative rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from extraction.core.progress import ProgressReporter
from extraction.core.records import POLARITIES, Trait
from extraction.engine.lazy_model import load_model
from extraction.pipeline.fit import FitInputs, VectorOptions, fit_inputs
from extraction.pipeline.model_checks import (
    SWEEP_FORM,
    SteeringInputs,
    capture_without_instruction,
    first_token_ratio,
    has_without_instruction,
    run_steering_sweep,
)
from extraction.pipeline.plan import RunPlan
from extraction.pipeline.score import make_scorer
from extraction.pipeline.session import ModelSession, locked_run


@dataclass(frozen=True)
class EvalOptions:
    """How much stage 4 asks. `quick`: of stored activations alone; else also of the model, `answers` a coefficient."""

    quick: bool = False
    answers: int = 24


def evaluate(
    job: RunPlan, wanted: VectorOptions, checks: EvalOptions, listener: ProgressReporter, engine: ModelSession
) -> tuple[ModelSession, int]:
    """Stage 4: what each method and layer is worth on questions it has not seen. Returns how many files are new.

    `engine` is that of an earlier job, whose loaded model is used again where the two jobs have the same.
    """
    engine = engine.turned_to(job)
    return engine, sum(evaluate_trait(engine, trait, wanted, checks, listener) for trait in job.traits)


def evaluate_trait(
    engine: ModelSession, trait: Trait, wanted: VectorOptions, checks: EvalOptions, listener: ProgressReporter
) -> int:
    """One trait's card, steering sweep and verdict; returns how many files are new."""
    folder = engine.job.folder(trait)
    with locked_run(folder, engine.job, trait):
        plan = fit_inputs(engine.job, trait, folder, wanted, listener)
        if not checks.quick:
            capture_without_instruction(engine, trait, folder, plan.tensor, listener)
        n_new = _write_card(engine, trait, plan, checks, listener)
        n_new += 0 if checks.quick else _write_steering(engine, trait, plan, checks, listener)
        return max(n_new, _settle_verdict(plan))


def _write_card(
    engine: ModelSession, trait: Trait, plan: FitInputs, checks: EvalOptions, listener: ProgressReporter
) -> int:
    from extraction.vectors.card import CARD_FORM, build_card

    folder = plan.folder
    stripped = has_without_instruction(engine.job, trait, folder, plan.tensor)
    old = folder.read_card() if folder.has_card() else {}
    ratio_L = _token_0(engine, plan, old, checks, listener)
    made_of = {
        **plan.header("card"),
        "methods": list(plan.methods),
        "form": CARD_FORM,
        "stripped": folder.shard_checksums("stripped") if stripped else None,
        "token_0": ratio_L is not None,
    }
    if old.get("made_of") == made_of:
        return 0
    ids = [example_id for polarity in POLARITIES for example_id in plan.kept.ids[polarity]]
    instruction_of = {
        row["id"]: row["instruction_id"] for polarity in POLARITIES for row in folder.read_responses(polarity)
    }
    card = build_card(
        plan.rows,
        [True] * len(plan.kept.ids["pos"]) + [False] * len(plan.kept.ids["neg"]),
        [plan.kept.questions[example_id] for example_id in ids],
        instruction_ids=[instruction_of[example_id] for example_id in ids],
        layers=plan.layers,
        seed=plan.seed,
        methods=plan.methods,
        example_ids=ids,
        without_instruction_nLD=plan.stripped if stripped else None,
        token_0_ratio_L=ratio_L,
        judge_facts=plan.kept.facts(),
    )
    folder.write_card({**card, "made_of": made_of})
    return 1


def _token_0(
    engine: ModelSession, plan: FitInputs, old: Mapping[str, Any], checks: EvalOptions, listener: ProgressReporter
) -> list[float] | None:
    """The first token's norm over the others', by layer; from the card where it was measured for these layers."""
    measured = old.get("token_0")
    if measured is not None and old["layers"] == list(plan.layers):
        return list(measured["ratio"])
    if checks.quick:
        return None
    load_model(engine, listener)
    return first_token_ratio(engine, plan.folder, plan.layers)


def _write_steering(
    engine: ModelSession, trait: Trait, plan: FitInputs, checks: EvalOptions, listener: ProgressReporter
) -> int:
    """vectors/steering.json, by directions that are fitted without the questions that are reported on."""
    folder, judge = plan.folder, plan.kept.judge
    if judge == "none":
        listener.note(f"{trait.name}: no steering sweep: without a judge there is no telling what it does")
        return 0
    chosen = folder.read_card()["chosen"]["method"]
    made_of = {**plan.header("steering"), "form": SWEEP_FORM, "chosen": chosen, "answers": checks.answers}
    if folder.has_steering() and folder.read_steering().get("made_of") == made_of:
        return 0
    load_model(engine, listener)
    material = _material(plan, ("mean_diff", chosen), checks.answers)
    found = run_steering_sweep(
        engine, trait, material, make_scorer(engine.job, trait, listener, folder=folder), listener
    )
    folder.write_steering({**found, "judge": judge, "made_of": made_of})
    return 1


def _settle_verdict(plan: FitInputs) -> int:
    """The card's verdict, with what steering did where that is of these vectors. 1 where the card had another."""
    from extraction.vectors.verdict import verdict

    folder = plan.folder
    card = folder.read_card()
    steering = folder.read_steering() if folder.has_steering() else None
    if steering is not None and steering["made_of"]["sources"] != plan.sources:
        steering = None
    settled = verdict(card, steering)
    if settled == card["verdict"]:
        return 0
    folder.write_card({**card, "verdict": settled})
    return 1


def _material(plan: FitInputs, methods: Sequence[str], answers: int) -> SteeringInputs:
    """Directions of the rows about the questions that steering is not reported on."""
    import torch

    from extraction.vectors.chunked import typical_norms
    from extraction.vectors.methods import fit_layers
    from extraction.vectors.splits import PARTS, deal_questions

    ids = [(side, example_id) for side in POLARITIES for example_id in plan.kept.ids[side]]
    questions = [plan.kept.questions[example_id] for _, example_id in ids]
    labels_n = torch.tensor([side == "pos" for side, _ in ids])
    fit, validation, test = deal_questions(questions, labels_n, tuple(PARTS.values()), seed=plan.seed)
    choose_on, report_on = sorted(fit | validation), sorted(test)  # the card's own parts
    chosen = [each for each, question in zip(ids, questions, strict=True) if question in choose_on]
    rows, n_positive = (
        plan.pick([example_id for _, example_id in chosen], plan.stored),
        [side for side, _ in chosen].count("pos"),
    )
    found = fit_layers(tuple(dict.fromkeys(methods)), rows, n_positive, seed=plan.seed)
    return SteeringInputs(found, typical_norms(rows).tolist(), plan.layers, choose_on, report_on, answers)

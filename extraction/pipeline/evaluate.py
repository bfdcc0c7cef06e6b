"""Stage 4: measure a trait's vectors: the card, the steering sweep, and the verdict on both.

Shapes: L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from extraction.core.records import POLARITIES, Trait
from extraction.judging.registry import resolve_judge
from extraction.pipeline.fit import FitInputs
from extraction.pipeline.lazy_model import load_model
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
from extraction.pipeline.session import TraitResult
from extraction.vectors.method_table import CARD_FORM

Document = Mapping[str, Any]


@dataclass(frozen=True)
class EvalOptions:
    """Options of stage 4. `quick`: from stored activations, without the model; `answers`: for each coefficient."""

    quick: bool = False
    answers: int = 24


def n_steered_answers(plan: RunPlan, answers: int, traits: Iterable[Trait]) -> int:
    """Return about how many steered responses stage 4 makes of some traits: none where there is no judge.

    `answers`: of each coefficient.
    """
    from extraction.evaluation.steering_sweep import typical_n_answers

    judged = [trait for trait in traits if resolve_judge(plan.experiment.judge, trait) != "none"]
    return typical_n_answers(len(plan.layers), answers) * len(judged) if judged else 0


def note_of_steering(plan: RunPlan, options: EvalOptions) -> str | None:
    """Return a line on the steered responses that are still to be made; None if there are none."""
    pending = [trait for trait in plan.traits if not plan.folder(trait).has_steering()]
    if options.quick or not plan.is_whole or not pending:
        return None
    count = n_steered_answers(plan, options.answers, pending)
    return f"stage 4: about {count:,} steered responses at the end; --quick leaves them out" if count else None


def evaluate_trait(inputs: FitInputs, result: TraitResult, options: EvalOptions) -> TraitResult:
    """Write a trait's card, steering sweep and verdict; return the result with them. The run must be locked.

    Files that were made from the same activations, responses and options are left as they are.
    """
    run = inputs.context.run
    if not options.quick:
        capture_without_instruction(inputs.context, inputs.tensor)
    old_card = run.read_card() if run.has_card() else None
    card = _make_card(inputs, old_card, options)
    old_sweep = run.read_steering() if run.has_steering() else None
    sweep = old_sweep if options.quick else _make_sweep(inputs, card, old_sweep, options)
    steering = sweep if sweep is not None and sweep["made_of"]["sources"] == inputs.sources else None
    settled = _with_verdict(inputs, card, steering)
    n_new = (card is not old_card) + (sweep is not old_sweep)
    n_new = max(n_new, int(settled is not card))
    return replace(result, card=settled, steering=steering, n_new=result.n_new + n_new)


def _make_card(inputs: FitInputs, old: Document | None, options: EvalOptions) -> Document:
    """Return the stored card if it is current, else make and write another."""
    run, kept = inputs.context.run, inputs.kept
    has_bare_rows = has_without_instruction(inputs.context, inputs.tensor)
    ratio_L = _first_token_ratio(inputs, old, options)
    made_of = {
        **inputs.header("card"),
        "methods": list(inputs.methods),
        "form": CARD_FORM,
        "stripped": run.shard_checksums("stripped") if has_bare_rows else None,
        "token_0": ratio_L is not None,
    }
    if old is not None and old.get("made_of") == made_of:
        return old
    from extraction.vectors.card import build_card

    instruction_of = {
        row["id"]: row["instruction_id"] for polarity in POLARITIES for row in run.read_responses(polarity)
    }
    card = build_card(
        inputs.rows,
        [True] * len(kept.ids["pos"]) + [False] * len(kept.ids["neg"]),
        [kept.questions[example_id] for example_id in inputs.ids],
        instruction_ids=[instruction_of[example_id] for example_id in inputs.ids],
        layers=inputs.layers,
        seed=inputs.seed,
        methods=inputs.methods,
        example_ids=inputs.ids,
        without_instruction_nLD=inputs.rows_without_instruction if has_bare_rows else None,
        token_0_ratio_L=ratio_L,
        judge_facts=kept.facts(),
    )
    return _write_card(inputs, {**card, "made_of": made_of})


def _write_card(inputs: FitInputs, card: Document) -> Document:
    """Write a card; return it as it is stored: lists for tuples, keys sorted."""
    run = inputs.context.run
    run.write_card(card)
    return run.read_card()


def _first_token_ratio(inputs: FitInputs, old: Document | None, options: EvalOptions) -> list[float] | None:
    """Return the first token's norm over the others', by layer; from the old card if it has these layers."""
    measured = old.get("token_0") if old is not None else None
    if old is not None and measured is not None and old["layers"] == list(inputs.layers):
        return list(measured["ratio"])
    if options.quick:
        return None
    load_model(inputs.context.session, inputs.context.progress)
    return first_token_ratio(inputs.context, inputs.layers)


def _make_sweep(inputs: FitInputs, card: Document, old: Document | None, options: EvalOptions) -> Document | None:
    """Return the stored steering sweep if it is current, else run and write another; None without a judge.

    Its directions are fitted without the held-out questions that it reports on.
    """
    context, judge = inputs.context, inputs.kept.judge
    if judge == "none":
        context.progress.note(f"{context.trait.name}: no steering sweep: without a judge its answers have no score")
        return old
    chosen = card["chosen"]["method"]
    made_of = {**inputs.header("steering"), "form": SWEEP_FORM, "chosen": chosen, "answers": options.answers}
    if old is not None and old.get("made_of") == made_of:
        return old
    load_model(context.session, context.progress)
    steering_inputs = _fit_for_steering(inputs, ("mean_diff", chosen), options.answers)
    sweep = {**run_steering_sweep(context, steering_inputs, make_scorer(context)), "judge": judge, "made_of": made_of}
    context.run.write_steering(sweep)
    return context.run.read_steering()


def _with_verdict(inputs: FitInputs, card: Document, steering: Document | None) -> Document:
    """Return the card with the verdict on it and on the sweep; write it where that differs from the stored one."""
    from extraction.vectors.verdict import verdict

    settled = verdict(card, steering)
    return card if settled == card["verdict"] else _write_card(inputs, {**card, "verdict": settled})


def _fit_for_steering(inputs: FitInputs, methods: Sequence[str], answers: int) -> SteeringInputs:
    """Fit the methods to the responses that are not about the held-out questions."""
    import torch

    from extraction.vectors.chunked import typical_norms
    from extraction.vectors.methods import fit_layers
    from extraction.vectors.splits import PARTS, deal_questions

    ids = [(side, example_id) for side in POLARITIES for example_id in inputs.kept.ids[side]]
    questions = [inputs.kept.questions[example_id] for _, example_id in ids]
    labels_n = torch.tensor([side == "pos" for side, _ in ids])
    fit, validation, test = deal_questions(questions, labels_n, tuple(PARTS.values()), seed=inputs.seed)
    choose_on, report_on = sorted(fit | validation), sorted(test)  # the parts of the card's own split
    chosen = [labelled for labelled, question in zip(ids, questions, strict=True) if question in choose_on]
    rows = inputs.pick([example_id for _, example_id in chosen], inputs.stored)
    n_positive = [side for side, _ in chosen].count("pos")
    directions = fit_layers(tuple(dict.fromkeys(methods)), rows, n_positive, seed=inputs.seed)
    return SteeringInputs(directions, typical_norms(rows).tolist(), inputs.layers, choose_on, report_on, answers)

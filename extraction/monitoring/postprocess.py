"""What is made of a set's files when they are all there: dynamics, the page, pictures, plain JSON, the index.

Shapes: T tokens (P prompt tokens, then R response tokens), L layers, K traits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from extraction.core.errors import MissingPackage
from extraction.core.progress import ProgressReporter
from extraction.core.records import POINTS, STREAM
from extraction.monitoring.colour_scale import colour_scales
from extraction.monitoring.dynamics import dynamics
from extraction.monitoring.page_data import CaptureSetData, TextReading, TraitData
from extraction.monitoring.plan import MonitoringPlan, SetPlan, shown_layer
from extraction.monitoring.reference_levels import levels_of
from extraction.monitoring.run import MonitoringSession, going_on
from extraction.storage.experiment_dir import capture_sets, write_sets_index
from extraction.storage.token_captures import CaptureSet, prompt_id

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.monitoring.index import SetRow

NORM = TraitData("norm", "no trait was read: the length of the residual stream", "length", 0, None)
LARGEST_JSON = 5_000_000  # numbers of one prompt: about 100 MB as text


@dataclass(frozen=True)
class PostprocessResult:
    """One set, whole. `moved` is its dynamics.json."""

    set: SetPlan
    moved: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def postprocess(taking: MonitoringSession, listener: ProgressReporter) -> list[PostprocessResult]:
    """Finish every set that is whole. What is there already, of the same files, is left as it is."""
    finished: list[PostprocessResult] = []
    for each in taking.plan.sets:
        with going_on(taking, each.stem, listener):
            ids = [prompt_id(i) for i in range(len(each.found.prompts))]
            if all(each.folder.prompt_done(id) for id in ids):
                with each.folder.lock():
                    finished.append(_finish_set(taking, each, ids, listener))
    if taking.fresh:
        _index(taking.plan)
    return finished


def _finish_set(
    taking: MonitoringSession, each: SetPlan, ids: Sequence[str], listener: ProgressReporter
) -> PostprocessResult:
    plan, folder = taking.plan, each.folder
    is_fresh = each.stem in taking.fresh
    notes = _write_json(folder, ids, again=is_fresh) if plan.extras.json else []
    last = plan.vectors[-1].trait if plan.vectors else NORM.name
    lacks_pictures = plan.extras.png and not folder.report_path(_overview(last)).exists()
    if is_fresh or lacks_pictures or not (folder.has_dynamics() and folder.report_path().exists()):
        facts = facts_of(plan, each, ids)
        folder.write_dynamics(document_of(facts))
        folder.write_report(folder.report_path().name, _page(facts))
        if plan.extras.png:
            _draw(folder, facts, listener)
    return PostprocessResult(each, folder.read_dynamics(), tuple(notes))


# --- what was read --------------------------------------------------------------------------------------------------


def facts_of(plan: MonitoringPlan, each: SetPlan, ids: Sequence[str]) -> CaptureSetData:
    """Everything that is shown of a set."""
    norm = replace(NORM, layer=plan.layers[0])
    traits = tuple(_trait_facts(plan, k) for k in range(len(plan.vectors))) or (norm,)
    found = [_reading(each.folder, id, traits) for id in ids]
    thresholds_LK = thresholds_of(traits, found)
    return CaptureSetData(
        title=each.stem,
        experiment=plan.settings.name,
        name=each.folder.path.name,
        model=plan.spec.name,
        traits=traits,
        layers=plan.layers,
        points=POINTS,
        readings=[_with_dynamics(reading, traits, thresholds_LK) for reading in found],
        settings={key: value for key, value in each.config.items() if key not in ("model", "layers")},
    )


def _trait_facts(plan: MonitoringPlan, k: int) -> TraitData:
    vector = plan.vectors[k]
    return TraitData(
        name=vector.trait,
        description=vector.description,
        method=vector.method,
        layer=shown_layer(vector, plan.layers),
        levels_L2=levels_of(vector, plan.layers, plan.unit_LDK[..., k]),
    )


def _reading(folder: CaptureSet, id: str, traits: Sequence[TraitData]) -> TextReading:
    tensors, header = folder.read_prompt(id)
    return TextReading(
        id=id,
        prompt=header["prompt"],
        response=header["response"],
        pieces=header["pieces"],
        tokens=header["tokens"],
        token_ids=header["token_ids"],
        n_prompt=header["n_prompt"],
        finish_reason=header["finish_reason"],
        projections_TLPK=np.stack([_along(tensors, trait) for trait in traits], axis=-1),
        dynamics={},
    )


def _along(tensors: Mapping[str, Tensor], trait: TraitData) -> np.ndarray:
    """[T, L, 3]: projections; without a trait, the stream's length in tier 3's one layer."""
    if trait.method != NORM.method:
        return np.asarray(tensors[f"projections.{trait.name}"])
    return np.stack([tensors[name].norm(dim=-1).numpy() for name in STREAM], axis=1)[:, None]


def thresholds_of(traits: Sequence[TraitData], readings: Sequence[TextReading]) -> np.ndarray:
    """[L, K]: the middle of the two sides where they are known, else the mean of all response tokens of the set."""
    return np.stack([_threshold(trait, k, readings) for k, trait in enumerate(traits)], axis=1)


def _threshold(trait: TraitData, k: int, readings: Sequence[TextReading]) -> np.ndarray:
    if trait.levels_L2 is not None:
        return np.asarray(trait.levels_L2.mean(axis=1))
    rows_TL = np.concatenate([_response(reading, k) for reading in readings])
    return rows_TL.mean(axis=0) if len(rows_TL) else np.zeros(rows_TL.shape[1])


def _response(reading: TextReading, k: int) -> np.ndarray:
    """[R, L]: the response's tokens at residual_out."""
    return reading.projections_TLPK[reading.n_prompt :, :, -1, k].astype(np.float64)


def _with_dynamics(reading: TextReading, traits: Sequence[TraitData], thresholds_LK: np.ndarray) -> TextReading:
    moved = {trait.name: dynamics(_response(reading, k), thresholds_LK[:, k]) for k, trait in enumerate(traits)}
    return replace(reading, dynamics=moved)


def document_of(facts: CaptureSetData) -> dict[str, Any]:
    """dynamics.json: every trait's levels and threshold by layer, and every prompt's summaries by trait and layer."""
    thresholds_LK = thresholds_of(facts.traits, facts.readings)
    return {
        "layers": list(facts.layers),
        "point": POINTS[-1],
        "traits": [
            {
                "trait": trait.name,
                "method": trait.method,
                "layer": trait.layer,
                "levels": None if trait.levels_L2 is None else trait.levels_L2.tolist(),
                "threshold": thresholds_LK[:, k].tolist(),
            }
            for k, trait in enumerate(facts.traits)
        ],
        "prompts": {reading.id: {"prompt": reading.prompt, "traits": reading.dynamics} for reading in facts.readings},
    }


# --- for people -----------------------------------------------------------------------------------------------------


def _page(facts: CaptureSetData) -> bytes:
    from extraction.monitoring.page import set_page

    return set_page(facts)


def _overview(trait: str) -> str:
    return f"overview-{trait}.png"


def _draw(folder: CaptureSet, facts: CaptureSetData, listener: ProgressReporter) -> None:
    """An overview a trait, and a picture a prompt and trait; a note where matplotlib is absent."""
    try:
        from extraction.monitoring.pictures import overview_picture, reading_picture
        from extraction.report.plot_style import check_matplotlib

        check_matplotlib()
    except MissingPackage as failure:
        listener.note(f"no pictures: {failure}")
        return
    scales = colour_scales(facts)
    for k, trait in enumerate(facts.traits):
        for reading in facts.readings:
            picture = reading_picture(facts, reading, k, trait.layer, scales=scales)
            folder.write_report(f"{reading.id}-{trait.name}.png", picture)
        overview = overview_picture(facts, k, trait.layer, scales=scales)
        folder.write_report(_overview(trait.name), overview)


def _index(plan: MonitoringPlan) -> None:
    """captures/index.html: every set of the experiment."""
    from extraction.monitoring.index import sets_index

    root, experiment = plan.root / "experiments", plan.settings.name
    write_sets_index(root, experiment, sets_index([_row(experiment, each) for each in capture_sets(root, experiment)]))


def _row(experiment: str, folder: CaptureSet) -> SetRow:
    from extraction.monitoring.index import SetRow

    config, page = folder.read_config(), folder.report_path()
    return SetRow(
        experiment=experiment,
        name=folder.path.name,
        tier=config["tier"],
        model=config["model"]["name"],
        traits=[vector["trait"] for vector in config["vectors"]],
        layers=config["layers"],
        done=len(folder.prompt_ids()),
        asked=config["prompts"]["count"],
        link=f"{folder.path.name}/reports/{page.name}" if page.exists() else None,
    )


def _write_json(folder: CaptureSet, ids: Sequence[str], *, again: bool) -> list[str]:
    """The same as plain JSON, a file a prompt; a note where that would be too large to be of use."""
    skipped = 0
    for id in ids if again else [id for id in ids if not folder.json_path(id).exists()]:
        tensors, header = folder.read_prompt(id)
        if sum(tensor.numel() for tensor in tensors.values()) > LARGEST_JSON:
            skipped += 1
        else:
            folder.write_json(id, {**header, "values": _listed(tensors)})
    return [f"{skipped} prompts are too large for JSON; their safetensors hold all"] if skipped else []


def _listed(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in tensors.items()}

"""Postprocess a complete capture set: dynamics, page, pictures, plain JSON, and the experiment's index.

Shapes: T tokens (prompt tokens, then R response tokens), L layers, 3 points of a layer, K traits, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from extraction.core.errors import MissingPackage, TraitlineError
from extraction.core.progress import ProgressReporter
from extraction.core.records import POINTS, POLARITIES, STREAM
from extraction.monitoring.colour_scale import colour_scales
from extraction.monitoring.dynamics import dynamics
from extraction.monitoring.page_data import CaptureSetData, TextReading, TraitData
from extraction.monitoring.plan import MonitoringPlan, SetPlan, Vector, first_layer
from extraction.monitoring.run import MonitoringSession, recorded_failure
from extraction.pipeline.fit import sources_digest
from extraction.pipeline.score import kept_responses
from extraction.storage.experiment_dir import capture_sets, write_sets_index
from extraction.storage.token_captures import CaptureSet, prompt_id

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.monitoring.page import SetRow
    from extraction.vectors.chunked import ChunkedRows

NORM = TraitData("norm", "no trait was read: the norm of the residual stream", "length", 0, None)
MAX_JSON_NUMBERS = 5_000_000  # of one prompt: about 100 MB as text


@dataclass(frozen=True)
class PostprocessResult:
    """A complete set. `dynamics` is its dynamics.json."""

    set: SetPlan
    dynamics: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def postprocess_sets(session: MonitoringSession, listener: ProgressReporter) -> list[PostprocessResult]:
    """Postprocess every complete set. Files that exist already, made of the same captures, are left as they are."""
    finished: list[PostprocessResult] = []
    for set_plan in session.plan.sets:
        with recorded_failure(session, set_plan.stem, listener):
            ids = [prompt_id(i) for i in range(len(set_plan.prompt_set.prompts))]
            if all(set_plan.folder.prompt_done(id) for id in ids):
                with set_plan.folder.lock():
                    finished.append(_postprocess_set(session, set_plan, ids, listener))
    if session.changed:
        _write_index(session.plan)
    return finished


def _postprocess_set(
    session: MonitoringSession, set_plan: SetPlan, ids: Sequence[str], listener: ProgressReporter
) -> PostprocessResult:
    plan, folder = session.plan, set_plan.folder
    is_fresh = set_plan.stem in session.changed
    notes = _write_json(folder, ids, again=is_fresh) if plan.extras.json else []
    last = plan.vectors[-1].trait if plan.vectors else NORM.name
    lacks_pictures = plan.extras.png and not folder.report_path(_overview_name(last)).exists()
    if is_fresh or lacks_pictures or not (folder.has_dynamics() and folder.report_path().exists()):
        from extraction.monitoring.page import set_page

        data = load_capture_set(plan, set_plan, ids)
        folder.write_dynamics(dynamics_document(data))
        folder.write_report(folder.report_path().name, set_page(data))
        if plan.extras.png:
            _write_pictures(folder, data, listener)
    return PostprocessResult(set_plan, folder.read_dynamics(), tuple(notes))


# --- reading the captures -------------------------------------------------------------------------------------------


def load_capture_set(plan: MonitoringPlan, set_plan: SetPlan, ids: Sequence[str]) -> CaptureSetData:
    """Read the captures of a set, and compute their dynamics."""
    norm = replace(NORM, layer=plan.layers[0])
    traits = tuple(_trait_data(plan, k) for k in range(len(plan.vectors))) or (norm,)
    readings = [_read_prompt(set_plan.folder, id, traits) for id in ids]
    thresholds_LK = thresholds_of(traits, readings)
    return CaptureSetData(
        title=set_plan.stem,
        experiment=plan.settings.name,
        name=set_plan.folder.path.name,
        model=plan.spec.name,
        traits=traits,
        layers=plan.layers,
        points=POINTS,
        readings=[_with_dynamics(reading, traits, thresholds_LK) for reading in readings],
        settings={key: value for key, value in set_plan.config.items() if key not in ("model", "layers")},
    )


def _trait_data(plan: MonitoringPlan, k: int) -> TraitData:
    vector = plan.vectors[k]
    return TraitData(
        name=vector.trait,
        description=vector.description,
        method=vector.method,
        layer=first_layer(vector, plan.layers),
        levels_L2=reference_levels(vector, plan.layers, plan.unit_LDK[..., k]),
    )


def _read_prompt(folder: CaptureSet, id: str, traits: Sequence[TraitData]) -> TextReading:
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
        projections_TLPK=np.stack([_projections(tensors, trait) for trait in traits], axis=-1),
        dynamics={},
    )


def _projections(tensors: Mapping[str, Tensor], trait: TraitData) -> np.ndarray:
    """Return the projections [T, L, 3]; without a trait, the norms of tier 3's residual stream."""
    if trait.method != NORM.method:
        return np.asarray(tensors[f"projections.{trait.name}"])
    return np.stack([tensors[name].norm(dim=-1).numpy() for name in STREAM], axis=1)[:, None]


def thresholds_of(traits: Sequence[TraitData], readings: Sequence[TextReading]) -> np.ndarray:
    """Return the thresholds [L, K]: the mean of the two levels where known, else of all response tokens of the set."""
    return np.stack([_threshold(trait, k, readings) for k, trait in enumerate(traits)], axis=1)


def _threshold(trait: TraitData, k: int, readings: Sequence[TextReading]) -> np.ndarray:
    if trait.levels_L2 is not None:
        return np.asarray(trait.levels_L2.mean(axis=1))
    rows_TL = np.concatenate([_response_projections(reading, k) for reading in readings])
    return rows_TL.mean(axis=0) if len(rows_TL) else np.zeros(rows_TL.shape[1])


def _response_projections(reading: TextReading, k: int) -> np.ndarray:
    """Return the projections [R, L] of the response's tokens at residual_out."""
    return reading.projections_TLPK[reading.n_prompt :, :, -1, k].astype(np.float64)


def _with_dynamics(reading: TextReading, traits: Sequence[TraitData], thresholds_LK: np.ndarray) -> TextReading:
    summaries = {
        trait.name: dynamics(_response_projections(reading, k), thresholds_LK[:, k]) for k, trait in enumerate(traits)
    }
    return replace(reading, dynamics=summaries)


def reference_levels(vector: Vector, layers: tuple[int, ...], unit_LD: Tensor) -> np.ndarray | None:
    """Return the mean projection [L, 2], at residual_out, of the responses that the vector was fitted on.

    The negative side first. A projection is large or small in comparison with these. None where they are not known:
    the vector was imported or is of another site, or its run has other responses now.
    """
    header = vector.folder.vectors_header(vector.method) or {}
    name = str(header.get("activations", ""))
    if vector.run_plan is None or not name.startswith("residual."):
        return None
    try:
        kept = kept_responses(vector.run_plan, vector.run_plan.traits[0], vector.folder)
        if sources_digest(vector.folder, kept) != header.get("sources"):
            return None
        stored = vector.folder.open_activations(name)
    except TraitlineError:
        return None
    captured = vector.folder.shard_receipt("activations", 0)["meta"]["layers"]
    columns = [captured.index(layer) for layer in layers]
    sides = [stored.pick(kept.ids[polarity], columns) for polarity in reversed(POLARITIES)]
    return np.stack([_mean_projection(side, unit_LD) for side in sides], axis=1)


def _mean_projection(rows: ChunkedRows, unit_LD: Tensor) -> np.ndarray:
    """Return the mean projection [L] of stored rows, read some layers at a time."""
    from extraction.vectors.chunked import layer_blocks

    means = (
        (rows.read_layers(block.layers).double().mean(0) * unit_LD[block.layers].double()).sum(-1)
        for block in layer_blocks(rows.shape)
    )
    return np.concatenate([mean_k.numpy() for mean_k in means])


def dynamics_document(data: CaptureSetData) -> dict[str, Any]:
    """Return dynamics.json: levels and thresholds by trait and layer, and summaries by prompt, trait and layer."""
    thresholds_LK = thresholds_of(data.traits, data.readings)
    return {
        "layers": list(data.layers),
        "point": POINTS[-1],
        "traits": [
            {
                "trait": trait.name,
                "method": trait.method,
                "layer": trait.layer,
                "levels": None if trait.levels_L2 is None else trait.levels_L2.tolist(),
                "threshold": thresholds_LK[:, k].tolist(),
            }
            for k, trait in enumerate(data.traits)
        ],
        "prompts": {reading.id: {"prompt": reading.prompt, "traits": reading.dynamics} for reading in data.readings},
    }


# --- outputs -----------------------------------------------------------------------------------------------------


def _overview_name(trait: str) -> str:
    return f"overview-{trait}.png"


def _write_pictures(folder: CaptureSet, data: CaptureSetData, listener: ProgressReporter) -> None:
    """Write an overview for each trait, and a picture for each prompt and trait; a note without matplotlib."""
    try:
        from extraction.monitoring.pictures import overview_picture, reading_picture
        from extraction.report.plot_style import check_matplotlib

        check_matplotlib()
    except MissingPackage as failure:
        listener.note(f"no pictures: {failure}")
        return
    scales = colour_scales(data)
    for k, trait in enumerate(data.traits):
        for reading in data.readings:
            picture = reading_picture(data, reading, k, trait.layer, scales=scales)
            folder.write_report(f"{reading.id}-{trait.name}.png", picture)
        overview = overview_picture(data, k, trait.layer, scales=scales)
        folder.write_report(_overview_name(trait.name), overview)


def _write_index(plan: MonitoringPlan) -> None:
    """Write captures/index.html, the index of the experiment's sets."""
    from extraction.monitoring.page import sets_index

    root, experiment = plan.root / "experiments", plan.settings.name
    write_sets_index(
        root, experiment, sets_index([_index_row(experiment, folder) for folder in capture_sets(root, experiment)])
    )


def _index_row(experiment: str, folder: CaptureSet) -> SetRow:
    from extraction.monitoring.page import SetRow

    config, page = folder.read_config(), folder.report_path()
    return SetRow(
        experiment=experiment,
        name=folder.path.name,
        tier=config["tier"],
        model=config["model"]["name"],
        traits=[vector["trait"] for vector in config["vectors"]],
        layers=config["layers"],
        n_done=len(folder.prompt_ids()),
        n_prompts=config["prompts"]["count"],
        link=f"{folder.path.name}/reports/{page.name}" if page.exists() else None,
    )


def _write_json(folder: CaptureSet, ids: Sequence[str], *, again: bool) -> list[str]:
    """Write every prompt's capture as plain JSON; return a note where some are too large for that."""
    skipped = 0
    for id in ids if again else [id for id in ids if not folder.json_path(id).exists()]:
        tensors, header = folder.read_prompt(id)
        if sum(tensor.numel() for tensor in tensors.values()) > MAX_JSON_NUMBERS:
            skipped += 1
        else:
            folder.write_json(id, {**header, "values": {name: tensor.tolist() for name, tensor in tensors.items()}})
    return [f"{skipped} prompts are too large for JSON; their safetensors hold all"] if skipped else []

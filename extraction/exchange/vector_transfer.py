"""Export a run's vectors to the formats of other programs, and import vectors as a run.

An imported vector is stored like a run's, in experiments/imported/<name>/vectors/imported.safetensors with a receipt,
so that all that reads a run's vectors reads it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.config.experiments import find_root, model_of_run, parse_layers, resolve_model
from extraction.core.errors import TraitlineError, VectorError
from extraction.core.text import show_path
from extraction.exchange.formats import find_format, read_direction
from extraction.exchange.layer_rows import VectorMetadata
from extraction.storage.output_file import place_file
from extraction.storage.trait_run import TraitRun, trait_run

if TYPE_CHECKING:
    from extraction.vectors.direction import Direction

IMPORTED = "imported"


@dataclass(frozen=True)
class ExportOptions:
    """Options of `traitline export`."""

    experiment: str
    trait: str
    method: str
    to: str
    layers: str | None = None
    normalise: str | None = None
    scale: float = 1.0
    model: str | None = None


def export_vectors(wanted: ExportOptions, *, root: str | None, output: str | None, force: bool) -> list[str]:
    """Write one method's directions in a format of FORMATS. Returns lines for the user. Raises VectorError."""
    from extraction.vectors.direction import Direction, format_layers

    form = find_format(wanted.to, "--to")
    top = find_root(root)
    run = trait_run(top / "experiments", wanted.experiment, wanted.trait)
    direction = _select_and_scale(Direction.from_run(run, wanted.method), wanted, run)
    metadata = _model_metadata(direction, wanted, run, top) if form.needs_model else VectorMetadata()
    written = form.write(direction, metadata)
    path = Path(output or form.file_name.format(trait=wanted.trait, method=wanted.method))
    place_file(path, written.data, force=force)
    summary = (
        f"{show_path(path)}: {wanted.method} of {wanted.trait} at {format_layers(direction.layers)}, as {wanted.to}"
    )
    return [summary, *written.notes]


def import_vectors(
    source: str,
    name: str,
    *,
    root: str | None,
    format: str | None = None,
    base: int | None = None,
    model: str | None = None,
    force: bool = False,
) -> list[str]:
    """Read vectors of any format in FORMATS and store them as an imported run. Returns lines for the user."""
    from extraction.vectors.direction import format_layers

    top = find_root(root)
    label = None if model is None else resolve_model(model, top).name  # as in runs; an unknown name is an error
    loaded = read_direction(source, format=format, base=base, model=label)
    direction = replace(loaded.direction, trait=name, method=loaded.direction.method or IMPORTED)
    run = trait_run(top / "experiments", IMPORTED, name)
    header = {
        "trait": name,
        "model": direction.model,
        "method": direction.method,
        "layers": list(direction.layers),
        "model_type": loaded.metadata.model_type,
        "read_as": loaded.format,
    }
    with run.lock():
        run.open({"imported": name})
        _check_not_replacing(run, direction, force=force)
        run.write_vectors(IMPORTED, {"direction": direction.direction_LD}, header)
    span = f"{format_layers(direction.layers)} of {direction.hidden_size} values"
    summary = f"{show_path(source)}: read as {loaded.format}, {span}"
    return [summary, *loaded.notes, f"kept in {show_path(run.vectors_path(IMPORTED))}"]


def _check_not_replacing(run: TraitRun, direction: Direction, *, force: bool) -> None:
    """Raise VectorError where another vector was imported under this name."""
    from extraction.vectors.direction import Direction

    if IMPORTED in run.methods() and not force and Direction.from_run(run, IMPORTED) != direction:
        place = show_path(run.vectors_path(IMPORTED))
        raise VectorError(f"{place}: another vector has this name; give --force to replace it, or another --as NAME")


def _select_and_scale(direction: Direction, wanted: ExportOptions, run: TraitRun) -> Direction:
    """Apply --layers, --normalise and --scale."""
    if not math.isfinite(wanted.scale) or wanted.scale == 0:
        raise VectorError(f"--scale {wanted.scale}: give a finite number that is not 0")
    if wanted.layers is not None and wanted.layers.strip().lower() != "all":
        direction = direction.select(parse_layers(wanted.layers, direction.layers[-1] + 1))
    if wanted.normalise == "unit":
        direction = direction.normalised()
    elif wanted.normalise == "typical-norm":  # so that 1 in the other program is a steering coefficient of 1
        direction = direction.normalised(card_norms(run, direction.layers))
    return direction * wanted.scale


def card_norms(run: TraitRun, layers: Sequence[int]) -> list[float]:
    """Return the run's card's mean norm of the activations at these layers, the unit of steering coefficients."""
    card: dict[str, Any] = run.read_card() if run.has_card() else {}
    known = dict(zip(card.get("layers", ()), card.get("typical_norm") or (), strict=False))
    absent = [layer for layer in layers if layer not in known]
    if absent:
        remedy = "make it again (`traitline validate`), or give --normalise unit"
        raise VectorError(f"{show_path(run.card_path)}: no typical norm of layer {absent[0]}; {remedy}")
    return [float(known[layer]) for layer in layers]


def _model_metadata(direction: Direction, wanted: ExportOptions, run: TraitRun, root: Path) -> VectorMetadata:
    """Read the model's type and number of layers from the config of --model, or else of the run's model.

    Without --model, a model that can't be found leaves the number of layers unknown.
    """
    from extraction.model.loading import read_config

    header = run.vectors_header(wanted.method) or {}
    stored = (run.stored_config() or {}).get("model", {})
    name = wanted.model or stored.get("name") or direction.model
    if name is None:
        return VectorMetadata(model_type=header.get("model_type"))
    try:
        source = model_of_run(stored, root) if stored and not wanted.model else name
        config = read_config(resolve_model(source, root))
    except TraitlineError:
        if wanted.model:
            raise
        return VectorMetadata(model_type=header.get("model_type"))
    n_layers = int(config.num_hidden_layers)
    direction.check_fits(n_layers, int(config.hidden_size), name)
    return VectorMetadata(model_type=str(config.model_type), n_layers=n_layers)

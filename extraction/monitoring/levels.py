"""Where a trait's two sides lie on its vector: what a projection is large or small against.

Shapes: n rows, L layers, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from extraction.errors import TraitlineError
from extraction.fitting import sources_of
from extraction.judging import kept_of
from extraction.records import POLARITIES

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.monitoring.plans import Vector


def levels_of(vector: Vector, layers: tuple[int, ...], unit_LD: Tensor) -> np.ndarray | None:
    """Mean projection [L, 2] of the responses that the vector was made from, negative side first, at residual_out.

    None where that can't be said: the vector was imported, is of another site, or its run holds other responses now.
    """
    header = vector.folder.vectors_header(vector.method) or {}
    name = str(header.get("activations", ""))
    if vector.job is None or not name.startswith("residual."):
        return None
    try:
        kept = kept_of(vector.job, vector.job.traits[0], vector.folder)
        if sources_of(vector.folder, kept) != header.get("sources"):
            return None
        ids, activations_nLD = vector.folder.load_activations(name)
    except TraitlineError:
        return None
    captured = vector.folder.shard_facts("activations", 0)["meta"]["layers"]
    row_of = {example_id: row for row, example_id in enumerate(ids)}
    columns = [captured.index(layer) for layer in layers]
    sides = (
        activations_nLD[[row_of[example_id] for example_id in kept.ids[polarity]]][:, columns].double()
        for polarity in reversed(POLARITIES)
    )
    return np.stack([(side_nLD.mean(0) * unit_LD.double()).sum(-1).numpy() for side_nLD in sides], axis=1)

"""Where a trait's two sides lie on its vector: what a projection is large or small against.

Shapes: n rows, L layers, D hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from extraction.core.errors import TraitlineError
from extraction.core.records import POLARITIES
from extraction.pipeline.fit import sources_digest
from extraction.pipeline.score import kept_responses

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.monitoring.plan import Vector
    from extraction.vectors.chunked import ChunkedRows


def levels_of(vector: Vector, layers: tuple[int, ...], unit_LD: Tensor) -> np.ndarray | None:
    """Mean projection [L, 2] of the responses that the vector was made from, negative side first, at residual_out.

    None where that can't be said: the vector was imported, is of another site, or its run holds other responses now.
    """
    header = vector.folder.vectors_header(vector.method) or {}
    name = str(header.get("activations", ""))
    if vector.job is None or not name.startswith("residual."):
        return None
    try:
        kept = kept_responses(vector.job, vector.job.traits[0], vector.folder)
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
    """[L], of rows that are read some layers at a time."""
    from extraction.vectors.chunked import layer_blocks

    means = (
        (rows.read_layers(block.layers).double().mean(0) * unit_LD[block.layers].double()).sum(-1)
        for block in layer_blocks(rows.shape)
    )
    return np.concatenate([mean_k.numpy() for mean_k in means])

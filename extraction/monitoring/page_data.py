"""The values that a capture set's page and pictures are made from, as a caller has read them.

Shapes: T tokens (P prompt tokens, then R response tokens), L layers read, points of a layer, K traits. Row i is the
state where token i is the INPUT. Layer k is the output of decoder block k, from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Dynamics = Mapping[str, float | int | None]


@dataclass(frozen=True)
class TraitData:
    """One trait that was read.

    Attributes:
        layer: The layer that is shown first, as the model counts them.
        levels_L2: [L, 2], the mean projections at residual_out of the run's negative and positive responses; NaN at a
            layer without them, None where they are not known.
    """

    name: str
    description: str
    method: str
    layer: int
    levels_L2: np.ndarray | None


@dataclass(frozen=True)
class TextReading:
    """One prompt with its response, token by token.

    `pieces` are the text that each token adds, `tokens` the tokenizer's own strings, `token_ids` their ids: T of each,
    of which the first `n_prompt` are the prompt. `projections_TLPK`: [T, L, 3, K] float32, the points as in POINTS.
    `dynamics`: by trait name, a summary of the response at residual_out for each of the L layers.
    """

    id: str
    prompt: str
    response: str
    pieces: Sequence[str]
    tokens: Sequence[str]
    token_ids: Sequence[int]
    n_prompt: int
    finish_reason: str
    projections_TLPK: np.ndarray
    dynamics: Mapping[str, Sequence[Dynamics]]


@dataclass(frozen=True)
class CaptureSetData:
    """One capture set. `layers` are the L that were read, `points` the names of the projections' third axis.

    `readings` may be lazy; it is iterated twice. `settings` is any JSON object.
    """

    title: str
    experiment: str
    name: str
    model: str
    traits: tuple[TraitData, ...]
    layers: tuple[int, ...]
    points: tuple[str, ...]
    readings: Sequence[TextReading]
    settings: Mapping[str, Any]

"""Check the two sides of a trait, centre and scale them, and rotate them into the span of their rows.

Methods that depend on the rows only through inner products are fitted in that span: R coordinates instead of D, which
makes 200 rows of a model of hidden size 2304 cheap.

Shapes: L layers, k layers of a chunk, D hidden, N positive rows, M negative rows, n = N + M, b rows of a chunk,
R = min(n, D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from extraction.core.errors import ActivationError, TraitError
from extraction.vectors.chunked import NORM_CHUNK_BYTES, mean_over_rows, row_chunks, row_norms, rows_per_chunk

LAYER_CHUNK_BYTES = 2**28
FLOAT32_EPSILON = 2.0**-23


@dataclass(frozen=True)
class PreparedSides:
    """Rows of both sides in float64, positive first, centred on the mean of all rows and scaled.

    Each layer is divided by one number, so that its average feature has variance 1. Methods then do not depend on the
    scale of the activations, and still rotate with the space; a scale for each feature would break that.
    """

    rows_LnR: Tensor
    basis_LDR: Tensor | None  # orthonormal columns; None where R == D and the coordinates are the features
    n_positive: int
    hidden_size: int

    @property
    def positive_LNR(self) -> Tensor:
        """Positive rows."""
        return self.rows_LnR[:, : self.n_positive]

    @property
    def negative_LMR(self) -> Tensor:
        """Negative rows."""
        return self.rows_LnR[:, self.n_positive :]

    @property
    def mean_difference_LR(self) -> Tensor:
        """Mean of the positive rows minus mean of the negative rows."""
        return self.positive_LNR.mean(1) - self.negative_LMR.mean(1)

    def row_chunks(self) -> tuple[Tensor, ...]:
        """Split the rows into views [L, b, R], so that copies of one chunk stay small."""
        n_layers, n, width = self.rows_LnR.shape
        chunks: tuple[Tensor, ...] = self.rows_LnR.split(rows_per_chunk((n, n_layers, width)), dim=1)
        return chunks

    def deviations(self) -> Iterator[Tensor]:
        """Yield chunks A [L, b, R] of the rows minus their own side's mean, weighted for covariances.

        The sum of A^T A over the chunks is (S+ + S-) / 2, the average of the sides' covariances.
        """
        means = [side.mean(1, keepdim=True) for side in (self.positive_LNR, self.negative_LMR)]
        counts, start = (self.n_positive, self.rows_LnR.shape[1] - self.n_positive), 0
        for rows_LbR in self.row_chunks():
            chunk_LbR = rows_LbR.clone(memory_format=torch.contiguous_format)
            n_positive = min(max(0, self.n_positive - start), rows_LbR.shape[1])
            sides = chunk_LbR[:, :n_positive], chunk_LbR[:, n_positive:]
            for side, mean_L1R, count in zip(sides, means, counts, strict=True):
                side.sub_(mean_L1R).div_((2 * count) ** 0.5)
            start += rows_LbR.shape[1]
            yield chunk_LbR

    def to_unit_directions(self, direction_LR: Tensor) -> Tensor:
        """Rotate directions back to the features, with unit norm and the positive side up: [L, R] -> [L, D]."""
        unit_LR = direction_LR / direction_LR.norm(dim=-1, keepdim=True)
        unit_LR = orient_towards(unit_LR, self.mean_difference_LR)
        return unit_LR if self.basis_LDR is None else torch.einsum("ldr,lr->ld", self.basis_LDR, unit_LR)


def sum_parts(parts: Iterable[Tensor]) -> Tensor:
    """Add the results of several chunks; a single result is returned unchanged."""
    return reduce(torch.add, parts)


def orient_towards(direction_LD: Tensor, difference_LD: Tensor) -> Tensor:
    """Flip the sign of each layer's direction that points away from the difference of the means."""
    return torch.where((direction_LD * difference_LD).sum(-1, keepdim=True) < 0, -direction_LD, direction_LD)


def prepare_sides(positive_NLD: Tensor, negative_MLD: Tensor) -> PreparedSides:
    """Centre, scale and, where there are fewer rows than features, rotate into the rows' span (QR)."""
    n_positive, (n_layers, hidden_size) = len(positive_NLD), positive_NLD.shape[1:]
    n = n_positive + len(negative_MLD)
    rows_nLD = torch.empty((n, n_layers, hidden_size), dtype=torch.float64, device=positive_NLD.device)
    rows_nLD[:n_positive], rows_nLD[n_positive:] = positive_NLD, negative_MLD
    rows_LnD = rows_nLD.transpose(0, 1)  # this copy is most of the memory, so it is changed in place
    rows_LnD -= rows_LnD.mean(1, keepdim=True)
    squares_L = sum_parts(chunk_bLD.transpose(0, 1).square().sum((1, 2)) for chunk_bLD in row_chunks(rows_nLD))
    rows_LnD /= (squares_L / (n * hidden_size)).sqrt().view(-1, 1, 1)
    if n >= hidden_size:
        return PreparedSides(rows_LnD, None, n_positive, hidden_size)
    basis_LDR, rows_LRn = torch.linalg.qr(rows_LnD.mT)
    return PreparedSides(rows_LRn.mT.contiguous(), basis_LDR, n_positive, hidden_size)


def fit_by_layers(fit: Callable[[PreparedSides], Tensor], positive_NLD: Tensor, negative_MLD: Tensor) -> Tensor:
    """Run `fit` (PreparedSides -> directions [L, R]) on as many layers at a time as memory allows: float32 [L, D].

    Needs spread within a side, so at least 2 rows on each.
    """
    check_sides(positive_NLD, negative_MLD, min_rows=2)
    n, (n_layers, hidden_size) = len(positive_NLD) + len(negative_MLD), positive_NLD.shape[1:]
    step = max(1, LAYER_CHUNK_BYTES // (8 * 4 * n * (hidden_size + min(n, hidden_size))))
    chunks = (slice(start, start + step) for start in range(0, n_layers, step))
    with single_threaded():
        return torch.cat([_fit_chunk(fit, positive_NLD[:, layers], negative_MLD[:, layers]) for layers in chunks])


def _fit_chunk(fit: Callable[[PreparedSides], Tensor], positive_NkD: Tensor, negative_MkD: Tensor) -> Tensor:
    """Fit one chunk of layers in a function of its own, which frees its rows before the next chunk's are made."""
    sides = prepare_sides(positive_NkD, negative_MkD)
    return sides.to_unit_directions(fit(sides)).float()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch on one CPU thread within the block, and restore the number of threads afterwards.

    Decompositions of small matrices were measured 30 times slower on several threads. After `torch.set_num_threads`,
    torch 2.13 with oneMKL also hangs in batched LU and SVD ("Parameter 6 was incorrect on entry to DLASWP").
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_sides(
    positive_NLD: Tensor,
    negative_MLD: Tensor,
    *,
    min_rows: int = 1,
    layers: Sequence[int] | None = None,
    positive_ids: Sequence[str] | None = None,
    negative_ids: Sequence[str] | None = None,
) -> None:
    """Raise unless a direction can be fitted to the two sides. `layers` and the ids name the place in the message.

    Raises:
        ActivationError: an activation is NaN or Inf.
        TraitError: a side has fewer than `min_rows` rows, or the sides' means are equal at a layer.
    """
    if positive_NLD.dim() != 3 or positive_NLD.shape[1:] != negative_MLD.shape[1:]:
        raise ValueError(f"sides of shapes {tuple(positive_NLD.shape)} and {tuple(negative_MLD.shape)}, not [N, L, D]")
    layers = range(positive_NLD.shape[1]) if layers is None else layers
    for side, rows, ids in (("positive", positive_NLD, positive_ids), ("negative", negative_MLD, negative_ids)):
        _check_count(side, rows, min_rows)
        check_finite(side, rows, layers, ids)
    _check_difference(positive_NLD, negative_MLD, layers)


def _check_count(side: str, rows_NLD: Tensor, min_rows: int) -> None:
    if len(rows_NLD) >= min_rows:
        return
    remedy = "add examples, or loosen the judge's threshold"
    if min_rows > 1:
        remedy += "; mean_diff works with 1 on each side"
    raise TraitError(f"{side} side: {len(rows_NLD)} examples; at least {min_rows} are needed on each side: {remedy}")


def check_finite(side: str, rows_NLD: Tensor, layers: Sequence[int], ids: Sequence[str] | None) -> None:
    """Raise ActivationError with the layer and the example where an activation is NaN or Inf."""
    if all(torch.isfinite(chunk_bLD).all() for chunk_bLD in row_chunks(rows_NLD, NORM_CHUNK_BYTES)):
        return
    row, layer, feature = (~torch.isfinite(rows_NLD)).nonzero()[0].tolist()
    example = f"row {row} of the {side} side" if ids is None else f"example {ids[row]}"
    raise ActivationError(
        f"layer {layers[layer]}, {example}: activation {feature} is {rows_NLD[row, layer, feature].item()}"
        f" (stored as {str(rows_NLD.dtype).removeprefix('torch.')});"
        " capture again with the model in bfloat16 or float32, or leave the example out"
    )


def _check_difference(positive_NLD: Tensor, negative_MLD: Tensor, layers: Sequence[int]) -> None:
    difference_L = (mean_over_rows(positive_NLD) - mean_over_rows(negative_MLD)).norm(dim=-1)
    size_L = torch.stack([row_norms(side).mean(0) for side in (positive_NLD, negative_MLD)])
    same_L = difference_L <= FLOAT32_EPSILON * size_L.amax(0)
    if same_L.any():
        layer = int(same_L.nonzero()[0])
        raise TraitError(
            f"layer {layers[layer]}: both sides have the same mean activation (difference {difference_L[layer]:.1e},"
            f" norm {size_L[:, layer].max():.1e}), so no direction leads from one to the other; make the two sides'"
            " prompts differ, pool over the response, or leave the layer out"
        )

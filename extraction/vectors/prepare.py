"""The two sides of a trait, checked and made ready for the methods.

L layers, D hidden, N positive rows, M negative rows, n = N + M, R = min(n, D).

Every method but mean_diff and random depends only on inner products between rows, so all of them work in the rows'
own span: R coordinates instead of D, which is what makes 200 rows of a 2304-wide model cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from extraction.core.errors import ActivationError, TraitError
from extraction.vectors.chunked import ROW_BYTES, mean_row, row_norms, row_pieces, rows_a_piece

CHUNK_BYTES = 2**28
FLOAT32_STEP = 2.0**-23


@dataclass(frozen=True)
class PreparedSides:
    """Some layers' rows, positive first, centred on the mean of all rows, in float64.

    Scaled by one number a layer, so that the average feature has variance 1: a method is then blind to the scale of
    the activations, and still turns with the space, which a scale for each feature would break.
    """

    rows_LnR: Tensor
    basis_LDR: Tensor | None  # orthonormal columns; None where R == D and the coordinates are the features
    n_positive: int
    hidden_size: int

    @property
    def positive_LNR(self) -> Tensor:
        """The positive rows."""
        return self.rows_LnR[:, : self.n_positive]

    @property
    def negative_LMR(self) -> Tensor:
        """The negative rows."""
        return self.rows_LnR[:, self.n_positive :]

    @property
    def difference_LR(self) -> Tensor:
        """Mean of the positive rows minus mean of the negative rows."""
        return self.positive_LNR.mean(1) - self.negative_LMR.mean(1)

    def pieces(self) -> tuple[Tensor, ...]:
        """Views of the rows, of b at a time: [L, b, R]. What is worked out from a piece takes little room."""
        n_layers, n, width = self.rows_LnR.shape
        pieces: tuple[Tensor, ...] = self.rows_LnR.split(rows_a_piece((n, n_layers, width)), dim=1)
        return pieces

    def within(self) -> Iterator[Tensor]:
        """Pieces [L, b, R] of every row minus its own side's mean, so weighted that the sum of their A^T A is the
        average of the sides' covariances."""
        means = [side.mean(1, keepdim=True) for side in (self.positive_LNR, self.negative_LMR)]
        counts, start = (self.n_positive, self.rows_LnR.shape[1] - self.n_positive), 0
        for rows_LbR in self.pieces():
            piece_LbR = rows_LbR.clone(memory_format=torch.contiguous_format)
            n_positive = min(max(0, self.n_positive - start), rows_LbR.shape[1])
            sides = piece_LbR[:, :n_positive], piece_LbR[:, n_positive:]
            for side, mean_L1R, count in zip(sides, means, counts, strict=True):
                side.sub_(mean_L1R).div_((2 * count) ** 0.5)
            start += rows_LbR.shape[1]
            yield piece_LbR

    def to_hidden(self, direction_LR: Tensor) -> Tensor:
        """[L, R] -> [L, D]: unit norm, oriented from negative to positive."""
        unit_LR = direction_LR / direction_LR.norm(dim=-1, keepdim=True)
        unit_LR = towards(unit_LR, self.difference_LR)
        return unit_LR if self.basis_LDR is None else torch.einsum("ldr,lr->ld", self.basis_LDR, unit_LR)


def added(parts: Iterable[Tensor]) -> Tensor:
    """The sum of what pieces come to; of one piece, what it is."""
    return reduce(torch.add, parts)


def towards(direction_LD: Tensor, difference_LD: Tensor) -> Tensor:
    """Flip each layer's direction that points away from the difference."""
    return torch.where((direction_LD * difference_LD).sum(-1, keepdim=True) < 0, -direction_LD, direction_LD)


def span(positive_NLD: Tensor, negative_MLD: Tensor) -> PreparedSides:
    """Centre, scale and, where there are fewer rows than features, rotate into the rows' span (QR)."""
    n_positive, (n_layers, hidden_size) = len(positive_NLD), positive_NLD.shape[1:]
    n = n_positive + len(negative_MLD)
    rows_nLD = torch.empty((n, n_layers, hidden_size), dtype=torch.float64, device=positive_NLD.device)
    rows_nLD[:n_positive], rows_nLD[n_positive:] = positive_NLD, negative_MLD
    rows_LnD = rows_nLD.transpose(0, 1)  # ours, and most of the memory: all is done in place
    rows_LnD -= rows_LnD.mean(1, keepdim=True)
    squares_L = added(piece_bLD.transpose(0, 1).square().sum((1, 2)) for piece_bLD in row_pieces(rows_nLD))
    rows_LnD /= (squares_L / (n * hidden_size)).sqrt().view(-1, 1, 1)
    if n >= hidden_size:
        return PreparedSides(rows_LnD, None, n_positive, hidden_size)
    basis_LDR, rows_LRn = torch.linalg.qr(rows_LnD.mT)
    return PreparedSides(rows_LRn.mT.contiguous(), basis_LDR, n_positive, hidden_size)


def by_layers(fit: Callable[[PreparedSides], Tensor], positive_NLD: Tensor, negative_MLD: Tensor) -> Tensor:
    """Run `fit` ([L, R] directions from Sides) on all layers, as many at a time as memory allows -> float32 [L, D].

    A method of this kind needs spread within a side, so at least 2 rows of each.
    """
    check_sides(positive_NLD, negative_MLD, least=2)
    n, (n_layers, hidden_size) = len(positive_NLD) + len(negative_MLD), positive_NLD.shape[1:]
    step = max(1, CHUNK_BYTES // (8 * 4 * n * (hidden_size + min(n, hidden_size))))
    some = (slice(start, start + step) for start in range(0, n_layers, step))
    with one_thread():
        return torch.cat([_fitted(fit, positive_NLD[:, layers], negative_MLD[:, layers]) for layers in some])


def _fitted(fit: Callable[[PreparedSides], Tensor], positive_NkD: Tensor, negative_MkD: Tensor) -> Tensor:
    """Of some layers, whose rows are let go before the next ones' are made."""
    sides = span(positive_NkD, negative_MkD)
    return sides.to_hidden(fit(sides)).float()


@contextmanager
def one_thread() -> Iterator[None]:
    """Decompositions of small matrices on one processor thread; the number is put back afterwards.

    More threads mostly wait for one another there (30 times as long was measured); and once `torch.set_num_threads`
    has been called, torch 2.13 with oneMKL hangs in LU and SVD of a batch ("Parameter 6 was incorrect on entry to
    DLASWP").
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
    least: int = 1,
    layers: Sequence[int] | None = None,
    positive_ids: Sequence[str] | None = None,
    negative_ids: Sequence[str] | None = None,
) -> None:
    """Refuse what no direction can be made of. `layers` and ids are the names to use in the message.

    ActivationError: NaN or Inf. TraitError: fewer than `least` rows on a side, or no difference between the sides.
    """
    if positive_NLD.dim() != 3 or positive_NLD.shape[1:] != negative_MLD.shape[1:]:
        raise ValueError(f"sides of shapes {tuple(positive_NLD.shape)} and {tuple(negative_MLD.shape)}, not [N, L, D]")
    layers = range(positive_NLD.shape[1]) if layers is None else layers
    for side, rows, ids in (("positive", positive_NLD, positive_ids), ("negative", negative_MLD, negative_ids)):
        _check_count(side, rows, least)
        check_finite(side, rows, layers, ids)
    _check_difference(positive_NLD, negative_MLD, layers)


def _check_count(side: str, rows_NLD: Tensor, least: int) -> None:
    if len(rows_NLD) >= least:
        return
    remedy = "add examples, or loosen the judge's threshold"
    if least > 1:
        remedy += "; mean_diff works with 1 on each side"
    raise TraitError(f"{side} side: {len(rows_NLD)} examples; this needs at least {least} on each side: {remedy}")


def check_finite(side: str, rows_NLD: Tensor, layers: Sequence[int], ids: Sequence[str] | None) -> None:
    """ActivationError for NaN or Inf; names the layer and the example."""
    if all(torch.isfinite(piece_bLD).all() for piece_bLD in row_pieces(rows_NLD, ROW_BYTES)):
        return
    row, layer, feature = (~torch.isfinite(rows_NLD)).nonzero()[0].tolist()
    example = f"row {row} of the {side} side" if ids is None else f"example {ids[row]}"
    raise ActivationError(
        f"layer {layers[layer]}, {example}: activation {feature} is {rows_NLD[row, layer, feature].item()}"
        f" (stored as {str(rows_NLD.dtype).removeprefix('torch.')});"
        " capture again with the model in bfloat16 or float32, or leave the example out"
    )


def _check_difference(positive_NLD: Tensor, negative_MLD: Tensor, layers: Sequence[int]) -> None:
    difference_L = (mean_row(positive_NLD) - mean_row(negative_MLD)).norm(dim=-1)
    size_L = torch.stack([row_norms(side).mean(0) for side in (positive_NLD, negative_MLD)])
    same_L = difference_L <= FLOAT32_STEP * size_L.amax(0)
    if same_L.any():
        layer = int(same_L.nonzero()[0])
        raise TraitError(
            f"layer {layers[layer]}: both sides have the same mean activation (difference {difference_L[layer]:.1e},"
            f" norm {size_L[:, layer].max():.1e}), so no direction leads from one to the other; make the two sides'"
            " prompts differ, pool over the response, or leave the layer out"
        )

"""Methods that find the direction from a trait's negative side to its positive side.

A method is a function of `positive_NLD`, `negative_MLD` and a seed that returns float32 [L, D], all layers at once,
computed in float64. N and M may differ.

To add a method, write its function here, name it in FUNCTIONS, and give it a row in METHODS (method_table.py); then add
that row to the table in docs/guide.md. The options, the card, the report and the tests of the laws below read METHODS.

Laws that every method keeps (tests/test_vectors.py):
    The mean of the positive rows never projects lower than the mean of the negative rows.
    Scaling all activations changes nothing but mean_diff's norm; adding a vector to all rows changes nothing.
    Rotating the space rotates the direction (except random's).
    A layer's direction depends on that layer alone (except random's, which depends on the layer's index).

A method raises the errors of `extraction.vectors.prepare.check_sides`. All need 2 rows on each side, mean_diff and
random 1.

Shapes: L layers, D hidden, N positive rows, M negative rows, n = N + M, b rows of a chunk, R = min(n, D),
K components.
In formulas: x_i are rows, m+ and m- the sides' means, S+ and S- their covariances (1/N, 1/M), d = m+ - m-.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from extraction.vectors.chunked import ChunkedRows, LayerBlock, layer_blocks, mean_over_rows
from extraction.vectors.method_table import find_method
from extraction.vectors.prepare import PreparedSides, check_sides, fit_by_layers, orient_towards, sum_parts

PROBE_C = 1.0
NEWTON_STEPS = 100
ICA_COMPONENTS = 10
ICA_STEPS = 500
ICA_STEP = 5.0
ICA_TOLERANCE = 1e-10
SHRINKAGE = 0.01
ASCENT_STEPS = 1000
ASCENT_TOLERANCE = 1e-10


def mean_diff(positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int = 0) -> Tensor:
    """Subtract the sides' means: m+ - m-. NOT unit norm: its norm is in the activations' own units.

    Source: Marks and Tegmark 2023 (arXiv 2310.06824, mass-mean); Rimsky et al. 2023 (arXiv 2312.06681).
    """
    check_sides(positive_NLD, negative_MLD)
    return _mean_difference(positive_NLD, negative_MLD).float()


def probe(positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int = 0, c: float = PROBE_C) -> Tensor:
    """Fit a logistic regression and return its weights w, unit norm.

    w minimises |w|^2 / 2 + c sum_i log(1 + exp(-y_i f_i)) over w and b, where f_i = w . z_i + b, y_i = +1 or -1, and b
    is not penalised. z_i are the rows of one layer, centred, and divided by one number so that the average feature has
    variance 1: w is that of scikit-learn's `LogisticRegression(C=c)` on z, and c means the same at every layer and
    scale. Solved by Newton's method with step halving, in the rows' span.

    Source: Alain and Bengio 2016 (arXiv 1610.01644); Newton/IRLS: Bishop 2006, section 4.3.3.
    """
    return fit_by_layers(lambda sides: _fit_logistic(sides, c), positive_NLD, negative_MLD)


def pca(positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int = 0) -> Tensor:
    """Return the first principal axis, unit norm, of all rows around (m+ + m-) / 2, each side weighing one half.

    This is the top eigenvector of (S+ + S-) / 2 + d d^T / 4: the largest spread, also where the trait does not cause
    it. With N = M it is the first axis of ordinary PCA. It points to the positive mean.

    Source: Zou et al. 2023 (arXiv 2310.01405), there on paired differences; rows need no pairs here.
    """
    return fit_by_layers(_fit_first_axis, positive_NLD, negative_MLD)


def ica(positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int, components: int = ICA_COMPONENTS) -> Tensor:
    """Return the unmixing row, unit norm, of the independent component that differs most between the sides.

    Rows are whitened on their first `components` principal axes (fewer where the rank is lower). Then parallel FastICA
    with g = tanh, from a start drawn with the seed: U = E[g(Wz) z^T] - diag(E[g'(Wz)]) W, each row signed towards W's,
    and W <- (V V^T)^(-1/2) V with V = W + 5 U. Standard FastICA takes V = U, which has the same fixed points but cycles
    on components that are near Gaussian, so that rounding would decide the result.
    Projecting on the direction gives the component's source. Of K components the one with the largest
    |mean+ - mean-| is chosen; sources have variance 1, so it also has the largest Cohen's d.

    Source: Hyvarinen 1999, "Fast and robust fixed-point algorithms for ICA", equations 20 and 45.
    """
    return fit_by_layers(lambda sides: _fit_best_component(sides, seed, components), positive_NLD, negative_MLD)


def gradient(positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int = 0, shrinkage: float = SHRINKAGE) -> Tensor:
    """Maximise the standardised separation (w . d)^2 / (w^T S w) over unit vectors w by gradient ascent.

    S = (1 - shrinkage) (S+ + S-) / 2 + shrinkage t I, t = trace((S+ + S-) / 2) / D (S = I where there is no spread).
    Ascent is by conjugate gradients on w . d - w^T S w / 2, whose maximum S^-1 d is collinear: Fisher's discriminant
    with equal priors, as in scikit-learn's `LinearDiscriminantAnalysis(shrinkage=...)`.

    Source: Fisher 1936; shrinkage: Ledoit and Wolf 2004; ascent: Hestenes and Stiefel 1952.
    """
    return fit_by_layers(lambda sides: _fit_discriminant(sides, shrinkage), positive_NLD, negative_MLD)


def random(positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int, block: LayerBlock | None = None) -> Tensor:
    """Draw a Gaussian direction of unit norm from the seed, oriented to the positive side: the control.

    `block`: the layers that the rows are of (default: all). A layer's draw is the same in every block.
    """
    check_sides(positive_NLD, negative_MLD)
    n_layers, hidden_size = positive_NLD.shape[1:]
    block = block or LayerBlock(0, n_layers, n_layers)
    generator = torch.Generator().manual_seed(seed)
    draw_LD = torch.randn((block.n_layers, hidden_size), generator=generator, dtype=torch.float64)[block.layers]
    return normalised(
        orient_towards(draw_LD.to(positive_NLD.device), _mean_difference(positive_NLD, negative_MLD))
    ).float()


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (mean_diff, probe, pca, ica, gradient, random)
}


def fit_block(name: str, positive_NkD: Tensor, negative_MkD: Tensor, block: LayerBlock, *, seed: int) -> Tensor:
    """Fit a method to one block of layers: float32 [k, D], equal to those rows of a fit to all layers."""
    options: dict[str, Any] = {"block": block} if find_method(name).needs_block else {}
    return FUNCTIONS[name](positive_NkD, negative_MkD, seed=seed, **options)


def fit_layers(names: Sequence[str], rows: ChunkedRows, n_positive: int, *, seed: int) -> dict[str, Tensor]:
    """Fit methods to rows, positive ones first, that are read a block of layers at a time: name -> [L, D]."""

    def fit_methods(block: LayerBlock) -> list[Tensor]:
        rows_nkD = rows.read_layers(block.layers)  # freed before the next block is read
        sides = rows_nkD[:n_positive], rows_nkD[n_positive:]
        return [fit_block(name, *sides, block, seed=seed) for name in names]

    by_method = zip(*map(fit_methods, layer_blocks(rows.shape)), strict=True)
    return {name: torch.cat(blocks) for name, blocks in zip(names, by_method, strict=True)}


def normalised(direction_LD: Tensor) -> Tensor:
    """Scale directions to unit norm, in their dtype. Raises ValueError for a zero direction."""
    norm_L1 = direction_LD.double().norm(dim=-1, keepdim=True)
    if not (norm_L1 > 0).all():
        raise ValueError(f"row {int((norm_L1 <= 0).nonzero()[0, 0])} is a zero direction; it has no unit vector")
    unit_LD: Tensor = direction_LD / norm_L1
    return unit_LD.to(direction_LD.dtype)


def _mean_difference(positive_NLD: Tensor, negative_MLD: Tensor) -> Tensor:
    return mean_over_rows(positive_NLD) - mean_over_rows(negative_MLD)


def _fit_logistic(sides: PreparedSides, c: float) -> Tensor:
    n_layers, n, width = sides.rows_LnR.shape
    penalty, sign_n = sides.rows_LnR.new_ones(width + 1), sides.rows_LnR.new_ones(n)
    penalty[-1] = 0  # the intercept
    sign_n[sides.n_positive :] = -1

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows with a constant feature for the intercept [L, b, R + 1], and their signs [b]."""
        views = sides.row_chunks()
        for rows_LbR, sign_b in zip(views, sign_n.split(views[0].shape[1]), strict=True):
            yield torch.cat([rows_LbR, torch.ones_like(rows_LbR[..., :1])], -1), sign_b

    def loss(weights: Tensor) -> Tensor:
        margins = (sign_b * torch.einsum("lnr,lr->ln", rows, weights) for rows, sign_b in chunks())
        return (penalty * weights.square()).sum(-1) / 2 + c * sum_parts(softplus(-margin).sum(-1) for margin in margins)

    weights = sides.rows_LnR.new_zeros(n_layers, width + 1)
    for _ in range(NEWTON_STEPS):
        slope, curvature = penalty * weights, torch.diag(penalty)
        for rows, sign_b in chunks():
            probability = torch.sigmoid(torch.einsum("lnr,lr->ln", rows, weights))
            slope = slope + c * torch.einsum("lnr,ln->lr", rows, probability - (sign_b > 0).double())
            curvature = c * (rows * (probability * (1 - probability)).unsqueeze(-1)).mT @ rows + curvature
        step = torch.linalg.solve(curvature, slope)
        weights, before = _halving_step(loss, weights, step), weights
        if (weights - before).abs().max() <= 1e-12 * weights.abs().max():
            break
    return weights[:, :-1]


def _halving_step(loss: Callable[[Tensor], Tensor], weights: Tensor, step: Tensor) -> Tensor:
    """Return `weights - step` for each layer, the step halved until the loss does not rise; 0 if it always does."""
    before = loss(weights)
    size = torch.ones_like(before)
    for _ in range(40):
        rises = ~(loss(weights - size.unsqueeze(-1) * step) <= before)
        if not rises.any():
            break
        size = torch.where(rises, size / 2, size)
    return weights - torch.where(rises, 0, size).unsqueeze(-1) * step


def _fit_first_axis(sides: PreparedSides) -> Tensor:
    half_LR = sides.mean_difference_LR / 2
    within_LRR = sum_parts(rows_LbR.mT @ rows_LbR for rows_LbR in sides.deviations())
    spread_LRR = within_LRR + half_LR.unsqueeze(-1) * half_LR.unsqueeze(-2)
    axes_LRR: Tensor = torch.linalg.eigh(spread_LRR).eigenvectors
    return axes_LRR[..., -1]


def _fit_best_component(sides: PreparedSides, seed: int, components: int) -> Tensor:
    white_LnK, to_white_LRK, varies_LK = _whiten(sides, components)
    unmixing_LKK = _fast_ica(white_LnK, varies_LK, seed)
    gap_LK = torch.einsum(
        "lkj,lj->lk", unmixing_LKK, torch.einsum("lrk,lr->lk", to_white_LRK, sides.mean_difference_LR)
    )
    best_L = gap_LK.abs().argmax(-1)
    row_LK = unmixing_LKK[torch.arange(len(best_L), device=best_L.device), best_L]
    return torch.einsum("lrk,lk->lr", to_white_LRK, row_LK)


def _whiten(sides: PreparedSides, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows with unit variance on their first axes, the map to them, and which axes have any variance.

    Each axis is signed towards the positive side, so that neither the order of rows nor the basis changes the start.
    """
    n, (size_LR, axes_LRR) = sides.rows_LnR.shape[1], _principal_axes(sides)
    size_LK, axes_LRK = size_LR[:, :components], axes_LRR[:, :components].mT
    varies_LK = size_LK > 1e-7 * size_LK[:, :1]
    side_LK = torch.einsum("lrk,lr->lk", axes_LRK, sides.mean_difference_LR)
    factor_LK = torch.where(varies_LK, n**0.5 / size_LK, 0) * torch.where(side_LK < 0, -1, 1)
    to_white_LRK = axes_LRK * factor_LK.unsqueeze(1)
    return sides.rows_LnR @ to_white_LRK, to_white_LRK, varies_LK


def _principal_axes(sides: PreparedSides) -> tuple[Tensor, Tensor]:
    """Return the singular values and axes of the rows.

    Several chunks are reduced to one triangle by QR, a chunk at a time: sequential TSQR (Demmel et al. 2012, arXiv
    0808.2664).
    """
    rows_LnR, *others = sides.row_chunks()
    if others:
        rows_LnR = torch.linalg.qr(rows_LnR, mode="r").R
    for more_LbR in others:
        rows_LnR = torch.linalg.qr(torch.cat([rows_LnR, more_LbR], 1), mode="r").R
    _, size_LR, axes_LRR = torch.linalg.svd(rows_LnR, full_matrices=False)
    return size_LR, axes_LRR


def _fast_ica(white_LnK: Tensor, varies_LK: Tensor, seed: int) -> Tensor:
    """Return unmixing rows [L, K, K]. Axes without variance start apart from the others, and updates keep them so."""
    k = white_LnK.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    start_KK = torch.randn(k, k, generator=generator, dtype=torch.float64).to(white_LnK.device)
    both_varies_LKK = varies_LK.unsqueeze(-1) & varies_LK.unsqueeze(-2)
    unmixing = _decorrelate(torch.where(both_varies_LKK, start_KK, torch.eye(k).to(start_KK)))
    unconverged_L = torch.ones_like(varies_LK[:, 0])
    for _ in range(ICA_STEPS):
        tanh_LnK = torch.tanh(white_LnK @ unmixing.mT)
        slope_LK1 = (1 - tanh_LnK.square()).mean(1).unsqueeze(-1)
        update_LKK = tanh_LnK.mT @ white_LnK / white_LnK.shape[1] - slope_LK1 * unmixing
        signed_step_LK1 = torch.where((update_LKK * unmixing).sum(-1, keepdim=True) < 0, -ICA_STEP, ICA_STEP)
        moved_LKK = _decorrelate(unmixing + signed_step_LK1 * update_LKK)
        turned_L = ((moved_LKK * unmixing).sum(-1).abs() - 1).abs().amax(-1)
        unmixing = torch.where(unconverged_L.view(-1, 1, 1), moved_LKK, unmixing)
        unconverged_L = unconverged_L & (turned_L > ICA_TOLERANCE)
        if not unconverged_L.any():
            break
    return unmixing


def _decorrelate(unmixing_LKK: Tensor) -> Tensor:
    """Return the nearest orthogonal matrix, (W W^T)^(-1/2) W."""
    left_LKK, _, right_LKK = torch.linalg.svd(unmixing_LKK)
    nearest_LKK: Tensor = left_LKK @ right_LKK
    return nearest_LKK


def _fit_discriminant(sides: PreparedSides, shrinkage: float) -> Tensor:
    floor_L = sum_parts(rows_LbR.square().sum((1, 2)) for rows_LbR in sides.deviations()) / sides.hidden_size
    spread_L = floor_L > 1e-20  # of an average feature's 1: anything less is rounding
    floor_L11 = torch.where(spread_L, shrinkage * floor_L, 1).view(-1, 1, 1)
    identity = torch.eye(sides.rows_LnR.shape[-1]).to(sides.rows_LnR)
    within_LRR = sum_parts((1 - shrinkage) * rows_LbR.mT @ rows_LbR for rows_LbR in sides.deviations())
    return _conjugate_gradients(within_LRR + floor_L11 * identity, sides.mean_difference_LR)


def _conjugate_gradients(metric_LRR: Tensor, target_LR: Tensor) -> Tensor:
    """Maximise w . target - w^T metric w / 2 over w by conjugate gradients from 0."""
    point, slope, step = torch.zeros_like(target_LR), target_LR, target_LR
    size_L1 = slope.square().sum(-1, keepdim=True)
    tolerance_L1 = ASCENT_TOLERANCE**2 * size_L1
    for _ in range(ASCENT_STEPS):
        unconverged_L1 = size_L1 > tolerance_L1
        if not unconverged_L1.any():
            break
        curved = torch.einsum("lqr,lr->lq", metric_LRR, step)
        length_L1 = torch.where(unconverged_L1, size_L1 / (step * curved).sum(-1, keepdim=True), 0)
        point, slope = point + length_L1 * step, slope - length_L1 * curved
        size_L1, before_L1 = slope.square().sum(-1, keepdim=True), size_L1
        step = slope + torch.where(unconverged_L1, size_L1 / before_L1, 0) * step
    return point

"""Ways to find the direction that leads from a trait's negative side to its positive side.

L layers, D hidden, N positive rows, M negative rows, n = N + M, R = min(n, D), K components.

A method takes `positive_NLD`, `negative_MLD` and a seed, and returns float32 [L, D], all layers at once, worked out in
float64. N and M may differ. The mean of the positive rows never projects lower than the mean of the negative rows.
Multiplying all activations by a number changes nothing but mean_diff's norm, adding a vector to all rows changes
nothing, and turning the space turns the direction (random apart). A layer's direction depends on that layer only
(random apart: it depends on the layer's place in the list).

What can't be used raises, as `extraction.vectors.prepare.check_sides` says. All need 2 rows a side, mean_diff and
random 1.

x_i are rows, m+ and m- the sides' means, S+ and S- their covariances (1/N, 1/M), d = m+ - m-.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from extraction.vectors.chunked import Block, ChunkedRows, blocks_of, mean_row
from extraction.vectors.names import CONTROL, DEFAULT_METHODS, check_method
from extraction.vectors.prepare import PreparedSides, added, by_layers, check_sides, towards

PROBE_C = 1.0
NEWTON_STEPS = 100
ICA_COMPONENTS = 10
ICA_STEPS = 500
ICA_STEP = 5.0
ICA_TOLERANCE = 1e-10
SHRINKAGE = 0.01
ASCENT_STEPS = 1000
ASCENT_TOLERANCE = 1e-10


class Method(Protocol):
    """A way to find directions: [N, L, D] and [M, L, D] -> float32 [L, D]."""

    def __call__(self, positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int) -> Tensor: ...


def mean_diff(positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int = 0) -> Tensor:
    """m+ - m-, the raw difference of the sides' means: NOT unit norm, its norm is in the activations' own units.

    Source: Marks and Tegmark 2023 (arXiv 2310.06824, mass-mean); Rimsky et al. 2023 (arXiv 2312.06681).
    """
    check_sides(positive_NLD, negative_MLD)
    return _difference(positive_NLD, negative_MLD).float()


def probe(positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int = 0, c: float = PROBE_C) -> Tensor:
    """Weights w of a logistic regression, unit norm: argmin over w, b of |w|^2 / 2 + c sum_i log(1 + exp(-y_i f_i)).

    f_i = w . z_i + b, y_i = +1 or -1, b is not penalised. z_i are the rows of one layer, centred, and divided by one
    number so that the average feature has variance 1; so w is scikit-learn's `LogisticRegression(C=c)` on z, and c
    means the same at every layer and every scale. Solved by Newton's method with step halving, in the rows' span.

    Source: Alain and Bengio 2016 (arXiv 1610.01644); Newton/IRLS: Bishop 2006, section 4.3.3.
    """
    return by_layers(lambda sides: _logistic(sides, c), positive_NLD, negative_MLD)


def pca(positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int = 0) -> Tensor:
    """First principal axis, unit norm, of all rows around (m+ + m-) / 2, each side weighing one half.

    That is the top eigenvector of (S+ + S-) / 2 + d d^T / 4: the largest spread, whether or not the trait causes it.
    With N = M it is the first axis of ordinary PCA. The sign is the one that points to the positive mean.

    Source: Zou et al. 2023 (arXiv 2310.01405), there on paired differences; rows need no pairs here.
    """
    return by_layers(_first_axis, positive_NLD, negative_MLD)


def ica(positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int, components: int = ICA_COMPONENTS) -> Tensor:
    """Unmixing row, unit norm, of the independent component whose sources differ most between the sides.

    Rows are whitened on their first `components` principal axes (fewer where the rank is lower); FastICA, parallel,
    with g = tanh, from a start that the seed draws: U = E[g(Wz) z^T] - diag(E[g'(Wz)]) W, each row signed towards W's,
    then W <- (V V^T)^(-1/2) V with V = W + 5 U. FastICA proper takes V = U: that has the same fixed points, but cycles
    without end on components that are near Gaussian, so that rounding decides what comes out.
    Projecting on the direction gives the component's source. Of K components the one with the largest
    |mean+ - mean-| wins; sources have variance 1, so this is also the largest Cohen's d.

    Source: Hyvarinen 1999, "Fast and robust fixed-point algorithms for ICA", equations 20 and 45.
    """
    return by_layers(lambda sides: _best_component(sides, seed, components), positive_NLD, negative_MLD)


def gradient(positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int = 0, shrinkage: float = SHRINKAGE) -> Tensor:
    """Unit vector that maximises the standardised separation (w . d)^2 / (w^T S w), found by gradient ascent.

    S = (1 - shrinkage) (S+ + S-) / 2 + shrinkage t I, t = trace((S+ + S-) / 2) / D (S = I where there is no spread).
    Ascent is by conjugate gradients on w . d - w^T S w / 2, whose maximum is collinear; it is S^-1 d, Fisher's
    discriminant with the sides' priors equal, as in scikit-learn's `LinearDiscriminantAnalysis(shrinkage=...)`.

    Source: Fisher 1936; shrinkage: Ledoit and Wolf 2004; ascent: Hestenes and Stiefel 1952.
    """
    return by_layers(lambda sides: _most_separating(sides, shrinkage), positive_NLD, negative_MLD)


def random(positive_NLD: Tensor, negative_MLD: Tensor, *, seed: int, block: Block | None = None) -> Tensor:
    """A Gaussian draw from the seed, unit norm, oriented like the rest: the baseline that a method must beat.

    `block`: which layers the rows are of; all, unless given. A layer's draw is the same in any block.
    """
    check_sides(positive_NLD, negative_MLD)
    n_layers, hidden_size = positive_NLD.shape[1:]
    block = block or Block(0, n_layers, n_layers)
    generator = torch.Generator().manual_seed(seed)
    draw_LD = torch.randn((block.n_layers, hidden_size), generator=generator, dtype=torch.float64)[block.layers]
    return normalised(towards(draw_LD.to(positive_NLD.device), _difference(positive_NLD, negative_MLD))).float()


METHODS: dict[str, Method] = {
    "mean_diff": mean_diff,
    "probe": probe,
    "pca": pca,
    "ica": ica,
    "gradient": gradient,
    "random": random,
}
assert tuple(METHODS) == (*DEFAULT_METHODS, CONTROL)  # the names that need no torch


def find_method(name: str) -> Method:
    """Return the method of that name. Raises ConfigError, with the nearest known name."""
    check_method(name)
    return METHODS[name]


def fit_block(name: str, positive_NkD: Tensor, negative_MkD: Tensor, block: Block, *, seed: int) -> Tensor:
    """A method's directions [k, D] at some layers: what it finds there when it is given all of them."""
    if name == CONTROL:
        return random(positive_NkD, negative_MkD, seed=seed, block=block)
    return find_method(name)(positive_NkD, negative_MkD, seed=seed)


def fit_layers(names: Sequence[str], rows: ChunkedRows, n_positive: int, *, seed: int) -> dict[str, Tensor]:
    """Methods' directions [L, D] for rows that are read some layers at a time, the positive ones first."""

    def found_at(block: Block) -> list[Tensor]:
        rows_nkD = rows.at(block.layers)  # let go before the next ones are read
        sides = rows_nkD[:n_positive], rows_nkD[n_positive:]
        return [fit_block(name, *sides, block, seed=seed) for name in names]

    parts = zip(*map(found_at, blocks_of(rows.shape)), strict=True)
    return {name: torch.cat(found) for name, found in zip(names, parts, strict=True)}


def normalised(direction_LD: Tensor) -> Tensor:
    """The same directions with unit norm, in the same dtype; a zero direction is refused with ValueError."""
    norm_L1 = direction_LD.double().norm(dim=-1, keepdim=True)
    if not (norm_L1 > 0).all():
        raise ValueError(f"row {int((norm_L1 <= 0).nonzero()[0, 0])} is a zero direction; it has no unit vector")
    unit_LD: Tensor = direction_LD / norm_L1
    return unit_LD.to(direction_LD.dtype)


def _difference(positive_NLD: Tensor, negative_MLD: Tensor) -> Tensor:
    return mean_row(positive_NLD) - mean_row(negative_MLD)


def _logistic(sides: PreparedSides, c: float) -> Tensor:
    n_layers, n, width = sides.rows_LnR.shape
    penalty, sign_n = sides.rows_LnR.new_ones(width + 1), sides.rows_LnR.new_ones(n)
    penalty[-1] = 0  # the last weight is b
    sign_n[sides.n_positive :] = -1

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        """Rows with a feature for b [L, b, R + 1], and their signs [b]."""
        views = sides.pieces()
        for rows_LbR, sign_b in zip(views, sign_n.split(views[0].shape[1]), strict=True):
            yield torch.cat([rows_LbR, torch.ones_like(rows_LbR[..., :1])], -1), sign_b

    def loss(weights: Tensor) -> Tensor:
        margins = (sign_b * torch.einsum("lnr,lr->ln", rows, weights) for rows, sign_b in pieces())
        return (penalty * weights.square()).sum(-1) / 2 + c * added(softplus(-margin).sum(-1) for margin in margins)

    weights = sides.rows_LnR.new_zeros(n_layers, width + 1)
    for _ in range(NEWTON_STEPS):
        slope, curvature = penalty * weights, torch.diag(penalty)
        for rows, sign_b in pieces():
            chance = torch.sigmoid(torch.einsum("lnr,lr->ln", rows, weights))
            slope = slope + c * torch.einsum("lnr,ln->lr", rows, chance - (sign_b > 0).double())
            curvature = c * (rows * (chance * (1 - chance)).unsqueeze(-1)).mT @ rows + curvature
        step = torch.linalg.solve(curvature, slope)
        weights, before = _descend(loss, weights, step), weights
        if (weights - before).abs().max() <= 1e-12 * weights.abs().max():
            break
    return weights[:, :-1]


def _descend(loss: Callable[[Tensor], Tensor], weights: Tensor, step: Tensor) -> Tensor:
    """Each layer's `weights - step`, halving the step until the loss doesn't rise; unmoved where that fails."""
    before = loss(weights)
    size = torch.ones_like(before)
    for _ in range(40):
        rises = ~(loss(weights - size.unsqueeze(-1) * step) <= before)
        if not rises.any():
            break
        size = torch.where(rises, size / 2, size)
    return weights - torch.where(rises, 0, size).unsqueeze(-1) * step


def _first_axis(sides: PreparedSides) -> Tensor:
    half_LR = sides.difference_LR / 2
    within_LRR = added(rows_LbR.mT @ rows_LbR for rows_LbR in sides.within())
    spread_LRR = within_LRR + half_LR.unsqueeze(-1) * half_LR.unsqueeze(-2)
    axes_LRR: Tensor = torch.linalg.eigh(spread_LRR).eigenvectors
    return axes_LRR[..., -1]


def _best_component(sides: PreparedSides, seed: int, components: int) -> Tensor:
    white_LnK, to_white_LRK, live_LK = _whiten(sides, components)
    unmixing_LKK = _fast_ica(white_LnK, live_LK, seed)
    gap_LK = torch.einsum("lkj,lj->lk", unmixing_LKK, torch.einsum("lrk,lr->lk", to_white_LRK, sides.difference_LR))
    best_L = gap_LK.abs().argmax(-1)
    row_LK = unmixing_LKK[torch.arange(len(best_L), device=best_L.device), best_L]
    return torch.einsum("lrk,lk->lr", to_white_LRK, row_LK)


def _whiten(sides: PreparedSides, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with unit variance on their first axes, the map that makes them, and which axes have any variance.

    An axis is signed towards the positive side, so that neither the order of rows nor the basis changes the start.
    """
    n, (size_LR, axes_LRR) = sides.rows_LnR.shape[1], _principal(sides)
    size_LK, axes_LRK = size_LR[:, :components], axes_LRR[:, :components].mT
    live_LK = size_LK > 1e-7 * size_LK[:, :1]
    side_LK = torch.einsum("lrk,lr->lk", axes_LRK, sides.difference_LR)
    factor_LK = torch.where(live_LK, n**0.5 / size_LK, 0) * torch.where(side_LK < 0, -1, 1)
    to_white_LRK = axes_LRK * factor_LK.unsqueeze(1)
    return sides.rows_LnR @ to_white_LRK, to_white_LRK, live_LK


def _principal(sides: PreparedSides) -> tuple[Tensor, Tensor]:
    """Singular values and axes of the rows; of several pieces, those of their triangle, which QR makes of one more
    piece at a time (Demmel et al. 2012, arXiv 0808.2664, sequential TSQR)."""
    rows_LnR, *others = sides.pieces()
    if others:
        rows_LnR = torch.linalg.qr(rows_LnR, mode="r").R
    for more_LbR in others:
        rows_LnR = torch.linalg.qr(torch.cat([rows_LnR, more_LbR], 1), mode="r").R
    _, size_LR, axes_LRR = torch.linalg.svd(rows_LnR, full_matrices=False)
    return size_LR, axes_LRR


def _fast_ica(white_LnK: Tensor, live_LK: Tensor, seed: int) -> Tensor:
    """Unmixing rows [L, K, K]. A dead axis starts apart from the live ones, and the update keeps it apart."""
    k = white_LnK.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    start_KK = torch.randn(k, k, generator=generator, dtype=torch.float64).to(white_LnK.device)
    both_live_LKK = live_LK.unsqueeze(-1) & live_LK.unsqueeze(-2)
    unmixing = _decorrelate(torch.where(both_live_LKK, start_KK, torch.eye(k).to(start_KK)))
    moving_L = torch.ones_like(live_LK[:, 0])
    for _ in range(ICA_STEPS):
        bent_LnK = torch.tanh(white_LnK @ unmixing.mT)
        slope_LK1 = (1 - bent_LnK.square()).mean(1).unsqueeze(-1)
        pull = bent_LnK.mT @ white_LnK / white_LnK.shape[1] - slope_LK1 * unmixing
        ahead_LK1 = torch.where((pull * unmixing).sum(-1, keepdim=True) < 0, -ICA_STEP, ICA_STEP)
        update = _decorrelate(unmixing + ahead_LK1 * pull)
        turned_L = ((update * unmixing).sum(-1).abs() - 1).abs().amax(-1)
        unmixing = torch.where(moving_L.view(-1, 1, 1), update, unmixing)
        moving_L = moving_L & (turned_L > ICA_TOLERANCE)
        if not moving_L.any():
            break
    return unmixing


def _decorrelate(unmixing_LKK: Tensor) -> Tensor:
    """(W W^T)^(-1/2) W."""
    left_LKK, _, right_LKK = torch.linalg.svd(unmixing_LKK)
    nearest_LKK: Tensor = left_LKK @ right_LKK
    return nearest_LKK


def _most_separating(sides: PreparedSides, shrinkage: float) -> Tensor:
    floor_L = added(rows_LbR.square().sum((1, 2)) for rows_LbR in sides.within()) / sides.hidden_size
    spread_L = floor_L > 1e-20  # of an average feature's 1: anything less is rounding
    floor_L11 = torch.where(spread_L, shrinkage * floor_L, 1).view(-1, 1, 1)
    identity = torch.eye(sides.rows_LnR.shape[-1]).to(sides.rows_LnR)
    within_LRR = added((1 - shrinkage) * rows_LbR.mT @ rows_LbR for rows_LbR in sides.within())
    return _ascend(within_LRR + floor_L11 * identity, sides.difference_LR)


def _ascend(metric_LRR: Tensor, target_LR: Tensor) -> Tensor:
    """Maximise w . target - w^T metric w / 2 over w, from 0, each step exact along a conjugate of the gradient."""
    point, slope, way = torch.zeros_like(target_LR), target_LR, target_LR
    size_L1 = slope.square().sum(-1, keepdim=True)
    enough_L1 = ASCENT_TOLERANCE**2 * size_L1
    for _ in range(ASCENT_STEPS):
        moving_L1 = size_L1 > enough_L1
        if not moving_L1.any():
            break
        bent = torch.einsum("lqr,lr->lq", metric_LRR, way)
        length_L1 = torch.where(moving_L1, size_L1 / (way * bent).sum(-1, keepdim=True), 0)
        point, slope = point + length_L1 * way, slope - length_L1 * bent
        size_L1, before_L1 = slope.square().sum(-1, keepdim=True), size_L1
        way = slope + torch.where(moving_L1, size_L1 / before_L1, 0) * way
    return point

"""Controls that a direction must beat (random directions, shuffled labels), and its split-half cosine.

Shapes: n rows, K methods or random draws, L layers, D hidden, H ways to halve the questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from extraction.core.errors import TraitError
from extraction.vectors.chunked import LayerBlock
from extraction.vectors.held_out import fit_with_draws, fit_with_methods, held_out_scores
from extraction.vectors.method_table import find_method
from extraction.vectors.methods import fit_block
from extraction.vectors.metrics import auroc, cohens_d
from extraction.vectors.splits import LabelledRows, Split, split_halves

N_HALVINGS = 5
N_HALVINGS_SLOW = 2


@dataclass(frozen=True)
class RandomDirectionMetrics:
    """Test metrics [K] of random directions, each at the layer that validation chose for it."""

    auroc_K: Tensor
    cohens_d_K: Tensor


@dataclass(frozen=True)
class ShuffledLabels:
    """One shuffle of the labels: labels [n], the method and layer index chosen, and the rows' scores there [n]."""

    positive_n: Tensor
    method: str
    index: int
    scores_n: Tensor


def random_directions(shape: tuple[int, int, int], *, seed: int) -> Tensor:
    """Draw Gaussian directions [K, L, D] of unit norm.

    Where random directions separate the sides, the sides differ in much of the space.
    """
    generator = torch.Generator().manual_seed(seed)
    draws_KLD = torch.randn(shape, generator=generator, dtype=torch.float64)
    unit_KLD: Tensor = draws_KLD / draws_KLD.norm(dim=-1, keepdim=True)
    return unit_KLD


def random_direction_metrics(rows: LabelledRows, split: Split, unit_KLD: Tensor) -> Tensor:
    """Compute AUROC and Cohen's d of random directions, on validation and then on test: [4, K, L]."""
    (scores_nKL,) = held_out_scores(rows, split, fit_with_draws(unit_KLD))
    parts_n = [split.part_n[name] for name in ("validation", "test")]
    metrics = [metric for n in parts_n for metric in _auroc_and_cohens_d(scores_nKL[n], rows.positive_n[n])]
    return torch.stack(metrics)


def select_draw_layers(metrics_4KL: Tensor) -> RandomDirectionMetrics:
    """Take the test metrics of `random_direction_metrics` at the layer that validation chooses for each draw."""
    auroc_KL, cohens_d_KL, *test = metrics_4KL
    layers = [choose_best(auroc_KL[draw : draw + 1], cohens_d_KL[draw : draw + 1])[1] for draw in range(len(auroc_KL))]
    layer_K1 = torch.tensor(layers).unsqueeze(-1)
    return RandomDirectionMetrics(*(metric_KL.gather(1, layer_K1).flatten() for metric_KL in test))


def shuffled_label_scores(
    rows: LabelledRows, split: Split, methods: Sequence[str], block: LayerBlock, *, seed: int
) -> Tensor | None:
    """Compute held-out scores [n, K, L] of the fast methods, fitted on rows whose labels were shuffled.

    None where the shuffle leaves a side too few rows, or no difference between the sides.
    """
    with suppress(TraitError):
        (scores_nKL,) = held_out_scores(rows, split, fit_with_methods(fast_methods(methods), seed=seed, block=block))
        return scores_nKL
    return None


def choose_for_shuffled_labels(
    relabelled: LabelledRows, split: Split, methods: Sequence[str], scores_nKL: Tensor
) -> ShuffledLabels:
    """Choose method and layer by validation, as for the true labels."""
    validation_n = split.part_n["validation"]
    method, index = choose_best(*_auroc_and_cohens_d(scores_nKL[validation_n], relabelled.positive_n[validation_n]))
    return ShuffledLabels(relabelled.positive_n, fast_methods(methods)[method], index, scores_nKL[:, method, index])


def fast_methods(methods: Sequence[str]) -> list[str]:
    """Return the methods that are neither slow nor a control; all of them where none are left."""
    return [name for name in methods if not (find_method(name).is_slow or find_method(name).is_control)] or list(
        methods
    )


def choose_best(auroc_KL: Tensor, cohens_d_KL: Tensor) -> tuple[int, int]:
    """Return (method index, layer index) of the highest AUROC.

    Among equals the largest Cohen's d, then the earlier method, then the lower layer.
    """
    effect_KL = cohens_d_KL.nan_to_num(nan=-torch.inf)
    ranked = [
        (area, effect, -method, -layer)
        for method, row in enumerate(zip(auroc_KL.nan_to_num(nan=0.0).tolist(), effect_KL.tolist(), strict=True))
        for layer, (area, effect) in enumerate(zip(*row, strict=True))
    ]
    _, _, method, layer = max(ranked)
    return -method, -layer


def half_direction_cosines(rows: LabelledRows, method: str, block: LayerBlock, *, seed: int) -> Tensor:
    """Compute the cosines [H, L] between directions fitted on two disjoint halves of the questions.

    H is 5, and 2 for a slow method. A row is NaN where a half has too few rows, or no difference between its sides.
    """
    n_halvings = N_HALVINGS_SLOW if find_method(method).is_slow else N_HALVINGS
    cosines_HL = torch.full((n_halvings, rows.activations_nLD.shape[1]), torch.nan, dtype=torch.float64)
    for halving in range(n_halvings):
        with suppress(TraitError):
            first, second = (
                fit_block(method, *half.sides, block, seed=seed) for half in split_halves(rows, seed=seed + halving)
            )
            cosines_HL[halving] = cosine_similarity(first.double(), second.double(), dim=-1)
    return cosines_HL


def split_half_cosine(cosines_HL: Tensor) -> Tensor:
    """Average cosines over the halvings that are defined at every layer: [L]; NaN where there are none.

    1: the direction does not depend on the questions. 0: it depends on them alone.
    """
    return cosines_HL[~cosines_HL.isnan().any(-1)].mean(0)


def _auroc_and_cohens_d(scores_nKL: Tensor, positive_n: Tensor) -> tuple[Tensor, Tensor]:
    sides = scores_nKL[positive_n].flatten(1), scores_nKL[~positive_n].flatten(1)
    shape = scores_nKL.shape[1:]
    return auroc(*sides).view(shape), cohens_d(*sides).view(shape)

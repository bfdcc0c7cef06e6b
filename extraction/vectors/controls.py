"""What a method must beat, and how much it depends on the questions that it was given.

n rows, K draws or methods, L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from extraction.core.errors import TraitError
from extraction.vectors.chunked import Block
from extraction.vectors.held_out import by_draws, by_methods, held_out_scores
from extraction.vectors.methods import fit_block
from extraction.vectors.metrics import auroc, cohens_d
from extraction.vectors.names import CONTROL
from extraction.vectors.splits import LabelledRows, Split, halves

SLOW_METHODS = ("ica",)  # methods whose fit takes as long as all others': fewer halves, and no part in the placebos
N_HALVINGS = 5
N_HALVINGS_SLOW = 2


@dataclass(frozen=True)
class Draws:
    """The test figures [K] of random directions, each at the layer that its validation chose."""

    auroc_K: Tensor
    cohens_d_K: Tensor


@dataclass(frozen=True)
class Placebo:
    """One shuffle: the labels, the chosen method and layer index, and the rows' scores there [n]."""

    positive_n: Tensor
    method: str
    index: int
    scores_n: Tensor


def random_directions(shape: tuple[int, int, int], *, seed: int) -> Tensor:
    """Gaussian directions [K, L, D] of unit norm, to be read like any method's.

    What separates along one that nobody has chosen, separates nearly everywhere in the space.
    """
    generator = torch.Generator().manual_seed(seed)
    draws_KLD = torch.randn(shape, generator=generator, dtype=torch.float64)
    unit_KLD: Tensor = draws_KLD / draws_KLD.norm(dim=-1, keepdim=True)
    return unit_KLD


def random_figures(rows: LabelledRows, split: Split, unit_KLD: Tensor) -> Tensor:
    """AUROC and Cohen's d of random directions, oriented on the fit rows: of validation, then of test: [4, K, L]."""
    (scores_nKL,) = held_out_scores(rows, split, by_draws(unit_KLD))
    here_n = [split.part_n[name] for name in ("validation", "test")]
    return torch.stack([figure for n in here_n for figure in _figures(scores_nKL[n], rows.positive_n[n])])


def draws_of(figures_4KL: Tensor) -> Draws:
    """What `random_figures` come to at each draw's own layer."""
    areas_KL, effects_KL, *test = figures_4KL
    layers = [best(areas_KL[way : way + 1], effects_KL[way : way + 1])[1] for way in range(len(areas_KL))]
    at_K1 = torch.tensor(layers).unsqueeze(-1)
    return Draws(*(figure_KL.gather(1, at_K1).flatten() for figure_KL in test))


def placebo_scores(
    rows: LabelledRows, split: Split, methods: Sequence[str], block: Block, *, seed: int
) -> Tensor | None:
    """Held-out scores [n, K, L] of `cheap` methods, fitted on rows whose labels mean nothing.

    None where the shuffle leaves a side too few rows, or none that differ.
    """
    with suppress(TraitError):
        (scores_nKL,) = held_out_scores(rows, split, by_methods(is_fast(methods), seed=seed, block=block))
        return scores_nKL
    return None


def placebo(relabelled: LabelledRows, split: Split, methods: Sequence[str], scores_nKL: Tensor) -> Placebo:
    """The rest of the way, choice of method and layer, for the scores of all layers."""
    validation = split.part_n["validation"]
    method, index = best(*_figures(scores_nKL[validation], relabelled.positive_n[validation]))
    return Placebo(relabelled.positive_n, is_fast(methods)[method], index, scores_nKL[:, method, index])


def is_fast(methods: Sequence[str]) -> list[str]:
    """The methods that placebos are tried with: without the dear ones and the control, if any are left."""
    return [name for name in methods if name not in (*SLOW_METHODS, CONTROL)] or list(methods)


def best(auroc_KL: Tensor, cohens_d_KL: Tensor) -> tuple[int, int]:
    """(way, layer) of the highest AUROC; among equals the largest Cohen's d, then the earlier way, the lower layer."""
    effect_KL = cohens_d_KL.nan_to_num(nan=-torch.inf)
    ranked = [
        (area, effect, -way, -layer)
        for way, row in enumerate(zip(auroc_KL.nan_to_num(nan=0.0).tolist(), effect_KL.tolist(), strict=True))
        for layer, (area, effect) in enumerate(zip(*row, strict=True))
    ]
    _, _, way, layer = max(ranked)
    return -way, -layer


def half_cosines(rows: LabelledRows, method: str, block: Block, *, seed: int) -> Tensor:
    """Cosines [H, L] of the directions of two disjoint halves of the questions, for several ways to halve them.

    5 of them, 2 for a dear method. A row is NaN where a half has too few rows, or none that differ.
    """
    n_halvings = N_HALVINGS_SLOW if method in SLOW_METHODS else N_HALVINGS
    found_HL = torch.full((n_halvings, rows.activations_nLD.shape[1]), torch.nan, dtype=torch.float64)
    for halving in range(n_halvings):
        with suppress(TraitError):
            first, second = (
                fit_block(method, *half.sides, block, seed=seed) for half in halves(rows, seed=seed + halving)
            )
            found_HL[halving] = cosine_similarity(first.double(), second.double(), dim=-1)
    return found_HL


def split_half_cosine(cosines_HL: Tensor) -> Tensor:
    """Mean over the halvings that could be had at every layer: [L]; NaN where there are none.

    1: the direction does not depend on the questions; 0: there is nothing but the questions.
    """
    return cosines_HL[~cosines_HL.isnan().any(-1)].mean(0)


def _figures(scores_nKL: Tensor, positive_n: Tensor) -> tuple[Tensor, Tensor]:
    sides = scores_nKL[positive_n].flatten(1), scores_nKL[~positive_n].flatten(1)
    shape = scores_nKL.shape[1:]
    return auroc(*sides).view(shape), cohens_d(*sides).view(shape)

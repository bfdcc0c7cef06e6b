"""Attention of a decode step over each row's live columns only, on CPUs.

The rows of a running batch differ in age, so most rows need about half of the window's columns. torch's attention also
calls its matrix library twice per row and head, and each call costs more to start than to compute. Here one list holds
the live columns of all rows and heads. It is the pattern of a sparse matrix, whose entries (the scores) come from
`sampled_addmm`, and the bags of an `embedding_bag`, whose weighted sums are attention's output. Both read the cache in
place. Only for one query per key head: where query heads share keys, a dense product is faster.

Shapes: B rows, G heads, E = B G pairs of row and head, S columns, C head dimension, K columns of the cache over all
rows and heads, N live columns of all rows and heads, M = E + 1 bounds.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class LiveColumns:
    """The live columns of a step, as indices into the cache (`key_N`) and into scores [E, S] (`place_N`).

    `begin_M` holds the index of the first live column of every pair of row and head, and N last. `score_ES` is a
    buffer, minus infinity in dead columns; each layer overwrites the live ones.
    """

    begin_M: Tensor
    key_N: Tensor
    place_N: Tensor
    score_ES: Tensor
    n_keys: int

    @staticmethod
    def of(mask_B1TS: Tensor, key_BGSC: Tensor) -> LiveColumns:
        """List the columns that the mask leaves, of keys for which `is_row_major` holds."""
        n_rows, n_heads, n_columns, _ = key_BGSC.shape
        stride = _columns_of_cache(key_BGSC)
        live_ES = mask_B1TS.expand(n_rows, n_heads, 1, n_columns).reshape(-1, n_columns)
        begin_M = live_ES.new_zeros(len(live_ES) + 1, dtype=torch.int32)
        torch.cumsum(live_ES.sum(1), 0, out=begin_M[1:])
        pair_N, column_N = live_ES.nonzero(as_tuple=True)
        score_ES = key_BGSC.new_full(live_ES.shape, -torch.inf)
        n_keys = (len(live_ES) - 1) * stride + n_columns
        return LiveColumns(begin_M, (pair_N * stride + column_N).int(), pair_N * n_columns + column_N, score_ES, n_keys)


# mask -> its live columns by layout of the keys: all layers of a step share a mask
_cached: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def live_columns(mask_B1TS: Tensor, key_BGSC: Tensor) -> LiveColumns:
    """Return `LiveColumns.of`, computed once per mask and layout of the keys."""
    by_layout: dict[tuple[int, ...], LiveColumns] = _cached.setdefault(mask_B1TS, {})
    layout = (*key_BGSC.shape, key_BGSC.stride(1))
    if layout not in by_layout:
        by_layout[layout] = LiveColumns.of(mask_B1TS, key_BGSC)
    return by_layout[layout]


def _columns_of_cache(key_BGSC: Tensor) -> int:
    """Return the number of columns of the cache that these keys are a slice of."""
    return key_BGSC.stride(1) // key_BGSC.shape[3]


def is_row_major(states_BGSC: Tensor) -> bool:
    """Return True for a slice of adjacent columns of one contiguous float32 cache on the CPU."""
    n_heads, n_columns, size = states_BGSC.shape[1:]
    stride = max(_columns_of_cache(states_BGSC), n_columns)
    in_order = states_BGSC.stride() == (n_heads * stride * size, stride * size, size, 1)
    fits_int32 = states_BGSC.shape[0] * n_heads * stride < 2**31  # indices have 32 bits
    return in_order and fits_int32 and states_BGSC.dtype == torch.float32 and states_BGSC.device.type == "cpu"


def is_supported(query_BGTC: Tensor, key_BGSC: Tensor, value_BGSC: Tensor, mask_B1TS: Tensor | None) -> bool:
    """Return True if `sparse_attention` can compute a step: one query per key head, a boolean mask, plain caches."""
    one_each = query_BGTC.shape[2] == 1 and query_BGTC.shape[1] == key_BGSC.shape[1]
    masked = mask_B1TS is not None and mask_B1TS.dtype == torch.bool and mask_B1TS.shape[1] == 1
    # keys and values share one list of columns, so they must have one layout
    same_layout = key_BGSC.shape == value_BGSC.shape and key_BGSC.stride() == value_BGSC.stride()
    row_major = same_layout and is_row_major(key_BGSC) and is_row_major(value_BGSC)
    return one_each and masked and row_major and not torch.is_grad_enabled()


def sparse_attention(
    query_BG1C: Tensor, key_BGSC: Tensor, value_BGSC: Tensor, columns: LiveColumns, *, scaling: float
) -> Tensor:
    """Compute softmax(scaling * q k^T) v over each row's live columns: [B, G, 1, C]."""
    size = query_BG1C.shape[3]
    keys_KC, values_KC = (_flatten_columns(states, columns.n_keys) for states in (key_BGSC, value_BGSC))
    zeros_N = key_BGSC.new_zeros(len(columns.key_N))
    shape = (len(columns.score_ES), columns.n_keys)
    entries = torch.sparse_csr_tensor(columns.begin_M, columns.key_N, zeros_N, size=shape, check_invariants=False)
    query_EC = query_BG1C.reshape(-1, size)
    scores_N = torch.sparse.sampled_addmm(entries, query_EC, keys_KC.t(), beta=0.0, alpha=scaling).values()
    columns.score_ES.view(-1).scatter_(0, columns.place_N, scores_N)
    weight_N = columns.score_ES.softmax(-1).view(-1).index_select(0, columns.place_N)
    out_EC = embedding_bag(
        columns.key_N, values_KC, columns.begin_M, mode="sum", per_sample_weights=weight_N, include_last_offset=True
    )
    return out_EC.view(query_BG1C.shape)


def _flatten_columns(states_BGSC: Tensor, n_keys: int) -> Tensor:
    """View the cache as one column per row, from the first of these columns on: [n_keys, C]."""
    size = states_BGSC.shape[3]
    return states_BGSC.as_strided((n_keys, size), (size, 1))


def silence_sparse_warnings() -> None:
    """Trigger torch's once-per-process warning about sparse CSR tensors with warnings off."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [0.0], size=(1, 1))

"""Attention of a decode step over the columns that each row needs, and over no others: for processors.

The rows of a running batch differ in age, so of the columns that any of them needs, most rows need half. And torch's
attention asks its matrix library for two products of one row by row and head, each of which costs more to begin than
to do. Here a list says which columns of the cache count, row by row and head by head: as a sparse matrix, whose
entries are the scores that a sampled product works out; and as the bags of an embedding, whose weighted sums are the
answer. Both read the cache as it lies. For one query a key head: where heads share keys, a product pays.

Shapes: B rows, G heads, S columns, C head dimension; N live columns of all rows and heads.
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
    """The live columns of a step: where they lie in the cache, and in scores [BG, S].

    `begin_M`: of the BG + 1 limits between rows and heads, each one's first entry. `score_ES`: room for scores, minus
    infinity where nothing is live; a layer fills it, and the next one overwrites the same places.
    """

    begin_M: Tensor
    key_N: Tensor
    place_N: Tensor
    score_ES: Tensor
    n_keys: int

    @staticmethod
    def of(mask_B1TS: Tensor, key_BGSC: Tensor) -> LiveColumns:
        """Those that the mask leaves, of keys that lie as `lies_in_rows` has it."""
        n_rows, n_heads, n_columns, _ = key_BGSC.shape
        stride = _columns_of_cache(key_BGSC)
        live_ES = mask_B1TS.expand(n_rows, n_heads, 1, n_columns).reshape(-1, n_columns)
        begin_M = live_ES.new_zeros(len(live_ES) + 1, dtype=torch.int32)
        torch.cumsum(live_ES.sum(1), 0, out=begin_M[1:])
        at_N, column_N = live_ES.nonzero(as_tuple=True)
        score_ES = key_BGSC.new_full(live_ES.shape, -torch.inf)
        n_keys = (len(live_ES) - 1) * stride + n_columns
        return LiveColumns(begin_M, (at_N * stride + column_N).int(), at_N * n_columns + column_N, score_ES, n_keys)


# one mask serves all layers of a step; what was listed for it goes when it goes
_listed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def live_columns(mask_B1TS: Tensor, key_BGSC: Tensor) -> LiveColumns:
    """As `Columns.of`, worked out once for a mask and keys that lie alike."""
    known: dict[tuple[int, ...], LiveColumns] = _listed.setdefault(mask_B1TS, {})
    layout = (*key_BGSC.shape, key_BGSC.stride(1))
    if layout not in known:
        known[layout] = LiveColumns.of(mask_B1TS, key_BGSC)
    return known[layout]


def _columns_of_cache(key_BGSC: Tensor) -> int:
    """How many columns the cache has that these keys are columns of."""
    return key_BGSC.stride(1) // key_BGSC.shape[3]


def is_row_major(states_BGSC: Tensor) -> bool:
    """Whether keys or values are neighbouring columns of one cache that lies in one piece, of float32."""
    n_heads, n_columns, size = states_BGSC.shape[1:]
    stride = max(_columns_of_cache(states_BGSC), n_columns)
    in_order = states_BGSC.stride() == (n_heads * stride * size, stride * size, size, 1)
    few = states_BGSC.shape[0] * n_heads * stride < 2**31  # entries are named by 32 bits
    return in_order and few and states_BGSC.dtype == torch.float32 and states_BGSC.device.type == "cpu"


def is_supported(query_BGTC: Tensor, key_BGSC: Tensor, value_BGSC: Tensor, mask_B1TS: Tensor | None) -> bool:
    """Whether a step is of the kind that this module is for."""
    one_each = query_BGTC.shape[2] == 1 and query_BGTC.shape[1] == key_BGSC.shape[1]
    masked = mask_B1TS is not None and mask_B1TS.dtype == torch.bool and mask_B1TS.shape[1] == 1
    # one list of columns serves both, so values must lie as keys do
    alike = key_BGSC.shape == value_BGSC.shape and key_BGSC.stride() == value_BGSC.stride()
    lie = alike and is_row_major(key_BGSC) and is_row_major(value_BGSC)
    return one_each and masked and lie and not torch.is_grad_enabled()


def sparse_attention(
    query_BG1C: Tensor, key_BGSC: Tensor, value_BGSC: Tensor, columns: LiveColumns, *, scaling: float
) -> Tensor:
    """Softmax of (q . k) times the scaling over each row's own columns: [B, G, 1, C]."""
    size = query_BG1C.shape[3]
    keys_KC, values_KC = (_in_one(states, columns.n_keys) for states in (key_BGSC, value_BGSC))
    zeros_N = key_BGSC.new_zeros(len(columns.key_N))
    shape = (len(columns.score_ES), columns.n_keys)
    entries = torch.sparse_csr_tensor(columns.begin_M, columns.key_N, zeros_N, size=shape, check_invariants=False)
    query_EC = query_BG1C.reshape(-1, size)
    scores_N = torch.sparse.sampled_addmm(entries, query_EC, keys_KC.t(), beta=0.0, alpha=scaling).values()
    columns.score_ES.view(-1).scatter_(0, columns.place_N, scores_N)
    weight_N = columns.score_ES.softmax(-1).view(-1).index_select(0, columns.place_N)
    found_EC = embedding_bag(
        columns.key_N, values_KC, columns.begin_M, mode="sum", per_sample_weights=weight_N, include_last_offset=True
    )
    return found_EC.view(query_BG1C.shape)


def _in_one(states_BGSC: Tensor, n_keys: int) -> Tensor:
    """The cache's columns one below another, from the first of these on: [n_keys, C], without a copy."""
    size = states_BGSC.shape[3]
    return states_BGSC.as_strided((n_keys, size), (size, 1))


def silence_sparse_warnings() -> None:
    """torch says once a process that its sparse matrices are new; users need not read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [0.0], size=(1, 1))

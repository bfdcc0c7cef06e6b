"""Decoding strategies: plain, logit-diff amplification, and speculation with a draft model or n-gram lookup.

A strategy follows the slots (`assign`, `select_rows`), may read every prefill (`prefill`), may propose tokens before a
step (`propose`), may change the step's logits (`process_logits`), and records what was accepted.

Shapes: B slots, T columns, R rows that enter, P prompt columns, S columns of the window, K proposals, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from extraction.core.errors import ModelError
from extraction.engine.logit_diff import Amplify, align_logits, amplify_logits, compared_columns
from extraction.engine.requests import SpeculationStats
from extraction.engine.row_state import RowBuffers
from extraction.engine.sampler import Sample, Sampler, sample_from
from extraction.engine.speculation import AdaptiveDepth, NgramLookup, Proposal, Speculate
from extraction.model.kv_cache import CacheWindow, make_cache

if TYPE_CHECKING:
    from extraction.model.language_model import LanguageModel

Strategy = Sample | Amplify | Speculate


class ModelWithCache:
    """A model and its KV cache. Several models read the same tokens in one window.

    `clamps`: map token ids past the embedding's last row to that row. A second model may have fewer padding rows in its
    embedding than the first has in its head.
    """

    def __init__(self, lm: LanguageModel, window: CacheWindow, *, clamps: bool = False) -> None:
        self.lm, self.cache = lm, make_cache(lm.model, window)
        embeddings: Any = lm.model.get_input_embeddings()
        self.last_id = int(embeddings.weight.shape[0]) - 1 if clamps else None

    def forward(self, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor, n_last: int = 1) -> Tensor:
        """Run one forward pass; return the logits of the last `n_last` columns, [B, n_last, V]."""
        device = self.lm.device
        known_BT = ids_BT if self.last_id is None else ids_BT.clamp(max=self.last_id)
        logits_BTV = self.lm.cached_logits(
            known_BT.to(device), mask_BS.to(device), position_BT.to(device), self.cache, n_last
        )
        return logits_BTV.to(ids_BT.device)


@dataclass(frozen=True)
class ProposerInput:
    """State of the batch before a step. `room[b]`: number of proposals that row b can use (0 for an idle row)."""

    rows: RowBuffers
    mask_BS: Tensor
    last_position: int
    sampler: Sampler
    room: Sequence[int]


class PlainDecoding:
    """One model, one token a step; the base of the other strategies.

    `names`: roles of the two models, for errors. `streams`: streams of random numbers besides the draw's. `model`: the
    second model. `depth`: largest number of proposals. `in_place`: True if a step reads only buffers at fixed
    addresses, so that it can be captured as a CUDA graph.
    """

    names: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    model: ModelWithCache | None = None
    depth = 0
    in_place = True

    def __init__(self, strategy: Any, window: CacheWindow, lm: LanguageModel) -> None:
        self.strategy, self.window, self.lm = strategy, window, lm

    def assign(self, rows: Sequence[int], requests: Sequence[Any]) -> None:
        """Give rows to these requests."""

    def prefill(self, ids_RP: Tensor, mask_RP: Tensor, position_RP: Tensor, logits_RV: Tensor) -> Tensor:
        """Read a prefill; return the logits that the first tokens are chosen from, [R, V]."""
        return logits_RV

    def propose(self, batch: ProposerInput) -> Proposal | None:
        """Propose tokens for the model to verify in this step."""
        return None

    def process_logits(self, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor, logits_BTV: Tensor) -> Tensor:
        """Return the logits that the step's tokens are chosen from, [B, T, V]."""
        return logits_BTV

    def append_tokens(self, row: int, tokens: Sequence[int]) -> None:
        """Note tokens that joined a row's response."""

    def record_acceptance(self, row: int, proposed: int, accepted: int) -> None:
        """Note how many of a row's proposals were accepted in this step."""

    def stats(self, row: int) -> SpeculationStats | None:
        """Return a row's speculation statistics, if the strategy speculates."""
        return None

    def select_rows(self, rows: Sequence[int]) -> None:
        """Make the rows these ones."""


class LogitDiff(PlainDecoding):
    """Logit-diff amplification: the before model reads the same tokens, and its logits are subtracted."""

    names = ("after", "before")

    def __init__(self, strategy: Amplify, window: CacheWindow, lm: LanguageModel) -> None:
        super().__init__(strategy, window, lm)
        self.model = ModelWithCache(strategy.before, window, clamps=True)
        self.compared_V = compared_columns(lm, strategy.before)
        self.alpha_B = torch.full((window.slots,), strategy.alpha, device=lm.device)
        self.entering_R = self.alpha_B

    def assign(self, rows: Sequence[int], requests: Sequence[Any]) -> None:
        alphas = [self.strategy.alpha if request.alpha is None else request.alpha for request in requests]
        self.entering_R = torch.tensor(alphas, dtype=torch.float32, device=self.lm.device)
        self.alpha_B[torch.tensor(rows, device=self.lm.device)] = self.entering_R

    def prefill(self, ids_RP: Tensor, mask_RP: Tensor, position_RP: Tensor, logits_RV: Tensor) -> Tensor:
        return self._amplify(self.entering_R, ids_RP, mask_RP, position_RP, logits_RV)

    def process_logits(self, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor, logits_BTV: Tensor) -> Tensor:
        return self._amplify(self.alpha_B, ids_BT, mask_BS, position_BT, logits_BTV[:, -1]).unsqueeze(1)

    def _amplify(
        self, alpha_B: Tensor, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor, after_BV: Tensor
    ) -> Tensor:
        assert self.model is not None
        before_BV = self.model.forward(ids_BT, mask_BS, position_BT)[:, -1]
        after_BV, before_BV = align_logits(after_BV, before_BV, self.compared_V)
        return amplify_logits(after_BV, before_BV, alpha_B, self.strategy.plausibility)

    def select_rows(self, rows: Sequence[int]) -> None:
        self.alpha_B = self.alpha_B[torch.tensor(rows, device=self.lm.device)]


@dataclass
class _RowHistory:
    """Speculation of one row.

    `depths`: adaptive depth by length of the n-gram looked up (0: a draft model). `matched`: length of the n-gram that
    the row ends in. `outcomes`: (proposed, accepted) of each step with a proposal.
    """

    depths: dict[int, AdaptiveDepth]
    lookup: NgramLookup | None
    matched: int = 0
    n_steps: int = 0
    outcomes: list[tuple[int, int]] = field(default_factory=list)


class SpeculativeProposer(PlainDecoding):
    """Speculative decoding: proposals of a draft model, or by n-gram lookup in the row's own tokens."""

    names = ("target", "draft")
    streams = ("draft", "accept")
    in_place = False

    def __init__(self, strategy: Speculate, window: CacheWindow, lm: LanguageModel) -> None:
        super().__init__(strategy, window, lm)
        for role, model in zip(self.names, (lm, strategy.draft), strict=True):
            if model is not None and model.state_bytes:
                raise ModelError(
                    f"speculation: the {role} model keeps a recurrent state, which can't take back rejected tokens; "
                    "decode without speculation, or with attention-only models"
                )
        self.depth = strategy.depth
        self.model = None if strategy.draft is None else ModelWithCache(strategy.draft, window, clamps=True)
        self.cost = COLUMN_COST + (0.0 if strategy.draft is None else relative_size(strategy.draft, lm))
        self.rows: list[_RowHistory] = [self._new_history() for _ in range(window.slots)]

    def _new_history(self) -> _RowHistory:
        strategy: Speculate = self.strategy
        if strategy.draft is not None:
            return _RowHistory({0: AdaptiveDepth(strategy.depth, self.cost, INITIAL_ACCEPTANCE)}, None)
        # the longer the n-gram, the likelier is it followed by the same token again
        priors = {n: INITIAL_ACCEPTANCE * (n / strategy.ngram) ** 2 for n in range(1, strategy.ngram + 1)}
        depths = {n: AdaptiveDepth(strategy.depth, self.cost, prior) for n, prior in priors.items()}
        return _RowHistory(depths, NgramLookup(strategy.ngram))

    def assign(self, rows: Sequence[int], requests: Sequence[Any]) -> None:
        for row, request in zip(rows, requests, strict=True):
            self.rows[row] = self._new_history()
            lookup = self.rows[row].lookup
            if lookup is not None:
                lookup.extend(request.token_ids)

    def prefill(self, ids_RP: Tensor, mask_RP: Tensor, position_RP: Tensor, logits_RV: Tensor) -> Tensor:
        if self.model is not None:
            self.model.forward(ids_RP, mask_RP, position_RP)
        return logits_RV

    def propose(self, batch: ProposerInput) -> Proposal | None:
        return self._propose_by_lookup(batch) if self.model is None else self._propose_by_draft(batch, self.model)

    def _depth(self, history: _RowHistory, least: int) -> int:
        """Number of tokens that a row proposes, by its own history."""
        return history.depths[history.matched].best_depth(least) if self.strategy.adaptive else int(self.strategy.depth)

    def _propose_by_lookup(self, batch: ProposerInput) -> Proposal | None:
        found = [self._look_up(history, room) for history, room in zip(self.rows, batch.room, strict=True)]
        width = max(map(len, found))
        if not width:
            return None
        token_BK = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in found])
        depth_B = torch.tensor([len(tokens) for tokens in found])
        device = batch.mask_BS.device
        return Proposal(token_BK.to(device), depth_B.to(device), None)

    def _look_up(self, history: _RowHistory, room: int) -> list[int]:
        """Look up a row's next tokens. Shorter n-grams pause if they have not helped; the longest is always tried."""
        assert history.lookup is not None
        history.matched = history.lookup.known
        if not history.matched or not room:
            return []
        depth = self._depth(history, least=int(history.matched == self.strategy.ngram))
        return history.lookup.propose(history.matched, min(depth, room))

    def _propose_by_draft(self, batch: ProposerInput, draft: ModelWithCache) -> Proposal | None:
        """Draft column by column. The first pass reads the last column again, which the draft may not have seen."""
        depths = [min(room, self._depth(history, 1)) for room, history in zip(batch.room, self.rows, strict=True)]
        width, cursor, start = max(depths), self.window.cursor, self.window.start
        if not width:
            return None
        uniform_BK = batch.rows.uniform("draft", width)
        ids_BT = torch.cat([batch.rows.last_B1, batch.rows.token_B1], dim=1)
        tokens, probs = [], []
        for k in range(width):
            first = 1 - ids_BT.shape[1]  # -1 in the first pass: the column before the cursor
            position_BT = batch.rows.length_B1 + k + torch.arange(first, 1, device=ids_BT.device)
            mask_BS = batch.mask_BS[:, start : cursor + k + 1]
            with self.window.cursor_at(cursor + k + first):
                logits_BTV = draft.forward(ids_BT, mask_BS, position_BT.clamp_(0, batch.last_position))
            prob_BV = batch.sampler.chances(self._fit_to_target(logits_BTV))[:, -1]
            ids_BT = sample_from(prob_BV, uniform_BK[:, k]).unsqueeze(1)
            tokens.append(ids_BT)
            probs.append(prob_BV)
        depth_B = torch.tensor(depths, device=ids_BT.device)
        return Proposal(torch.cat(tokens, dim=1), depth_B, torch.stack(probs, dim=1))

    def _fit_to_target(self, logits_BTV: Tensor) -> Tensor:
        """Pad or cut the draft's logits to the target's vocabulary. Non-finite rows propose arbitrary tokens."""
        logits_BTV = logits_BTV[..., : self.lm.vocab_size]
        peak_BT1 = logits_BTV.amax(-1, keepdim=True)
        sound_BTV = torch.where(peak_BT1.isfinite(), logits_BTV, 0.0)
        return pad(sound_BTV, (0, self.lm.vocab_size - sound_BTV.shape[-1]), value=-torch.inf)

    def append_tokens(self, row: int, tokens: Sequence[int]) -> None:
        history = self.rows[row]
        history.n_steps += 1
        if history.lookup is not None:
            history.lookup.extend(tokens)

    def record_acceptance(self, row: int, proposed: int, accepted: int) -> None:
        if proposed:
            self.rows[row].outcomes.append((proposed, accepted))
            self.rows[row].depths[self.rows[row].matched].record(proposed, accepted)

    def stats(self, row: int) -> SpeculationStats | None:
        history = self.rows[row]
        proposed, accepted = (
            (sum(counts) for counts in zip(*history.outcomes, strict=True)) if history.outcomes else (0, 0)
        )
        return SpeculationStats(history.n_steps, proposed, accepted, tuple(a / p for p, a in history.outcomes))

    def select_rows(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]


INITIAL_ACCEPTANCE = 0.7  # prior acceptance rate of a proposal
COLUMN_COST = 0.2  # cost of one more column in passes of the target; measured on a CPU, 0.1 to 0.25 by batch size
STRATEGIES: dict[type, type[PlainDecoding]] = {
    Sample: PlainDecoding,
    Amplify: LogitDiff,
    Speculate: SpeculativeProposer,
}


def make_strategy(strategy: Strategy, window: CacheWindow, lm: LanguageModel) -> PlainDecoding:
    """Make the strategy of a batch of this model from its settings."""
    return STRATEGIES[type(strategy)](strategy, window, lm)


def relative_size(draft: LanguageModel, target: LanguageModel) -> float:
    """Return the cost of a draft's pass in passes of its target: the larger ratio of parameters or of layers."""
    weights = [sum(p.numel() for p in lm.model.parameters()) for lm in (draft, target)]
    return max(weights[0] / weights[1], draft.n_layers / target.n_layers)


_BY_COLUMN = re.compile("window|chunk|sliding|local")


@torch.inference_mode()
def needs_contiguous_kv(lm: LanguageModel) -> bool:
    """Return True if a masked column between live ones changes a model's logits.

    Sliding windows count columns, and so may ALiBi. A window is longer than a quick test could be, so a config that
    names one is believed; else a short text decides.
    """
    settings = lm.model.config.get_text_config().to_dict()
    kinds = {key: str(settings.get(key)) for key in ("layer_types", "attention_types", "attention_layers")}
    if any(map(_BY_COLUMN.search, kinds.values())):
        return True
    if any(_BY_COLUMN.search(key) and value for key, value in settings.items() if isinstance(value, int)):
        return True
    ids_BT = torch.arange(1, 8, device=lm.device).remainder(lm.vocab_size).unsqueeze(0)
    mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    mask_BT[0, 3] = False
    position_BT = mask_BT.cumsum(1) - 1
    holed_V, whole_V = (
        lm.last_logits(
            ids_BT[:, keep], attention_mask=mask_BT[:, keep], position_ids=position_BT[:, keep], use_cache=False
        )[0].double()
        for keep in (slice(None), mask_BT[0])
    )
    tolerance = 1e-4 if lm.is_exact else 3e-2
    return not bool(((holed_V - whole_V).abs() <= tolerance * whole_V.abs().max()).all())

"""What a strategy keeps beside the running batch: a second model that reads along, what it proposes or takes away.

A partner has one shape: `seat` and `take_rows` follow the slots, `enter` sees a prefill, `propose` comes before a step,
`weigh` sees the step's logits, `learn` its outcome.

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

from extraction.engine.logit_diff import Amplify, amplify_logits
from extraction.engine.requests import SpeculationStats
from extraction.engine.row_state import RowBuffers
from extraction.engine.sampler import Sample, Sampler, sample_from
from extraction.engine.speculation import AdaptiveDepth, NgramLookup, Proposal, Speculate
from extraction.model.kv_cache import CacheWindow, make_cache

if TYPE_CHECKING:
    from extraction.model.loading import LanguageModel

Strategy = Sample | Amplify | Speculate


class ModelWithCache:
    """A model and its cache of slots; several lanes read the same tokens in one window.

    A second model may have fewer rows of padding in its embeddings than the first has in its head: `clamps` then.
    """

    def __init__(self, lm: LanguageModel, window: CacheWindow, *, clamps: bool = False) -> None:
        self.lm, self.cache = lm, make_cache(lm.model, window)
        embeddings: Any = lm.model.get_input_embeddings()
        self.last_id = int(embeddings.weight.shape[0]) - 1 if clamps else None

    def read(self, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor, n_last: int = 1) -> Tensor:
        """One pass; the logits of the last `n_last` columns: [B, n_last, V]."""
        device = self.lm.device
        known_BT = ids_BT if self.last_id is None else ids_BT.clamp(max=self.last_id)
        logits_BTV = self.lm.logits(
            known_BT.to(device),
            n_last,
            attention_mask=mask_BS.to(device),
            position_ids=position_BT.to(device),
            past_key_values=self.cache,
            use_cache=True,
        )
        return logits_BTV.to(ids_BT.device)


@dataclass(frozen=True)
class ProposerInput:
    """Where the batch stands before a step. `room[b]` is how many proposals row b can use (0 for an idle one)."""

    rows: RowBuffers
    mask_BS: Tensor
    last_position: int
    sampler: Sampler
    room: Sequence[int]


class PlainDecoding:
    """No partner: one model, one token a step."""

    names: tuple[str, ...] = ()  # of the two models, in errors
    streams: tuple[str, ...] = ()
    lane: ModelWithCache | None = None
    depth = 0
    in_place = True  # whether a step reads only buffers that stay where they are

    def __init__(self, strategy: Any, window: CacheWindow, lm: LanguageModel) -> None:
        self.strategy, self.window, self.lm = strategy, window, lm

    def seat(self, rows: Sequence[int], asked: Sequence[Any]) -> None:
        """Slots take these requests."""

    def enter(self, ids_RP: Tensor, mask_RP: Tensor, position_RP: Tensor, logits_RV: Tensor) -> Tensor:
        """A prefill: read it too, and return the logits that the first tokens are chosen from."""
        return logits_RV

    def propose(self, front: ProposerInput) -> Proposal | None:
        """Tokens for the model to judge in this step."""
        return None

    def weigh(self, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor, logits_BTV: Tensor) -> Tensor:
        """A step: the logits that tokens are chosen from."""
        return logits_BTV

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """A pass gave a row these tokens."""

    def learn(self, row: int, proposed: int, accepted: int) -> None:
        """What became of a row's proposals."""

    def account(self, row: int) -> SpeculationStats | None:
        """What became of all of a row's proposals."""
        return None

    def take_rows(self, rows: Sequence[int]) -> None:
        """The slots become these ones."""


class LogitDiff(PlainDecoding):
    """The before model reads along; its logits push the after model's."""

    names = ("after", "before")

    def __init__(self, strategy: Amplify, window: CacheWindow, lm: LanguageModel) -> None:
        super().__init__(strategy, window, lm)
        self.lane = ModelWithCache(strategy.before, window, clamps=True)
        self.alpha_B = torch.full((window.slots,), strategy.alpha, device=lm.device)
        self.entering_R = self.alpha_B

    def seat(self, rows: Sequence[int], asked: Sequence[Any]) -> None:
        alphas = [self.strategy.alpha if request.alpha is None else request.alpha for request in asked]
        self.entering_R = torch.tensor(alphas, dtype=torch.float32, device=self.lm.device)
        self.alpha_B[torch.tensor(rows, device=self.lm.device)] = self.entering_R

    def enter(self, ids_RP: Tensor, mask_RP: Tensor, position_RP: Tensor, logits_RV: Tensor) -> Tensor:
        return self._amplified(self.entering_R, ids_RP, mask_RP, position_RP, logits_RV)

    def weigh(self, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor, logits_BTV: Tensor) -> Tensor:
        return self._amplified(self.alpha_B, ids_BT, mask_BS, position_BT, logits_BTV[:, -1]).unsqueeze(1)

    def _amplified(
        self, alpha_B: Tensor, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor, after_BV: Tensor
    ) -> Tensor:
        assert self.lane is not None
        before_BV = self.lane.read(ids_BT, mask_BS, position_BT)[:, -1]
        shared = min(after_BV.shape[1], before_BV.shape[1])  # heads may be padded by different numbers of rows
        return amplify_logits(after_BV[:, :shared], before_BV[:, :shared], alpha_B, self.strategy.plausibility)

    def take_rows(self, rows: Sequence[int]) -> None:
        self.alpha_B = self.alpha_B[torch.tensor(rows, device=self.lm.device)]


@dataclass
class _Guess:
    """What one row's speculation has seen. `paces`: by the length of the n-gram looked up; of a draft model, by 0."""

    paces: dict[int, AdaptiveDepth]
    lookup: NgramLookup | None
    known: int = 0
    steps: int = 0
    judged: list[tuple[int, int]] = field(default_factory=list)


class SpeculativeProposer(PlainDecoding):
    """Proposes tokens: a draft model's, or a row's own, looked up."""

    names = ("target", "draft")
    streams = ("draft", "accept")
    in_place = False

    def __init__(self, strategy: Speculate, window: CacheWindow, lm: LanguageModel) -> None:
        super().__init__(strategy, window, lm)
        self.depth = strategy.depth
        self.lane = None if strategy.draft is None else ModelWithCache(strategy.draft, window, clamps=True)
        self.cost = COLUMN_COST + (0.0 if strategy.draft is None else relative_size(strategy.draft, lm))
        self.rows: list[_Guess] = [self._new() for _ in range(window.slots)]

    def _new(self) -> _Guess:
        strategy: Speculate = self.strategy
        if strategy.draft is not None:
            return _Guess({0: AdaptiveDepth(strategy.depth, self.cost, INITIAL_ACCEPTANCE)}, None)
        # the longer the n-gram, the likelier is it followed by the same again
        hopes = {n: INITIAL_ACCEPTANCE * (n / strategy.ngram) ** 2 for n in range(1, strategy.ngram + 1)}
        paces = {n: AdaptiveDepth(strategy.depth, self.cost, hope) for n, hope in hopes.items()}
        return _Guess(paces, NgramLookup(strategy.ngram))

    def seat(self, rows: Sequence[int], asked: Sequence[Any]) -> None:
        for row, request in zip(rows, asked, strict=True):
            self.rows[row] = self._new()
            lookup = self.rows[row].lookup
            if lookup is not None:
                lookup.extend(request.token_ids)

    def enter(self, ids_RP: Tensor, mask_RP: Tensor, position_RP: Tensor, logits_RV: Tensor) -> Tensor:
        if self.lane is not None:
            self.lane.read(ids_RP, mask_RP, position_RP)
        return logits_RV

    def propose(self, front: ProposerInput) -> Proposal | None:
        return self._looked_up(front) if self.lane is None else self._drafted(front, self.lane)

    def _hoped(self, guess: _Guess, least: int) -> int:
        """How many a row may propose, by its own past."""
        return guess.paces[guess.known].best_depth(least) if self.strategy.adaptive else int(self.strategy.depth)

    def _looked_up(self, front: ProposerInput) -> Proposal | None:
        found = [self._found(guess, room) for guess, room in zip(self.rows, front.room, strict=True)]
        width = max(map(len, found))
        if not width:
            return None
        token_BK = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in found])
        depth_B = torch.tensor([len(tokens) for tokens in found])
        device = front.mask_BS.device
        return Proposal(token_BK.to(device), depth_B.to(device), None)

    def _found(self, guess: _Guess, room: int) -> list[int]:
        """Shorter n-grams rest where they have not helped; the longest is always worth a try."""
        assert guess.lookup is not None
        guess.known = guess.lookup.known
        if not guess.known or not room:
            return []
        depth = self._hoped(guess, least=int(guess.known == self.strategy.ngram))
        return guess.lookup.propose(guess.known, min(depth, room))

    def _drafted(self, front: ProposerInput, lane: ModelWithCache) -> Proposal | None:
        """Column by column. The first pass reads the last column again: it may be one that the draft has not seen."""
        depths = [min(room, self._hoped(guess, 1)) for room, guess in zip(front.room, self.rows, strict=True)]
        width, cursor, start = max(depths), self.window.cursor, self.window.start
        if not width:
            return None
        uniform_BK = front.rows.uniform("draft", width)
        ids_BT = torch.cat([front.rows.last_B1, front.rows.token_B1], dim=1)
        tokens, chances = [], []
        for k in range(width):
            first = 1 - ids_BT.shape[1]  # -1 in the first pass: the column before the cursor
            position_BT = front.rows.length_B1 + k + torch.arange(first, 1, device=ids_BT.device)
            mask_BS = front.mask_BS[:, start : cursor + k + 1]
            with self.window.at(cursor + k + first):
                logits_BTV = lane.read(ids_BT, mask_BS, position_BT.clamp_(0, front.last_position))
            chance_BV = front.sampler.chances(self._fitted(logits_BTV))[:, -1]
            ids_BT = sample_from(chance_BV, uniform_BK[:, k]).unsqueeze(1)
            tokens.append(ids_BT)
            chances.append(chance_BV)
        depth_B = torch.tensor(depths, device=ids_BT.device)
        return Proposal(torch.cat(tokens, dim=1), depth_B, torch.stack(chances, dim=1))

    def _fitted(self, logits_BTV: Tensor) -> Tensor:
        """As wide as the target's: heads may have padding rows. Where not finite, anything may be proposed."""
        logits_BTV = logits_BTV[..., : self.lm.vocab_size]
        peak_BT1 = logits_BTV.amax(-1, keepdim=True)
        sound_BTV = torch.where(peak_BT1.isfinite(), logits_BTV, 0.0)
        return pad(sound_BTV, (0, self.lm.vocab_size - sound_BTV.shape[-1]), value=-torch.inf)

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        guess = self.rows[row]
        guess.steps += 1
        if guess.lookup is not None:
            guess.lookup.extend(tokens)

    def learn(self, row: int, proposed: int, accepted: int) -> None:
        if proposed:
            self.rows[row].judged.append((proposed, accepted))
            self.rows[row].paces[self.rows[row].known].learn(proposed, accepted)

    def account(self, row: int) -> SpeculationStats | None:
        guess = self.rows[row]
        proposed, accepted = (sum(counts) for counts in zip(*guess.judged, strict=True)) if guess.judged else (0, 0)
        return SpeculationStats(guess.steps, proposed, accepted, tuple(a / p for p, a in guess.judged))

    def take_rows(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]


INITIAL_ACCEPTANCE = 0.7  # acceptance to start with
COLUMN_COST = 0.2  # of one column more, in passes of the target; measured on a CPU, 0.1 to 0.25 by batch size
STRATEGIES: dict[type, type[PlainDecoding]] = {
    Sample: PlainDecoding,
    Amplify: LogitDiff,
    Speculate: SpeculativeProposer,
}


def make_strategy(strategy: Strategy, window: CacheWindow, lm: LanguageModel) -> PlainDecoding:
    """What a strategy keeps beside a running batch of this model."""
    return STRATEGIES[type(strategy)](strategy, window, lm)


def relative_size(draft: LanguageModel, target: LanguageModel) -> float:
    """A draft's pass in passes of its target: by weights where those take the time, by layers where steps are short."""
    weights = [sum(p.numel() for p in lm.model.parameters()) for lm in (draft, target)]
    return max(weights[0] / weights[1], draft.n_layers / target.n_layers)


_BY_COLUMN = re.compile("window|chunk|sliding|local")


@torch.inference_mode()
def needs_contiguous_kv(lm: LanguageModel) -> bool:
    """Whether a masked column between live ones changes what a model says: sliding windows count columns; so may ALiBi.

    A window is longer than any quick proof, so a config that speaks of one is believed; else a short text decides.
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

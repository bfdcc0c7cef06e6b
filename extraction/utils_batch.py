"""THE ENGINE: left-padded continuous batching, with activations captured in the same pass.

One loop. A step feeds one token to every slot; a slot whose example ends takes the next one while its neighbours go on.
A result does not depend on neighbours, order, batch size or refill.

Shapes: B slots, T tokens, R rows that enter, P prompt columns, S columns, V vocabulary, L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from extraction.capture import Capture, Observer, first_overflow
from extraction.decoding.sample import Sample, uniforms
from extraction.errors import ActivationError, LogitsError, PromptError
from extraction.models import LanguageModel, wrap
from extraction.slots import SlotCache
from extraction.steering import NOTHING, Steerer, Steering, check_steering
from extraction.teacher import Text, forced_activations

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Request:
    """A prompt to continue. With `seed`, `id` alone decides the random numbers, so ids are unique within a run.

    `steering` is this request's own: neighbours in the batch don't feel it. `draws` names the random numbers where they
    are to be those of others with the same name, so that nothing but the steering differs.
    """

    id: str
    token_ids: tuple[int, ...]
    max_new_tokens: int
    seed: int = 0
    steering: Steering | None = field(default=None, compare=False)
    draws: str | None = None


@dataclass(frozen=True)
class Completion:
    """What came out. `token_ids` holds no stop token; `finish_reason` is `stop`, `stop_string` or `length`.

    `activations`: `site.pooling` -> [L, D] on the CPU (`all`: [T, L, D]); empty when the response is empty.
    """

    id: str
    token_ids: tuple[int, ...]
    finish_reason: str
    activations: dict[str, Tensor] = field(default_factory=dict)


def generate(
    lm: LanguageModel,
    requests: Sequence[Request],
    *,
    batch_size: int,
    strategy: Sample | None = None,
    capture: Capture | None = None,
    stop_strings: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> Iterator[Completion]:
    """Continue every request; yield completions as they end.

    `on_progress` is told the number of new response tokens after each step. Activations are those of the steered
    stream. Raises PromptError for a request that the model can't hold, ConfigError for a steering that does not fit
    it, ActivationError where an activation or a logit is not finite.
    """
    for request in requests:
        _check(request, lm, feeds_last=capture is not None)
    batch = RunningBatch(lm, requests, batch_size, strategy or Sample(), capture, tuple(stop_strings))
    with batch.watching():
        while batch.has_work:
            done, n_tokens = batch.advance()
            if on_progress is not None:
                on_progress(n_tokens)
            yield from done


def teacher_force(
    lm: LanguageModel,
    texts: Sequence[Text],
    *,
    capture: Capture,
    batch_size: int = 16,
    on_progress: Progress | None = None,
) -> Iterator[Completion]:
    """Activations of responses that exist already: `texts` are (id, prompt ids, response ids), never re-tokenised.

    Yields completions, longest first; `finish_reason` is `given`. Errors as in `generate`.
    """
    responses = {example_id: tuple(response) for example_id, _, response in texts}
    for example_id, kept in forced_activations(lm, texts, capture=capture, batch_size=batch_size):
        if on_progress is not None:
            on_progress(len(responses[example_id]))
        yield Completion(example_id, responses[example_id], "given", kept)


def generate_batch_with_activations(  # noqa: PLR0913 (a script's one call)
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 150,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    sites: Sequence[str] = ("residual",),
    poolings: Sequence[str] = ("response_mean",),
) -> list[dict[str, Any]]:
    """Generate for every prompt, capturing in the same pass. For people who script.

    `prompts` are exact texts: apply a chat template before. Returns, in their order, dicts with prompt, response,
    token_ids, finish_reason and activations (`site.pooling` -> [L, D], row i the i-th of `layers`, default all).
    """
    lm = wrap(model, tokenizer)
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    requests = [Request(str(i), tuple(ids), max_new_tokens, seed) for i, ids in enumerate(encoded)]
    capture = Capture(tuple(range(lm.n_layers)) if layers is None else tuple(layers), tuple(sites), tuple(poolings))
    strategy = Sample(temperature, top_k, top_p)
    done = {c.id: c for c in generate(lm, requests, batch_size=batch_size, strategy=strategy, capture=capture)}
    return [
        {
            "prompt": prompt,
            "response": tokenizer.decode(list(done[str(i)].token_ids), skip_special_tokens=True),
            "token_ids": list(done[str(i)].token_ids),
            "finish_reason": done[str(i)].finish_reason,
            "activations": done[str(i)].activations,
        }
        for i, prompt in enumerate(prompts)
    ]


def get_activations_from_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 16,
    layers: Sequence[int] | None = None,
    sites: Sequence[str] = ("residual",),
    poolings: Sequence[str] = ("response_mean",),
) -> list[dict[str, Tensor]]:
    """Activations of texts in one teacher-forced pass. For people who script.

    A text is a string, all of which counts as response, or (prompt ids, response ids), which are taken as they are.
    Returns, in their order, `site.pooling` -> [L, D].
    """
    lm = wrap(model, tokenizer)
    pairs = [((), _encode(tokenizer, text)) if isinstance(text, str) else text for text in texts]
    forced = [(str(i), prompt, response) for i, (prompt, response) in enumerate(pairs)]
    capture = Capture(tuple(range(lm.n_layers)) if layers is None else tuple(layers), tuple(sites), tuple(poolings))
    done = {c.id: c.activations for c in teacher_force(lm, forced, capture=capture, batch_size=batch_size)}
    return [done[str(i)] for i in range(len(texts))]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text, with exactly one BOS if the tokenizer has one of its own accord."""
    bos = tokenizer.bos_token
    return list(tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"])


def _check(request: Request, lm: LanguageModel, *, feeds_last: bool) -> None:
    check_steering(request.steering or NOTHING, lm)
    n_prompt = len(request.token_ids)
    n_total = n_prompt + request.max_new_tokens - (not feeds_last)
    if not n_prompt:
        raise PromptError(f"{request.id}: the prompt has no tokens; give it at least one")
    if request.max_new_tokens < 1:
        raise PromptError(f"{request.id}: max_new_tokens is {request.max_new_tokens}; use at least 1")
    if lm.max_positions is not None and n_total > lm.max_positions:
        raise PromptError(
            f"{request.id}: {n_prompt} prompt tokens + {request.max_new_tokens} new ones pass the model's "
            f"{lm.max_positions} positions; shorten the prompt or lower max_new_tokens"
        )


@dataclass
class _Slot:
    """One row of the running batch and the example that it holds."""

    request: Request
    first_column: int
    tokens: list[int] = field(default_factory=list)
    ending: str | None = None


class RunningBatch:
    """The slots, their cache and their window. Everything that changes from step to step lives here."""

    def __init__(
        self,
        lm: LanguageModel,
        requests: Sequence[Request],
        batch_size: int,
        strategy: Sample,
        capture: Capture | None,
        stop_strings: tuple[str, ...],
    ) -> None:
        self.lm, self.strategy, self.stop_strings = lm, strategy, stop_strings
        self.queue = sorted(requests, key=lambda request: -len(request.token_ids))[::-1]
        n_slots = max(1, min(batch_size, len(requests)))
        self.budget = max((r.max_new_tokens for r in requests), default=1)
        self.longest = max((len(r.token_ids) + r.max_new_tokens for r in requests), default=1)
        self.last_position = min(self.longest, lm.max_positions or self.longest) - 1
        columns = self.longest + max(32, self.longest // 4)
        self.cache = SlotCache(lm.n_layers, n_slots, columns)
        self.observer = Observer(lm, capture, n_slots) if capture is not None else None
        steerings = [request.steering for request in requests if request.steering is not None]
        self.steerer = Steerer(lm, steerings, n_slots) if steerings else None
        # the steerer's hooks come first, so that the observer sees what it has done
        self.guests = [guest for guest in (self.steerer, self.observer) if guest is not None]
        self.slots: list[_Slot | None] = [None] * n_slots
        device = lm.device
        self.mask_BS = torch.zeros(n_slots, columns, dtype=torch.bool, device=device)
        self.token_B1 = torch.full((n_slots, 1), lm.pad_id, dtype=torch.long, device=device)
        self.first_column_B1 = torch.zeros(n_slots, 1, dtype=torch.long, device=device)
        self.prompt_length_B1 = torch.zeros(n_slots, 1, dtype=torch.long, device=device)
        self.uniform_BT = torch.zeros(n_slots, self.budget, dtype=_wide(device), device=device)

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.queue) or any(slot is not None for slot in self.slots)

    def watching(self) -> AbstractContextManager[Any]:
        """The guests' hooks, while the batch runs."""
        return _all(guest.watching() for guest in self.guests)

    @torch.inference_mode()
    def advance(self) -> tuple[list[Completion], int]:
        """Refill if it pays, then one step of every slot. Returns what ended, and how many response tokens are new."""
        done: list[Completion] = []
        n_tokens = 0
        self._shrink()
        if self._should_refill():
            n_tokens += self._refill(done)
        if any(slot is not None for slot in self.slots):
            n_tokens += self._step(done)
        return done, n_tokens

    # -- entering -----------------------------------------------------------------------------------------------------

    def _should_refill(self) -> bool:
        """Several free slots are filled together, to share the cost of a prefill."""
        free = self.slots.count(None)
        return bool(self.queue) and (free == len(self.slots) or free >= min(len(self.queue), len(self.slots) // 16 + 1))

    def _refill(self, done: list[Completion]) -> int:
        """Prefill the next requests straight into free slots, and sample their first tokens."""
        rows = [i for i, slot in enumerate(self.slots) if slot is None][: len(self.queue)]
        entering = [self.queue.pop() for _ in rows]
        width = len(entering[0].token_ids)
        self._make_room(width)
        ids_RP, mask_RP = left_padded([r.token_ids for r in entering], self.lm.pad_id, self.lm.device)
        rows_R = torch.tensor(rows, device=self.lm.device)
        self._seat(rows, rows_R, entering, mask_RP)
        position_RP = (mask_RP.cumsum(1) - 1).clamp_(min=0)
        guests = _all(guest.entering(rows_R, mask_RP) for guest in self.guests)
        with guests, self.cache.entering(rows_R, self.cache.window.cursor):
            logits_RV = self._forward(ids_RP, mask_RP, position_RP)
        token_R = self._choose(logits_RV, self.uniform_BT[rows_R, 0], rows)
        self.token_B1[rows_R, 0] = token_R
        return self._accept(rows, token_R.tolist(), done)

    def _make_room(self, width: int) -> None:
        window = self.cache.window
        if all(slot is None for slot in self.slots):
            window.cursor = window.start = width
        if window.cursor >= window.columns:
            self._roll()

    def _seat(self, rows: list[int], rows_R: Tensor, entering: list[Request], mask_RP: Tensor) -> None:
        """Give each row its slot: mask, first column, random numbers."""
        cursor = self.cache.window.cursor
        for row, request in zip(rows, entering, strict=True):
            self.slots[row] = _Slot(request, cursor - len(request.token_ids))
        length_R1 = mask_RP.sum(1, keepdim=True)
        self.mask_BS[rows_R] = False
        self.mask_BS[rows_R, cursor - mask_RP.shape[1] : cursor] = mask_RP
        self.mask_BS[rows_R, cursor:] = True
        self.first_column_B1[rows_R] = cursor - length_R1
        self.prompt_length_B1[rows_R] = length_R1
        if self.strategy.draws:
            drawn = np.stack([uniforms(r.draws or r.id, r.seed, self.budget) for r in entering])
            self.uniform_BT[rows_R] = torch.from_numpy(drawn).to(self.uniform_BT)
        if self.steerer is not None:
            self.steerer.seat(rows_R, [request.steering or NOTHING for request in entering])
        self._find_start()

    # -- stepping -----------------------------------------------------------------------------------------------------

    def _step(self, done: list[Completion]) -> int:
        """Feed every slot's newest token and sample the next."""
        window = self.cache.window
        if window.cursor >= window.columns:
            self._roll()
        position_B1 = (window.cursor - self.first_column_B1).clamp_(0, self.last_position)  # idle rows drift
        age_B1 = position_B1 - self.prompt_length_B1
        with _all(guest.stepping(age_B1[:, 0]) for guest in self.guests):
            mask_BS = self.mask_BS[:, window.start : window.cursor + 1]
            logits_BV = self._forward(self.token_B1, mask_BS, position_B1)
        window.cursor += 1
        uniform_B1 = self.uniform_BT.gather(1, (age_B1 + 1).clamp_(0, self.budget - 1)) if self.strategy.draws else None
        uniform_B = None if uniform_B1 is None else uniform_B1[:, 0]
        token_B = self._choose(logits_BV, uniform_B, list(range(len(self.slots))))
        self.token_B1 = token_B.unsqueeze(1)
        rows = [i for i, slot in enumerate(self.slots) if slot is not None]
        return self._accept(rows, token_B.tolist(), done, sampled_all=True)

    def _choose(self, logits_BV: Tensor, uniform_B: Tensor | None, rows: list[int]) -> Tensor:
        """The strategy's tokens; an idle row's logits don't matter, a live one's must be sound."""
        try:
            return self.strategy(logits_BV, uniform_B)
        except LogitsError as failure:
            for row in failure.rows:
                slot = self.slots[rows[row]]
                if slot is not None:
                    raise self._no_choice(slot) from failure
            return self.strategy(logits_BV.index_fill(0, logits_BV.new_tensor(failure.rows).long(), 0.0), uniform_B)

    def _no_choice(self, slot: _Slot) -> ActivationError:
        """What to raise where a live row has no sound logits: names the example, the first bad layer, the dtype."""
        layer = first_overflow(self.lm, [*slot.request.token_ids, *slot.tokens])
        where = "the head" if layer is None else f"layer {layer}"
        dtype = str(self.lm.dtype).removeprefix("torch.")
        return ActivationError(
            f"{slot.request.id}: the logits after {len(slot.tokens)} response tokens are NaN or all -inf in {dtype}, "
            f"from {where} on: load the model with --dtype bfloat16 or float32"
        )

    def _forward(self, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor) -> Tensor:
        return self.lm.last_logits(
            ids_BT, attention_mask=mask_BS, position_ids=position_BT, past_key_values=self.cache, use_cache=True
        )

    def _accept(self, rows: list[int], tokens: list[int], done: list[Completion], *, sampled_all: bool = False) -> int:
        """Append each row's token, or end the row. Returns how many tokens joined a response."""
        n_tokens = 0
        for i, row in enumerate(rows):
            slot = self.slots[row]
            assert slot is not None
            token = tokens[row if sampled_all else i]
            if slot.ending is None and token in self.lm.stop_ids:
                slot.ending = "stop"
            elif slot.ending is None:
                slot.tokens.append(token)
                n_tokens += 1
                slot.ending = self._ended_by(slot)
                if slot.ending is not None and self.observer is not None:
                    continue  # its last token is fed once more, so that it has an activation
            if slot.ending is not None:
                done.append(self._leave(row, slot))
        if len(done) and self.slots.count(None) < len(self.slots):
            self._find_start()
        return n_tokens

    def _ended_by(self, slot: _Slot) -> str | None:
        if self.stop_strings and self.lm.tokenizer is not None:
            text = self.lm.tokenizer.decode(slot.tokens, skip_special_tokens=True)
            if any(stop in text for stop in self.stop_strings):
                return "stop_string"
        return "length" if len(slot.tokens) >= slot.request.max_new_tokens else None

    def _leave(self, row: int, slot: _Slot) -> Completion:
        self.slots[row] = None
        kept = self.observer.emit(row, len(slot.tokens), slot.request.id) if self.observer is not None else {}
        return Completion(slot.request.id, tuple(slot.tokens), slot.ending or "length", kept)

    # -- the window ---------------------------------------------------------------------------------------------------

    def _find_start(self) -> None:
        """The first column that a live row still needs."""
        live = [slot.first_column for slot in self.slots if slot is not None]
        self.cache.window.start = min(live, default=self.cache.window.cursor)

    def _roll(self, rows: list[int] | None = None) -> None:
        """Move the live columns to the left edge; with `rows`, keep only those slots."""
        window = self.cache.window
        start, width = window.start, window.cursor - window.start
        rows_B = None if rows is None else torch.tensor(rows, device=self.lm.device)
        self.cache.repack(rows_B)
        kept = list(range(len(self.slots))) if rows is None else rows
        self.slots = [self.slots[row] for row in kept]
        for slot in self.slots:
            if slot is not None:
                slot.first_column -= start
        index_B = torch.tensor(kept, device=self.lm.device)
        mask_BS = torch.ones_like(self.mask_BS[index_B])
        mask_BS[:, :width] = self.mask_BS[index_B, start : start + width]
        self.mask_BS = mask_BS
        self.first_column_B1 = self.first_column_B1[index_B] - start
        if rows_B is not None:
            self.token_B1, self.uniform_BT = self.token_B1[rows_B], self.uniform_BT[rows_B]
            self.prompt_length_B1 = self.prompt_length_B1[rows_B]
            for guest in self.guests:
                guest.repack(rows_B)

    def _shrink(self) -> None:
        """When nothing waits and half the slots are idle, go on with the live rows alone."""
        live = [i for i, slot in enumerate(self.slots) if slot is not None]
        if not self.queue and live and len(live) <= len(self.slots) // 2:
            self._roll(live)


def _all(contexts: Iterable[AbstractContextManager[Any]]) -> ExitStack:
    """Several contexts as one, the first outermost."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return stack.pop_all()


def left_padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [R, P] that end at the right edge, and their mask [R, P]."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = True
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64

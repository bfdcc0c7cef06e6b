"""The scheduler: which request runs in which slot, when slots are refilled, and how many slots there are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from extraction.core.errors import ConfigError, PromptError
from extraction.engine.logit_diff import check_alpha
from extraction.engine.requests import Request
from extraction.engine.sampler import Sample
from extraction.engine.sequence import BatchLimits, RunningSequence
from extraction.engine.steering import NO_STEERING, check_steering
from extraction.model.devices import prefill_rows
from extraction.model.language_model import LanguageModel


@dataclass(frozen=True)
class Admission:
    """Requests that enter together in one prefill, and the free slots that they take."""

    rows: list[int]
    requests: list[Request]


@dataclass(frozen=True)
class RequestRules:
    """Conditions that a request must meet, and that prompts must meet to enter together.

    `max_positions`: of the models' contexts the shortest; None: unbounded. `pads_prompts`: False if a model needs
    prompts of one prefill to be equally long.
    """

    lm: LanguageModel
    limits: BatchLimits
    max_positions: int | None
    pads_prompts: bool
    captures: bool
    steers: bool

    def check(self, request: Request) -> None:
        """Raise PromptError for a request that does not fit, ConfigError for a steering or an alpha that does not."""
        steering = request.steering or NO_STEERING
        check_steering(steering, self.lm)
        check_alpha(request.alpha or 0.0)
        if steering.layers and not self.steers:
            raise ConfigError(f"{request.id}: this batch was made without steering; name the steerings when it is made")
        n_prompt, n_new = len(request.token_ids), request.max_new_tokens
        if not n_prompt:
            raise PromptError(f"{request.id}: the prompt has no tokens; give it at least one")
        self.lm.check_ids(request.id, request.token_ids)
        if n_new < 1:
            raise PromptError(f"{request.id}: max_new_tokens is {n_new}; use at least 1")
        # without capture the last token is never fed back, so it needs no position
        n_positions = n_prompt + n_new - (not self.captures)
        if self.max_positions is not None and n_positions > self.max_positions:
            raise PromptError(
                f"{request.id}: {n_prompt} prompt tokens + {n_new} new ones pass the model's "
                f"{self.max_positions} positions; shorten the prompt or lower max_new_tokens"
            )
        if n_prompt + n_new > self.limits.longest or n_new > self.limits.budget:
            raise PromptError(
                f"{request.id}: {n_prompt} prompt tokens + {n_new} new ones pass the batch's limits, "
                f"{self.limits.longest} together and {self.limits.budget} new ones"
            )


class Scheduler:
    """Waiting requests, and the slots that running sequences occupy (None: a free slot)."""

    def __init__(self, rules: RequestRules, default_sample: Sample, stop_strings: tuple[str, ...]) -> None:
        self.rules, self.default_sample, self.stop_strings = rules, default_sample, stop_strings
        self.waiting: deque[Request] = deque()
        self.slots: list[RunningSequence | None] = [None]

    @property
    def running(self) -> Mapping[int, RunningSequence]:
        """The occupied slots by row."""
        return {row: sequence for row, sequence in enumerate(self.slots) if sequence is not None}

    @property
    def has_work(self) -> bool:
        """True while a request waits or runs."""
        return bool(self.waiting) or any(sequence is not None for sequence in self.slots)

    @property
    def lengths(self) -> list[int | None]:
        """Tokens in the KV cache by slot; None for a free slot."""
        return [None if sequence is None else sequence.length for sequence in self.slots]

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests in this order. Raises for one that does not fit; then none is queued."""
        requests = list(requests)
        for request in requests:
            self.rules.check(request)
        self.waiting.extend(requests)

    def cancel(self, request_id: str) -> list[int]:
        """Remove a request, waiting or running; return the rows that are free now."""
        self.waiting = deque(request for request in self.waiting if request.id != request_id)
        rows = [row for row, sequence in self.running.items() if sequence.request.id == request_id]
        for row in rows:
            self.slots[row] = None
        return rows

    def admissions(self, min_free: int, device: torch.device) -> Iterator[Admission]:
        """Yield the prefills of this step: none unless `min_free` slots are free, or as many as requests wait.

        Several free slots are filled together, to share the cost of a prefill; each prefill has as many prompts as the
        device reads fastest at once.
        """
        n_free = self.slots.count(None)
        if not self.waiting or (n_free < len(self.slots) and n_free < min(len(self.waiting), min_free)):
            return
        n_entering = min(n_free, len(self.waiting))
        while n_entering:
            lengths = [len(request.token_ids) for request in islice(self.waiting, n_entering)]
            if not self.rules.pads_prompts:
                lengths = lengths[: next((i for i, length in enumerate(lengths) if length != lengths[0]), None)]
            rows = [row for row, sequence in enumerate(self.slots) if sequence is None][: prefill_rows(lengths, device)]
            yield Admission(rows, [self.waiting.popleft() for _ in rows])
            n_entering -= len(rows)

    def assign(self, admission: Admission) -> list[Sample]:
        """Occupy the slots of an admission; return each request's sampling."""
        samples = [request.sample or self.default_sample for request in admission.requests]
        for row, request, sample in zip(admission.rows, admission.requests, samples, strict=True):
            stop_strings = (*self.stop_strings, *request.stop_strings)
            self.slots[row] = RunningSequence(request, sample, stop_strings)
        return samples

    def resize(self) -> list[int] | None:
        """Return the rows that the slots should become, or None to keep them.

        Slots double while requests wait, up to the limit. When none waits and at most half of the slots run, those
        go on alone. A row that is named again stands for a new free slot.
        """
        n_slots, running = len(self.slots), list(self.running)
        n_wanted = len(running) + len(self.waiting)
        if n_wanted > n_slots < self.rules.limits.slots:
            n_more = min(self.rules.limits.slots, max(n_wanted, 2 * n_slots)) - n_slots
            return [*range(n_slots), *[0] * n_more]
        if not self.waiting and running and len(running) <= n_slots // 2:
            return running
        return None

    def select(self, rows: Sequence[int]) -> None:
        """Make the slots these rows; a row that is named again becomes a free slot."""
        self.slots = [self.slots[row] if row not in rows[:i] else None for i, row in enumerate(rows)]

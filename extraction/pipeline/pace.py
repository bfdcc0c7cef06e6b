"""The time left of a stage under way: the work that remains, at the rate of the work done so far.

The clock starts when the first example has ended, since loading and warming up happen once.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

PROMPT_SHARE = {"cpu": 0.3}  # time to read a token of a prompt, over the time to make a response token; measured
OTHER_PROMPT_SHARE = 0.03  # an assumption: a GPU reads the tokens of a prompt side by side
SAME_BATCH = 0.05  # seconds within which the first examples count as one batch that ended together
MIN_EXAMPLES = 30  # of whole shards, before their mean response length is used

Clock = Callable[[], float]


class Pace(ABC):
    """An estimate of the time left, in seconds. Subclasses define the unit of work."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._start: tuple[float, float] | None = None

    @property
    @abstractmethod
    def work_done(self) -> float:
        """Workload done so far, up to a constant."""

    @property
    @abstractmethod
    def work_left(self) -> float | None:
        """Workload that remains; None while it is unknown."""

    def start(self) -> None:
        """Start the clock, unless it runs."""
        if self._start is None:
            self._start = (self.clock(), self.work_done)

    def restart(self) -> None:
        """Forget the rate seen so far: the rest runs at another."""
        self._start = None

    def seconds_left(self) -> float | None:
        """Return the time left, or None where too little has been seen."""
        left = self.work_left
        if self._start is None or left is None:
            return None
        seconds, done = self.clock() - self._start[0], self.work_done - self._start[1]
        return max(0.0, left) * seconds / done if done > 0 else None


class ExamplePace(Pace):
    """The time left of a stage whose examples take about the same time each, some of them side by side.

    The rate is that between the first batch of ends and the last one. There is none before the second, and none while
    no example ends for twice as long as before: one early end says nothing about examples that are still under way.
    """

    def __init__(self, n_examples: int, clock: Clock = time.perf_counter) -> None:
        super().__init__(clock)
        self.n_left, self.n_done = n_examples, 0
        self._last_end = self._longest_wait = 0.0

    def advance(self, n_examples: int) -> None:
        """Count examples that have ended; a negative number of them will be made again."""
        self.n_left, self.n_done = self.n_left - n_examples, self.n_done + n_examples
        if n_examples < 0:
            self.restart()
        elif n_examples:
            self._end_at(self.clock())

    def _end_at(self, now: float) -> None:
        if self._start is None or now - self._start[0] < SAME_BATCH:
            first = now if self._start is None else self._start[0]
            self._start, self._longest_wait = (first, self.work_done), 0.0
        else:
            self._longest_wait = max(self._longest_wait, now - self._last_end)
        self._last_end = now

    def seconds_left(self) -> float | None:
        """Return the time left, or None where too little has been seen."""
        if self._start is None or self.work_done <= self._start[1]:
            return None
        waited = self.clock() - self._last_end
        if waited > 2 * self._longest_wait:
            return None
        rate = (self.work_done - self._start[1]) / (self._last_end - self._start[0])
        return max(0.0, self.n_left / rate - waited)

    @property
    def work_done(self) -> float:
        """Number of examples that have ended."""
        return float(self.n_done)

    @property
    def work_left(self) -> float:
        """Number of examples that have not."""
        return float(self.n_left)


class TokenPace(Pace):
    """The time left of a generation, in response tokens; a prompt token counts as a share of one.

    Short responses end first, so the mean length is taken over whole shards, not over the responses that have ended.

    Args:
        n_examples: examples to run.
        n_prompt_tokens: tokens of all their prompts.
        device: the kind of device, such as `cpu`.
    """

    def __init__(self, n_examples: int, n_prompt_tokens: int, device: str, clock: Clock = time.perf_counter) -> None:
        super().__init__(clock)
        self.prompt_share = PROMPT_SHARE.get(device, OTHER_PROMPT_SHARE)
        self._reset(n_examples, n_prompt_tokens)

    def _reset(self, n_examples: int, n_prompt_tokens: int) -> None:
        self.n_examples = self.n_left = n_examples
        self.prompt_tokens_left = n_prompt_tokens
        self.n_tokens = self.n_in_shards = self.tokens_in_shards = 0
        self.restart()

    def rerun(self, n_examples: int, n_prompt_tokens: int) -> None:
        """Add examples that had ended and run again, at another batch size: what was seen does not predict it."""
        self._reset(self.n_left + n_examples, self.prompt_tokens_left + n_prompt_tokens)

    def advance(self, n_tokens: int) -> None:
        """Count response tokens."""
        self.n_tokens += n_tokens

    def end_example(self, n_prompt_tokens: int) -> None:
        """Count an example that has ended."""
        self.n_left -= 1
        self.prompt_tokens_left -= n_prompt_tokens
        self.start()

    def end_shard(self, response_lengths: Sequence[int]) -> None:
        """Add the response lengths of a whole shard to the mean."""
        self.n_in_shards += len(response_lengths)
        self.tokens_in_shards += sum(response_lengths)

    @property
    def work_done(self) -> float:
        """Response tokens made, less the share of the prompts that are not read."""
        return self.n_tokens - self.prompt_share * self.prompt_tokens_left

    @property
    def work_left(self) -> float | None:
        """Response tokens to make, and the share of the prompts to read; None until whole shards give a mean length."""
        if not self.n_left:
            return 0.0
        if self.n_in_shards < MIN_EXAMPLES:
            return None
        n_tokens = self.n_examples * self.tokens_in_shards / self.n_in_shards - self.n_tokens
        return n_tokens + self.prompt_share * self.prompt_tokens_left

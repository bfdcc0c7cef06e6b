"""How long the rest of a run takes, from what was seen of its beginning.

Responses end sooner the shorter they are, so the first to end say too little: the mean length is that of whole shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

PROMPT_SHARE = {"cpu": 0.3}  # what reading a token of a prompt takes of what making one of a response does; measured
OTHER_PROMPT_SHARE = 0.03  # a guess: a GPU reads the tokens of a prompt side by side
ENOUGH = 30  # examples of whole shards, before anything is said
WORTH_SAYING = 60.0  # seconds


class Pace:
    """What was seen of a run that has `n_examples` with `n_prompt_tokens` before it, on a kind of device.

    The clock starts when the first example has ended: what is slow once, at the beginning, is not what the rest costs.
    """

    def __init__(
        self, n_examples: int, n_prompt_tokens: int, kind: str, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock, self.share, self._said = clock, PROMPT_SHARE.get(kind, OTHER_PROMPT_SHARE), False
        self._begin(n_examples, n_prompt_tokens)

    def _begin(self, n_examples: int, n_prompt_tokens: int) -> None:
        self.n_examples = self.n_left = n_examples
        self.prompts_left = n_prompt_tokens
        self.made = self.n_whole = self.whole_tokens = 0
        self._start: tuple[float, float] | None = None

    def again(self, n_examples: int, n_prompt_tokens: int) -> None:
        """So many examples that had ended are to be made again, at another speed: what was seen says nothing now."""
        self._begin(self.n_left + n_examples, self.prompts_left + n_prompt_tokens)

    def advance(self, n_tokens: int) -> None:
        """So many more response tokens."""
        self.made += n_tokens

    def end(self, n_prompt_tokens: int) -> None:
        """An example with such a prompt has ended."""
        self.n_left -= 1
        self.prompts_left -= n_prompt_tokens
        if self._start is None:
            self._start = (self.clock(), self._work)

    def whole(self, response_lengths: Sequence[int]) -> None:
        """A whole shard has ended."""
        self.n_whole += len(response_lengths)
        self.whole_tokens += sum(response_lengths)

    @property
    def _work(self) -> float:
        """What was done, in response tokens; up to a constant."""
        return self.made - self.share * self.prompts_left

    def seconds_left(self) -> float | None:
        """Of the rest; None where too little was seen."""
        if self._start is None or self.n_whole < ENOUGH:
            return None
        seconds, done = self.clock() - self._start[0], self._work - self._start[1]
        if done <= 0:
            return None
        tokens = self.n_examples * self.whole_tokens / self.n_whole - self.made
        return max(0.0, tokens + self.share * self.prompts_left) * seconds / done

    def say_once(self) -> str | None:
        """How long the rest takes, the first time that it is known; None where that is soon."""
        seconds = None if self._said else self.seconds_left()
        if seconds is None:
            return None
        self._said = True
        return f"about {_rough(seconds)} left for {self.n_left:,} examples" if seconds >= WORTH_SAYING else None


def _rough(seconds: float) -> str:
    """`12 min`, `3 h 20 min`: as near as a forecast is."""
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"

"""The interface by which stages report progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class ProgressReporter(Protocol):
    """Receives the progress of stages; a command passes one in."""

    def note(self, text: str) -> None:
        """Show one line."""

    def begin(
        self, title: str, n_examples: int, n_done: int, *, seconds_left: Callable[[], float | None] | None = None
    ) -> None:
        """Begin a stage of `n_examples`, of which `n_done` were done before.

        `seconds_left` returns the stage's own estimate of the time left, or None while it has none.
        """

    def advance(self, n_examples: int, n_tokens: int) -> None:
        """Count examples and response tokens; negative counts take them back."""

    def end(self) -> None:
        """End the stage that began last."""

"""The protocol by which stages report progress."""

from __future__ import annotations

from typing import Protocol


class ProgressReporter(Protocol):
    """Receives the progress of stages; the command line prints it."""

    def note(self, text: str) -> None:
        """Report a line of text."""

    def begin(self, title: str, n_examples: int, n_done: int) -> None:
        """Report that a stage starts; `n_done` examples were done before."""

    def advance(self, n_examples: int, n_tokens: int) -> None:
        """Report that many more examples and response tokens."""

    def end(self) -> None:
        """Report the end of the stage."""

"""TODO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    pass


class ProgressReporter(Protocol):
    """What a door gives a stage, to hear how the work goes."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def begin(self, title: str, n_examples: int, n_done: int) -> None:
        """A stage of one trait starts; `n_done` examples are there already."""

    def advance(self, n_examples: int, n_tokens: int) -> None:
        """So many more examples and response tokens."""

    def end(self) -> None:
        """The stage has ended."""

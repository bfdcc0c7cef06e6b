"""Errors that a user can correct.

    TraitlineError
    |-- ConfigError        an experiment, a model file or an option is wrong
    |   |-- TraitError     a trait or a prompt file is wrong
    |   |-- VectorError    a file of vectors is wrong, or two directions don't fit
    |   `-- MissingPackage an optional package is not installed
    |-- TraitFailures      some traits of several failed, the others are done
    |-- ModelError         the model can't be loaded, or can't do what it is used for
    |   |-- PromptError    one prompt can't be encoded for this model
    |   `-- ActivationError  an activation is NaN or Inf
    |       `-- LogitsError    no token can be chosen from some rows' logits
    |-- StoreError         the run's folder: damaged, locked, full, read-only
    |   `-- RunMismatch    the folder holds a run with another config
    `-- RequestError       a server did not answer

A message carries the value, the place and the remedy, in one line. The command line prints it and exits 2.
"""

from __future__ import annotations

from collections.abc import Mapping


class TraitlineError(Exception):
    """Base of all errors that a user can correct."""


class ConfigError(TraitlineError):
    """An experiment, a model file or an option is wrong."""


class TraitError(ConfigError):
    """A trait or a prompt file is wrong."""


class VectorError(ConfigError):
    """A file of vectors can't be read or written, or two directions don't fit each other."""


class MissingPackage(ConfigError):
    """An optional package is not installed; the message names the extra that installs it."""


class ModelError(TraitlineError):
    """The model can't be loaded, or can't do what it is used for."""


class PromptError(ModelError):
    """One prompt can't be encoded for this model."""


class ActivationError(ModelError):
    """An activation is NaN or Inf; the message names layer, example and dtype."""


class LogitsError(ActivationError):
    """No token can be chosen from the logits of some rows: NaN, or nothing but -inf. `rows` are their numbers."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        named = ", ".join(f"row {row}" for row in rows)
        super().__init__(f"the logits of {named} are NaN or all -inf: try --dtype bfloat16 or float32")
        self.rows = rows


class StoreError(TraitlineError):
    """The run's folder is damaged, locked, full or read-only."""


class RunMismatch(StoreError):
    """The folder holds a run with another config; the message names the field that differs."""


class RequestError(TraitlineError):
    """A server did not answer, or refused a request; the message has the reason."""


class TraitFailures(TraitlineError):
    """Some traits of several failed, and the others are done.

    `failures` are by trait; `result` is that of the stage for the others, and `has_result` is False if there are none.
    """

    def __init__(self, failures: Mapping[str, TraitlineError], result: object, *, has_result: bool = True) -> None:
        self.failures, self.result, self.has_result = failures, result, has_result
        super().__init__("; ".join(self.lines()))

    def lines(self) -> list[str]:
        """Return a line for each trait that failed."""
        return [_with_trait(name, str(failure)) for name, failure in self.failures.items()]


def _with_trait(name: str, text: str) -> str:
    return text if text.startswith((f"trait {name}:", f"{name}:", f"{name}/")) else f"trait {name}: {text}"


ONE_TRAIT = (TraitError, ActivationError, PromptError)  # errors that may be about one trait of several

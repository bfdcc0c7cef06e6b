"""Everything Traitline raises on purpose.

    TraitlineError
    |-- ConfigError        an experiment, a model file or an option is wrong
    |   `-- TraitError     a trait or a prompt file is wrong
    |-- ModelError         the model can't be loaded, or can't do what is asked
    |   |-- PromptError    one prompt can't be encoded for this model
    |   `-- ActivationError  an activation is NaN or Inf
    `-- StoreError         the run's folder: damaged, locked, full, read-only
        `-- RunMismatch    the folder holds a run with another config

A message carries the value, the place and the remedy, in one line. The command line prints it and exits 2.
"""


class TraitlineError(Exception):
    """Base of all errors that a user can put right."""


class ConfigError(TraitlineError):
    """An experiment, a model file or an option is wrong."""


class TraitError(ConfigError):
    """A trait or a prompt file is wrong."""


class ModelError(TraitlineError):
    """The model can't be loaded, or can't do what is asked of it."""


class PromptError(ModelError):
    """One prompt can't be encoded for this model."""


class ActivationError(ModelError):
    """An activation is NaN or Inf: names the layer, the example and the dtype."""


class StoreError(TraitlineError):
    """The run's folder is damaged, locked, full or read-only."""


class RunMismatch(StoreError):
    """The folder holds a run with another config; names the field that differs."""

"""Names of the vector methods, and the version of the card: what can be checked without importing torch."""

from __future__ import annotations

from difflib import get_close_matches

from extraction.core.errors import ConfigError

CONTROL = "random"  # the method that is a control, not a direction of the trait
DEFAULT_METHODS = ("mean_diff", "probe", "pca", "ica", "gradient")
METHOD_NAMES = (*DEFAULT_METHODS, CONTROL)
CARD_FORM = 2  # rises when the card of the same activations would be another


def check_method(name: str) -> None:
    """Raise ConfigError, with the nearest known name, for a method that does not exist."""
    if name not in METHOD_NAMES:
        nearest = get_close_matches(name, METHOD_NAMES, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ConfigError(f"method {name!r} is not known; {hint}known: {', '.join(METHOD_NAMES)}")

"""The table of vector methods: what options, the card and the report know of them without importing torch.

The functions themselves are in `extraction.vectors.methods`, which says how to add one.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from extraction.core.errors import ConfigError

CARD_FORM = 2  # rises when the card of the same activations would be another


@dataclass(frozen=True)
class VectorMethod:
    """A row of METHODS.

    `is_slow`: the fit takes as long as all other methods together, so the card repeats it less often. `is_control`:
    fitted only on request, and never chosen. `needs_block`: the direction depends on the layer's index, so the function
    takes the rows' LayerBlock.
    """

    summary: str
    is_slow: bool = False
    is_control: bool = False
    needs_block: bool = False


# In the order in which the card prefers methods that validation can't tell apart: simple ones first.
METHODS: dict[str, VectorMethod] = {
    "mean_diff": VectorMethod("mean of the positive minus mean of the negative activations; keeps its norm"),
    "probe": VectorMethod("normal of an L2 logistic regression"),
    "pca": VectorMethod("first principal axis of both sides together"),
    "ica": VectorMethod("the independent component that separates best", is_slow=True),
    "gradient": VectorMethod("the unit vector that maximises the standardised separation"),
    "random": VectorMethod("a Gaussian draw: what a method must beat", is_control=True, needs_block=True),
}
DEFAULT_METHODS = tuple(name for name, method in METHODS.items() if not method.is_control)


def find_method(name: str) -> VectorMethod:
    """Look up a method. Raises ConfigError with the nearest known name."""
    if name in METHODS:
        return METHODS[name]
    nearest = get_close_matches(name, METHODS, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ConfigError(f"method {name!r} is not known; {hint}known: {', '.join(METHODS)}")

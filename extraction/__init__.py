"""Traitline: a trait goes in, a validated direction in a model's activations comes out."""

__version__ = "0.1.0"

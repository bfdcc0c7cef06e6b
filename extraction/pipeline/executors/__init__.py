"""Executors: where the run groups of a plan run. `base` is the interface, the other modules implement it.

A new executor is one module here, handed to `stages.generate` or `stages.extract` as `make_executor`.
"""

"""Measurements: the engine beside its peers, what capture costs, how memory grows (`python -m benchmarks`)."""

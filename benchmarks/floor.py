"""What no engine can beat: the time of a decode step's matrices alone."""

from __future__ import annotations

import time

import torch
from torch import nn

from extraction.model.devices import synchronize
from extraction.model.loading import LanguageModel


@torch.inference_mode()
def linear_rate(lm: LanguageModel, batch_size: int, seconds: float = 0.5) -> float:
    """Tokens per second if a step were its linear layers, head included, and nothing else."""
    linear = [module for module in lm.model.modules() if isinstance(module, nn.Linear)]
    given = [torch.randn(batch_size, module.in_features, device=lm.device).to(module.weight.dtype) for module in linear]
    steps, started = 0, time.perf_counter()
    while steps < 3 or time.perf_counter() - started < seconds:
        for module, rows in zip(linear, given, strict=True):
            module(rows)
        synchronize(str(lm.device))
        steps += 1
    return steps * batch_size / (time.perf_counter() - started)

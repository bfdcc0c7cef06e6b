"""Run nnsight: sum every layer's output while `model.generate` runs.

The newest token is not fed, so each row goes on for one token more than it needs.

Shapes: B rows, T tokens, L layers, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from nnsight import NNsight
from protocol import Rows, Run, budgets, cut, left_padded, responses, serve, settings
from torch import Tensor
from transformers import AutoModelForCausalLM


def load(setup: dict[str, Any]) -> Run:
    """Wrap a transformers model in nnsight."""
    model = AutoModelForCausalLM.from_pretrained(setup["folder"], dtype=torch.float32).eval()
    watched = NNsight(model)
    layers = list(watched.model.layers)

    def run(rows: Rows, batch_size: int) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
        tokens, means = {}, {}
        for piece in cut(rows, batch_size):
            found, means_BLD = _answered(model, watched, layers, piece)
            tokens |= found
            means |= {row["id"]: means_LD.clone() for row, means_LD in zip(piece, means_BLD, strict=True)}
        return tokens, means

    return run


def _answered(model: Any, watched: Any, layers: list[Any], rows: Rows) -> tuple[dict[str, list[int]], Tensor]:
    ids_BT, mask_BT = left_padded(rows)
    width, budget_B = ids_BT.shape[1], torch.tensor([row["max_new_tokens"] for row in rows])
    sums_LBD = torch.zeros(len(layers), len(rows), model.config.hidden_size)
    stops, asked = budgets(rows, width, more=1), settings(rows, more=1)
    with (
        torch.inference_mode(),
        watched.trace(ids_BT, fn=model.generate, attention_mask=mask_BT, stopping_criteria=stops, **asked) as tracer,
    ):
        for step in tracer.iter[: asked["max_new_tokens"]]:
            states_LBD = torch.stack([layer.output[:, -1] for layer in layers])
            if step > 0:
                sums_LBD += states_LBD * (step <= budget_B).unsqueeze(1)
        out_BT = tracer.result.save()
    return responses(rows, out_BT, width), sums_LBD.transpose(0, 1) / budget_B[:, None, None]


if __name__ == "__main__":
    serve(load)

"""Run TransformerLens' bridge around a transformers model: `generate` on padded batches, then a pass with its hooks.

Shapes: B rows, T tokens, L layers, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from protocol import Rows, Run, budgets, cut, left_padded, responses, serve, settings
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import AutoModelForCausalLM


def load(setup: dict[str, Any]) -> Run:
    """Load a transformers model into the bridge, which generates with its own parts."""
    model = AutoModelForCausalLM.from_pretrained(setup["folder"], dtype=torch.float32).eval()
    bridge = build_bridge_from_module(model, model.config.architectures[0], hf_config=model.config)
    names = [f"blocks.{layer}.hook_out" for layer in range(model.config.num_hidden_layers)]

    @torch.inference_mode()
    def run(rows: Rows, batch_size: int) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
        tokens: dict[str, list[int]] = {}
        for piece in cut(rows, batch_size):
            ids_BT, mask_BT = left_padded(piece)
            stops = budgets(piece, ids_BT.shape[1])
            out_BT = bridge.original_model.generate(
                ids_BT, attention_mask=mask_BT, stopping_criteria=stops, **settings(piece)
            )
            tokens |= responses(piece, out_BT, ids_BT.shape[1])
        whole = [{**row, "token_ids": row["token_ids"] + tokens[row["id"]]} for row in rows]
        means: dict[str, Tensor] = {}
        for piece in cut(whole, batch_size):
            means |= _means(bridge, names, piece)
        return tokens, means

    return run


def _means(bridge: Any, names: list[str], rows: Rows) -> dict[str, Tensor]:
    """Run the second pass on right-padded rows; return the means over the responses."""
    width = max(len(row["token_ids"]) for row in rows)
    ids_BT = torch.tensor([row["token_ids"] + [0] * (width - len(row["token_ids"])) for row in rows])
    end_B1 = torch.tensor([[len(row["token_ids"])] for row in rows])
    budget_B1 = torch.tensor([[row["max_new_tokens"]] for row in rows])
    column_T = torch.arange(width)
    live_BT = ((column_T >= end_B1 - budget_B1) & (column_T < end_B1)).float()
    found: dict[str, Tensor] = {}

    def note(hidden_BTD: Tensor, hook: Any) -> None:
        found[hook.name] = torch.einsum("btd,bt->bd", hidden_BTD, live_BT) / budget_B1

    bridge.run_with_hooks(ids_BT, return_type=None, fwd_hooks=[(name, note) for name in names])
    means_BLD = torch.stack([found[name] for name in names], dim=1)
    return {row["id"]: means_LD.clone() for row, means_LD in zip(rows, means_BLD, strict=True)}


if __name__ == "__main__":
    serve(load)

"""Protocol of the peer scripts: jobs arrive as lines of JSON on stdin, answers are written to stdout.

The scripts run by path in environments of their own and import nothing of this project. What libraries print is
redirected to stderr.

Shapes: B rows, T tokens, L layers, D hidden.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

Rows = Sequence[dict[str, Any]]  # id, token_ids, max_new_tokens
Run = Callable[[Rows, int], tuple[dict[str, list[int]], dict[str, Tensor]]]  # tokens and means [L, D], by id


def serve(load: Callable[[dict[str, Any]], Run]) -> None:
    """Read the setup from the first line, load, and run every other line as a job."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    setup = json.loads(sys.stdin.readline())
    torch.set_num_threads(setup["threads"])
    run = load(setup)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        tokens, means = run(job["requests"], job["batch_size"])
        if means:
            save_file({key: means_LD.contiguous() for key, means_LD in means.items()}, job["means"])
        print(json.dumps({"tokens": tokens, "has_means": bool(means)}), file=answers, flush=True)


def cut(rows: Rows, size: int) -> list[Rows]:
    """Split rows into batches of `size`, longest prompt first."""
    longest_first = sorted(rows, key=lambda row: -len(row["token_ids"]))
    return [longest_first[i : i + size] for i in range(0, len(longest_first), size)]


def left_padded(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return left-padded ids and their mask, [B, T]."""
    width = max(len(row["token_ids"]) for row in rows)
    ids_BT = torch.tensor([[0] * (width - len(row["token_ids"])) + row["token_ids"] for row in rows])
    start_B1 = torch.tensor([[width - len(row["token_ids"])] for row in rows])
    return ids_BT, (torch.arange(width) >= start_B1).long()


def budgets(rows: Rows, width: int, more: int = 0) -> StoppingCriteriaList:
    """Return a criterion that ends each row at its own length plus `more` tokens."""
    return StoppingCriteriaList([_Budgets(torch.tensor([width + row["max_new_tokens"] + more for row in rows]))])


class _Budgets(StoppingCriteria):
    def __init__(self, columns_B: Tensor) -> None:
        self.columns_B = columns_B

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Mark the rows that are done."""
        done_B: Tensor = self.columns_B <= input_ids.shape[1]
        return done_B


def responses(rows: Rows, out_BT: Tensor, width: int) -> dict[str, list[int]]:
    """Return the new tokens of each row."""
    return {
        row["id"]: out_T[width : width + row["max_new_tokens"]].tolist()
        for row, out_T in zip(rows, out_BT, strict=True)
    }


def settings(rows: Rows, more: int = 0) -> dict[str, Any]:
    """Return greedy generation settings up to the longest response."""
    most = max(row["max_new_tokens"] for row in rows) + more
    return {"do_sample": False, "max_new_tokens": most, "pad_token_id": 0}

"""Shards on disk: which are done, what a file of activations holds, and stored responses read by the model again.

Shapes: n examples, L layers, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from extraction.core.errors import ActivationError
from extraction.core.progress import ProgressReporter
from extraction.core.records import Prompt
from extraction.pipeline.lazy_model import retry_with_smaller_batch
from extraction.pipeline.plan import MODES, GenerationMode
from extraction.pipeline.session import ModelSession
from extraction.storage.trait_run import TraitRun

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.engine.requests import Completion


def is_done(run: TraitRun, index: int, mode: GenerationMode) -> bool:
    """Return True if a shard has everything that a mode makes."""
    return run.shard_done("responses", index) and (not mode.captures or run.shard_done("activations", index))


def receipt_meta(session: ModelSession, batch_size: int) -> dict[str, Any]:
    """Return the fields of a shard's receipt that say how it was made."""
    import torch
    import transformers

    from extraction import __version__

    plan, lm = session.plan, session.lm
    return {
        "model": plan.spec.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": lm.device.type,
        "layers": list(plan.layers),
        "batch_size": batch_size,
        "instruction_as": session.encoder.instruction_role,
        "versions": {
            "traitline": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def shard_tensors(session: ModelSession, activations: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a shard's file from each example's activations: `site.pooling` -> [n, L, D].

    The rows are in the examples' order and in the capture's dtype. Pooling `all` gives one tensor an example. Raises
    ActivationError for a value that the dtype can't hold.
    """
    tensors: dict[str, Tensor] = {}
    for name in (f"{site}.{pooling}" for pooling in session.capture.poolings for site in session.capture.sites):
        rows = {id: _to_stored_dtype(session, found[name], f"{id}: {name}") for id, found in activations.items()}
        if name.endswith(".all"):
            tensors.update({f"{name}/{id}": row for id, row in rows.items()})
        else:
            tensors[name] = _stack(session, list(rows.values()))
    return tensors


def _to_stored_dtype(session: ModelSession, hidden_LD: Tensor, place: str) -> Tensor:
    import torch

    name = session.plan.experiment.capture.dtype
    stored: Tensor = hidden_LD.to(getattr(torch, name))
    if not stored.isfinite().all():
        raise ActivationError(f"{place}: too large for {name}; set capture: {{dtype: float32}} in the experiment")
    return stored


def _stack(session: ModelSession, rows_LD: Sequence[Tensor]) -> Tensor:
    """[n, L, D], also where every response of the shard is empty."""
    import torch

    if rows_LD:
        return torch.stack(list(rows_LD))
    plan = session.plan
    dtype = getattr(torch, plan.experiment.capture.dtype)
    return torch.empty(0, len(plan.layers), session.lm.hidden_size, dtype=dtype)


def capture_shard(
    session: ModelSession,
    run: TraitRun,
    index: int,
    progress: ProgressReporter,
    *,
    without_instruction: Sequence[Prompt] | None = None,
) -> None:
    """Write the activations of one shard's stored responses, teacher-forced from their token ids.

    Empty responses have none. `without_instruction` are the shard's prompts without the instruction, which then stand
    in for the stored ones.
    """
    from extraction.engine.generate import teacher_force

    rows = [row for row in run.read_responses_shard(index) if row["token_ids"]]
    prompts = {row["id"]: row["prompt_token_ids"] for row in rows}
    if without_instruction is not None:
        prompts = {prompt.example.id: prompt.token_ids for prompt in without_instruction}
    texts = [(row["id"], prompts[row["id"]], row["token_ids"]) for row in rows]
    done: dict[str, Completion] = {}

    def capture(batch_size: int) -> None:
        done.clear()
        for completion in teacher_force(session.lm, texts, capture=session.capture, batch_size=batch_size):
            done[completion.id] = completion
            progress.advance(1, len(completion.token_ids))

    started = time.perf_counter()
    batch_size = session.batch_size(MODES["batched"], [len(prompt_ids) for _, prompt_ids, _ in texts])
    batch_size = retry_with_smaller_batch(
        capture, batch_size, session, progress, lambda: progress.advance(-len(done), 0)
    )
    session.note_work(done.values(), batch_size, time.perf_counter() - started)
    activations = {row["id"]: done[row["id"]].activations for row in rows}
    stage = "activations" if without_instruction is None else "stripped"
    how = "from stored ids" if without_instruction is None else "from stored ids, without the instruction"
    meta = {**receipt_meta(session, batch_size), "captured": how}
    run.write_activations_shard(index, list(activations), shard_tensors(session, activations), meta, stage=stage)

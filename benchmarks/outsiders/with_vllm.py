"""vLLM: token ids in, token ids out, greedy, every length forced. It has no activations: they take a second pass."""

from __future__ import annotations

import os
from typing import Any

from line import Rows, Run, serve

GIB = 2**30
QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def load(setup: dict[str, Any]) -> Run:
    """One engine for all batch sizes; its cache holds the largest batch at full length."""
    os.environ |= {**QUIET, "VLLM_CPU_KVCACHE_SPACE": str(1 + setup["cache_bytes"] // GIB)}
    from vllm import LLM, SamplingParams

    llm = LLM(
        setup["folder"],
        skip_tokenizer_init=True,
        dtype="float32",
        max_num_seqs=setup["most_rows"],
        max_model_len=setup["longest"],
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler

    def run(rows: Rows, batch_size: int) -> tuple[dict[str, list[int]], dict[str, Any]]:
        scheduler.max_num_running_reqs = min(batch_size, setup["most_rows"])
        asked = [
            SamplingParams(temperature=0.0, max_tokens=row["max_new_tokens"], ignore_eos=True, detokenize=False)
            for row in rows
        ]
        done = llm.generate([{"prompt_token_ids": row["token_ids"]} for row in rows], asked, use_tqdm=False)
        return {row["id"]: list(each.outputs[0].token_ids) for row, each in zip(rows, done, strict=True)}, {}

    return run


if __name__ == "__main__":
    serve(load)

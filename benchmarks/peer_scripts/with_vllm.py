"""Run vLLM: token ids in and out, greedy, forced lengths. It returns no activations; those take a second pass.

As its documentation asks for on a processor: compiled, Intel's OpenMP loaded before anything else, a thread a core.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from protocol import Rows, Run, serve

GIB = 2**30
QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # it binds threads of worker processes only; ours are bound by `prepared`
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
OPENMP = Path(sys.prefix) / "lib" / "libiomp5.so"  # of intel-openmp, which the package brings where there is one
# What admits a request to the batch, newest name first. Where there are two, the second is the number of slots: to
# lower that one alone ends in an AssertionError as soon as there are more requests.
ADMISSION = ("max_num_active_reqs", "max_num_running_reqs")


def prepared() -> dict[str, str]:
    """Return environment variables that must be set before start; empty if they are set or the library is missing."""
    if not OPENMP.is_file() or str(OPENMP) in os.environ.get("LD_PRELOAD", ""):
        return {}
    threads, cores = int(os.environ["OMP_NUM_THREADS"]), sorted(os.sched_getaffinity(0))
    bound = {"KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{','.join(map(str, cores[:threads]))}]"}
    return {
        "LD_PRELOAD": str(OPENMP),
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
        **(bound if threads <= len(cores) else {}),
    }


def load(setup: dict[str, Any]) -> Run:
    """Load one engine for all batch sizes; its cache holds the largest batch at full length."""
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
    admits = next(name for name in ADMISSION if hasattr(scheduler, name))

    def run(rows: Rows, batch_size: int) -> tuple[dict[str, list[int]], dict[str, Any]]:
        setattr(scheduler, admits, min(batch_size, setup["most_rows"]))
        asked = [
            SamplingParams(temperature=0.0, max_tokens=row["max_new_tokens"], ignore_eos=True, detokenize=False)
            for row in rows
        ]
        done = llm.generate([{"prompt_token_ids": row["token_ids"]} for row in rows], asked, use_tqdm=False)
        return {row["id"]: list(each.outputs[0].token_ids) for row, each in zip(rows, done, strict=True)}, {}

    return run


if __name__ == "__main__":
    if more := prepared():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | more)
    serve(load)

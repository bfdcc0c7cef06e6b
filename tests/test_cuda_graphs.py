"""Tests of CUDA graphs: replayed steps obey the engine's laws, and models that cannot be recorded run step by step.

`tests/recorder.py` records on the CPU; on a GPU the same laws run on CUDA graphs.

Shapes: L layers, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from extraction.activations.pooled import PooledCapture
from extraction.engine import cuda_graphs
from extraction.engine.batch import ContinuousBatch
from extraction.engine.cuda_graphs import STEPS_PER_RUN, CudaGraphRunner, unsupported_reason
from extraction.engine.logit_diff import Amplify
from extraction.engine.sampler import Sample
from extraction.engine.sequence import BatchLimits
from extraction.engine.speculation import Speculate
from extraction.engine.steering import Steering
from extraction.model import onednn_linear
from extraction.model.kv_cache import CacheWindow, GraphCursor
from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap
from extraction.pipeline.lazy_model import cuda_graph_notes
from extraction.utils_batch import Capture, Request
from tests.recorder import Recorder
from tests.test_engine_laws import ALL_LAYERS, EVERY, TOLERANCE, case_of, run, tokens_of, worst
from tests.tiny import FAMILIES, HIDDEN, deviation, prompts, shared_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`input_embeds` is deprecated:FutureWarning")
WARPED = Sample(0.8, top_k=20, top_p=0.9)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Record on the CPU, without the kernels that are chosen for it."""
    recorder = Recorder()
    monkeypatch.setattr(cuda_graphs, "recorder_for", lambda _device: recorder)
    monkeypatch.setattr(onednn_linear, "is_worthwhile", lambda: False)
    monkeypatch.setattr(cuda_graphs, "COLUMN_BUCKET", 16)  # so that short texts have several recordings
    return recorder


# --- laws -----------------------------------------------------------------------------------------------------------


NOT_RECORDED = {
    ("xglm", "mpt"): "not permitted while recording",  # they ask the device for the length of the text
    ("jetmoe", "gpt_neo"): "a replayed step differs",  # expert counts on the host; windows from the last column
}


@pytest.mark.parametrize(
    "name",
    [*FAMILIES, "falcon_h1", "lfm2", "qwen3_next", "mamba2", *(name for names in NOT_RECORDED for name in names)],
)
def test_tokens_and_activations_equal_transformers_in_any_batch_and_order(name: str, recorder: Recorder) -> None:
    case = case_of(name)
    reason = next((words for names, words in NOT_RECORDED.items() if name in names), "")
    assert (reason in unsupported_reason(case.lm, recorder)) if reason else not unsupported_reason(case.lm, recorder)
    recorder.n_replayed = 0
    for batch_size, lm, requests in case.orders()[1:3]:
        done = run(lm, requests, batch_size, Capture(ALL_LAYERS))
        assert tokens_of(done) == case.expected(done, lm), f"batch size {batch_size}"
        assert worst(case, done) < TOLERANCE[torch.float32], f"batch size {batch_size}"
    assert bool(recorder.n_replayed) == (not reason)


def twice(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, work: Callable[[], dict[str, Any]], *, replays: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run with recording and step by step; both results by id."""
    replayed = work()
    assert bool(recorder.n_replayed) == replays
    with monkeypatch.context() as patch:
        patch.setattr(cuda_graphs, "recorder_for", lambda _device: None)
        return replayed, work()


def agree(replayed: dict[str, Any], stepped: dict[str, Any]) -> bool:
    """Return True if tokens and finish reasons are equal, and activations within rounding."""
    if tokens_of(replayed) != tokens_of(stepped):
        return False
    return all(
        done.finish_reason == stepped[key].finish_reason
        and done.activations.keys() == stepped[key].activations.keys()
        and all(deviation(kept, stepped[key].activations[n]) < 1e-5 for n, kept in done.activations.items())
        for key, done in replayed.items()
    )


def many(lm: LanguageModel, n: int = 11, **fields: Any) -> list[Request]:
    """Return requests of many lengths, more than slots."""
    return [Request(f"e{i}", row, 1 + (5 * i) % 17, **fields) for i, row in enumerate(prompts(n, seed=3))]


IN_PLACE = ("response_mean", "prompt_mean", "prompt_last", "response_first:2", "response_last")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("sample", [Sample(), Sample(1.0), WARPED], ids=["greedy", "plain", "warped"])
def test_every_way_of_sampling_and_pooling_is_the_same(
    name: str, sample: Sample, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = case_of(name).lm
    capture = Capture(ALL_LAYERS, ("residual", "mlp"), IN_PLACE)
    assert agree(*twice(recorder, monkeypatch, lambda: run(lm, many(lm), 4, capture, strategy=sample)))


def test_without_capture_it_is_the_same(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = case_of("llama").lm
    assert agree(*twice(recorder, monkeypatch, lambda: run(lm, many(lm), 4)))


def test_two_models_are_amplified_in_one_recording(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    after, before = wrap(shared_model("llama"), stop_ids=()), wrap(shared_model("gpt2"), stop_ids=())
    requests = [replace(request, alpha=float(i % 3)) for i, request in enumerate(many(after))]
    strategy = Amplify(before, WARPED)
    replayed, stepped = twice(recorder, monkeypatch, lambda: run(after, requests, 4, Capture((1,)), strategy=strategy))
    assert agree(replayed, stepped)
    assert not agree(replayed, run(after, many(after), 4, Capture((1,)), strategy=WARPED))  # alphas did something


def test_steering_is_recorded_with_the_step(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = wrap(shared_model("llama"), stop_ids=())
    vector_D = torch.linspace(-3, 3, HIDDEN)
    ways = [Steering(add={1: vector_D}), Steering(ablate={1: vector_D / vector_D.norm()}), Steering()]
    requests = [replace(request, steering=ways[i % 3]) for i, request in enumerate(many(lm))]
    replayed, stepped = twice(recorder, monkeypatch, lambda: run(lm, requests, 4, Capture(ALL_LAYERS)))
    assert agree(replayed, stepped)
    assert not agree(replayed, run(lm, many(lm), 4, Capture(ALL_LAYERS)))


@pytest.mark.parametrize("capture", [None, Capture(ALL_LAYERS)], ids=["plain", "captured"])
def test_stop_strings_end_a_response_where_they_did(
    capture: Capture | None, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    lm = wrap(shared_model("llama"), tokenizer, stop_ids=())
    stop = tokenizer.decode(list(run(lm, many(lm)[3:4], 1)["e3"].token_ids[4:6]))
    replayed, stepped = twice(recorder, monkeypatch, lambda: run(lm, many(lm), 4, capture, stop_strings=(stop,)))
    assert agree(replayed, stepped)
    assert "stop_string" in {done.finish_reason for done in replayed.values()}


def test_stop_tokens_that_are_ignored_end_nothing(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = case_of("llama").lm
    replayed, stepped = twice(recorder, monkeypatch, lambda: run(lm, many(lm, ignore_eos=True), 4, Capture(ALL_LAYERS)))
    assert agree(replayed, stepped)
    assert {done.finish_reason for done in replayed.values()} == {"length"}


# --- what is not recorded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({"capture": Capture((1,), poolings=("all",))}, [Sample()]),
        ({"strategy": Speculate(None)}, [Sample()]),
        ({}, [Sample(), Sample(1.0)]),
    ],
    ids=["every token kept", "speculation", "rows that are sampled in different ways"],
)
def test_settings_that_cannot_be_recorded_run_step_by_step(
    options: dict[str, Any], samples: Sequence[Sample], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = wrap(shared_model("llama"), stop_ids=())
    requests = [replace(r, sample=samples[i % len(samples)]) for i, r in enumerate(many(lm, 6)) if r.max_new_tokens > 2]
    mixed = [replace(request, max_new_tokens=9) for request in requests]
    assert unsupported_reason(lm, recorder) == ""
    recorder.n_replayed = 0
    assert agree(*twice(recorder, monkeypatch, lambda: run(lm, mixed, len(mixed), **options), replays=False))


def test_a_failed_recording_falls_back_to_steps(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = wrap(deepcopy(shared_model("llama")), stop_ids=())
    assert unsupported_reason(lm, recorder) == ""
    record = Recorder.__call__

    def once(self: Recorder, work: Callable[[], None]) -> Callable[[], None]:
        if self.n_recorded > 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return record(self, work)

    monkeypatch.setattr(Recorder, "__call__", once)
    assert agree(*twice(recorder, monkeypatch, lambda: run(lm, many(lm), 4, Capture(ALL_LAYERS))))
    assert "stream is capturing" in unsupported_reason(lm)


def test_a_run_reports_why_a_model_is_not_recorded(recorder: Recorder) -> None:
    (said,) = cuda_graph_notes(case_of("mpt").lm)
    assert said.startswith("decode steps run one by one")
    assert "not permitted while recording" in said
    assert not list(cuda_graph_notes(case_of("llama").lm))


# --- what a recording may count on ----------------------------------------------------------------------------------


def test_buffers_keep_their_addresses_and_the_host_syncs_once_a_run(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = wrap(shared_model("llama"), stop_ids=())
    assert unsupported_reason(lm, recorder) == ""
    recorder.n_recorded = recorder.n_replayed = 0
    requests = [Request(f"e{i}", row, 24) for i, row in enumerate(prompts(4))]
    batch = ContinuousBatch(lm, BatchLimits.of(requests, 4), capture=Capture(ALL_LAYERS))
    looks: list[int] = []
    look = CudaGraphRunner._outcome
    monkeypatch.setattr(
        CudaGraphRunner, "_outcome", lambda self, n_steps: (looks.append(n_steps), look(self, n_steps))[1]
    )
    batch.add(requests)
    seen: list[tuple[int, ...]] = []
    with batch.attached():
        while batch.has_work:
            batch.step()
            seen.append(tuple(tensor.data_ptr() for tensor in buffers(batch)))
    assert len(set(seen[:-1])) == 1
    assert looks == [STEPS_PER_RUN] * (24 // STEPS_PER_RUN)
    assert recorder.n_recorded < 4  # one for every 16 columns
    assert recorder.n_replayed == sum(looks) - recorder.n_recorded


def buffers(batch: ContinuousBatch) -> list[Tensor]:
    """Return the buffers that a step reads and writes."""
    assert batch.stepper.graphs is not None
    assert isinstance(batch.stepper.capture, PooledCapture)
    rows, layers = batch.stepper.rows, batch.stepper.model.cache.slot_layers
    kept = [states for layer in layers for states in (layer.keys, layer.values) if states is not None]
    sums = [accumulator.sum_KBD for accumulator in batch.stepper.capture.poolings.values()]
    own = [
        batch.stepper.graphs.token_BK,
        batch.stepper.graphs.status_3B,
        batch.stepper.graphs.cursor_1,
        batch.kv.mask_BS,
    ]
    return [rows.token_B1, rows.last_B1, rows.length_B1, *rows.uniform_BT.values(), *kept, *sums, *own]


def test_a_recording_is_dropped_when_the_rows_change(recorder: Recorder) -> None:
    lm = wrap(shared_model("llama"), stop_ids=())
    requests = [Request(f"e{i}", row, 4 if i else 40) for i, row in enumerate(prompts(8))]
    done = run(lm, requests, 8, Capture(ALL_LAYERS))
    assert recorder.n_recorded > 2  # the batch shrank to one row
    alone = run(lm, requests[:1], 1, Capture(ALL_LAYERS))
    assert agree({"e0": done["e0"]}, alone)


# --- negative controls ----------------------------------------------------------------------------------------------


def stuck_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number that the cursor had when it was recorded."""
    recording = CacheWindow.recording

    def stuck(self: CacheWindow, recorded: GraphCursor) -> Any:
        return recording(self, GraphCursor(torch.full_like(recorded.cursor_1, self.cursor), recorded.columns))

    monkeypatch.setattr(CacheWindow, "recording", stuck)


def stopped_rows_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a fault: tokens past a stop are counted."""
    accumulate = PooledCapture.accumulate
    monkeypatch.setattr(PooledCapture, "accumulate", lambda self, age_B, live_B, t=0: accumulate(self, age_B, None, t))


def stale_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a fault: recordings are kept when their rows are gone."""
    monkeypatch.setattr(CudaGraphRunner, "forget", lambda self: None)


@pytest.mark.parametrize("harm", [stuck_cursor, stopped_rows_count, stale_recording])
def test_planted_faults_break_the_laws(
    harm: Callable[[pytest.MonkeyPatch], None], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("llama")
    assert unsupported_reason(case.lm, recorder) == ""
    assert unsupported_reason(case.endless, recorder) == ""
    harm(monkeypatch)
    broken = False
    for batch_size, lm, requests in case.orders():
        try:
            done = run(lm, requests, batch_size, Capture(ALL_LAYERS))
        except Exception:  # a stale buffer may have another shape
            broken = True
            continue
        broken |= tokens_of(done) != case.expected(done, lm) or worst(case, done) > 1e-3
    assert broken


def test_a_model_whose_replay_differs_is_not_recorded(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = wrap(deepcopy(shared_model("llama")), stop_ids=())
    stuck_cursor(monkeypatch)
    assert unsupported_reason(lm, recorder) != ""
    monkeypatch.undo()
    requests = [Request("e0", prompts(1)[0], 8)]
    recorder.n_replayed = 0
    run(lm, requests, 1)
    assert recorder.n_replayed == 0


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EVERY
def test_on_a_gpu_the_laws_hold(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    case = case_of(name)
    model = deepcopy(case.lm.model).to("cuda")
    for batch_size, lm, requests in case.orders():
        done = run(wrap(model, stop_ids=lm.stop_ids), requests, batch_size, Capture(ALL_LAYERS))
        assert tokens_of(done) == case.expected(done, lm), f"batch size {batch_size}"
        assert worst(case, done) < 1e-4, f"batch size {batch_size}"

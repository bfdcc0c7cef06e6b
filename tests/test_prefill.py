"""Prompts that enter together are read in prefills of few tokens: the same answers, and every slot filled at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extraction.engine.generate import generate
from extraction.engine.sampler import Sample
from extraction.engine.scheduler import Admission, Scheduler
from extraction.model import devices
from extraction.model.devices import prefill_rows
from extraction.model.loading import wrap
from extraction.utils_batch import Capture, Completion, Request
from tests.tiny import deviation, prompts, reference_greedy, shared_model

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=300))
def test_a_prefill_has_as_many_prompts_as_fit_and_one_at_least(lengths: list[int]) -> None:
    n_rows, most = prefill_rows(lengths, CPU), devices.prefill_tokens(CPU)
    assert 1 <= n_rows <= len(lengths)
    assert n_rows == 1 or n_rows * max(lengths[:n_rows]) <= most
    assert n_rows == len(lengths) or (n_rows + 1) * max(lengths[: n_rows + 1]) > most


def test_a_gpu_prefills_larger_batches() -> None:
    assert prefill_rows([60] * 100, torch.device("cuda", 1)) == 100
    assert prefill_rows([60] * 100, CPU) == 17
    assert devices.prefill_tokens("cuda:1") == devices.prefill_tokens("mps") > devices.prefill_tokens("cpu")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom"])
def test_pieces_change_no_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = wrap(shared_model(name), stop_ids=())
    requests = [Request(str(i), ids, 2 + 5 * (i % 3)) for i, ids in enumerate(prompts(13))]
    entered: list[tuple[int, int]] = []
    own = Scheduler.assign

    def watched(scheduler: Scheduler, admission: Admission) -> list[Sample]:
        samples = own(scheduler, admission)
        entered.append((len(admission.rows), scheduler.slots.count(None)))
        return samples

    def said() -> tuple[dict[str, Completion], Sequence[tuple[int, int]]]:
        entered.clear()
        done = generate(lm, requests, batch_size=6, capture=Capture(tuple(range(lm.n_layers))))
        return {c.id: c for c in done}, tuple(entered)

    monkeypatch.setattr(Scheduler, "assign", watched)
    whole, prefills = said()
    assert prefills[0] == (6, 0)
    monkeypatch.setattr(devices, "PREFILL_TOKENS_BY_DEVICE", {"cpu": 50})
    pieces, prefills = said()
    assert prefills[0][0] < 6
    full = [sum(n for n, _ in prefills[: i + 1]) for i, (_, n_idle) in enumerate(prefills) if not n_idle]
    assert full[0] == 6  # all slots were filled before the first step
    for request in requests:
        wanted = reference_greedy(lm.model, request.token_ids, request.max_new_tokens, lm.stop_ids)
        assert pieces[request.id].token_ids == whole[request.id].token_ids == wanted
        key = "residual.response_mean"
        assert deviation(pieces[request.id].activations[key], whole[request.id].activations[key]) < 1e-5

"""Real servers on loopback with tiny random models, in a thread of this process, and models with planted faults."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx2
import torch
from torch import Tensor, nn

from extraction.model.language_model import LanguageModel
from extraction.model.loading import wrap
from extraction.serving.models import ServedModels
from extraction.serving.server import HttpServer
from extraction.serving.settings import Settings, address_of, bind
from tests.tiny import tiny_model, tiny_tokenizer

NAMES = {"model": "tiny", "draft": "tiny-draft", "after": "tiny-after", "before": "tiny-before"}
POISON = "$$"  # two tokens: the self-test of a loaded model uses single ones


@dataclass
class Running:
    """A running server, a client of it, and the lines that it logged."""

    server: HttpServer
    url: str
    client: httpx2.Client
    log: list[str]

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        """POST JSON."""
        return self.client.post(path, json=body, **options)

    def answer(self, path: str, **body: Any) -> dict[str, Any]:
        """POST JSON and return the JSON of a response with status 200."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def refusal(self, path: str, body: Any, status: int, **options: Any) -> dict[str, Any]:
        """POST JSON and return the error of a response with another status."""
        response = self.post(path, body, **options)
        assert response.status_code == status, response.text
        return error_of(response)

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """POST JSON and return the events of the stream."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """Return the error of a response, which must have OpenAI's shape and a message of one short line."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].isprintable()
    assert len(error["message"]) < 400
    return error


@cache
def language_model(seed: int = 0, **changes: Any) -> LanguageModel:
    """Return a tiny Llama with one token a character."""
    return wrap(tiny_model("llama", seed=seed, max_position_embeddings=512, **changes), tiny_tokenizer())


def served(**replaced: Any) -> ServedModels:
    """Return models for every kind of generation."""
    models = {
        "target": language_model(0),
        "draft": language_model(0, num_hidden_layers=2),
        "after": language_model(1),
        "before": language_model(2),
    }
    return ServedModels(**(models | {"names": NAMES} | replaced))


@contextmanager
def running(what: ServedModels | None = None, **settings: Any) -> Iterator[Running]:
    """Run a server in a thread, until the end of the block."""
    limits = {"port": 0, "batch_size": 8, "max_total_tokens": 256, "max_new_tokens": 120, "grace": 5.0}
    chosen = Settings(**(limits | settings))
    taken, log = bind(chosen), []
    server = HttpServer(what or served(), chosen, taken, log.append)
    thread = threading.Thread(target=server.run)
    thread.start()
    headers = {"authorization": f"Bearer {chosen.token}"} if chosen.token else {}
    try:
        while not server.started:
            assert thread.is_alive()
        with httpx2.Client(verify=False, base_url=address_of(taken), timeout=60, headers=headers) as client:
            yield Running(server, address_of(taken), client, log)
    finally:
        server.shut_down()
        thread.join(30)
        taken.close()
        assert not thread.is_alive()


class Planted(nn.Embedding):
    """An embedding with a planted fault at one token or at too many rows: memory runs out, NaN, or a crash."""

    def __init__(self, inner: nn.Embedding, fault: str, most_rows: int) -> None:
        super().__init__(inner.num_embeddings, inner.embedding_dim, _weight=inner.weight.detach())
        self.fault, self.most_rows = fault, most_rows
        self.poison = tiny_tokenizer().convert_tokens_to_ids(POISON[0])

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the embeddings, or raise."""
        poisoned_BT = ids_BT == self.poison
        poisoned_BT[:, 1:] &= poisoned_BT[:, :-1].clone()
        poisoned_BT[:, 0] = False
        if len(ids_BT) > self.most_rows or (self.fault == "memory" and poisoned_BT.any()):
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        if self.fault == "crash" and poisoned_BT.any():
            raise RuntimeError(f"planted: {ids_BT.tolist()}")
        hidden_BTD = super().forward(ids_BT)
        return hidden_BTD.masked_fill(poisoned_BT.unsqueeze(-1), float("nan")) if self.fault == "nan" else hidden_BTD


def faulty(fault: str, most_rows: int = 10_000) -> LanguageModel:
    """Return a model that fails where a prompt holds POISON, and never generates it."""
    model = tiny_model("llama", max_position_embeddings=512, tie_word_embeddings=False)
    inner, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(inner, nn.Embedding)
    planted = Planted(inner, fault, 10_000)
    silenced = nn.Linear(head.in_features, head.out_features)
    silenced.weight.data.copy_(head.weight)
    silenced.bias.data.zero_()[planted.poison] = -1e9
    model.set_input_embeddings(planted)
    model.set_output_embeddings(silenced)
    lm = wrap(model.requires_grad_(False), tiny_tokenizer())
    planted.most_rows = most_rows  # once it has loaded
    return lm

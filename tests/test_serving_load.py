"""Many clients at once, and faults meanwhile: no response is lost, swapped or late. Queue, memory, crashes, signals."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from extraction.serving.batch_queue import GROW_AFTER, BatchQueue, PendingRow, QueueName
from extraction.serving.engine_thread import EngineThread
from extraction.serving.settings import Settings
from extraction.utils_batch import Request
from tests.forks import Forked, Forks, forks
from tests.runs import REPOSITORY, environment, make_root, refused
from tests.served import POISON, Running, error_of, faulty, language_model, running, served

CLIENTS = 64
REQUESTS = 320
DISTINCT = 48
VOLATILE = {"id", "created", "time_seconds", "tokens_per_second", "time_to_first_token", "stats"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One server for the tests without faults."""
    with running() as started:
        yield started


def stable(value: Any) -> Any:
    """Return a response without the fields that differ from one time to the next."""
    if isinstance(value, dict):
        return {key: stable(item) for key, item in value.items() if key not in VOLATILE}
    return [stable(item) for item in value] if isinstance(value, list) else value


# --- many at once ---------------------------------------------------------------------------------------------------

PathAndBody = tuple[str, dict[str, Any]]


def mixed(number: int) -> PathAndBody:
    """Return a random request; consecutive numbers are for different endpoints."""
    rng = random.Random(number)
    text = "".join(rng.choice("abcdefgh ?") for _ in range(rng.randint(1, 60)))
    how: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.7, 1.0, 1.5]),
        "top_p": rng.choice([0.5, 0.9, 1.0]),
        "top_k": rng.choice([0, 0, 5]),
        "seed": rng.randrange(1000),
        "ignore_eos": rng.random() < 0.5,
    }
    n = rng.randint(1, 16)
    alpha = rng.choice([-1.0, 0.0, 0.5, 1.0, 3.0])
    chat = {"apply_chat_template": rng.random() < 0.5}
    kinds: list[PathAndBody] = [
        ("/generate", {"prompt": text, "max_new_tokens": n, **how, **chat}),
        ("/generate_lda", {"prompt": text, "max_new_tokens": n, "alpha": alpha, **how, **chat}),
        ("/generate_lda_batch", {"prompts": [text, text[::-1]], "max_new_tokens": n, "alpha": alpha, **how, **chat}),
        ("/generate/batch", {"prompts": [text, f"{text}?"], "max_tokens": n, **how, **chat}),
        ("/v1/completions", {"model": "tiny", "prompt": text, "max_tokens": n, **how}),
        (
            "/v1/chat/completions",
            {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": n, **how},
        ),
    ]
    return kinds[number % len(kinds)]


async def send_all(url: str, requests: list[PathAndBody], clients: int) -> list[Any]:
    """Send the requests from concurrent clients, each with its own connection. Returns the response of each."""
    answers: list[Any] = [None] * len(requests)
    numbers = iter(range(len(requests)))

    async def work() -> None:
        async with httpx2.AsyncClient(verify=False, base_url=url, timeout=120) as client:
            for number in numbers:
                path, body = requests[number]
                response = await client.post(path, json=body)
                answers[number] = stable(response.json()) if response.status_code == 200 else response.text

    await asyncio.gather(*(work() for _ in range(clients)))
    return answers


def n_wrong(answers: list[Any], requests: list[PathAndBody], alone: dict[str, Any]) -> int:
    """Return the number of responses that differ from those of the same request alone."""
    return sum(answer != alone[repr(request)] for answer, request in zip(answers, requests, strict=True))


def test_requests_of_64_clients_have_the_responses_that_they_have_alone():
    distinct = [mixed(number) for number in range(DISTINCT)]
    rng = random.Random(0)
    requests = [rng.choice(distinct) for _ in range(REQUESTS)]
    with running(batch_size=32, queue=4 * CLIENTS) as server:
        alone = {repr(each): stable(server.answer(each[0], **each[1])) for each in distinct}
        answers = asyncio.run(send_all(server.url, requests, CLIENTS))
        assert server.client.get("/health").json()["rows"] == 0
    assert len({repr(answer) for answer in alone.values()}) > 0.9 * DISTINCT
    assert n_wrong(answers, requests, alone) == 0
    # the comparison itself: two answers that are swapped, and one that is lost, are seen
    i, j = next((i, j) for i in range(9) for j in range(9) if answers[i] != answers[j])
    answers[i], answers[j] = answers[j], answers[i]
    assert n_wrong(answers, requests, alone) == 2
    answers[i] = None
    assert n_wrong(answers, requests, alone) == 2


def test_responses_swapped_by_a_planted_fault_are_found(monkeypatch):
    end = EngineThread._finish

    def swapped(self: Any, ends: list[Any]) -> None:
        """Two rows that end together get each other's answer."""
        if len(ends) > 1:
            (one, first), (other, second), *others = ends
            ends = [(one, second), (other, first), *others]
        end(self, ends)

    requests = [
        ("/generate", {"prompt": f"{i}", "max_new_tokens": 6, "seed": i, "ignore_eos": True}) for i in range(24)
    ]
    with running() as server:
        alone = {repr(each): stable(server.answer(each[0], **each[1])) for each in requests}
        assert n_wrong(asyncio.run(send_all(server.url, requests, 12)), requests, alone) == 0
        monkeypatch.setattr(EngineThread, "_finish", swapped)
        assert n_wrong(asyncio.run(send_all(server.url, requests, 12)), requests, alone) > 0


def test_concurrent_requests_share_decode_steps(server):
    requests = [("/generate", {"prompt": f"{i}", "max_new_tokens": 60, "ignore_eos": True}) for i in range(8)]
    before = steps(server, "plain")
    asyncio.run(send_all(server.url, requests, 8))
    assert steps(server, "plain") - before < 60 * 4  # alone they would take 8 times 60


def steps(server: Running, kind: str) -> float:
    """Return the number of decode steps of a kind of generation."""
    found = re.search(rf'traitline_steps_total{{kind="{kind}"}} ([\d.]+)', server.client.get("/metrics").text)
    return float(found[1]) if found else 0.0


def test_health_responds_while_the_engine_works(server):
    with Streaming(server, "/generate", prompt="x", max_new_tokens=120, ignore_eos=True):
        began = time.monotonic()
        assert server.client.get("/health").json()["rows"] == 1
        assert time.monotonic() - began < 2


# --- the queue ------------------------------------------------------------------------------------------------------


class Streaming:
    """A client that has read the first event of a streamed response."""

    def __init__(self, server: Running, path: str, **body: Any) -> None:
        self.server = server
        self.opened = server.client.stream("POST", path, json={**body, "stream": True})

    def __enter__(self) -> Streaming:
        self.response = self.opened.__enter__()
        self.lines = self.response.iter_lines()
        self.first = next(self.lines)
        return self

    def __exit__(self, *failure: Any) -> None:
        self.opened.__exit__(*failure)

    def rest(self) -> str:
        """Read the stream to its end. Returns its last chunk."""
        found = [line for line in self.lines if line]
        assert found[-1] == "data: [DONE]"
        return found[-2].removeprefix("data: ")


def slow_model(seconds: float = 0.02) -> Any:
    """Return models with a slow target, so that tests can act while it generates."""
    lm = language_model(7, tie_word_embeddings=False)
    if not hasattr(lm.model, "slowed"):
        lm.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
        lm.model.slowed = True
    return served(target=lm, draft=None)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a condition; fail after some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def rows_now(server: Running) -> int:
    """Return the number of rows that wait or run."""
    rows: int = server.client.get("/health").json()["rows"]
    return rows


def test_a_full_queue_is_429_with_retry_after_and_recovers():
    with running(slow_model(), batch_size=2, queue=3) as server:
        body = {"prompt": "x", "max_new_tokens": 100, "ignore_eos": True}
        with Streaming(server, "/generate", **body), Streaming(server, "/generate", **body):
            threads = [threading.Thread(target=server.post, args=("/generate", {**body, "max_new_tokens": 1}))]
            threads[0].start()
            wait_until(lambda: rows_now(server) == 3)
            response = server.post("/generate", body)
            assert response.status_code == 429
            assert error_of(response)["type"] == "rate_limit_error"
            assert 1 <= int(response.headers["retry-after"]) <= 60
        threads[0].join()
        wait_until(lambda: rows_now(server) == 0)
        assert server.answer("/generate", prompt="x", max_new_tokens=2)
        error = server.refusal("/generate/batch", {"prompts": ["x"] * 4}, 422)
        assert (error["code"], "3" in error["message"]) == ("queue", True)


def test_all_rows_of_a_request_are_accepted_or_none():
    with running(slow_model(), batch_size=2, queue=3) as server:
        body = {"prompt": "x", "max_new_tokens": 100, "ignore_eos": True}
        with Streaming(server, "/generate", **body):
            assert server.post("/generate/batch", {"prompts": ["x"] * 3}).status_code == 429
            assert rows_now(server) == 1


# --- clients that leave ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_slot(stream):
    with running(slow_model(), batch_size=1, queue=2) as server:
        address = server.url.removeprefix("http://").split(":")
        body = (
            b'{"prompt": "x", "max_new_tokens": 120, "ignore_eos": true, "stream": %s}' % str(stream).lower().encode()
        )
        head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d"
        with socket.create_connection((address[0], int(address[1]))) as wire:
            wire.sendall(head % len(body) + b"\r\n\r\n" + body)
            wait_until(lambda: rows_now(server) == 1)
            if stream:
                assert b"200 OK" in wire.recv(1000)
        began = time.monotonic()
        wait_until(lambda: rows_now(server) == 0)
        assert server.answer("/generate", prompt="x", max_new_tokens=2)
        assert time.monotonic() - began < 1.5  # the whole answer would take 2.4 s
        assert "traitline_rows_cancelled_total 1" in server.client.get("/metrics").text


def test_other_clients_of_one_that_disconnects_get_their_responses(server):
    body = {"prompt": "What?", "max_new_tokens": 100, "seed": 1, "ignore_eos": True}
    alone = server.answer("/generate", **body)
    with Streaming(server, "/generate", **body) as staying:
        with Streaming(server, "/generate", **body):
            pass
        assert (
            alone["completion"] in staying.rest().encode().decode("unicode_escape") or alone["tokens_generated"] == 100
        )


def test_a_request_ends_at_its_timeout():
    with running(slow_model(), timeout=0.3) as server:
        error = server.refusal("/generate", {"prompt": "x", "max_new_tokens": 120, "ignore_eos": True}, 504)
        assert error["type"] == "timeout_error"
        wait_until(lambda: rows_now(server) == 0, 1)
        events = server.events("/generate", prompt="x", max_new_tokens=120, ignore_eos=True)
        assert events[-1]["error"]["type"] == "timeout_error"
        assert events[0]["text"]


# --- faults of the model --------------------------------------------------------------------------------------------


def together(server: Running, bodies: list[dict[str, Any]], path: str = "/generate") -> list[httpx2.Response]:
    """Send requests at the same time. Returns their responses."""

    async def ask() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(verify=False, base_url=server.url, timeout=60) as client:
            return await asyncio.gather(*(client.post(path, json=body) for body in bodies))

    return asyncio.run(ask())


GOOD = [{"prompt": f"Good {i}", "max_new_tokens": 20 + i, "seed": i, "apply_chat_template": False} for i in range(7)]
BAD = {"prompt": f"Bad {POISON}", "max_new_tokens": 20}


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        ("nan", 500, "server_error"),
        ("memory", 507, "out_of_memory_error"),
    ],
)
def test_one_faulty_request_fails_alone(fault, status, kind):
    with running(served(target=faulty(fault), draft=None)) as server:
        alone = [server.answer("/generate", **body) for body in GOOD]
        for position in (0, 3, 7):
            *found, bad = together(server, [*GOOD[:position], BAD, *GOOD[position:]][::-1])[::-1], None
            responses = found[0]
            bad = responses.pop(position)
            assert bad.status_code == status
            assert error_of(bad)["type"] == kind
            assert [response.json() for response in responses] == alone
        several = server.post("/v1/completions", {"model": "tiny", "prompt": ["x", POISON]})
        assert several.status_code == status
        assert server.client.get("/health").json()["status"] == "ready"


@pytest.mark.parametrize(("fault", "kind"), [("nan", "server_error"), ("memory", "out_of_memory_error")])
@pytest.mark.parametrize("path", ["/generate_lda_batch", "/generate/batch"])
def test_one_faulty_prompt_of_a_batch_fails_at_its_index(fault, kind, path):
    lm = faulty(fault)
    with running(served(target=lm, draft=None, after=lm)) as server:
        found = server.answer(path, prompts=["x", POISON, "y"], seed=1)["results"]
        assert [each.get("error", {}).get("type") for each in found] == [None, kind, None]
        assert [each["prompt"] for each in found] == ["x", POISON, "y"]
        good = server.answer(path, prompts=["x", "?", "y"], seed=1)["results"]
        assert [stable(found[i]) for i in (0, 2)] == [stable(good[i]) for i in (0, 2)]
        assert server.post(path, {"prompts": [POISON, POISON]}).status_code == {"nan": 500, "memory": 507}[fault]


def stream_beside_a_faulty_row(server: Running, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Stream a response while another row runs out of memory. Returns the joined pieces and the last chunk."""
    with Streaming(server, "/generate", **body) as stream:
        lines = [stream.first, *(next(stream.lines) for _ in range(10))]
        assert server.post("/generate", BAD).status_code == 507
        lines += list(stream.lines)
    *pieces, last, end = [line.removeprefix("data: ") for line in lines if line]
    assert end == "[DONE]"
    assert re.search(r'traitline_out_of_memory_total{kind="plain"} [1-9]', server.client.get("/metrics").text)
    return "".join(json.loads(piece)["text"] for piece in pieces), json.loads(last)


def test_a_stream_continues_when_another_row_runs_out_of_memory(monkeypatch):
    lm = faulty("memory")
    lm.model.register_forward_pre_hook(lambda *_: time.sleep(0.005))
    body = {"prompt": "Why?", "max_new_tokens": 80, "seed": 4, "ignore_eos": True}
    with running(served(target=lm, draft=None)) as server:
        whole = server.answer("/generate", **body)
        text, last = stream_beside_a_faulty_row(server, body)
        assert (text, last) == (whole["completion"], {**whole, "done": True})

        def forgetful(row: PendingRow) -> None:
            """Emit every token again: the planted fault."""
            row.n_generated = row.n_emitted = 0

        monkeypatch.setattr(PendingRow, "restart", forgetful)
        text, _ = stream_beside_a_faulty_row(server, body)
        assert text != whole["completion"]


def test_a_batch_that_is_too_large_shrinks_and_grows_again():
    lm = faulty("memory", most_rows=3)
    with running(served(target=lm, draft=None)) as server:
        alone = [server.answer("/generate", **body) for body in GOOD]
        assert [response.json() for response in together(server, GOOD)] == alone
        count = r'traitline_out_of_memory_total{kind="plain"} ([\d.]+)'
        assert float(re.search(count, server.client.get("/metrics").text)[1]) >= 2  # 8 slots, 4, 2
        lm.model.get_input_embeddings().most_rows = 100
        assert [response.json() for response in together(server, GOOD)] == alone


def test_a_small_batch_grows_while_rows_keep_arriving():
    what = served(target=faulty("memory", most_rows=3), draft=None)
    batch: BatchQueue = what.queue_factory(Settings(batch_size=4, max_total_tokens=64, max_new_tokens=8))(
        QueueName("plain")
    )
    rows = [
        PendingRow(QueueName("plain"), Request(f"{i}", (5, 6, 7 + i % 20), 3), lambda event: None) for i in range(60)
    ]
    for row in rows:
        batch.add(row)
    sizes, n_ended = [], 0
    while batch.has_work:
        n_ended += len(batch.step())
        sizes.append(batch.slots)
        if batch.n_out_of_memory and sizes[-1] == 2:
            what.target.model.get_input_embeddings().most_rows = 100  # memory of the device becomes free
    assert n_ended == 60
    assert sizes.count(2) > GROW_AFTER
    assert sizes[-2] == 4


def test_an_engine_that_fails_ends_every_request_with_an_error():
    with running(served(target=faulty("crash"), draft=None)) as server:
        responses = together(server, [*GOOD, BAD])
        assert {response.status_code for response in responses} <= {200, 500, 503}
        assert responses[-1].status_code == 500
        assert error_of(responses[-1])["code"] == "engine"
        health = server.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert server.refusal("/generate", GOOD[0], 503)["code"] == "engine"
        (line,) = [line for line in server.log if "failed" in line]
        assert re.search(r"RuntimeError at .*served\.py:\d+$", line)  # the place, without tokens
        assert "planted" not in line


def test_a_batch_that_can_never_run_fails_its_rows_one_by_one():
    with running(served(target=faulty("memory", most_rows=0), draft=None)) as server:
        assert [response.status_code for response in together(server, GOOD)] == [507] * len(GOOD)
        server.server.service.models.target.model.get_input_embeddings().most_rows = 100
        assert server.answer("/generate", **GOOD[0])


# --- signals --------------------------------------------------------------------------------------------------------

LONG = {"prompt": "x", "max_new_tokens": 250, "ignore_eos": True, "seed": 1}
ENDLESS = {"prompt": "x", "max_new_tokens": 480, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root folder with a tiny model."""
    return make_root(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def server_of_forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """A process that forks servers."""
    with forks(tmp_path_factory.mktemp("forks")) as started:
        yield started


@pytest.fixture
def start(server_of_forks: Forks, root: Path) -> Iterator[Callable[..., tuple[Forked, str]]]:
    """Return a function that starts `traitline serve` on the tiny model and returns the process and its address."""
    begun: list[Forked] = []

    def starting(*options: str) -> tuple[Forked, str]:
        begun.append(server_of_forks.start("serve", "--root", root, "--model", "tiny", "--port", "0", *options))
        wait_until((begun[-1].folder / "stderr").exists)
        wait_until(lambda: "listening" in begun[-1].stderr or begun[-1].poll() is not None, 60)
        loading, listening = begun[-1].stderr.splitlines()
        assert loading == "loading tiny"
        return begun[-1], re.fullmatch(r"listening on (\S+) \(model tiny\)", listening)[1]

    yield starting
    for process in begun:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)


def logged_since(process: Forked) -> list[str]:
    """Return the lines that a server has logged since it listens."""
    return process.stderr.splitlines()[2:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_server(start, number):
    process, url = start()
    with (
        httpx2.Client(verify=False, base_url=url, timeout=30) as client,
        httpx2.Client(verify=False, base_url=url) as other,
    ):
        other.get("/health")
        with client.stream("POST", "/generate", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(number)
            wait_until(lambda: other.get("/health").status_code == 503)
            refused = other.post("/generate", json=LONG)
            assert (refused.status_code, error_of(refused)["code"]) == (503, "draining")
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"tokens_generated":250' in rest[-2]
    assert process.wait(20) == 0
    assert [re.findall(r"\d+", line) for line in logged_since(process)] == [["1"]]
    assert process.stdout == ""


def test_a_second_signal_ends_the_server(start):
    process, url = start()
    with (
        httpx2.Client(verify=False, base_url=url, timeout=30) as client,
        client.stream("POST", "/generate", json=ENDLESS) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: len(logged_since(process)) == 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 143
        with pytest.raises(httpx2.HTTPError):
            list(lines)


def test_rows_not_finished_within_the_grace_time_fail(start):
    process, url = start("--grace", "0.1")
    with (
        httpx2.Client(verify=False, base_url=url, timeout=30) as client,
        client.stream("POST", "/generate", json=ENDLESS) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert '"code":"stopped"' in rest[-2]
    assert process.wait(20) == 0
    assert re.search("0.1 s.* 1 ", logged_since(process)[-1])


def test_an_idle_server_stops_immediately(start):
    process, _ = start()
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0
    assert len(logged_since(process)) == 1


def test_a_second_server_on_a_port_is_refused(start, root):
    _, url = start()
    line = refused("serve", "--root", root, "--model", "tiny", "--port", url.rsplit(":", 1)[1])
    assert "--port" in line


def test_a_signal_while_the_models_load_ends_the_process(root):
    """`python -m extraction serve` is the same command."""
    words = ["-m", "extraction", "serve", "--root", str(root), "--model", "tiny", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, *words], stderr=subprocess.PIPE, text=True, env=environment(), cwd=REPOSITORY
    ) as child:
        assert child.stderr.readline() == "loading tiny\n"
        child.terminate()
        assert re.fullmatch("traitline: .+\n", child.communicate(timeout=60)[1])
    assert child.returncode == 143

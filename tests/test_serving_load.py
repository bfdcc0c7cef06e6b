"""Many clients at once, and what goes wrong meanwhile: nobody loses an answer, gets another's, or waits for ever."""

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

from extraction.serving import engine_thread as scheduler_module
from extraction.serving.batch_queue import GROW_AFTER, BatchQueue
from extraction.serving.events import PendingRow, QueueName
from extraction.serving.settings import Settings
from extraction.utils_batch import Request
from tests.forks import Forked, Forks, forks
from tests.runs import REPOSITORY, environment, make_root, refused
from tests.served import POISON, Running, error_of, faulty, language_model, running, served

CLIENTS = 64
REQUESTS = 1000
DISTINCT = 120
VOLATILE = {"id", "created", "time_seconds", "tokens_per_second", "time_to_first_token", "stats"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One server for the quiet tests."""
    with running() as started:
        yield started


def lasting(value: Any) -> Any:
    """An answer without what differs from one time to the next."""
    if isinstance(value, dict):
        return {key: lasting(item) for key, item in value.items() if key not in VOLATILE}
    return [lasting(item) for item in value] if isinstance(value, list) else value


# --- many at once ---------------------------------------------------------------------------------------------------

Asked = tuple[str, dict[str, Any]]


def mixed(number: int) -> Asked:
    """A request of one of all kinds, with settings of its own."""
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
    kinds: list[Asked] = [
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


async def storm(url: str, asked: list[Asked], clients: int) -> list[Any]:
    """All requests, by so many clients at once, each with a connection of its own; what each was answered."""
    answers: list[Any] = [None] * len(asked)
    numbers = iter(range(len(asked)))

    async def work() -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
            for number in numbers:
                path, body = asked[number]
                response = await client.post(path, json=body)
                answers[number] = lasting(response.json()) if response.status_code == 200 else response.text

    await asyncio.gather(*(work() for _ in range(clients)))
    return answers


def wrong(answers: list[Any], asked: list[Asked], alone: dict[str, Any]) -> int:
    """How many answers are not those of the same request alone."""
    return sum(answer != alone[repr(each)] for answer, each in zip(answers, asked, strict=True))


def test_a_thousand_requests_of_64_clients_are_each_answered_as_alone():
    distinct = [mixed(number) for number in range(DISTINCT)]
    rng = random.Random(0)
    asked = [rng.choice(distinct) for _ in range(REQUESTS)]
    with running(batch_size=32, queue=4 * CLIENTS) as server:
        alone = {repr(each): lasting(server.answer(each[0], **each[1])) for each in distinct}
        answers = asyncio.run(storm(server.url, asked, CLIENTS))
        assert server.client.get("/health").json()["rows"] == 0
    assert len({repr(answer) for answer in alone.values()}) > 0.9 * DISTINCT
    assert wrong(answers, asked, alone) == 0
    # the comparison itself: two answers that are swapped, and one that is lost, are seen
    i, j = next((i, j) for i in range(9) for j in range(9) if answers[i] != answers[j])
    answers[i], answers[j] = answers[j], answers[i]
    assert wrong(answers, asked, alone) == 2
    answers[i] = None
    assert wrong(answers, asked, alone) == 2


def test_rows_that_are_swapped_in_the_server_are_found(monkeypatch):
    end = scheduler_module.EngineThread._finish

    def swapped(self: Any, ends: list[Any]) -> None:
        """Two rows that end together get each other's answer."""
        if len(ends) > 1:
            (one, first), (other, second), *others = ends
            ends = [(one, second), (other, first), *others]
        end(self, ends)

    asked = [("/generate", {"prompt": f"{i}", "max_new_tokens": 6, "seed": i, "ignore_eos": True}) for i in range(24)]
    with running() as server:
        alone = {repr(each): lasting(server.answer(each[0], **each[1])) for each in asked}
        assert wrong(asyncio.run(storm(server.url, asked, 12)), asked, alone) == 0
        monkeypatch.setattr(scheduler_module.EngineThread, "_finish", swapped)
        assert wrong(asyncio.run(storm(server.url, asked, 12)), asked, alone) > 0


def test_what_arrives_together_runs_together(server):
    asked = [("/generate", {"prompt": f"{i}", "max_new_tokens": 60, "ignore_eos": True}) for i in range(8)]
    before = steps(server, "plain")
    asyncio.run(storm(server.url, asked, 8))
    assert steps(server, "plain") - before < 60 * 4  # alone they would take 8 times 60


def steps(server: Running, kind: str) -> float:
    """How many steps a lane has made."""
    found = re.search(rf'traitline_steps_total{{kind="{kind}"}} (\d+)', server.client.get("/metrics").text)
    return float(found[1]) if found else 0.0


def test_health_is_answered_while_the_engine_works(server):
    with Streaming(server, "/generate", prompt="x", max_new_tokens=120, ignore_eos=True):
        began = time.monotonic()
        assert server.client.get("/health").json()["rows"] == 1
        assert time.monotonic() - began < 2


# --- the queue ------------------------------------------------------------------------------------------------------


class Streaming:
    """A client that has read the first event of a stream."""

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
        """The last event but the end."""
        found = [line for line in self.lines if line]
        assert found[-1] == "data: [DONE]"
        return found[-2].removeprefix("data: ")


def slow_model(seconds: float = 0.02) -> Any:
    """A model that takes its time, so that something can happen meanwhile."""
    lm = language_model(7, tie_word_embeddings=False)
    if not hasattr(lm.model, "slowed"):
        lm.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
        lm.model.slowed = True
    return served(target=lm, draft=None)


def wait_until(holds: Callable[[], bool], seconds: float = 10) -> None:
    """Until it holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def rows_now(server: Running) -> int:
    """Rows that wait or run."""
    rows: int = server.client.get("/health").json()["rows"]
    return rows


def test_a_full_queue_says_when_to_come_again_and_recovers():
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
        assert "this server holds 3" in error["message"]


def test_all_rows_of_a_request_are_taken_or_none():
    with running(slow_model(), batch_size=2, queue=3) as server:
        body = {"prompt": "x", "max_new_tokens": 100, "ignore_eos": True}
        with Streaming(server, "/generate", **body):
            assert server.post("/generate/batch", {"prompts": ["x"] * 3}).status_code == 429
            assert rows_now(server) == 1


# --- clients that leave ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_and_place(stream):
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


def test_neighbours_of_a_client_that_leaves_get_their_answers(server):
    body = {"prompt": "What?", "max_new_tokens": 100, "seed": 1, "ignore_eos": True}
    alone = server.answer("/generate", **body)
    with Streaming(server, "/generate", **body) as staying:
        with Streaming(server, "/generate", **body):
            pass
        assert (
            alone["completion"] in staying.rest().encode().decode("unicode_escape") or alone["tokens_generated"] == 100
        )


def test_a_request_takes_no_longer_than_it_may():
    with running(slow_model(), timeout=0.3) as server:
        error = server.refusal("/generate", {"prompt": "x", "max_new_tokens": 120, "ignore_eos": True}, 504)
        assert error["type"] == "timeout_error"
        wait_until(lambda: rows_now(server) == 0, 1)
        events = server.events("/generate", prompt="x", max_new_tokens=120, ignore_eos=True)
        assert events[-1]["error"]["type"] == "timeout_error"
        assert events[0]["text"]


# --- faults of the model --------------------------------------------------------------------------------------------


def together(server: Running, bodies: list[dict[str, Any]], path: str = "/generate") -> list[httpx2.Response]:
    """Answers to requests that are sent at once."""

    async def ask() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as client:
            return await asyncio.gather(*(client.post(path, json=body) for body in bodies))

    return asyncio.run(ask())


GOOD = [{"prompt": f"Good {i}", "max_new_tokens": 20 + i, "seed": i, "apply_chat_template": False} for i in range(7)]
BAD = {"prompt": f"Bad {POISON}", "max_new_tokens": 20}


@pytest.mark.parametrize(
    ("fault", "status", "kind", "said"),
    [
        ("nan", 500, "server_error", "NaN"),
        ("memory", 507, "out_of_memory_error", "out of memory with this prompt alone; shorten it"),
    ],
)
def test_one_bad_request_fails_alone(fault, status, kind, said):
    with running(served(target=faulty(fault), draft=None)) as server:
        alone = [server.answer("/generate", **body) for body in GOOD]
        for position in (0, 3, 7):
            *found, bad = together(server, [*GOOD[:position], BAD, *GOOD[position:]][::-1])[::-1], None
            responses = found[0]
            bad = responses.pop(position)
            assert bad.status_code == status
            assert said in error_of(bad)["message"]
            assert error_of(bad)["type"] == kind
            assert [response.json() for response in responses] == alone
        several = server.post("/v1/completions", {"model": "tiny", "prompt": ["x", POISON]})
        assert several.status_code == status
        assert server.client.get("/health").json()["status"] == "ready"


@pytest.mark.parametrize(("fault", "kind"), [("nan", "server_error"), ("memory", "out_of_memory_error")])
@pytest.mark.parametrize("path", ["/generate_lda_batch", "/generate/batch"])
def test_one_bad_prompt_of_a_batch_fails_in_its_place(fault, kind, path):
    lm = faulty(fault)
    with running(served(target=lm, draft=None, after=lm)) as server:
        found = server.answer(path, prompts=["x", POISON, "y"], seed=1)["results"]
        assert [each.get("error", {}).get("type") for each in found] == [None, kind, None]
        assert [each["prompt"] for each in found] == ["x", POISON, "y"]
        good = server.answer(path, prompts=["x", "?", "y"], seed=1)["results"]
        assert [lasting(found[i]) for i in (0, 2)] == [lasting(good[i]) for i in (0, 2)]
        assert server.post(path, {"prompts": [POISON, POISON]}).status_code == {"nan": 500, "memory": 507}[fault]


def streamed_beside_a_bad_one(server: Running, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text of a stream's pieces, and its last event, where memory runs out beside it."""
    with Streaming(server, "/generate", **body) as stream:
        lines = [stream.first, *(next(stream.lines) for _ in range(10))]
        assert server.post("/generate", BAD).status_code == 507
        lines += list(stream.lines)
    *pieces, last, end = [line.removeprefix("data: ") for line in lines if line]
    assert end == "[DONE]"
    assert re.search(r'traitline_out_of_memory_total{kind="plain"} [1-9]', server.client.get("/metrics").text)
    return "".join(json.loads(piece)["text"] for piece in pieces), json.loads(last)


def test_a_stream_goes_on_where_it_was_when_memory_runs_out_beside_it(monkeypatch):
    lm = faulty("memory")
    lm.model.register_forward_pre_hook(lambda *_: time.sleep(0.005))
    body = {"prompt": "Why?", "max_new_tokens": 80, "seed": 4, "ignore_eos": True}
    with running(served(target=lm, draft=None)) as server:
        whole = server.answer("/generate", **body)
        text, last = streamed_beside_a_bad_one(server, body)
        assert (text, last) == (whole["completion"], {**whole, "done": True})

        def forgetful(row: PendingRow) -> None:
            """Tells everything again."""
            row.n_generated = row.n_emitted = 0

        monkeypatch.setattr(PendingRow, "restart", forgetful)
        text, _ = streamed_beside_a_bad_one(server, body)
        assert text != whole["completion"]


def test_a_batch_that_is_too_large_is_made_smaller_and_grows_again():
    lm = faulty("memory", most_rows=3)
    with running(served(target=lm, draft=None)) as server:
        alone = [server.answer("/generate", **body) for body in GOOD]
        assert [response.json() for response in together(server, GOOD)] == alone
        count = r'traitline_out_of_memory_total{kind="plain"} (\d+)'
        assert float(re.search(count, server.client.get("/metrics").text)[1]) >= 2  # 8 slots, 4, 2
        lm.model.get_input_embeddings().most_rows = 100
        assert [response.json() for response in together(server, GOOD)] == alone


def test_a_batch_that_stays_small_grows_while_it_is_never_empty():
    what = served(target=faulty("memory", most_rows=3), draft=None)
    batch: BatchQueue = what.queue_factory(Settings(batch_size=4, max_total_tokens=64, max_new_tokens=8))(QueueName("plain"))
    rows = [PendingRow(QueueName("plain"), Request(f"{i}", (5, 6, 7 + i % 20), 3), lambda event: None) for i in range(60)]
    for row in rows:
        batch.add(row)
    sizes, n_ended = [], 0
    while batch.has_work:
        n_ended += len(batch.step())
        sizes.append(batch.slots)
        if batch.n_out_of_memory and sizes[-1] == 2:
            what.target.model.get_input_embeddings().most_rows = 100  # others have left the device
    assert n_ended == 60
    assert sizes.count(2) > GROW_AFTER
    assert sizes[-2] == 4


def test_an_engine_that_breaks_says_so_and_nobody_waits_for_ever():
    with running(served(target=faulty("crash"), draft=None)) as server:
        responses = together(server, [*GOOD, BAD])
        assert {response.status_code for response in responses} <= {200, 500, 503}
        assert responses[-1].status_code == 500
        assert "restart the server" in error_of(responses[-1])["message"]
        health = server.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert server.refusal("/generate", GOOD[0], 503)["code"] == "engine"
        (line,) = [said for said in server.said if "failed" in said]
        assert re.search(r"RuntimeError at .*served\.py:\d+$", line)  # where, and no tokens
        assert "planted" not in line


def test_a_batch_that_can_not_be_made_at_all_fails_its_rows_one_by_one(monkeypatch):
    with running(served(target=faulty("memory", most_rows=0), draft=None)) as server:
        assert [response.status_code for response in together(server, GOOD)] == [507] * len(GOOD)
        server.server.service.models.target.model.get_input_embeddings().most_rows = 100
        assert server.answer("/generate", **GOOD[0])


# --- signals --------------------------------------------------------------------------------------------------------

LONG = {"prompt": "x", "max_new_tokens": 400, "ignore_eos": True, "seed": 1}
ENDLESS = {"prompt": "x", "max_new_tokens": 480, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a tiny model."""
    return make_root(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def server_of_forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Where processes come from."""
    with forks(tmp_path_factory.mktemp("forks")) as started:
        yield started


@pytest.fixture
def start(server_of_forks: Forks, root: Path) -> Iterator[Callable[..., tuple[Forked, str]]]:
    """Start `traitline serve` on the tiny model: the process, and its address; ended at the end."""
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


def said_since(process: Forked) -> list[str]:
    """What a server has said after it listened."""
    return process.stderr.splitlines()[2:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(start, number):
    process, url = start()
    with httpx2.Client(base_url=url, timeout=30) as client, httpx2.Client(base_url=url) as other:
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
    assert '"tokens_generated":400' in rest[-2]
    assert process.wait(20) == 0
    assert said_since(process) == ["stopping: 1 rows to finish"]
    assert process.stdout == ""


def test_a_second_signal_ends_it_at_once(start):
    process, url = start()
    with httpx2.Client(base_url=url, timeout=30) as client, client.stream("POST", "/generate", json=ENDLESS) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: said_since(process) == ["stopping: 1 rows to finish"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 143
        with pytest.raises(httpx2.HTTPError):
            list(lines)


def test_what_is_not_done_within_the_grace_time_is_told_so(start):
    process, url = start("--grace", "0.1")
    with httpx2.Client(base_url=url, timeout=30) as client, client.stream("POST", "/generate", json=ENDLESS) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert "the server has stopped" in rest[-2]
    assert process.wait(20) == 0
    assert said_since(process)[-1] == "not finished within 0.1 s: 1 rows"


def test_an_idle_server_stops_at_once(start):
    process, _ = start()
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 0
    assert said_since(process) == ["stopping"]


def test_two_servers_of_one_port_are_refused(start, root):
    _, url = start()
    line = refused("serve", "--root", root, "--model", "tiny", "--port", url.rsplit(":", 1)[1])
    assert line.startswith("traitline: --host '127.0.0.1' --port")


def test_a_signal_while_the_models_load_is_no_drain(root):
    """And `python -m extraction.serving` is the same command."""
    words = ["-m", "extraction", "serve", "--root", str(root), "--model", "tiny", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, *words], stderr=subprocess.PIPE, text=True, env=environment(), cwd=REPOSITORY
    ) as child:
        assert child.stderr.readline() == "loading tiny\n"
        child.terminate()
        assert child.communicate(timeout=60)[1] == "traitline: stopped before it listened\n"
    assert child.returncode == 143

"""Calls of a server: what is sent, what is made of every kind of answer, and where the token goes."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from extraction.amplification import http_client
from extraction.amplification.http_client import TOKEN, HttpServer, message_in
from extraction.core.errors import ConfigError, RequestError
from tests.doubles import Answer, Double


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    monkeypatch.delenv(TOKEN, raising=False)
    with Double() as running:
        yield running


def told(status: int, body: Any, **headers: str) -> Answer:
    return status, headers, json.dumps(body).encode()


def test_json_goes_there_and_comes_back(double: Double) -> None:
    double.answers = [told(200, {"results": ["é"]})]
    assert HttpServer(double.address + "/").post("/generate", {"prompt": "naïve \ud83d"}) == {"results": ["é"]}
    path, headers, body = double.asked[0]
    assert (path, body) == ("/generate", {"prompt": "naïve \ud83d"})
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers


def test_the_token_goes_to_the_server_and_nowhere_else(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "geheim")
    with Double() as other:
        double.answers = [told(200, {}), told(302, {}, Location=other.address)]
        HttpServer(double.address).post("/a", {})
        assert double.asked[0][1]["Authorization"] == "Bearer geheim"
        with pytest.raises(RequestError, match="status 302") as caught:
            HttpServer(double.address).post("/a", {})
        assert other.asked == []
    assert "geheim" not in str(caught.value)
    assert "geheim" not in repr(HttpServer(double.address))


def test_a_proxy_is_no_way_to_this_machine(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    double.answers = [told(200, {"a": 1})]
    assert HttpServer(double.address).post("/a", {}) == {"a": 1}


@pytest.mark.parametrize(("header", "seconds"), [("3", 3.0), ("900", 60.0), ("soon", 1.0), ("nan", 1.0), ("-1", 0.0)])
def test_a_busy_server_is_asked_once_more_when_it_says(double: Double, header: str, seconds: float) -> None:
    waited: list[float] = []
    double.answers = [told(429, {"error": "full"}, **{"Retry-After": header}), told(200, {"a": 1})]
    assert HttpServer(double.address, wait=waited.append).post("/a", {}) == {"a": 1}
    assert waited == [seconds]
    double.answers = [told(429, {"error": "full"}), told(429, {"error": "still full"})]
    with pytest.raises(RequestError, match="429: still full; ask less"):
        HttpServer(double.address, wait=waited.append).post("/a", {})


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def half(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"a":')


def no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"hello\r\n\r\n")


FAULTS: dict[str, tuple[Any, str]] = {
    "refused": (told(422, {"error": {"message": "alpha: too\nlarge"}}), "status 422: alpha: too large"),
    "detail": (told(400, {"detail": "no"}), "status 400: no"),
    "no token": (told(401, {}), r"status 401: \{\}"),
    "error without JSON": ((500, {}, b"<h1>\x1b[31mBoom</h1>"), r"status 500: <h1>\\x1b\[31mBoom"),
    "error without body": ((503, {}, b""), "status 503: no reason"),
    "no JSON": ((200, {}, b"hello"), "not JSON .*hello"),
    "no object": ((200, {}, b"[1]"), "not a JSON object"),
    "deep": ((200, {}, b"[" * 100_000), "not JSON"),
    "hangs up": (hang_up, "is the server running"),
    "half an answer": (half, "not JSON"),
    "no HTTP": (no_http, "is the server running"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_comes_is_one_line(double: Double, fault: str) -> None:
    answer, pattern = FAULTS[fault]
    double.answers = [answer]
    with pytest.raises(RequestError, match=pattern) as caught:
        HttpServer(double.address, timeout=5).post("/a", {})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_slow_or_an_absent_server_and_too_long_an_answer(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    double.answers = [lambda _: release.wait(5)]
    with pytest.raises(RequestError, match="timed out"):
        HttpServer(double.address, timeout=0.2).post("/a", {})
    release.set()
    monkeypatch.setattr(http_client, "MAX_ANSWER_BYTES", 10)
    double.answers = [told(200, {"a": "x" * 100})]
    with pytest.raises(RequestError, match="more than 10 bytes"):
        HttpServer(double.address).post("/a", {})
    with pytest.raises(RequestError, match="is the server running"):
        HttpServer("http://127.0.0.1:9").post("/a", {})


@pytest.mark.parametrize(
    "address", ["", "localhost:8000", "ftp://a", "http://", "http://a b", "http://a:99999", "http://é", "file:///etc"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="write it as"):
        HttpServer(address)


@pytest.mark.parametrize("address", ["http://me:secret@host", "http://host/?key=secret", "http://host/#secret"])
def test_an_address_with_a_secret_is_refused_unseen(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HttpServer(address)
    assert "secret" not in str(caught.value)


def test_a_token_that_would_break_a_header_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "geheim\r\nX: 1")
    with pytest.raises(ConfigError) as caught:
        HttpServer("http://127.0.0.1:1")
    assert "geheim" not in str(caught.value)


def test_a_message_is_found_wherever_it_stands() -> None:
    assert message_in({"error": {"message": "a"}}) == "a"
    assert message_in({"detail": [{"msg": "b"}]}) == "[{'msg': 'b'}]"
    assert message_in({"else": 1}) == "{'else': 1}"
    assert len(message_in("x" * 10_000)) == 300

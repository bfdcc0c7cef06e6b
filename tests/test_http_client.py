"""The client of a server: requests sent, every kind of reply and failure, and the only place where the token goes."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from extraction.amplification import http_client
from extraction.amplification.http_client import TOKEN_VARIABLE, HttpClient, message_in
from extraction.core.errors import ConfigError, RequestError
from tests.doubles import Answer, Double


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with Double() as running:
        yield running


def reply(status: int, body: Any, **headers: str) -> Answer:
    return status, headers, json.dumps(body).encode()


def test_json_is_sent_and_received(double: Double) -> None:
    double.answers = [reply(200, {"results": ["é"]})]
    assert HttpClient(double.address + "/").post("/generate", {"prompt": "naïve \ud83d"}) == {"results": ["é"]}
    path, headers, body = double.asked[0]
    assert (path, body) == ("/generate", {"prompt": "naïve \ud83d"})
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_the_token_is_sent_to_the_server_and_not_to_a_redirect(
    double: Double, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "geheim")
    with Double() as other:
        double.answers = [reply(200, {}), reply(status, {}, Location=other.address)]
        HttpClient(double.address).post("/a", {})
        assert double.asked[0][1]["Authorization"] == "Bearer geheim"
        with pytest.raises(RequestError, match=f"status {status}") as caught:
            HttpClient(double.address).post("/a", {})
        assert other.asked == []
    assert "geheim" not in str(caught.value)
    assert "geheim" not in repr(HttpClient(double.address))


def test_a_server_on_this_machine_is_not_asked_through_a_proxy(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    double.answers = [reply(200, {"a": 1})]
    assert HttpClient(double.address).post("/a", {}) == {"a": 1}


@pytest.mark.parametrize(("header", "seconds"), [("3", 3.0), ("900", 60.0), ("soon", 1.0), ("nan", 1.0), ("-1", 0.0)])
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_once_more_after_the_seconds_that_it_names(
    double: Double, status: int, header: str, seconds: float
) -> None:
    slept: list[float] = []
    double.answers = [reply(status, {"error": "full"}, **{"Retry-After": header}), reply(200, {"a": 1})]
    assert HttpClient(double.address, sleep=slept.append).post("/a", {}) == {"a": 1}
    assert slept == [seconds]


def test_a_server_that_stays_busy_is_an_error_after_two_requests(double: Double) -> None:
    slept: list[float] = []
    double.answers = [reply(429, {"error": "full"}), reply(429, {"error": "still full"})]
    with pytest.raises(RequestError, match="429: still full"):
        HttpClient(double.address, sleep=slept.append).post("/a", {})
    assert (slept, len(double.asked)) == ([1.0], 2)


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
    "refused": (reply(422, {"error": {"message": "alpha: too\nlarge"}}), "422: alpha: too large"),
    "detail": (reply(400, {"detail": "no"}), "400: no"),
    "no token": (reply(401, {}), r"401: \{\}"),
    "error without JSON": ((500, {}, b"<h1>\x1b[31mBoom</h1>"), r"500: <h1>\\x1b\[31mBoom"),
    "error without body": ((503, {}, b""), "503"),
    "no JSON": ((200, {}, b"hello"), "hello"),
    "compressed unasked": ((200, {"Content-Encoding": "gzip"}, b"\x1f\x8b"), "not JSON"),
    "no object": ((200, {}, b"[1]"), "JSON object"),
    "deep": ((200, {}, b"[" * 100_000), "not JSON"),
    "hangs up": (hang_up, r"http://127\.0\.0\.1"),
    "half a reply": (half, r"http://127\.0\.0\.1"),
    "no HTTP": (no_http, r"http://127\.0\.0\.1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_an_error_of_one_short_line(double: Double, fault: str) -> None:
    answer, pattern = FAULTS[fault]
    double.answers = [answer]
    with pytest.raises(RequestError, match=pattern) as caught:
        HttpClient(double.address, timeout=5).post("/a", {})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_slow_server_an_absent_one_and_a_reply_that_is_too_long(
    double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    double.answers = [lambda _: release.wait(5)]
    with pytest.raises(RequestError, match="timed out"):
        HttpClient(double.address, timeout=0.2).post("/a", {})
    release.set()
    monkeypatch.setattr(http_client, "MAX_REPLY_BYTES", 10)
    double.answers = [reply(200, {"a": "x" * 100})]
    with pytest.raises(RequestError, match="10 bytes"):
        HttpClient(double.address).post("/a", {})
    with pytest.raises(RequestError, match=r"http://127\.0\.0\.1:9/a"):
        HttpClient("http://127.0.0.1:9").post("/a", {})


def test_an_endless_reply_is_cut_off(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    hung_up = threading.Event()

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"x" * 65536)
        except OSError:
            hung_up.set()

    monkeypatch.setattr(http_client, "MAX_REPLY_BYTES", 1_000_000)
    double.answers = [endless]
    with pytest.raises(RequestError, match="1000000 bytes"):
        HttpClient(double.address, timeout=5).post("/a", {})
    assert hung_up.wait(5)


@pytest.mark.parametrize(
    "address", ["", "localhost:8000", "ftp://a", "http://", "http://a b", "http://a:99999", "http://é", "file:///etc"]
)
def test_an_invalid_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="--server-url"):
        HttpClient(address)


@pytest.mark.parametrize("address", ["http://me:secret@host", "http://host/?key=secret", "http://host/#secret"])
def test_an_address_with_a_secret_is_refused_without_showing_it(address: str) -> None:
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE) as caught:
        HttpClient(address)
    assert "secret" not in str(caught.value)


def test_a_token_that_would_break_a_header_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "geheim\r\nX: 1")
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE) as caught:
        HttpClient("http://127.0.0.1:1")
    assert "geheim" not in str(caught.value)


def test_the_message_of_an_error_body_is_found_under_the_usual_keys() -> None:
    assert message_in({"error": {"message": "a"}}) == "a"
    assert message_in({"detail": [{"msg": "b"}]}) == "[{'msg': 'b'}]"
    assert message_in({"else": 1}) == "{'else': 1}"
    assert len(message_in("x" * 10_000)) == 300

"""Access control and validation of requests: every refusal of a server that strangers can reach, on real sockets."""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import time
from collections.abc import Iterator

import httpx2
import pytest

from extraction.core.errors import ConfigError
from extraction.serving.settings import MAX_BODY, Settings, bind, is_loopback, read_token
from tests.runs import refused
from tests.served import Running, error_of, running
from tests.tiny import tiny_tokenizer

TOKEN = "0123456789abcdef-secret"
PATHS = [
    ("POST", "/generate"),
    ("POST", "/generate_lda"),
    ("POST", "/generate_lda_batch"),
    ("POST", "/generate/batch"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/tokenizer_compatibility"),
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/no/such/path"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server on loopback without a token."""
    with running(body_timeout=0.7) as started:
        yield started


@pytest.fixture(scope="module")
def closed() -> Iterator[Running]:
    """A server that listens on all addresses, with a token."""
    with running(host="0.0.0.0", token=TOKEN, names=("box.example",)) as started:
        yield started


def raw(server: Running, *parts: bytes, pause: float = 0.0, wait: float = 10.0) -> tuple[int, dict[str, str], bytes]:
    """Send bytes on a socket. Returns the status, headers and body of the response."""
    with socket.create_connection(address(server), timeout=wait) as wire:
        for part in parts:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                wire.sendall(part)
                time.sleep(pause)
        data = b""
        while chunk := wire.recv(65536):
            data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, body


def head(path: str = "/generate", **headers: str) -> bytes:
    """Return the head of a POST request that asks to close the connection."""
    all_headers = {"Host": "localhost", "Content-Type": "application/json", "Connection": "close", **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in all_headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def address(server: Running) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host.replace("0.0.0.0", "127.0.0.1"), int(port)


def friend(server: Running, **headers: str) -> httpx2.Client:
    """A client without the token, unless it is among the headers."""
    return httpx2.Client(verify=False, base_url="http://{}:{}".format(*address(server)), headers=headers)


JSON = {"content-type": "application/json"}


def still_answers(server: Running) -> None:
    assert server.answer("/generate", prompt="Why?", max_new_tokens=2)["tokens_generated"] <= 2


# --- access ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "192.168.1.9", "", "[::2]"]
)
def test_a_foreign_host_is_refused(server, host):
    response = server.client.get("/health", headers={"host": host})
    assert (response.status_code, error_of(response)["code"]) == (403, "host")


def test_a_foreign_host_is_refused_on_every_path(server):
    for method, path in PATHS:
        response = server.client.request(method, path, headers={"host": "evil.example"})
        assert (response.status_code, error_of(response)["code"]) == (403, "host"), path


def test_names_of_this_machine_are_not_foreign(server):
    for host in ("localhost", "LOCALHOST:1234", "127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "localhost."):
        assert server.client.get("/health", headers={"host": host}).status_code == 200, host


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://localhost.evil.example", "http://localhost:1"]
)
def test_a_foreign_origin_is_refused(server, origin):
    response = server.client.post("/generate", json={"prompt": "x"}, headers={"origin": origin})
    assert response.status_code == 403
    assert error_of(response)["code"] == "origin"
    assert "access-control-allow-origin" not in response.headers


def test_the_servers_own_origin_is_accepted(server):
    assert server.client.get("/health", headers={"origin": server.url}).status_code == 200


WRONG_TOKENS = [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"]


def refused_token(response: httpx2.Response) -> None:
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert error_of(response)["type"] == "authentication_error"
    assert TOKEN not in response.text


@pytest.mark.parametrize("header", WRONG_TOKENS)
def test_a_wrong_token_is_refused(closed, header):
    with friend(closed) as stranger:
        refused_token(stranger.get("/health", headers={} if header is None else {"authorization": header}))


def test_without_the_token_every_path_is_refused(closed):
    with friend(closed) as stranger:
        for method, path in PATHS:
            refused_token(stranger.request(method, path))


def test_with_the_token_the_servers_names_and_addresses_are_accepted(closed):
    with friend(closed, authorization=f"bearer {TOKEN}") as client:
        for host in ("box.example", "127.0.0.1", "10.0.0.7:8000", "localhost"):
            assert client.get("/health", headers={"host": host}).status_code == 200
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 403


def test_a_token_that_is_not_ascii_is_refused(closed):
    line = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer \xff\xfe\xe4\r\n\r\n"
    assert raw(closed, line)[0] == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "box.example"])
def test_listening_beyond_this_machine_needs_a_token(host):
    with pytest.raises(ConfigError, match="TRAITLINE_TOKEN"):
        Settings(host=host)
    assert Settings(host=host, token=TOKEN).token == TOKEN
    assert TOKEN not in repr(Settings(host=host, token=TOKEN))


def test_loopback_addresses():
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.1.2", "box.example"]))


def test_the_token_is_read_from_a_file_or_the_environment_and_validated(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(str(file), {"TRAITLINE_TOKEN": "another-one-of-some-length"}) == TOKEN
    assert read_token(None, {"TRAITLINE_TOKEN": TOKEN}) == TOKEN
    assert read_token(None, {}) is None
    assert read_token(None, {"TRAITLINE_TOKEN": ""}) is None
    for bad in ("short", "x" * 15, "with spaces in between it", "naïve-naïve-naïve-naïve"):
        with pytest.raises(ConfigError, match="TRAITLINE_TOKEN") as caught:
            read_token(None, {"TRAITLINE_TOKEN": bad})
        assert bad not in str(caught.value)
    with pytest.raises(ConfigError, match="none"):
        read_token(str(tmp_path / "none"), {})


def test_an_address_in_use_is_refused_before_the_models_load():
    with contextlib.closing(bind(Settings(port=0))) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}"):
            bind(Settings(port=port))


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (("--host", "0.0.0.0"), "TRAITLINE_TOKEN"),
        (("--after", "pocket"), "--before"),
        (("--draft", "pocket"), "--model"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--token-file", "/no/such/file"), "/no/such/file"),
        (("--port", "70000"), "70000"),
        (("--timeout", "0"), "--timeout"),
        (("--max-new-tokens", "100", "--max-total-tokens", "100"), "--max-new-tokens 100"),
        (("--model", "pocket", "--dtype", "int8"), "int8"),
        (("--host", "no.such.host.invalid", "--token-file", "TOKEN"), "no.such.host.invalid"),
        (("--qeue", "3"), "--qeue"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, tuple) else "",
)
def test_an_invalid_option_is_refused_in_one_line_before_the_models_load(options, pattern, tmp_path, monkeypatch):
    monkeypatch.delenv("TRAITLINE_TOKEN", raising=False)
    (tmp_path / "token").write_text(TOKEN)
    line = refused("serve", *[str(tmp_path / "token") if word == "TOKEN" else word for word in options])
    assert pattern in line
    assert TOKEN not in line


# --- the body -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"prompt": "x"',
        b'{"prompt": "\xff"}',
        b"\xef\xbb\xbf{}",
        b"[" * 5000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:12]),
)
def test_a_body_that_is_not_json_is_refused(server, body):
    response = server.client.post("/generate", content=body, headers=JSON)
    assert response.status_code == (422 if body == b"" else 400)
    assert error_of(response)["type"] == "invalid_request_error"
    still_answers(server)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data; boundary=x"]
)
def test_content_types_of_a_web_form_are_refused(server, kind):
    response = server.client.post("/generate", content=b'{"prompt": "x"}', headers={"content-type": kind})
    assert response.status_code == 415
    assert error_of(response)["code"] == "type"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long_is_refused(server, chunked):
    body = json.dumps({"prompt": "x" * MAX_BODY}).encode()
    content = iter([body[i : i + 65536] for i in range(0, len(body), 65536)]) if chunked else body
    response = server.client.post("/generate", content=content, headers=JSON)
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_size"
    still_answers(server)


def test_an_endless_body_is_refused_without_being_kept(server):
    piece = b"%x\r\n%s\r\n" % (1 << 20, b"x" * (1 << 20))
    status, _, _ = raw(server, head(Transfer_Encoding="chunked"), *[piece] * 40)
    assert status == 413
    still_answers(server)


@pytest.mark.parametrize("length", ["1000001", "999999999999999999"])
def test_a_declared_length_that_is_too_long_is_refused_before_the_body_arrives(server, length):
    began = time.monotonic()
    status, _, _ = raw(server, head(Content_Length=length), b"{}")
    assert status == 413
    assert time.monotonic() - began < 5


def test_a_body_of_exactly_the_limit_is_read(server):
    body = b'{"prompt": "x", "max_new_tokens": 1}'.ljust(MAX_BODY)
    assert server.client.post("/generate", content=body, headers=JSON).status_code == 200
    assert server.client.post("/generate", content=body + b" ", headers=JSON).status_code == 413
    response = server.client.post("/generate", json={"prompt": "x" * 9000})
    assert (response.status_code, error_of(response)["code"]) == (422, "context_length_exceeded")


def test_a_slow_body_is_refused(server):
    began = time.monotonic()
    status, headers, body = raw(server, head(Content_Length="30"), b"{", b'"', b"p", pause=0.1)
    assert status == 408
    assert json.loads(body)["error"]["code"] == "body_timeout"
    assert headers["connection"] == "close"
    assert time.monotonic() - began < 5
    still_answers(server)


@pytest.mark.parametrize(
    "first", [b"", b"POST /generate HTTP/1.1\r\nHost: loc", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he"]
)
def test_slow_headers_close_the_connection(server, first):
    with socket.create_connection(address(server), timeout=5) as wire:
        wire.sendall(first)
        began = time.monotonic()
        while wire.recv(65536):
            wire.sendall(b"x")
        assert 0.3 < time.monotonic() - began < 4
    still_answers(server)


def test_an_idle_connection_is_kept_longer_than_a_slow_request(server):
    ports = set()
    with httpx2.Client(verify=False, base_url=server.url) as client:
        for pause in (0.0, 0.9, 0.9):  # longer than a slow request may take
            time.sleep(pause)
            response = client.get("/health")
            assert response.status_code == 200
            ports.add(response.extensions["network_stream"].get_extra_info("client_addr"))
    assert len(ports) == 1


def test_requests_beyond_the_limit_of_bodies_in_memory_are_refused():
    with running(queue=1, body_timeout=5) as small, contextlib.ExitStack() as opened:
        for _ in range(65):
            wire = opened.enter_context(socket.create_connection(address(small)))
            wire.sendall(head(Content_Length="30") + b"{")
        time.sleep(0.3)
        response = small.post("/generate", {"prompt": "x"})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert small.client.get("/health").status_code == 200
        opened.close()
        time.sleep(0.3)
        still_answers(small)


def test_clients_that_hang_up_in_the_middle_of_a_body_do_no_harm(server):
    for _ in range(5):
        with socket.create_connection(address(server)) as wire:
            wire.sendall(head(Content_Length="30") + b"{")
    still_answers(server)


@pytest.mark.parametrize(
    "nonsense", [b"\x16\x03\x01 tls", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"X" * 70_000 + b"\r\n\r\n"]
)
def test_bytes_that_are_not_http_do_no_harm(server, nonsense):
    with contextlib.suppress(ConnectionError, ValueError, IndexError):
        raw(server, nonsense, wait=3)
    still_answers(server)


# --- fields ---------------------------------------------------------------------------------------------------------

INVALID = [  # body, field, and the value or rule in the message
    ({}, "prompt", "prompt"),
    ([], None, r"\[\]"),
    ("x", None, "'x'"),
    (None, None, "the body"),
    ({"prompt": 5}, "prompt", "5"),
    ({"prompt": "x", "temperatur": 1}, "temperatur", "'temperature'"),
    ({"prompt": "x", "\x1b[31m": 1}, "\x1b[31m", "known"),
    ({"prompt": "x", "temperature": "hot"}, "temperature", "'hot'"),
    ({"prompt": "x", "temperature": True}, "temperature", "True"),
    ({"prompt": "x", "temperature": -0.1}, "temperature", "-0.1"),
    ({"prompt": "x", "temperature": 101}, "temperature", "101 .*100"),
    ({"prompt": "x", "temperature": math.nan}, "temperature", "nan"),
    ({"prompt": "x", "alpha": -math.inf}, "alpha", "-inf"),
    ({"prompt": "x", "top_p": 0}, "top_p", "0"),
    ({"prompt": "x", "top_p": 1.1}, "top_p", "1.1"),
    ({"prompt": "x", "top_k": -1}, "top_k", "-1"),
    ({"prompt": "x", "alpha": 1e30}, "alpha", r"1e\+30 .*1000000"),
    ({"prompt": "x", "seed": 1.5}, "seed", "1.5"),
    ({"prompt": "x", "seed": 2**63}, "seed", "9223372036854775808"),
    ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens", "0"),
    ({"prompt": "x", "max_new_tokens": 121}, "max_new_tokens", "120"),
    ({"prompt": "x" * 200, "max_new_tokens": 120}, "prompt", "120 .*256"),
    ({"prompt": "x", "stop": "x"}, "stop", "'x'"),
    ({"prompt": "x", "stop": [""]}, "stop.0", "''"),
    ({"prompt": "a\0b"}, "prompt", r"'a\\x00b'"),
    ({"prompt": "a", "system_prompt": "a\0b"}, "system_prompt", r"'a\\x00b'"),
    ({"prompt": "x", "apply_chat_template": "yes"}, "apply_chat_template", "'yes'"),
    ({"prompt": "x", "stream": 1}, "stream", "1"),
]


@pytest.mark.parametrize(("body", "param", "pattern"), INVALID, ids=[repr(body)[:40] for body, _, _ in INVALID])
def test_an_invalid_field_is_named_with_its_value(server, body, param, pattern):
    content = json.dumps(body).encode()
    response = server.client.post("/generate_lda", content=content, headers=JSON)
    assert response.status_code == 422, response.text
    error = error_of(response)
    assert re.search(pattern, error["message"]), error
    assert error["param"] == param


def test_the_limit_on_alpha_is_that_of_the_engine():
    from extraction.engine.logit_diff import MAX_ALPHA
    from extraction.serving import settings

    assert settings.MAX_ALPHA == MAX_ALPHA


@pytest.mark.parametrize("text", [r"\ud800", r"\udfff\ud800", r"x\udc00y"])
def test_a_lone_surrogate_is_refused_and_a_pair_is_not(server, text):
    for field in ("prompt", "system_prompt"):
        fields = {"prompt": "x", "system_prompt": "y"} | {field: "TEXT"}
        content = json.dumps({**fields, "max_new_tokens": 1}).encode()
        response = server.client.post("/generate", content=content.replace(b"TEXT", text.encode()), headers=JSON)
        assert (response.status_code, error_of(response)["param"]) == (422, field)
        pair = content.replace(b"TEXT", rb"\ud83d\ude00")
        assert server.client.post("/generate", content=pair, headers=JSON).status_code == 200


@pytest.mark.parametrize("path", ["/generate_lda_batch", "/generate/batch"])
def test_too_many_prompts_none_and_an_invalid_one_are_refused(server, path):
    error = server.refusal(path, {"prompts": ["x"] * 10_000}, 422)
    assert error["param"] == "prompts"
    assert "32" in error["message"]
    assert server.refusal(path, {"prompts": []}, 422)["param"] == "prompts"
    assert server.refusal(path, {"prompts": ["x", 3]}, 422)["param"] == "prompts.1"
    assert server.refusal(path, {"prompts": ["x", "y" * 250]}, 422)["param"] == "prompts.1"


def test_a_depth_out_of_range_is_refused(server):
    for depth in (0, 17, "4", 2.5):
        error = server.refusal("/generate/batch", {"prompts": ["x"], "speculation_depth": depth}, 422)
        assert error["param"] == "speculation_depth"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/generate", 405), ("PUT", "/generate", 405), ("POST", "/health", 405), ("GET", "/", 404),
     ("GET", "/docs", 404), ("GET", "/redoc", 404), ("GET", "/openapi.json", 404), ("GET", "/generate/", 404),
     ("GET", "/../etc/passwd", 404)],
)  # fmt: skip
def test_unknown_paths_and_methods_have_errors_of_the_same_shape(server, method, path, status):
    response = server.client.request(method, path, headers=JSON)
    assert response.status_code == status
    error_of(response)


# --- responses ------------------------------------------------------------------------------------------------------

NASTY = '<script>alert(1)</script> \x1b[31mred\x1b[0m \x9b31m \u202egnirts \u2028 & "quoted"'


def test_scripts_and_escape_sequences_are_returned_as_text(server):
    response = server.post("/generate", {"prompt": NASTY, "max_new_tokens": 3, "temperature": 0.0})
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert response.json()["prompt"] == NASTY
    assert all(c.isprintable() for c in response.text.rstrip("\n"))
    error = server.post("/generate", {"prompt": "x", NASTY: 1})
    assert error.headers["content-type"] == "application/json"
    assert all(c.isprintable() for c in error.text.rstrip("\n"))


def test_escape_sequences_of_a_response_are_escaped():
    from extraction.serving.streaming import to_safe_json

    assert to_safe_json({"text": "\x1b[31m\x9b\u202e</script>"}) == '{"text":"\\u001b[31m\\u009b\\u202e</script>"}'
    assert json.loads(to_safe_json({"text": NASTY})) == {"text": NASTY}


def test_every_response_has_the_security_headers(server):
    for method, path in PATHS:
        assert server.client.request(method, path).headers["x-content-type-options"] == "nosniff"
    with server.client.stream("POST", "/generate", json={"prompt": "x", "stream": True}) as response:
        assert response.headers["x-content-type-options"] == "nosniff"
        response.read()


def test_no_prompt_and_no_token_is_logged_or_counted(closed, capfd):
    secret = "my-private-prompt"
    with friend(closed, authorization=f"Bearer {TOKEN}", host="box.example") as client:
        for body in ({"prompt": secret}, {"prompt": secret, "nonsense": 1}, {"prompt": secret * 100}):
            client.post("/generate", json=body)
        client.post("/generate", content=secret.encode())
        text = client.get("/metrics").text + client.get("/health").text
    printed = capfd.readouterr()
    everything = text + printed.out + printed.err + "\n".join(closed.log)
    assert secret not in everything
    assert TOKEN not in everything


def test_control_tokens_in_a_prompt_are_text(server):
    answer = server.answer("/generate", prompt="<eos><pad>", apply_chat_template=False, max_new_tokens=2)
    assert answer["formatted_prompt"] == "<eos><pad>"
    assert len(tiny_tokenizer()("<eos><pad>", split_special_tokens=True)["input_ids"]) == 10

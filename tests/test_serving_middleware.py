"""Who is let in, and what may be asked: every hazard of a server that strangers can reach, on real sockets."""

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
    """One server without a token."""
    with running(body_timeout=0.7) as started:
        yield started


@pytest.fixture(scope="module")
def closed() -> Iterator[Running]:
    """One beyond this machine (in name), with a token."""
    with running(host="0.0.0.0", token=TOKEN, names=("box.example",)) as started:
        yield started


def raw(server: Running, *parts: bytes, pause: float = 0.0, wait: float = 10.0) -> tuple[int, dict[str, str], bytes]:
    """Bytes on a socket, as nobody's library would send them; the status, headers and body of what comes back."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host.replace("0.0.0.0", "127.0.0.1"), int(port)), timeout=wait) as wire:
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
    """A request's first lines, which closes the connection."""
    all_headers = {"Host": "localhost", "Content-Type": "application/json", "Connection": "close", **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in all_headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def still_answers(server: Running) -> None:
    assert server.answer("/generate", prompt="Why?", max_new_tokens=2)["tokens_generated"] <= 2


# --- who may ask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "192.168.1.9", "", "[::2]"]
)
@pytest.mark.parametrize(("method", "path"), PATHS)
def test_a_foreign_host_is_refused_everywhere(server, host, method, path):
    response = server.client.request(method, path, headers={"host": host})
    assert response.status_code == 403
    assert error_of(response)["code"] == "host"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "127.0.0.1:8000", "[::1]:8000", "localhost."]
)
def test_names_of_this_machine_are_not_foreign(server, host):
    assert server.client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://localhost.evil.example", "http://localhost:1"]
)
def test_a_foreign_origin_is_refused(server, origin):
    response = server.client.post("/generate", json={"prompt": "x"}, headers={"origin": origin})
    assert response.status_code == 403
    assert error_of(response)["code"] == "origin"
    assert "access-control-allow-origin" not in response.headers


def test_the_servers_own_origin_is_let_in(server):
    assert server.client.get("/health", headers={"origin": server.url}).status_code == 200


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"]
)
def test_without_the_token_nothing_is_answered(closed, method, path, given):
    with httpx2.Client(base_url=closed.url.replace("0.0.0.0", "127.0.0.1")) as stranger:
        response = stranger.request(method, path, headers={} if given is None else {"authorization": given})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert error_of(response)["type"] == "authentication_error"
    assert TOKEN not in response.text


def test_with_the_token_all_is_answered(closed):
    with httpx2.Client(base_url=closed.url.replace("0.0.0.0", "127.0.0.1")) as friend:
        for host in ("box.example", "127.0.0.1", "10.0.0.7:8000", "localhost"):
            headers = {"authorization": f"bearer {TOKEN}", "host": host}
            assert friend.get("/health", headers=headers).status_code == 200
        headers = {"authorization": f"Bearer {TOKEN}", "host": "evil.example"}
        assert friend.get("/health", headers=headers).status_code == 403


def test_a_token_that_is_no_text_is_wrong(closed):
    line = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer \xff\xfe\xe4\r\n\r\n"
    assert raw(closed, line)[0] == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "box.example"])
def test_no_server_beyond_this_machine_without_a_token(host):
    with pytest.raises(ConfigError, match="TRAITLINE_TOKEN"):
        Settings(host=host)
    assert Settings(host=host, token=TOKEN).token == TOKEN
    assert TOKEN not in repr(Settings(host=host, token=TOKEN))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_is_this_machine(host):
    assert is_loopback(host)


def test_a_token_is_read_and_judged(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(str(file), {"TRAITLINE_TOKEN": "another-one-of-some-length"}) == TOKEN
    assert read_token(None, {"TRAITLINE_TOKEN": TOKEN}) == TOKEN
    assert read_token(None, {}) is None
    assert read_token(None, {"TRAITLINE_TOKEN": ""}) is None
    for bad in ("short", "x" * 15, "with spaces in between it", "naïve-naïve-naïve-naïve"):
        with pytest.raises(ConfigError, match="a token has 16 or more") as caught:
            read_token(None, {"TRAITLINE_TOKEN": bad})
        assert bad not in str(caught.value)
    with pytest.raises(ConfigError, match="no such file"):
        read_token(str(tmp_path / "none"), {})


def test_an_address_that_is_taken_is_told_before_any_model_loads():
    with contextlib.closing(bind(Settings(port=0))) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="give another, or --port 0"):
            bind(Settings(port=taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--host", "0.0.0.0"), "set TRAITLINE_TOKEN or give --token-file, or take 127.0.0.1"),
        (("--after", "pocket"), "--after and --before are a pair; give both, or neither"),
        (("--draft", "pocket"), "--draft proposes tokens to --model; give that too"),
        (("--model", "no-such-model"), "no such short name, folder or hub id"),
        (("--token-file", "/no/such/file"), "no such file"),
        (("--port", "70000"), "70000 is not in the range"),
        (("--timeout", "0"), "0.0 is not in the range"),
        (("--max-new-tokens", "100", "--max-total-tokens", "100"), "leaves no room for a prompt"),
        (("--model", "pocket", "--dtype", "int8"), "'int8' is not known"),
        (("--host", "no.such.host.invalid", "--token-file", "TOKEN"), "give another, or --port 0"),
        (("--qeue", "3"), "No such option"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, tuple) else "",
)
def test_a_wrong_option_is_one_line_before_any_model_loads(options, said, tmp_path, monkeypatch):
    monkeypatch.delenv("TRAITLINE_TOKEN", raising=False)
    (tmp_path / "token").write_text(TOKEN)
    line = refused("serve", *[str(tmp_path / "token") if word == "TOKEN" else word for word in options])
    assert said in line
    assert TOKEN not in line


# --- what arrives ---------------------------------------------------------------------------------------------------


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
def test_what_is_no_json_is_refused(server, body):
    response = server.client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert response.status_code == (422 if body == b"" else 400)
    assert error_of(response)["type"] == "invalid_request_error"
    still_answers(server)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data; boundary=x"]
)
def test_what_a_form_can_send_is_refused(server, kind):
    response = server.client.post("/generate", content=b'{"prompt": "x"}', headers={"content-type": kind})
    assert response.status_code == 415
    assert "application/json" in error_of(response)["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long_is_refused(server, chunked):
    body = json.dumps({"prompt": "x" * MAX_BODY}).encode()
    content = iter([body[i : i + 65536] for i in range(0, len(body), 65536)]) if chunked else body
    response = server.client.post("/generate", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_size"
    still_answers(server)


def test_a_body_of_any_length_is_refused_without_being_kept(server):
    piece = b"%x\r\n%s\r\n" % (1 << 20, b"x" * (1 << 20))
    status, _, _ = raw(server, head(Transfer_Encoding="chunked"), *[piece] * 40)
    assert status == 413
    still_answers(server)


@pytest.mark.parametrize("length", ["1000001", "999999999999999999"])
def test_a_length_that_is_too_long_is_refused_before_the_body_comes(server, length):
    began = time.monotonic()
    status, _, _ = raw(server, head(Content_Length=length), b"{}")
    assert status == 413
    assert time.monotonic() - began < 5


def test_a_body_of_just_the_right_length_is_read(server):
    start, end = b'{"prompt": "', b'"}'
    body = start + b"x" * (MAX_BODY - len(start) - len(end)) + end
    response = server.client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422  # read, and found too long for the model
    assert error_of(response)["code"] == "context_length_exceeded"


def test_a_slow_body_is_not_waited_for(server):
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
def test_slow_headers_are_not_waited_for(server, first):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as wire:
        wire.sendall(first)
        began = time.monotonic()
        while wire.recv(65536):
            wire.sendall(b"x")
        assert 0.3 < time.monotonic() - began < 4
    still_answers(server)


def test_a_connection_that_is_used_now_and_then_is_kept(server):
    ports = set()
    with httpx2.Client(base_url=server.url) as client:
        for _ in range(3):
            response = client.get("/health")
            assert response.status_code == 200
            ports.add(response.extensions["network_stream"].get_extra_info("client_addr"))
            time.sleep(1.0)  # more than a slow request may take
    assert len(ports) == 1


def test_requests_beyond_what_memory_is_meant_for_are_sent_away():
    with running(queue=1, body_timeout=5) as small, contextlib.ExitStack() as opened:
        host, port = small.url.removeprefix("http://").split(":")
        for _ in range(65):
            wire = opened.enter_context(socket.create_connection((host, int(port))))
            wire.sendall(head(Content_Length="30") + b"{")
        time.sleep(0.3)
        response = small.post("/generate", {"prompt": "x"})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert small.client.get("/health").status_code == 200
        opened.close()
        time.sleep(0.3)
        still_answers(small)


def test_who_hangs_up_in_the_middle_is_forgotten(server):
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port))) as wire:
            wire.sendall(head(Content_Length="30") + b"{")
    still_answers(server)


@pytest.mark.parametrize(
    "nonsense", [b"\x16\x03\x01 tls", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"X" * 70_000 + b"\r\n\r\n"]
)
def test_what_is_no_http_does_no_harm(server, nonsense):
    with contextlib.suppress(ConnectionError, ValueError, IndexError):
        raw(server, nonsense, wait=3)
    still_answers(server)


# --- what is asked --------------------------------------------------------------------------------------------------

BAD = [
    ({}, "prompt", r"'prompt' is missing; give it"),
    ([], None, r"the body: \[\] given; input should be a valid dictionary"),
    ("x", None, r"the body: 'x' given"),
    (None, None, r"the body"),
    ({"prompt": 5}, "prompt", r"'prompt': 5 given; input should be a valid string"),
    ({"prompt": ["x"]}, "prompt", r"'prompt': \['x'\] given; input should be a valid string"),
    ({"prompt": "x", "temperatur": 1}, "temperatur", r"'temperatur': not a known field; did you mean 'temperature'\?"),
    ({"prompt": "x", "\x1b[31m": 1}, "\x1b[31m", r"not a known field"),
    ({"prompt": "x", "temperature": "hot"}, "temperature", r"'temperature': 'hot' given; .* a valid number"),
    ({"prompt": "x", "temperature": True}, "temperature", r"'temperature': True given; .* a valid number"),
    ({"prompt": "x", "temperature": -0.1}, "temperature", r"greater than or equal to 0"),
    ({"prompt": "x", "temperature": 101}, "temperature", r"less than or equal to 100"),
    ({"prompt": "x", "temperature": math.nan}, "temperature", r"'temperature': nan given; .* a finite number"),
    ({"prompt": "x", "temperature": math.inf}, "temperature", r"'temperature': inf given; .* a finite number"),
    ({"prompt": "x", "top_p": 0}, "top_p", r"'top_p': 0 given; input should be greater than 0"),
    ({"prompt": "x", "top_p": 1.1}, "top_p", r"less than or equal to 1"),
    ({"prompt": "x", "top_k": -1}, "top_k", r"greater than or equal to 0"),
    ({"prompt": "x", "alpha": 1e30}, "alpha", r"'alpha': 1e\+30 given; input should be less than or equal to 1000000"),
    ({"prompt": "x", "alpha": -math.inf}, "alpha", r"'alpha': -inf given"),
    ({"prompt": "x", "seed": 1.5}, "seed", r"'seed': 1.5 given; input should be a valid integer"),
    ({"prompt": "x", "seed": 2**63}, "seed", r"less than 9223372036854775808"),
    ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens", r"greater than or equal to 1"),
    ({"prompt": "x", "max_new_tokens": 121}, "max_new_tokens", r"at most 120 new tokens"),
    ({"prompt": "x" * 200, "max_new_tokens": 120}, "prompt", r"prompt tokens and 120 new ones are more than 256"),
    ({"prompt": "x", "stop": "x"}, "stop", r"'stop': 'x' given; input should be a valid list"),
    ({"prompt": "x", "stop": [""]}, "stop.0", r"at least 1 item"),
    ({"prompt": "a\0b"}, "prompt", r"'a\\x00b' holds a NUL character; remove it"),
    ({"prompt": "a", "system_prompt": "a\0b"}, "system_prompt", r"holds a NUL character"),
    ({"prompt": "x", "apply_chat_template": "yes"}, "apply_chat_template", r"input should be a valid boolean"),
    ({"prompt": "x", "stream": 1}, "stream", r"input should be a valid boolean"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "said"), BAD, ids=[repr(body)[:40] for body, _, _ in BAD])
def test_what_is_wrong_is_said_in_one_line_with_its_place(server, body, param, said):
    content = json.dumps(body).encode()
    response = server.client.post("/generate_lda", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 422, response.text
    error = error_of(response)
    assert re.search(said, error["message"]), error
    assert error["param"] == param


def test_the_engine_takes_every_alpha_that_the_server_takes():
    from extraction.engine.logit_diff import MAX_ALPHA
    from extraction.serving import settings

    assert settings.MAX_ALPHA == MAX_ALPHA


@pytest.mark.parametrize("text", [r"\ud800", r"\udfff\ud800", r"x\udc00y"])
@pytest.mark.parametrize("field", ["prompt", "system_prompt"])
def test_a_lone_surrogate_is_refused_and_a_pair_is_not(server, text, field):
    other = '"prompt": "x", ' if field != "prompt" else ""
    content = f'{{{other}"{field}": "{text}"}}'.encode()
    response = server.client.post("/generate", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert error_of(response)["param"] == field
    good = content.replace(text.encode(), rb"\ud83d\ude00")
    assert (
        server.client.post("/generate", content=good, headers={"content-type": "application/json"}).status_code == 200
    )


@pytest.mark.parametrize("path", ["/generate_lda_batch", "/generate/batch"])
def test_ten_thousand_prompts_are_refused(server, path):
    error = server.refusal(path, {"prompts": ["x"] * 10_000}, 422)
    assert "at most 32 items" in error["message"]
    assert "at least 1 item" in server.refusal(path, {"prompts": []}, 422)["message"]
    assert server.refusal(path, {"prompts": ["x", 3]}, 422)["param"] == "prompts.1"
    assert server.refusal(path, {"prompts": ["x", "y" * 250]}, 422)["param"] == "prompts.1"


@pytest.mark.parametrize("depth", [0, 17, "4", 2.5])
def test_a_depth_out_of_range_is_refused(server, depth):
    error = server.refusal("/generate/batch", {"prompts": ["x"], "speculation_depth": depth}, 422)
    assert error["param"] == "speculation_depth"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/generate", 405), ("PUT", "/generate", 405), ("POST", "/health", 405), ("GET", "/", 404),
     ("GET", "/docs", 404), ("GET", "/redoc", 404), ("GET", "/openapi.json", 404), ("GET", "/generate/", 404),
     ("GET", "/../etc/passwd", 404)],
)  # fmt: skip
def test_other_paths_and_methods_are_errors_of_the_same_shape(server, method, path, status):
    response = server.client.request(method, path, headers={"content-type": "application/json"})
    assert response.status_code == status
    error_of(response)


# --- what comes back ------------------------------------------------------------------------------------------------

NASTY = '<script>alert(1)</script> \x1b[31mred\x1b[0m \x9b31m \u202egnirts \u2028 & "quoted"'


def test_scripts_and_escape_sequences_come_back_as_text(server):
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


def test_a_model_that_writes_escape_sequences_is_shown_them(server):
    from extraction.serving.streaming import to_safe_json

    assert to_safe_json({"text": "\x1b[31m\x9b\u202e</script>"}) == '{"text":"\\u001b[31m\\u009b\\u202e</script>"}'
    assert json.loads(to_safe_json({"text": NASTY})) == {"text": NASTY}


def test_every_answer_has_the_headers_that_keep_it_data(server):
    for method, path in PATHS:
        assert server.client.request(method, path).headers["x-content-type-options"] == "nosniff"
    with server.client.stream("POST", "/generate", json={"prompt": "x", "stream": True}) as response:
        assert response.headers["x-content-type-options"] == "nosniff"
        response.read()


def test_no_prompt_and_no_token_is_ever_said(closed, capfd):
    secret = "my-private-prompt"
    headers = {"authorization": f"Bearer {TOKEN}", "host": "box.example"}
    with httpx2.Client(base_url=closed.url.replace("0.0.0.0", "127.0.0.1"), headers=headers) as friend:
        for body in ({"prompt": secret}, {"prompt": secret, "nonsense": 1}, {"prompt": secret * 100}):
            friend.post("/generate", json=body)
        friend.post("/generate", content=secret.encode())
        text = friend.get("/metrics").text + friend.get("/health").text
    said = capfd.readouterr()
    everything = text + said.out + said.err + "\n".join(closed.said)
    assert secret not in everything
    assert TOKEN not in everything


def test_a_prompt_of_control_tokens_alone_is_text(server):
    answer = server.answer("/generate", prompt="<eos><pad>", apply_chat_template=False, max_new_tokens=2)
    assert answer["formatted_prompt"] == "<eos><pad>"
    assert len(tiny_tokenizer()("<eos><pad>", split_special_tokens=True)["input_ids"]) == 10

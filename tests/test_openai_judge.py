"""The openai judge against a real server that misbehaves: nothing is lost, nothing paid twice, no key written."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from extraction.core.errors import ConfigError, ModelError
from extraction.judging.base import Rating
from extraction.judging.openai_server import JudgeServer, rate_texts, read_answer
from tests.runs import contents, demo_rows, environment, invoke, make_root, refused, succeed

SECRET = "sk-secret-0123456789abcdef"
QUICK = {"timeout": 0.5, "max_retries": 3, "concurrency": 4}


@dataclass(frozen=True)
class Reply:
    """The server's action for one request."""

    content: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    delay: float = 0.0
    hang_up: bool = False
    logprobs: Any = None
    finish_reason: str = "stop"

    def data(self) -> bytes:
        message = {"role": "assistant", "content": self.content}
        choice = {"index": 0, "finish_reason": self.finish_reason, "message": message, "logprobs": self.logprobs}
        usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
        whole = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
        return self.body if self.body is not None else json.dumps(whole).encode()


def refusal(status: int, message: str, **more: str) -> Reply:
    return Reply(status=status, body=json.dumps({"error": {"message": message, **more}}).encode())


class Scripted(ThreadingHTTPServer):
    """Answers by a script: a function of the text asked about and of how often it was asked before."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: Callable[[str, int], Reply] = lambda text, before: Reply("80")
        self.asked: list[dict[str, Any]] = []
        self.next: dict[str, Any] = {}  # the request that the script answers now
        self.keys: set[str] = set()
        self.models: list[str] = []
        self.times: list[float] = []
        self.running = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def texts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.asked]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that closed their connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, server = request["messages"][0]["content"], self.server
        with server.lock:
            server.next = request
            reply = server.script(text, server.texts().count(text))
            server.asked.append(request)
            server.keys.add(self.headers["Authorization"])
            server.times.append(time.monotonic())
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            time.sleep(reply.delay)
            if not reply.hang_up:
                self._send(reply)
        finally:
            with server.lock:
                server.running -= 1
        self.close_connection = self.close_connection or reply.hang_up

    def do_GET(self) -> None:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in self.server.models]
        self._send(Reply(body=json.dumps({"object": "list", "data": data}).encode()))

    def _send(self, reply: Reply) -> None:
        data = reply.data()
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    """A server on a port of its own, and a key that must not get anywhere else."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = Scripted()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def judged(served: Scripted, texts: dict[str, str], **options: Any) -> tuple[dict[str, Rating], JudgeServer]:
    """Return all ratings, and the server with its requests."""
    server = JudgeServer("m", SECRET, served.url, **{**QUICK, **options})
    found: dict[str, Rating] = {}
    counted: list[int] = []
    rate_texts(server, texts, found.update, counted.append)
    assert len(counted) == len(texts)
    return found, server


TEXTS = {f"k{i}": f"text {i}" for i in range(6)}


def once(bad: Reply, good: Reply | None = None) -> Callable[[str, int], Reply]:
    """Reply to every text badly first, then well."""
    return lambda text, before: bad if before == 0 else (good or Reply("80"))


@pytest.mark.parametrize(
    "bad",
    [
        Reply(status=429, headers={"Retry-After": "0"}),
        Reply(status=500, body=b"oops"),
        Reply(status=503, headers={"Retry-After": "soon"}),
        Reply(status=408),
        Reply(body=b"{not json"),
        Reply(body=b"<html>busy</html>", headers={"Content-Type": "text/html"}),
        Reply(body=b'{"choices": []}'),
        Reply(body=b'{"error": {"message": "overloaded"}}'),
        Reply(body=b"[]"),
        Reply(body=b""),
        Reply("80", delay=1.0),
        Reply(hang_up=True),
        Reply(status=200, headers={"Content-Encoding": "gzip"}, body=b"not gzip"),
    ],
    ids=lambda reply: (
        f"{reply.status}-{(reply.body or b'')[:9]!r}{'-slow' if reply.delay else ''}{reply.hang_up or ''}"
    ),
)
def test_a_call_that_fails_once_is_retried_and_nothing_is_lost(served, bad):
    served.script = once(bad)
    found, server = judged(served, TEXTS)
    assert {key: rating.score for key, rating in found.items()} == dict.fromkeys(TEXTS, 80.0)
    assert (server.counts["calls"], server.n_retried, server.counts["failed"]) == (12, 6, 0)
    assert Counter(served.texts()) == dict.fromkeys(TEXTS.values(), 2)


def test_without_retries_it_would_have_been_lost(served):
    served.script = once(Reply(status=500))
    found, server = judged(served, TEXTS, max_retries=0)
    assert {rating.score for rating in found.values()} == {None}
    assert server.counts["failed"] == 6


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_the_servers_retry_after_is_waited_for(served, kind):
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    header = {"seconds": "0.4", "date": date}[kind]
    served.script = once(Reply(status=429, headers={"Retry-After": header}))
    judged(served, {"a": "one"})
    waited = served.times[1] - served.times[0]
    assert waited >= {"seconds": 0.4, "date": 0.5}[kind]


def test_a_server_that_asks_for_an_hour_is_not_waited_for(served):
    served.script = lambda text, before: Reply(status=429, headers={"Retry-After": "3600"})
    started = time.monotonic()
    found, server = judged(served, {"a": "one"})
    assert time.monotonic() - started < 5
    assert found["a"].score is None
    assert found["a"].reason.startswith("failed: ")
    assert "429" in found["a"].reason
    assert server.counts["calls"] <= 4  # by the SDK's version it gives up at once, or retries with waits of its own


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (refusal(401, f"Incorrect API key provided: {SECRET}"), "401.*OPENAI_API_KEY"),
        (refusal(403, "no"), "403"),
        (refusal(404, "The model `m` does not exist"), "404.*--judge-model"),
        (refusal(429, "You exceeded your quota", code="insufficient_quota"), "429.*You exceeded your quota"),
    ],
    ids=["401", "403", "404", "quota"],
)
def test_a_permanent_error_ends_the_run(served, reply, message):
    served.script = lambda text, before: reply
    with pytest.raises(ConfigError, match=message) as caught:
        judged(served, {f"k{i}": f"text {i}" for i in range(50)}, concurrency=2)
    assert SECRET not in str(caught.value)
    assert len(served.asked) <= 3
    assert max(Counter(served.texts()).values()) == 1


def test_a_lost_server_ends_the_run_and_finished_ratings_are_kept(served):
    served.script = lambda text, before: Reply("70") if text in ("text 0", "text 1") else Reply(status=500)
    found: dict[str, Rating] = {}
    server = JudgeServer("m", SECRET, served.url, max_retries=1, concurrency=1)
    with pytest.raises(ModelError, match=r"10 .*500"):
        rate_texts(server, {f"k{i}": f"text {i}" for i in range(50)}, found.update, lambda n: None)
    assert (found["k0"].score, found["k1"].score) == (70.0, 70.0)
    assert len(served.asked) <= 2 + 2 * 11


def test_a_text_that_the_server_refuses_is_missing_and_the_others_are_not(served):
    served.script = lambda text, before: refusal(400, "content filter") if text == "text 3" else Reply("20")
    found, server = judged(served, TEXTS)
    assert found["k3"].score is None
    assert found["k3"].reason.startswith("failed: ")
    assert "content filter" in found["k3"].reason
    assert [found[key].score for key in TEXTS if key != "k3"] == [20.0] * 5
    assert server.counts["calls"] == 6


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("REFUSAL", "refused"),
        ("refusal.", "refused"),
        ("", "no answer"),
        (None, "no answer"),
        ("I think so", "no number"),
        ("150", "no number"),
        ("-5", "no number"),
        ("<think>maybe 80", "no answer"),
    ],
)
def test_an_answer_without_a_score_is_missing_never_0_and_not_asked_again(served, content, reason):
    served.script = lambda text, before: Reply(content)
    found, server = judged(served, {"a": "one"})
    assert (found["a"].score, found["a"].reason) == (None, reason)
    assert server.counts["calls"] == 1


def test_a_score_of_0_is_a_score(served):
    served.script = lambda text, before: Reply("0")
    assert judged(served, {"a": "one"})[0]["a"].score == 0.0


# --- log-probabilities ----------------------------------------------------------------------------------------------


def logprobs_of(*likely: tuple[str, float], rest: tuple[str, ...] = ()) -> dict[str, Any]:
    """A completion's logprobs: the likeliest first tokens with their probabilities; then tokens of probability 1."""
    top = [{"token": token, "logprob": math.log(p)} for token, p in likely]
    sure = [{"token": token, "logprob": 0.0, "top_logprobs": [{"token": token, "logprob": 0.0}]} for token in rest]
    return {"content": [{**top[0], "top_logprobs": top}, *sure]}


@pytest.mark.parametrize(
    ("content", "logprobs", "score", "how"),
    [
        (
            "80",
            logprobs_of(("80", 0.5), ("90", 0.25), (" 80", 0.05), ("The", 0.1)),
            (80 * 0.55 + 90 * 0.25) / 0.8,
            "logprobs",
        ),
        ("8", logprobs_of(("8", 0.6), ("75", 0.3)), (8 * 0.6 + 75 * 0.3) / 0.9, "logprobs"),
        ("80", logprobs_of(("80", 0.2), ("Well", 0.1)), None, "logprobs"),
        ("80", logprobs_of(("80", 0.5), ("150", 0.3)), 80.0, "logprobs"),
        (
            "85",
            logprobs_of(("8", 0.9), ("9", 0.1), rest=("5",)),
            85.0,
            "text",
        ),  # digit by digit: the first tells of tens only
        ("5", logprobs_of(("5", 0.9), ("8", 0.1)), 5.0, "text"),
        ("Score: 85", logprobs_of(("Score", 0.9), ("85", 0.1), rest=(": ", "85")), 85.0, "text"),
        ("85", {"content": []}, 85.0, "text"),
        ("85", {"content": [{"token": "85"}]}, 85.0, "text"),
        ("85", None, 85.0, "text"),
        ("REFUSAL", logprobs_of(("REF", 0.6), ("50", 0.4)), None, "text"),
    ],
)
def test_single_token_numbers_are_averaged_by_probability(served, content, logprobs, score, how):
    served.script = lambda text, before: Reply(content, logprobs=logprobs)
    rating = judged(served, {"a": "one"})[0]["a"]
    assert rating.score == (None if score is None else pytest.approx(score))
    assert rating.how == how


def test_a_model_that_declines_has_refused():
    body = {"choices": [{"message": {"content": None, "refusal": "I can't help with that."}}]}
    assert read_answer(body).reason == "refused"


def test_parameters_that_a_server_does_not_take_are_left_out_from_then_on(served):
    objections = ["logprobs", "max_tokens", "temperature"]
    messages = [f"Unsupported parameter: '{name}' is not supported with this model." for name in objections]
    served.script = lambda text, before: refusal(400, messages.pop(0)) if messages else Reply("60")
    found, server = judged(served, TEXTS, concurrency=1)
    assert {rating.score for rating in found.values()} == {60.0}
    assert server.parameters == {"max_completion_tokens": 16}
    assert len(served.asked) == len(TEXTS) + len(objections)


def reasoning(served: Scripted, n_thoughts: int, budget: str = "max_tokens") -> Callable[[str, int], Reply]:
    """A model that thinks for some tokens before its number; a server that takes one name of the limit alone."""

    def script(text: str, before: int) -> Reply:
        for name in ("max_tokens", "max_completion_tokens"):
            if name in served.next and name != budget:
                return refusal(400, f"Unsupported parameter: '{name}' is not supported with this model.")
        cut = served.next.get(budget, 10_000) <= n_thoughts
        return Reply("", finish_reason="length") if cut else Reply("80")

    return script


@pytest.mark.parametrize("budget", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_model_that_reasons_is_asked_again_with_more_tokens_and_from_then_on(served, budget, concurrency):
    served.script = reasoning(served, 100, budget)
    texts = {f"k{i}": f"text {i}" for i in range(12)}
    found, server = judged(served, texts, concurrency=concurrency)
    assert {rating.score for rating in found.values()} == {80.0}
    assert server.parameters[budget] == 128
    n_small = sum(request.get(budget) == 16 for request in served.asked)
    assert 1 <= n_small <= concurrency
    if concurrency == 1:
        assert len(served.asked) == 12 + 1 + (budget != "max_tokens")
    answered = [request for request in served.asked if budget in request]
    assert server.counts["tokens_out"] == 2 * len(answered)


@pytest.mark.parametrize("content", ["", None, "<think>a long", "Let me think about that", "It is 8"])
def test_an_answer_that_is_cut_off_twice_has_failed_and_ten_in_a_row_end_the_run(served, content):
    served.script = lambda text, before: Reply(content, finish_reason="length")
    found, _ = judged(served, TEXTS, concurrency=1)
    assert all(rating.score is None and rating.reason.startswith("failed: ") for rating in found.values())
    assert "128" in found["k0"].reason
    assert len(served.asked) == len(TEXTS) + 1
    with pytest.raises(ModelError, match=r"10 .*128"):
        judged(served, {f"k{i}": f"text {i}" for i in range(40)})


def test_a_number_that_is_whole_counts_though_the_answer_is_cut_off(served):
    served.script = lambda text, before: Reply("80, because it is", finish_reason="length")
    found, server = judged(served, TEXTS)
    assert {rating.score for rating in found.values()} == {80.0}
    assert server.counts["calls"] == len(TEXTS)


def test_a_judge_without_any_score_is_stopped_after_ten_answers_and_nothing_is_kept(served):
    served.script = lambda text, before: Reply("Sure thing")
    server, found = JudgeServer("m", SECRET, served.url, concurrency=2), dict[str, Rating]()
    with pytest.raises(ModelError, match=r"10 answers.*no number.*'Sure thing'.*--judge-model"):
        rate_texts(server, {f"k{i}": f"text {i}" for i in range(50)}, found.update, lambda n: None)
    assert found == {}
    assert len(served.asked) <= 12


def test_the_first_answers_without_a_score_are_kept_once_another_has_one(served):
    """The control: nine without a score, then one with."""
    served.script = lambda text, before: Reply("80" if text == "text 9" else "Sure thing")
    found, _ = judged(served, {f"k{i}": f"text {i}" for i in range(10)}, concurrency=1)
    assert {key: rating.score for key, rating in found.items() if rating.score is not None} == {"k9": 80.0}
    assert len(found) == 10


def test_no_more_calls_at_a_time_than_asked_for(served):
    served.script = lambda text, before: Reply("80", delay=0.03)
    judged(served, {f"k{i}": f"text {i}" for i in range(12)}, concurrency=3)
    assert 1 < served.most <= 3


# --- in a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root with responses that the lexical judge scored."""
    root = make_root(tmp_path_factory.mktemp("generated"))
    succeed("batched", "--root", root, "--experiment", "demo")
    return root


@pytest.fixture
def root(generated: Path, tmp_path: Path) -> Path:
    """A copy of that root: a test's first command judges its responses, and makes none."""
    return Path(shutil.copytree(generated, tmp_path / "root"))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the SDK's waits between retries short, but for those that a server asks for."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def options(served: Scripted, *more: object) -> tuple[object, ...]:
    return ("--experiment", "demo", "--judge", "openai", "--judge-model", "m", "--judge-url", served.url, *more)


def by_letters(text: str, before: int = 0) -> Reply:
    """Score the share of letters before n in the answer; coherence is always 100."""
    if "word salad" in text:
        return Reply("95")
    answer = text.split("Answer:\n")[1].split("\n\nJudge", maxsplit=1)[0]
    early = sum("a" <= c <= "m" for c in answer.lower())
    late = sum("n" <= c <= "z" for c in answer.lower())
    return Reply(str(round(100 * early / max(early + late, 1))))


def test_a_run_is_scored_and_its_calls_are_counted(root, served):
    served.script = by_letters
    result = succeed("batched", "--root", root, *options(served, "--judge-price", "1000,1000"))
    rows = [row for row in demo_rows(root) if row["response"].strip()]
    distinct = {(row["question"], row["response"]) for row in rows}
    assert len(served.asked) == 2 * len(distinct)
    assert result.stderr.count(f"{len(served.asked)} calls") == 2  # the estimate, and what it was
    assert f"{100 * len(served.asked):,} tokens in, {2 * len(served.asked):,} out" in result.stderr
    assert "openai judge m" in " ".join(result.stdout.split())
    assert {row["scores"]["openai_coherence"] for row in rows} == {95.0}
    assert served.keys == {f"Bearer {SECRET}"}
    asked, before = len(served.asked), contents(root / "experiments")
    succeed("batched", "--root", root, *options(served))
    assert len(served.asked) == asked
    assert contents(root / "experiments") == before


def test_scores_missing_refused_and_incoherent_are_dropped_and_counted(root, served):
    def script(text: str, before: int) -> Reply:
        if "Who?" in text:
            return Reply("REFUSAL")
        if "When?" in text:
            return Reply("who knows")
        return Reply("10") if "word salad" in text and "What?" in text else by_letters(text)

    served.script = script
    out = " ".join(succeed("batched", "--root", root, *options(served)).stdout.split())
    rows = [row for row in demo_rows(root) if row["response"].strip()]
    n_refused = sum(row["question"] == "Who?" for row in rows)
    n_garbage = sum(row["question"] == "When?" for row in rows)
    assert re.search(rf"\b{n_garbage} \D*\b{n_refused} refused", out)
    assert " incoherent" in out
    assert all(row["scores"]["openai"] is None for row in rows if row["question"] in ("Who?", "When?"))
    assert 0 not in [row["scores"]["openai"] for row in rows if row["question"] in ("Who?", "When?")]


def test_a_run_that_fails_halfway_pays_nothing_twice(root, served):
    heard: list[str] = []

    def script(text: str, before: int) -> Reply:
        if len(heard) >= 20:
            return refusal(401, f"Incorrect API key provided: {SECRET}")
        heard.append(text)
        return by_letters(text)

    served.script = script
    scored = (root / "experiments/demo/calm/responses/pos.jsonl").read_bytes()
    result = invoke("batched", "--root", root, *options(served, "--judge-concurrency", 3))
    assert result.exit_code == 2
    assert "401" in result.stderr
    assert (root / "experiments/demo/calm/responses/pos.jsonl").read_bytes() == scored
    log = root / "experiments/demo/calm/judgements/openai.jsonl"
    assert len(log.read_text().splitlines()) == 20
    log.write_bytes(log.read_bytes() + b'{"key": "torn')
    served.script, before = by_letters, len(served.asked)
    again = succeed("batched", "--root", root, *options(served))
    assert "20 ratings known" in again.stderr
    assert set(served.texts()[before:]).isdisjoint(heard)
    lines = log.read_text().splitlines()
    assert len(lines) == len({json.loads(line)["key"] for line in lines}) == 20 + len(served.asked) - before
    succeed("verify", root / "experiments")


def test_a_line_of_the_log_that_was_changed_is_found_and_judged_again(root, served):
    served.script = by_letters
    succeed("batched", "--root", root, *options(served))
    log = root / "experiments/demo/calm/judgements/openai.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([lines[0].replace('"score": ', '"score": 1'), *lines[1:]]))
    assert "judgements/openai.jsonl" in invoke("verify", root / "experiments").stdout
    for side in ("pos", "neg"):
        (root / f"experiments/demo/calm/responses/{side}.jsonl").unlink()
    asked = len(served.asked)
    succeed("batched", "--root", root, *options(served))
    assert len(served.asked) == asked + 1


def test_the_next_start_requests_only_the_failed_ratings(root, served):
    served.script = lambda text, before: refusal(400, "too spicy") if "Why?" in text else by_letters(text)
    first = succeed("batched", "--root", root, *options(served))
    n_failed = sum(row["question"] == "Why?" and bool(row["response"].strip()) for row in demo_rows(root))
    failed = rf"\b{n_failed} with a failed judge call"
    assert re.search(failed, " ".join(first.stdout.split()))
    before = len(served.asked)
    served.script = by_letters
    second = succeed("batched", "--root", root, *options(served))
    assert all("Why?" in text for text in served.texts()[before:])
    assert len(served.asked) > before
    assert "failed judge call" not in second.stdout


def test_a_killed_run_continues_from_its_log(root, served):
    served.script = lambda text, before: Reply(by_letters(text).content, delay=0.05)
    command = [sys.executable, "-c", "from extraction.cli.commands import main; main()", "batched", "--root", root]
    command += [*options(served, "--judge-concurrency", 2)]
    process = subprocess.Popen(
        [str(word) for word in command],
        env=environment(OPENAI_API_KEY=SECRET, NO_PROXY="127.0.0.1"),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    log = root / "experiments/demo/calm/judgements/openai.jsonl"
    limit = time.monotonic() + 60
    while not (log.exists() and log.read_bytes().count(b"\n") >= 8) and time.monotonic() < limit:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    known, before = log.read_bytes().count(b"\n"), len(served.asked)
    assert known >= 8
    result = succeed("batched", "--root", root, *options(served, "--judge-concurrency", 8))
    assert f"{known} ratings known" in result.stderr
    repeated = Counter(served.texts()) - Counter(set(served.texts()))
    assert repeated.total() <= 2  # those in flight when it was killed
    assert len(served.asked) > before


def test_the_key_gets_nowhere(root, served):
    """A server that repeats the key in answers and errors."""

    def script(text: str, before: int) -> Reply:
        if "Who?" in text:
            return Reply(f"no number, but {SECRET}")
        if "When?" in text:
            return refusal(400, f"bad request with {SECRET}")
        return by_letters(text)

    served.script = script
    results = [succeed("extract", "--quick", "--root", root, *options(served), "--method", "mean_diff")]
    served.script = lambda text, before: refusal(401, f"Incorrect API key provided: {SECRET}")
    results.append(invoke("extract", "--root", root, *options(served, "--judge-model", "other")))
    results.append(
        invoke("extract", "--root", root, *options(served), "--judge-url", f"http://u:{SECRET}@127.0.0.1/v1")
    )
    assert [result.exit_code for result in results] == [0, 2, 2]
    assert not [name for name, data in contents(root).items() if SECRET.encode() in data]
    assert not [result.output for result in results if SECRET in result.output]
    assert "[key]" in (root / "experiments/demo/calm/judgements/openai.jsonl").read_text()


def test_a_judge_that_gives_50_to_everything_is_refused(root, served):
    served.script = lambda text, before: Reply("50")
    line = refused("vectors", "--root", root, *options(served), notes=("calm: ",))
    assert "openai judge m" in line
    assert "(50)" in line


def test_a_missing_model_key_or_address_is_refused_before_anything_is_made(root, served, monkeypatch):
    shutil.rmtree(root / "experiments")
    started = ("extract", "--root", root, "--experiment", "demo", "--judge", "openai")
    assert "--judge-model" in refused(*started)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY" in refused(*started, "--judge-model", "m")
    for url in ("ftp://host/v1", "localhost:8000", "http://", "file:///etc/passwd", "http://a b/", "http://x:99999/"):
        assert repr(url) in refused(*started, "--judge-model", "m", "--judge-url", url)
    assert not (root / "experiments").exists()
    assert not served.asked
    served.script = by_letters
    succeed("batched", "--root", root, *options(served))
    assert served.keys == {"Bearer none"}


def test_without_the_openai_package_the_extra_is_named(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    options = ("--experiment", "demo", "--judge", "openai", "--judge-model", "m", "--judge-url", "http://x")
    assert "traitline[judge]" in refused("extract", "--root", root, *options)
    succeed("generate", "--root", root, "--experiment", "demo")


def test_stage_3_judges_stored_responses_and_needs_no_key_for_stored_scores(root, served, monkeypatch):
    served.script = by_letters
    stored = contents(root / "experiments/demo/calm/responses/shards")
    succeed("vectors", "--root", root, *options(served), "--method", "mean_diff")
    assert contents(root / "experiments/demo/calm/responses/shards") == stored
    asked = len(served.asked)
    monkeypatch.delenv("OPENAI_API_KEY")
    plain = ("--experiment", "demo", "--judge", "openai", "--judge-model", "m")
    succeed("validate", "--quick", "--root", root, *plain, "--method", "mean_diff")
    assert len(served.asked) == asked

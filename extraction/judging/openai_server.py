"""A judge behind an OpenAI-compatible address: called many at a time, patiently, and never twice for one answer.

A call that fails in passing (a full queue, a server's error, a timeout, a dropped connection, an answer that is no
JSON) is made again, a bounded number of times; what can't get better (the key, the model's name) ends the job at once.
The key is sent to the server, and goes nowhere else: it is cut out of everything that comes back.
"""

from __future__ import annotations

import json
import math
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from extraction.core.errors import ConfigError, ModelError
from extraction.judging.registry import FAILED, KEY, Keep, Rating
from extraction.judging.rubric import NO_NUMBER, REFUSED, expectation, read_score

ANSWER_TOKENS = 16
FAILURES_IN_A_ROW = 10  # and the server is taken for lost
HOPELESS = {
    401: f"the key is refused; set {KEY}",
    402: "the account has no credit",
    403: "the key may not use this model",
    404: "no such model or address; check --judge-model and --judge-url (which usually ends in /v1)",
    405: "no such address; check --judge-url (which usually ends in /v1)",
}
IN_PASSING = {408, 409, 425, 429}  # and 5xx
# what some servers or models don't take: the parameter, and what stands in for it
STAND_INS: dict[str, dict[str, Any]] = {
    "top_logprobs": {},
    "logprobs": {},
    "temperature": {},
    "max_tokens": {"max_completion_tokens": ANSWER_TOKENS},
    "max_completion_tokens": {},
}
FULL: dict[str, Any] = {"max_tokens": ANSWER_TOKENS, "temperature": 0, "logprobs": True, "top_logprobs": 20}


@dataclass(frozen=True)
class RetryPolicy:
    """How long to wait for an answer, how often to ask, and how long in between (seconds)."""

    timeout: float = 60.0
    attempts: int = 6
    base: float = 1.0
    cap: float = 60.0
    longest: float = 600.0  # a server that asks for more is not waited for

    def delay(self, attempt: int, asked: float | None, chance: float) -> float:
        """Doubles with each attempt, less a random half of it; never shorter than the server asks."""
        own: float = min(self.cap, self.base * 2**attempt) * (0.5 + chance / 2)
        return max(own, asked or 0.0)


@dataclass
class JudgeServer:
    """Whom to call, and what has come of it so far."""

    model: str
    key: str = field(repr=False)
    url: str | None
    patience: RetryPolicy = RetryPolicy()
    concurrency: int = 8
    counts: Counter[str] = field(default_factory=Counter)
    parameters: dict[str, Any] = field(default_factory=lambda: dict(FULL))
    failing: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    chance: random.Random = field(default_factory=random.Random)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def place(self) -> str:
        """The server and the model, for a message."""
        return f"--judge openai: {self.model}" + (f" at {self.url}" if self.url else "")

    def clean(self, text: object) -> str:
        """Text without the key, whoever put it there."""
        return str(text).replace(self.key, "[key]") if self.key else str(text)

    def brief(self, text: object) -> str:
        """One short line of it."""
        return " ".join(self.clean(text).split())[:160]


class _Failed(Exception):
    """This answer could not be had; others may."""


def rate(server: JudgeServer, texts: Mapping[str, str], keep: Keep, advance: Callable[[int], None]) -> None:
    """Rate filled rubrics by key.

    `keep` is called by many threads, for each rating as it arrives; `advance` by this one, with an answer's tokens.
    What failed for good is a rating without a score, whose reason starts with `failed`. Raises ConfigError where the
    key or the model is refused, ModelError where nothing comes back any more.
    """
    import openai

    address: dict[str, Any] = {"base_url": server.url} if server.url else {}
    with openai.OpenAI(api_key=server.key, max_retries=0, timeout=server.patience.timeout, **address) as client:
        create = client.chat.completions.with_raw_response.create
        pool = ThreadPoolExecutor(server.concurrency, thread_name_prefix="judge")
        try:
            futures = [pool.submit(_rate_one, server, create, key, text, keep) for key, text in texts.items()]
            for future in as_completed(futures):
                advance(future.result())
        finally:
            server.stop.set()  # those that wait to ask again give up; those that have asked are heard
            pool.shutdown(wait=True, cancel_futures=True)


def _rate_one(server: JudgeServer, create: Callable[..., Any], key: str, text: str, keep: Keep) -> int:
    """Keep one rating; returns how many tokens it took. What can't go on stops the other threads, too."""
    try:
        rating = _ask(server, create, text)
        _count(server, rating)
    except _Failed as failure:
        if server.stop.is_set():
            return 0
        rating = _missed(server, failure)
    except BaseException:
        server.stop.set()
        raise
    keep({key: rating})
    return sum(rating.tokens)


def _count(server: JudgeServer, rating: Rating) -> None:
    with server.lock:
        server.failing = 0
        server.counts["tokens in"] += rating.tokens[0]
        server.counts["tokens out"] += rating.tokens[1]


def _missed(server: JudgeServer, failure: _Failed) -> Rating:
    """A rating that will be asked for again. Raises ModelError where too many in a row have failed."""
    with server.lock:
        server.counts["failed"] += 1
        server.failing += 1
        lost = server.failing >= FAILURES_IN_A_ROW
    if lost:
        server.stop.set()
        raise ModelError(
            f"{server.place}: {FAILURES_IN_A_ROW} answers in a row could not be had, the last: {failure}; try again "
            "later: what has arrived is kept"
        ) from None
    return Rating(None, f"{FAILED}: {failure}")


# --- one answer -----------------------------------------------------------------------------------------------------


def _ask(server: JudgeServer, create: Callable[..., Any], text: str) -> Rating:
    """Call until there is an answer, at most `patience.attempts` times. Raises _Failed, ConfigError."""
    reason = "stopped"
    for attempt in range(server.patience.attempts):
        if server.stop.is_set():
            break
        with server.lock:
            server.counts["calls"] += 1
            server.counts["retried"] += attempt > 0
        reason, asked = "", None
        try:
            return read_answer(_call(server, create, text), server.clean)
        except _Again as again:
            reason, asked = again.reason, again.seconds
        if asked is not None and asked > server.patience.longest:
            break
        if attempt + 1 < server.patience.attempts:
            server.stop.wait(server.patience.delay(attempt, asked, server.chance.random()))
    raise _Failed(reason)


class _Again(Exception):
    """Worth another call, after so many seconds if the server said so."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.seconds = reason, seconds


def _call(server: JudgeServer, create: Callable[..., Any], text: str) -> dict[str, Any]:
    """One answer's JSON. Parameters that the server doesn't take are left out, from then on."""
    import openai

    while True:
        parameters = server.parameters
        try:
            reply = create(model=server.model, messages=[{"role": "user", "content": text}], **parameters)
            return _message(reply.content)
        except openai.APITimeoutError:
            raise _Again("no answer in time") from None
        except openai.APIConnectionError as failure:
            raise _Again(server.brief(failure.__cause__ or failure)) from None
        except openai.APIStatusError as failure:
            refused = _refused_parameter(parameters, failure)
            if refused is None:
                raise _judged_by_status(server, failure) from None
            with server.lock:
                server.parameters = _without(server.parameters, refused)
        except (ValueError, openai.OpenAIError):
            raise _Again("its answer is no JSON of a chat completion") from None


def _message(content: bytes) -> dict[str, Any]:
    """The JSON of a chat completion. Raises ValueError for anything else."""
    body = json.loads(content)
    try:
        body["choices"][0]["message"].get("content")
    except (TypeError, KeyError, IndexError, AttributeError) as failure:
        raise ValueError("no choices") from failure
    answer: dict[str, Any] = body
    return answer


def _refused_parameter(parameters: Mapping[str, Any], failure: Any) -> str | None:
    """The parameter that the server objects to; None where it objects to something else."""
    if failure.status_code not in (400, 422):
        return None
    message = str(failure.message)
    return next((name for name in STAND_INS if name in parameters and re.search(rf"\b{name}\b", message)), None)


def _without(parameters: Mapping[str, Any], refused: str) -> dict[str, Any]:
    """The others, and what stands in for it; `top_logprobs` is nothing without `logprobs`."""
    gone = {refused, "top_logprobs"} if refused == "logprobs" else {refused}
    stand_in = STAND_INS[refused] if refused in parameters else {}
    return {key: value for key, value in parameters.items() if key not in gone} | stand_in


def _judged_by_status(server: JudgeServer, failure: Any) -> Exception:
    """What to raise: again, not this one, or nothing any more."""
    status, said = failure.status_code, server.brief(failure.message)
    out_of_credit = failure.code == "insufficient_quota"
    if status in HOPELESS or out_of_credit:
        remedy = HOPELESS[402] if out_of_credit else HOPELESS[status]
        return ConfigError(f"{server.place}: {status}: {remedy} ({said})")
    if status in IN_PASSING or status >= 500:
        return _Again(f"status {status}", _retry_after(failure.response.headers))
    return _Failed(said)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks to wait; None where it does not say."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


# --- reading --------------------------------------------------------------------------------------------------------


def read_answer(body: Mapping[str, Any], clean: Callable[[object], str] = str) -> Rating:
    """A chat completion as a rating: the mean over the likely numbers where the server tells them, else the number."""
    choice = body["choices"][0]
    message, tokens = choice["message"], _tokens(body)
    text = clean(message.get("content") or "")
    if message.get("refusal"):
        return Rating(None, REFUSED, clean(message["refusal"]), "text", tokens)
    score, reason = read_score(text)
    weights = _number_weights(choice, text) if reason is None else None
    if weights is None:
        return Rating(score, reason, text, "text", tokens)
    mean = expectation(weights)
    return Rating(mean, None if mean is not None else NO_NUMBER, text, "logprobs", tokens)


def _tokens(body: Mapping[str, Any]) -> tuple[int, int]:
    usage = body.get("usage") or {}
    counts = [usage.get(name) if isinstance(usage, Mapping) else 0 for name in ("prompt_tokens", "completion_tokens")]
    n_in, n_out = (count if isinstance(count, int) else 0 for count in counts)
    return n_in, n_out


def _number_weights(choice: Mapping[str, Any], text: str) -> dict[int, float] | None:
    """The probability of each number among the likeliest first tokens; None where they are not told.

    None, too, where the number is written in several tokens, since then the first tells of its first digits alone.
    """
    try:
        tokens = [token for token in choice["logprobs"]["content"] if str(token["token"]).strip()]
        likely = [(str(each["token"]).strip(), float(each["logprob"])) for each in tokens[0]["top_logprobs"]]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    numbers = [(word, logprob) for word, logprob in likely if re.fullmatch(r"\d{1,3}", word, re.ASCII)]
    first = str(tokens[0]["token"]).strip()
    written = re.match(r"\s*(\d+(?:\.\d+)?)", text)
    whole = written is not None and written[1] == first and any(len(word) > 1 for word, _ in numbers)
    if not whole:
        return None
    weights: dict[int, float] = {}
    for word, logprob in numbers:
        if int(word) <= 100 and logprob <= 0:
            weights[int(word)] = weights.get(int(word), 0.0) + math.exp(logprob)
    return weights

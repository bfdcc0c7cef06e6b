"""The openai judge: a model behind an OpenAI-compatible address, called with many requests at a time.

The openai SDK retries what may pass (a full queue, a server's error, a timeout, a dropped connection) and honours
`Retry-After`; a reply that is no chat completion gets a status that it retries as well. Errors that stay (a refused
key, an unknown model) end the run. The key is cut out of every text that comes back from the server.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from extraction.config.experiments import Experiment
from extraction.core.errors import ConfigError, ModelError
from extraction.judging.base import FAILED, FirstAnswers, ModelJudge, Rating, RatingContext, SaveRatings
from extraction.judging.rubric import NO_ANSWER, NO_NUMBER, REFUSED, expectation, read_score

KEY = "OPENAI_API_KEY"
ANSWER_TOKENS = 16
REASONED_TOKENS = 8 * ANSWER_TOKENS  # for a model that reasons before it answers
FAILURES_IN_A_ROW = 10  # after which the server counts as lost
BYTES_PER_TOKEN = 4  # of English, about
TOKENS_PER_ANSWER = 3  # a number, and what ends it
MALFORMED = 599  # the status that a reply gets here if it is no chat completion; the SDK retries 5xx
FATAL = {
    401: f"the key is refused; set {KEY}",
    402: "the account has no credit",
    403: "the key may not use this model",
    404: "no such model or address; check --judge-model and --judge-url (which usually ends in /v1)",
    405: "no such address; check --judge-url (which usually ends in /v1)",
}
# parameters that some servers or models refuse, and what replaces each of them
REPLACEMENTS: dict[str, dict[str, Any]] = {
    "top_logprobs": {},
    "logprobs": {},
    "temperature": {},
    "max_tokens": {"max_completion_tokens": ANSWER_TOKENS},  # or the number that was refused
    "max_completion_tokens": {},
}
BUDGETS = ("max_tokens", "max_completion_tokens")
PARAMETERS: dict[str, Any] = {"max_tokens": ANSWER_TOKENS, "temperature": 0, "logprobs": True, "top_logprobs": 20}


@dataclass
class JudgeServer:
    """A server and a model, the counts of what was sent and received, and the parameters that it accepts.

    `timeout` is in seconds, of one call; `max_retries` of one rating.
    """

    model: str
    key: str = field(repr=False)
    url: str | None
    timeout: float = 60.0
    max_retries: int = 5
    concurrency: int = 8
    counts: Counter[str] = field(default_factory=Counter)
    parameters: dict[str, Any] = field(default_factory=lambda: dict(PARAMETERS))
    failed_in_a_row: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def place(self) -> str:
        """The server and the model, as an error message begins."""
        return f"--judge openai: {self.model}" + (f" at {self.url}" if self.url else "")

    @property
    def n_retried(self) -> int:
        """Number of calls that the SDK made again."""
        return self.counts["calls"] - self.counts["requests"]

    def redact(self, text: object) -> str:
        """Return the text without the key."""
        return str(text).replace(self.key, "[key]") if self.key else str(text)

    def shorten(self, text: object) -> str:
        """Return the text as one short line, without the key."""
        return " ".join(self.redact(text).split())[:160]

    def count(self, **more: int) -> None:
        """Add to the counts."""
        with self.lock:
            self.counts.update(more)


class _Failed(Exception):
    """This rating failed; others may succeed."""


# --- a run's judge --------------------------------------------------------------------------------------------------


def access(settings: Experiment) -> tuple[str, str | None]:
    """Return (key, address or None). Raises ConfigError without a key, or without the package openai."""
    if find_spec("openai") is None:
        raise ConfigError("--judge openai: needs the package openai: pip install 'traitline[judge]'")
    key = os.environ.get(KEY, "").strip()
    if not key and settings.judge_url is None:
        raise ConfigError(
            f"--judge openai: {KEY} is not set; set it, or give --judge-url of a server that needs no key"
        )
    return key or "none", settings.judge_url


def estimate(texts: Collection[str], price: tuple[float, float] | None, model: str) -> str:
    """Return a line with the calls, their tokens (about) and, with `price` per million tokens in and out, the cost."""
    sizes = [len(text.encode("utf-8", "replace")) for text in texts]
    n_in, n_out = round(sum(sizes) / BYTES_PER_TOKEN), TOKENS_PER_ANSWER * len(sizes)
    cost = "" if price is None else f", {(n_in * price[0] + n_out * price[1]) / 1e6:.4f} at the given prices"
    return f"{len(sizes):,} calls to {model}: about {n_in:,} tokens in and {n_out:,} out{cost}"


def _rate(context: RatingContext, texts: Mapping[str, str], save: SaveRatings) -> None:
    """Rate the texts, with a line before of what they will take, and a line after of what they took."""
    settings, note = context.settings, context.reporter.note
    key, url = access(settings)
    server = JudgeServer(settings.judge_model or "", key, url, concurrency=settings.judge_concurrency)
    note(f"{context.trait_name}: {estimate(texts.values(), settings.judge_price, server.model)}")
    try:
        rate_texts(server, texts, save, lambda n_tokens: context.reporter.advance(1, n_tokens))
    finally:
        counts = server.counts
        note(
            f"{context.trait_name}: {counts['calls']} calls ({server.n_retried} of them retries), "
            f"{counts['failed']} ratings failed; {counts['tokens_in']:,} tokens in, {counts['tokens_out']:,} out"
        )


def rate_texts(
    server: JudgeServer, texts: Mapping[str, str], save: SaveRatings, advance: Callable[[int], None]
) -> None:
    """Rate filled rubrics by key.

    `save` is called by many threads, for each rating as it arrives; `advance` by this one, with a rating's tokens. A
    rating that failed has no score, and a reason that starts with `failed`. Raises ConfigError if the key or the model
    is refused, ModelError after FAILURES_IN_A_ROW failures, and if none of the first answers has a score.
    """
    first = FirstAnswers(save, server.place)
    with _client(server) as client:
        create = client.chat.completions.with_raw_response.create
        pool = ThreadPoolExecutor(server.concurrency, thread_name_prefix="judge")
        try:
            futures = [pool.submit(_rate_one, server, create, key, text, first) for key, text in texts.items()]
            for future in as_completed(futures):
                advance(future.result())
            first.end()
        finally:
            server.stop.set()  # threads stop before their next call; calls that are under way are saved
            pool.shutdown(wait=True, cancel_futures=True)


def _rate_one(server: JudgeServer, create: Callable[..., Any], key: str, text: str, first: FirstAnswers) -> int:
    """Save one rating and return its number of tokens. An error that ends the run stops the other threads."""
    try:
        rating = _answer(server, create, text)
        with server.lock:
            server.failed_in_a_row = 0
        first({key: rating})
    except _Failed as failure:
        if server.stop.is_set():
            return 0
        rating = _failed_rating(server, failure)
        first.save({key: rating})
    except BaseException:
        server.stop.set()
        raise
    return sum(rating.tokens)


def _answer(server: JudgeServer, create: Callable[..., Any], text: str) -> Rating:
    """Return a rating. An answer that is cut off before its number is asked for again with more tokens, once.

    A model that reasons first needs them: later calls begin with as many. Raises _Failed if that is cut off too.
    """
    budget = _budget(server.parameters)
    rating, is_cut = _read(server, _call(server, create, text))
    if is_cut and _allow_reasoning(server, budget):
        again, is_cut = _read(server, _call(server, create, text))
        rating = replace(again, tokens=(rating.tokens[0] + again.tokens[0], rating.tokens[1] + again.tokens[1]))
    if is_cut:
        limit = _budget(server.parameters)
        at = "" if limit is None else f" at {limit} tokens"
        raise _Failed(f"the answer was cut off{at} before its number; turn the model's reasoning off, or take another")
    return rating


def _read(server: JudgeServer, body: Mapping[str, Any]) -> tuple[Rating, bool]:
    """Return the rating of a chat completion, and True if it was cut off before its number ended; count its tokens."""
    rating = read_answer(body, server.redact)
    server.count(tokens_in=rating.tokens[0], tokens_out=rating.tokens[1])
    unread = rating.reason in (NO_ANSWER, NO_NUMBER) or rating.raw[-1:].isdecimal()
    return rating, unread and body["choices"][0].get("finish_reason") == "length"


def _budget(parameters: Mapping[str, Any]) -> int | None:
    """Return the limit on the tokens of an answer; None without one."""
    return next((parameters[name] for name in BUDGETS if name in parameters), None)


def _allow_reasoning(server: JudgeServer, budget: int | None) -> bool:
    """Raise the limit for all later calls; return False if `budget` was no lower, or if there is no limit."""
    if budget is None or budget >= REASONED_TOKENS:
        return False
    with server.lock:
        limits = {name: REASONED_TOKENS for name in BUDGETS if name in server.parameters}
        server.parameters = {**server.parameters, **limits}
    return bool(limits)


def _failed_rating(server: JudgeServer, failure: _Failed) -> Rating:
    """Return a rating that the next run requests again. Raises ModelError after too many failures in a row."""
    server.count(failed=1)
    with server.lock:
        server.failed_in_a_row += 1
        lost = server.failed_in_a_row >= FAILURES_IN_A_ROW
    if lost:
        server.stop.set()
        raise ModelError(
            f"{server.place}: {FAILURES_IN_A_ROW} ratings in a row failed, the last: {failure}; try again later: "
            "finished ratings are kept"
        ) from None
    return Rating(None, f"{FAILED}: {failure}")


# --- one call -------------------------------------------------------------------------------------------------------


def _client(server: JudgeServer) -> Any:
    """Return an SDK client whose HTTP hooks count calls, and tell the SDK which replies to retry."""
    import openai

    def before_request(_request: Any) -> None:
        if server.stop.is_set():
            raise openai.OpenAIError("stopped")
        server.count(calls=1)

    def after_response(response: Any) -> None:
        response.read()
        if response.status_code == 200 and _completion(response.content) is None:
            response.status_code = MALFORMED
        elif response.status_code == 429 and _is_out_of_credit(response.content):
            response.headers["x-should-retry"] = "false"

    http_client = openai.DefaultHttpxClient(event_hooks={"request": [before_request], "response": [after_response]})
    address: dict[str, Any] = {"base_url": server.url} if server.url else {}
    return openai.OpenAI(
        api_key=server.key, max_retries=server.max_retries, timeout=server.timeout, http_client=http_client, **address
    )


def _call(server: JudgeServer, create: Callable[..., Any], text: str) -> dict[str, Any]:
    """Return a chat completion's JSON. Parameters that the server refuses are left out from then on.

    Raises _Failed after the SDK's last retry, ConfigError for an error that stays.
    """
    import openai

    while True:
        parameters = server.parameters
        server.count(requests=1)
        try:
            reply = create(model=server.model, messages=[{"role": "user", "content": text}], **parameters)
            completion = _completion(reply.content)
            assert completion is not None  # the hook has marked all others
            return completion
        except openai.APITimeoutError:
            raise _Failed("no answer in time") from None
        except openai.APIConnectionError as failure:
            raise _Failed(server.shorten(failure.__cause__ or failure)) from None
        except openai.APIStatusError as failure:
            refused = _refused_parameter(parameters, failure)
            if refused is None:
                raise _by_status(server, failure) from None
            with server.lock:
                server.parameters = _without(server.parameters, refused)
        except openai.OpenAIError as failure:
            raise _Failed(server.shorten(failure)) from None


def _completion(content: bytes) -> dict[str, Any] | None:
    """Return the JSON of a chat completion; None for anything else."""
    try:
        body: dict[str, Any] = json.loads(content)
        body["choices"][0]["message"].get("content")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    return body


def _is_out_of_credit(content: bytes) -> bool:
    """True if an error's body says that the account has no credit: a 429 that stays."""
    try:
        return bool(json.loads(content)["error"]["code"] == "insufficient_quota")
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _refused_parameter(parameters: Mapping[str, Any], failure: Any) -> str | None:
    """Return the parameter that the server's message names; None for another error."""
    if failure.status_code not in (400, 422):
        return None
    message = str(failure.message)
    return next((name for name in REPLACEMENTS if name in parameters and re.search(rf"\b{name}\b", message)), None)


def _without(parameters: Mapping[str, Any], refused: str) -> dict[str, Any]:
    """Return the other parameters with what replaces the refused one; `top_logprobs` goes with `logprobs`."""
    gone = {refused, "top_logprobs"} if refused == "logprobs" else {refused}
    replacement = dict.fromkeys(REPLACEMENTS[refused], parameters[refused]) if refused in parameters else {}
    return {key: value for key, value in parameters.items() if key not in gone} | replacement


def _by_status(server: JudgeServer, failure: Any) -> Exception:
    """Return the error to raise for a status that the SDK did not retry, or retried in vain."""
    status, message = failure.status_code, server.shorten(failure.message)
    out_of_credit = failure.code == "insufficient_quota"
    if status in FATAL or out_of_credit:
        remedy = FATAL[402] if out_of_credit else FATAL[status]
        return ConfigError(f"{server.place}: {status}: {remedy} ({message})")
    if status == MALFORMED:
        return _Failed("the reply is no JSON of a chat completion")
    return _Failed(f"status {status}" if status in (408, 409, 429) or status >= 500 else message)


# --- reading --------------------------------------------------------------------------------------------------------


def read_answer(body: Mapping[str, Any], redact: Callable[[object], str] = str) -> Rating:
    """Return a chat completion's rating: the mean over its likeliest numbers; without log-probabilities, its number.

    `redact` cuts the key out of texts.
    """
    choice = body["choices"][0]
    message, tokens = choice["message"], _tokens(body)
    text = redact(message.get("content") or "")
    if message.get("refusal"):
        return Rating(None, REFUSED, redact(message["refusal"]), "text", tokens)
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
    """Return the probability of each number among the likeliest first tokens; None without log-probabilities.

    None, too, if the number takes several tokens: the first token would hold its first digits alone.
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


JUDGE = ModelJudge(
    model_help="the name that the server has",
    rate=_rate,
    check_access=lambda settings, root: access(settings),
)

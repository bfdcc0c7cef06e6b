"""Responses of the server: every endpoint against the engine alone, streams, OpenAI's client, metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from extraction.amplification.lda import LDAModelPair
from extraction.engine.generate import generate
from extraction.engine.sampler import Sample
from extraction.model.chat_template import encode_conversation, encode_raw
from extraction.model.pairs import ModelPair
from extraction.serving.streaming import REPLACEMENT, IncrementalDecoder, decode, stable_prefix
from extraction.utils_batch import Request
from tests.served import NAMES, Running, language_model, running, served
from tests.tiny import reference_greedy, tiny_tokenizer

GREEDY = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 24, "seed": 5}
ANSWER = {
    "prompt",
    "formatted_prompt",
    "completion",
    "text",
    "tokens_generated",
    "stopped_early",
    "finish_reason",
    "seed",
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One server for the module."""
    with running() as started:
        yield started


def alone(kind: str, text: str, n: int, **how: object) -> str:
    """Return the engine's response to a prompt, without a server."""
    lm = language_model({"plain": 0, "after": 1}[kind])
    _, ids = encode_conversation(lm.tokenizer, (("user", text),))
    request = Request("x", ids, n, seed=5, draws="lda", sample=Sample(1.0, 0, 0.9), **how)
    (completion,) = generate(lm, [request], batch_size=1)
    return decode(lm.tokenizer, completion.token_ids)


# --- every endpoint -------------------------------------------------------------------------------------------------


def test_generate_equals_the_engine_alone(server):
    answer = server.answer("/generate", prompt="What is AI?", **SAMPLED)
    assert set(answer) == ANSWER | {"model"}
    assert answer["completion"] == alone("plain", "What is AI?", 24)
    assert answer["text"] == answer["formatted_prompt"] + answer["completion"]
    assert (answer["model"], answer["seed"]) == ("tiny", 5)


def test_greedy_equals_transformers(server):
    lm = language_model(0)
    answer = server.answer("/generate", prompt="Why?", apply_chat_template=False, **GREEDY)
    wanted = reference_greedy(lm.model, encode_raw(lm.tokenizer, "Why?"), 12)
    assert answer["completion"] == decode(lm.tokenizer, wanted)


def test_at_alpha_0_the_response_is_the_after_models(server):
    answer = server.answer("/generate_lda", prompt="What is AI?", alpha=0.0, **SAMPLED)
    assert set(answer) == ANSWER | {"alpha", "model_after", "model_before"}
    assert answer["completion"] == alone("after", "What is AI?", 24)
    amplified = server.answer("/generate_lda", prompt="What is AI?", alpha=2.0, **SAMPLED)
    assert amplified["completion"] != answer["completion"]


def test_each_prompt_of_a_batch_has_its_own_seed(server):
    prompts = ["Why?", "A much longer prompt than that one", "Why?", ""]
    answer = server.answer("/generate_lda_batch", prompts=prompts, alpha=1.5, **SAMPLED)
    assert set(answer) == {"results", "alpha", "model_after", "model_before", "batch_size"}
    assert [each["prompt"] for each in answer["results"]] == prompts
    for i, each in enumerate(answer["results"]):
        single = server.answer("/generate_lda", prompt=prompts[i], alpha=1.5, **{**SAMPLED, "seed": 5 + i})
        assert {key: single[key] for key in ANSWER} == each
    assert answer["results"][0]["completion"] != answer["results"][2]["completion"]


def test_the_server_equals_lda_model_pair(server):
    pair = LDAModelPair(
        ModelPair(language_model(1), language_model(2), "tiny-after", "tiny-before", shares_weights=False)
    )
    how = {"alpha": 1.5, "system_prompt": "Be calm.", **SAMPLED}
    prompts = ["What is AI?", "Why <|user|>?"]
    scripted = pair.generate_lda_batched(prompts, **how)
    for i, wanted in enumerate(scripted):
        got = server.answer("/generate_lda", prompt=prompts[i], **{**how, "seed": SAMPLED["seed"] + i})
        assert {key: got[key] for key in wanted} == wanted


def test_greedy_speculation_equals_plain_generation(server):
    prompts = ["What is AI?", "Explain ML", "Define NN"]
    answer = server.answer("/generate/batch", prompts=prompts, max_tokens=30, temperature=0.0)
    assert set(answer) == {"results", "model", "draft", "batch_size", "speculation_depth", "time_seconds"}
    for prompt, each in zip(prompts, answer["results"], strict=True):
        plain = server.answer("/generate", prompt=prompt, max_new_tokens=30, temperature=0.0)
        assert (each["prompt"], each["text"]) == (prompt, plain["completion"])
        assert each["num_tokens"] == len(each["tokens"]) == plain["tokens_generated"]
        assert 0 < each["time_to_first_token"] <= each["time_seconds"] <= answer["time_seconds"]
        stats = each["stats"]
        assert 0 <= stats["accepted_tokens"] <= stats["proposed_tokens"]
        assert stats["total_steps"] <= each["num_tokens"] + 1


def test_a_request_can_set_the_depth_of_speculation(server):
    def steps(depth: int) -> int:
        body = {"prompts": ["What is AI?"], "max_tokens": 40, "temperature": 0.0, "ignore_eos": True}
        stats = server.answer("/generate/batch", **body, speculation_depth=depth)["results"][0]["stats"]
        return stats["total_steps"]

    assert steps(1) >= 20  # one proposal and one more, at best


def test_a_random_seed_is_returned_and_reproduces_the_response(server):
    body = {key: value for key, value in SAMPLED.items() if key != "seed"}
    first, second = (server.answer("/generate", prompt="Why?", **body) for _ in range(2))
    assert first["seed"] != second["seed"]
    assert first["completion"] != second["completion"]
    again = server.answer("/generate", prompt="Why?", **{**body, "seed": first["seed"]})
    assert again == first


def test_a_response_ends_before_its_stop_string(server):
    whole = server.answer("/generate", prompt="Why?", **{**GREEDY, "max_new_tokens": 40})["completion"]
    stop = whole[10:13]
    cut = server.answer("/generate", prompt="Why?", **{**GREEDY, "max_new_tokens": 40}, stop=[stop, "not there"])
    assert cut["completion"] == whole[: whole.index(stop)]
    assert (cut["finish_reason"], cut["stopped_early"]) == ("stop_string", True)


def test_stop_tokens_end_a_response_unless_ignored(server):
    responses = [
        server.answer("/generate", prompt=f"Say {i}", temperature=1.0, max_new_tokens=60, seed=i) for i in range(20)
    ]
    early = [each for each in responses if each["stopped_early"]]
    assert early  # of 60 tokens out of 97, one is the end
    assert {each["finish_reason"] for each in early} == {"stop"}
    body = {"prompt": early[0]["prompt"], "temperature": 1.0, "max_new_tokens": 60, "seed": early[0]["seed"]}
    assert server.answer("/generate", **body, ignore_eos=True)["tokens_generated"] == 60


# --- how a prompt is written ----------------------------------------------------------------------------------------


def test_the_chat_template_is_applied_once_and_prompts_are_literal(server):
    chat = server.answer("/generate", prompt="Hi <|user|>", system_prompt="Be calm.", max_new_tokens=1)
    assert chat["formatted_prompt"] == (
        "<bos><|system|>\nBe calm.<|end|>\n<|user|>\nHi <|user|><|end|>\n<|assistant|>\n"
    )
    tokenizer = tiny_tokenizer()
    _, ids = encode_conversation(tokenizer, (("system", "Be calm."), ("user", "Hi <|user|>")))
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<|user|>")) == 1  # the template's, not the user's
    raw = server.answer("/generate", prompt="Hi", system_prompt="Be calm.", apply_chat_template=False, max_new_tokens=1)
    assert raw["formatted_prompt"] == "Be calm.\n\nHi"


def test_a_conversation_of_many_turns_is_literal():
    tokenizer = tiny_tokenizer()
    turns = tuple((("user", "assistant")[i % 2], f" <|end|> turn {i} ") for i in range(41))
    text, ids = encode_conversation(tokenizer, (("system", "Go."), *turns))
    assert text.count("turn") == 41
    assert ids.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 42


def test_a_model_without_a_chat_template_gets_the_bare_prompt():
    from copy import deepcopy
    from dataclasses import replace

    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.chat_template = None
    with running(served(target=replace(language_model(0), tokenizer=tokenizer), draft=None)) as plain:
        answer = plain.answer("/generate", prompt="Why?", **GREEDY)
        assert answer["formatted_prompt"] == "Why?"
        error = plain.refusal("/generate", {"prompt": "Why?", "apply_chat_template": True}, 422)
        assert error["param"] == "apply_chat_template"
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "Why?"}]}
        assert "/v1/completions" in plain.refusal("/v1/chat/completions", chat, 422)["message"]
        found = plain.answer("/generate/batch", prompts=["Why? Why? Why?"], max_tokens=12, temperature=0.0)
        assert found["draft"] == NAMES["draft"] or found["draft"] is None


# --- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/generate", "/generate_lda"])
@pytest.mark.parametrize("stops", [[], ["e", "Qq"], ["ab"]])
def test_the_pieces_of_a_stream_join_to_the_whole_response(server, path, stops):
    body = {"prompt": "What is AI?", **SAMPLED, "max_new_tokens": 60, "stop": stops}
    whole = server.answer(path, **body)
    *pieces, last = server.events(path, **body)
    assert last == {**whole, "done": True}
    assert "".join(piece["text"] for piece in pieces) == whole["completion"]
    assert len(pieces) > 1 or len(whole["completion"]) < 5
    assert all(not piece["done"] for piece in pieces)


BYTES = "aß中🙂\n"


class ByteTokenizer:
    """A tokenizer whose tokens are halves of bytes of UTF-8 text."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        assert skip_special_tokens
        halves = ids[: len(ids) // 2 * 2]
        data = bytes(high * 16 + low for high, low in zip(halves[::2], halves[1::2], strict=True))
        return data.decode("utf-8", "replace")

    def encode(self, text: str) -> list[int]:
        return [half for byte in text.encode() for half in divmod(byte, 16)]


@given(text=st.text(st.sampled_from(BYTES), max_size=12), stop=st.text(st.sampled_from(BYTES), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_no_piece_breaks_a_character_or_holds_a_part_of_a_stop_string(text, stop):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    stream, shown = IncrementalDecoder(tokenizer, [stop]), ""
    for token in ids:
        shown += stream.add([token])
        assert REPLACEMENT not in shown
        assert text.startswith(shown)
        assert stop not in shown
    shown += stream.finish(ids)
    assert shown == decode(tokenizer, ids, [stop]) == text.partition(stop)[0]


def test_naive_pieces_would_break_characters_and_hold_stop_strings():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("中")
    assert any(REPLACEMENT in tokenizer.decode(ids[:n]) for n in range(len(ids)))
    assert stable_prefix("to be or n", ["not"]) == "to be or "
    assert stable_prefix("to be or no", ["not"]) == "to be or "
    assert stable_prefix("to be or now", ["not"]) == "to be or now"


def test_an_unfinished_character_at_the_end_is_a_replacement_character():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("a中")[:-2]
    stream = IncrementalDecoder(tokenizer)
    assert "".join(stream.add([token]) for token in ids) == "a"
    assert stream.finish(ids) == REPLACEMENT


# --- OpenAI's client ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    """OpenAI's client."""
    with openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0, timeout=60) as real:
        yield real


MESSAGES = [{"role": "system", "content": "Be calm."}, {"role": "user", "content": "Why?"}]


def test_the_client_lists_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "traitline"
    with pytest.raises(openai.NotFoundError, match=r"'tinny'.*'tiny'"):
        client.models.retrieve("tinny")


def test_the_client_completes_text_lists_and_token_ids(client, server):
    ids = list(encode_raw(tiny_tokenizer(), "Why?"))
    how = {"model": "tiny", "max_tokens": 9, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
    text, several, tokens = (client.completions.create(prompt=p, **how) for p in ("Why?", ["Why?", "Who?"], ids))
    plain = server.answer("/generate", prompt="Why?", apply_chat_template=False, **{**GREEDY, "max_new_tokens": 9})
    assert text.choices[0].text == several.choices[0].text == tokens.choices[0].text == plain["completion"]
    assert several.choices[1].text != text.choices[0].text
    assert (text.choices[0].finish_reason, text.object) == ("length", "text_completion")
    assert (text.usage.prompt_tokens, text.usage.completion_tokens, text.usage.total_tokens) == (
        len(ids),
        9,
        len(ids) + 9,
    )


def test_the_client_chats(client, server):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=20, temperature=0.0)
    plain = server.answer("/generate", prompt="Why?", system_prompt="Be calm.", max_new_tokens=20, temperature=0.0)
    assert answer.choices[0].message.content == plain["completion"]
    assert answer.choices[0].message.role == "assistant"
    other = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=20, temperature=0.0)
    assert other.choices[0].message.content == plain["completion"]


def test_a_chat_without_max_tokens_gets_the_servers_limit(client):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 120


def test_streamed_chats_equal_whole_ones(client):
    how = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "seed": 3, "n": 2, "stop": ["zz"]}
    whole = client.chat.completions.create(**how)
    chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_streamed_completions_equal_whole_ones(client):
    how = {"model": "tiny", "prompt": ["Why?", "Who?"], "max_tokens": 12, "seed": 3}
    whole = client.completions.create(**how)
    found = ["", ""]
    for chunk in client.completions.create(**how, stream=True):
        for choice in chunk.choices:
            found[choice.index] += choice.text
    assert found == [choice.text for choice in whole.choices]


def test_the_seed_determines_the_response(client):
    def text(seed: int) -> str:
        answer = client.completions.create(model="tiny", prompt="Why?", max_tokens=30, seed=seed)
        return answer.choices[0].text

    assert text(1) == text(1) != text(2)


INVALID_COMPLETIONS = [  # fields, the one at fault, and the value or rule in the message
    ({"logprobs": 3}, "logprobs", "3"),
    ({"echo": True}, "echo", "True"),
    ({"best_of": 4}, "best_of", "4"),
    ({"suffix": "x"}, "suffix", "'x'"),
    ({"presence_penalty": 0.5}, "presence_penalty", "0.5"),
    ({"n": 99}, "n", "99 .*32"),
    ({"temperature": -1}, "temperature", "-1"),
    ({"stop": ["a"] * 5}, "stop", "4"),
    ({"prompt": []}, "prompt", r"\[\]"),
    ({"prompt": [[1, 2], "x"]}, "prompt", r"\[\[1, 2\], 'x'\]"),
    ({"prompt": [5, 99_999]}, "prompt", "99999 .*9[67]"),
    ({"max_tokens": 500}, "max_tokens", "500 .*120"),
    ({"prompt": "x" * 250}, "prompt", "16 .*256"),
    ({"extra_body": {"max_token": 3}}, "max_token", "'max_tokens'"),
    ({"prompt": ["x"] * 8, "n": 8}, "n", "8 .*32"),
]
INVALID_CHATS = [
    ({"messages": []}, "messages", r"\[\]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'tool'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "image_url"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "messages"),
    ({"tools": [{"type": "function"}]}, "tools", "function"),
    ({"logprobs": True}, "logprobs", "True"),
    ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
]


def check_refusal(caught: pytest.ExceptionInfo[openai.UnprocessableEntityError], param: str, pattern: str) -> None:
    error = caught.value.body
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert re.search(pattern, error["message"]), error


@pytest.mark.parametrize(("fields", "param", "pattern"), INVALID_COMPLETIONS)
def test_an_invalid_completion_names_its_field(client, fields, param, pattern):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "Why?", **fields})
    check_refusal(caught, param, pattern)


@pytest.mark.parametrize(("fields", "param", "pattern"), INVALID_CHATS)
def test_an_invalid_chat_names_its_field(client, fields, param, pattern):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **fields})
    check_refusal(caught, param, pattern)


def test_content_in_parts_is_accepted(client):
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    how = {"model": "tiny", "temperature": 0.0, "max_tokens": 9}
    one = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **how)
    other = client.chat.completions.create(messages=[{"role": "user", "content": "Why?"}], **how)
    assert one.choices == other.choices


# --- what is not served ---------------------------------------------------------------------------------------------


def test_a_kind_without_its_model_names_the_option():
    only_pair = served(target=None, draft=None, names={**NAMES, "model": None, "draft": None})
    with running(only_pair) as pair:
        assert pair.answer("/generate_lda", prompt="Why?", max_new_tokens=2)["tokens_generated"] <= 2
        for path, body in (("/generate", {"prompt": "x"}), ("/generate/batch", {"prompts": ["x"]})):
            assert "--model" in pair.refusal(path, body, 404)["message"]
        assert pair.client.get("/v1/models").json()["data"] == []
        assert pair.refusal("/v1/completions", {"model": "tiny", "prompt": "x"}, 404)["param"] == "model"
    with running(served(before=None, after=None)) as plain:
        assert "--after" in plain.refusal("/generate_lda", {"prompt": "x"}, 404)["message"]
        assert plain.client.get("/tokenizer_compatibility").status_code == 404


def test_health_and_metrics(server):
    health = server.client.get("/health").json()
    assert (health["status"], health["models"], health["rows"], health["queue"]) == ("ready", NAMES, 0, 256)
    server.answer("/generate", prompt="Why?", max_new_tokens=2)
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    series = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    assert float(series['traitline_requests_total{path="/generate",status="200"}']) > 0
    assert float(series['traitline_tokens_total{kind="plain"}']) > 0
    assert float(series["traitline_rows_now"]) == 0
    count = series['traitline_row_seconds_count{kind="plain"}']
    assert series['traitline_row_seconds_bucket{kind="plain",le="+Inf"}'] == count
    buckets = [
        float(value) for key, value in series.items() if key.startswith('traitline_row_seconds_bucket{kind="plain"')
    ]
    assert buckets == sorted(buckets)


def test_the_metrics_are_parsed_by_prometheus_client(server):
    text = server.client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["traitline_requests"].type == "counter"
    assert families["traitline_row_seconds"].type == "histogram"
    assert families["traitline_ready"].samples[0].value == 1
    assert not [name for name in families if not name.startswith("traitline_") or name.endswith("_created")]


def test_two_servers_count_apart(server):
    with running() as other:
        assert 'path="/generate"' not in other.client.get("/metrics").text
    assert server.client.get("/metrics").status_code == 200

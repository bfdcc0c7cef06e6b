"""Encode prompts to token ids in a thread of its own, so that a long text does not block the event loop.

A tokenizer can't be used by two threads at once: this thread has copies.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from extraction.core.errors import PromptError
from extraction.model.chat_template import encode_conversation, encode_raw
from extraction.serving.errors import HttpError

Messages = tuple[tuple[str, str], ...]  # (role, content)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt, its text with the chat template, and its token ids. `field`: its name in the request."""

    field: str
    prompt: str
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class TextPrompt:
    """A prompt as text. `chat` None: with the chat template if the model has one; `literal`: see encode_raw."""

    field: str
    prompt: str
    system: str | None = None
    chat: bool | None = None
    literal: bool = False

    def encode(self, tokenizer: Any) -> EncodedPrompt:
        """Encode it, without or with the chat template. Raises HttpError 422."""
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if self.chat and not has_template:
            message = "'apply_chat_template': true given; this model has no chat template, send false"
            raise HttpError(422, message, param="apply_chat_template")
        if has_template if self.chat is None else self.chat:
            system = (("system", self.system),) if self.system else ()
            return _encode_chat(tokenizer, self.field, self.prompt, (*system, ("user", self.prompt)))
        text = f"{self.system}\n\n{self.prompt}" if self.system else self.prompt
        return _require_tokens(
            EncodedPrompt(self.field, self.prompt, text, encode_raw(tokenizer, text, literal=self.literal))
        )


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation of several messages."""

    field: str
    messages: Messages

    def encode(self, tokenizer: Any) -> EncodedPrompt:
        """Encode it with the chat template. Raises HttpError 422."""
        if not getattr(tokenizer, "chat_template", None):
            raise HttpError(422, "this model has no chat template; use /v1/completions", param=self.field)
        return _encode_chat(tokenizer, self.field, "", self.messages)


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as token ids."""

    field: str
    token_ids: tuple[int, ...]

    def encode(self, tokenizer: Any) -> EncodedPrompt:
        """Check the ids against the vocabulary. Raises HttpError 422."""
        unknown = next((token_id for token_id in self.token_ids if token_id >= len(tokenizer)), None)
        if unknown is not None:
            message = f"{self.field!r}: {unknown} is not a token id; use 0 to {len(tokenizer) - 1}"
            raise HttpError(422, message, param=self.field)
        return EncodedPrompt(self.field, "", "", self.token_ids)


PromptInput = TextPrompt | ChatPrompt | TokenPrompt


class PromptEncoder:
    """Tokenizers by kind of generation, and the thread that uses them."""

    def __init__(self, tokenizers: dict[str, Any]) -> None:
        self._tokenizers = copy_tokenizers(tokenizers)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    async def encode(self, kind: str, prompts: Sequence[PromptInput]) -> list[EncodedPrompt]:
        """Encode prompts in their order. Raises the HttpError of the first that can't be encoded."""
        tokenizer = self._tokenizers[kind]
        loop = asyncio.get_running_loop()
        return [await loop.run_in_executor(self._pool, prompt.encode, tokenizer) for prompt in prompts]

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def copy_tokenizers(tokenizers: Mapping[str, Any]) -> dict[str, Any]:
    """Copy tokenizers for another thread; the same object under two names is copied once."""
    memo: dict[int, Any] = {}
    return {name: copy.deepcopy(tokenizer, memo) for name, tokenizer in tokenizers.items()}


def _encode_chat(tokenizer: Any, field: str, prompt: str, messages: Messages) -> EncodedPrompt:
    try:
        text, token_ids = encode_conversation(tokenizer, messages)
    except PromptError as failure:
        problem, _, remedy = str(failure).rpartition("; ")
        message = f"{problem}; check the roles and their order" if "--" in remedy else str(failure)  # no CLI options
        raise HttpError(422, f"{field!r}: {message}", param=field) from failure
    return _require_tokens(EncodedPrompt(field, prompt, text, token_ids))


def _require_tokens(encoded: EncodedPrompt) -> EncodedPrompt:
    if not encoded.token_ids:
        raise HttpError(422, f"{encoded.field!r}: gives no tokens; write a prompt", param=encoded.field)
    return encoded

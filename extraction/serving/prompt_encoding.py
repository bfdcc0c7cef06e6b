"""Prompts to token ids, in a thread of their own: a long text does not keep others from being answered.

Tokenizers can't be used by two threads at once, so this one has copies.
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

Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model reads it. `field`: where the request has it."""

    field: str
    prompt: str
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Raw:
    """A prompt as it comes."""

    field: str
    prompt: str
    system: str | None = None
    chat: bool | None = None  # None: with the chat template where there is one

    def encode(self, tokenizer: Any) -> Encoded:
        """Written for the model. Raises Refused."""
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if self.chat and not has_template:
            raise HttpError(
                422,
                "'apply_chat_template': true given; this model has no chat template, give false",
                param="apply_chat_template",
            )
        if has_template if self.chat is None else self.chat:
            system = (("system", self.system),) if self.system else ()
            return _conversation(tokenizer, self.field, self.prompt, (*system, ("user", self.prompt)))
        text = f"{self.system}\n\n{self.prompt}" if self.system else self.prompt
        return _sound(Encoded(self.field, self.prompt, text, encode_raw(tokenizer, text)))


@dataclass(frozen=True)
class Conversation:
    """Turns of a chat."""

    field: str
    turns: Turns

    def encode(self, tokenizer: Any) -> Encoded:
        """Written for the model. Raises Refused."""
        if not getattr(tokenizer, "chat_template", None):
            raise HttpError(422, "this model has no chat template; use /v1/completions", param=self.field)
        return _conversation(tokenizer, self.field, "", self.turns)


@dataclass(frozen=True)
class Ids:
    """Token ids, taken as they are."""

    field: str
    token_ids: tuple[int, ...]

    def encode(self, tokenizer: Any) -> Encoded:
        """The same. Raises Refused for one that the tokenizer does not know."""
        strange = next((each for each in self.token_ids if each >= len(tokenizer)), None)
        if strange is not None:
            said = f"{self.field!r}: {strange} is no token; this model has {len(tokenizer)}, counted from 0"
            raise HttpError(422, said, param=self.field)
        return Encoded(self.field, "", "", self.token_ids)


Asked = Raw | Conversation | Ids


class PromptEncoder:
    """Tokenizers by name, and the thread that uses them."""

    def __init__(self, tokenizers: dict[str, Any]) -> None:
        self._tokenizers = copies(tokenizers)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    async def encode(self, name: str, asked: Sequence[Asked]) -> list[Encoded]:
        """In their order. Raises Refused for the first that can't be encoded."""
        tokenizer = self._tokenizers[name]
        work = [lambda each=each: each.encode(tokenizer) for each in asked]
        loop = asyncio.get_running_loop()
        return [await loop.run_in_executor(self._pool, each) for each in work]

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def copies(tokenizers: Mapping[str, Any]) -> dict[str, Any]:
    """Tokenizers for one more thread; what is the same object stays one."""
    memo: dict[int, Any] = {}
    return {name: copy.deepcopy(tokenizer, memo) for name, tokenizer in tokenizers.items()}


def _conversation(tokenizer: Any, field: str, prompt: str, turns: Turns) -> Encoded:
    try:
        text, token_ids = encode_conversation(tokenizer, turns)
    except PromptError as failure:
        said = str(failure).replace("give --raw, or another model", "check the order of the roles")
        raise HttpError(422, f"{field!r}: {said}", param=field) from failure
    return _sound(Encoded(field, prompt, text, token_ids))


def _sound(encoded: Encoded) -> Encoded:
    if not encoded.token_ids:
        raise HttpError(422, f"{encoded.field!r}: gives no tokens; write a prompt", param=encoded.field)
    return encoded

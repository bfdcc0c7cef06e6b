"""What a token is called: the tokenizer's own string for it, and the piece of text that it adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokens_of(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The tokenizer's own strings, one an id; ids that it does not know (padding of a model's head) by number."""
    named: Any = tokenizer.convert_ids_to_tokens(list(token_ids))
    return [f"<{number}>" if name is None else str(name) for number, name in zip(token_ids, named, strict=True)]


def pieces_of(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """Pieces of text, one an id, that join to the whole text, control tokens shown.

    The bytes of one character can be several tokens: the last of them has the character, the others are empty; of a
    character that never ends, the text's last token has what a decoder writes for it.
    """
    from tokenizers.decoders import DecodeStream

    backend: Any = getattr(tokenizer, "_tokenizer", None)
    if backend is None:  # a tokenizer in Python: no stream, so each token stands for itself
        return [str(tokenizer.decode([number], skip_special_tokens=False)) for number in token_ids]
    stream = DecodeStream(skip_special_tokens=False)
    pieces = [stream.step(backend, number) or "" for number in token_ids]
    whole, shown = backend.decode(list(token_ids), skip_special_tokens=False), "".join(pieces)
    if pieces and whole != shown and whole.startswith(shown):
        pieces[-1] += whole[len(shown) :]
    return pieces

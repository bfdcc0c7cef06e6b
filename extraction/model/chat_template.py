"""Examples and prompt files, made ready for a model: chat templates, token ids, one prompt a line.

Control tokens are the tokenizer's special tokens. Those of the chat template count; the same text in a user's words
stays text.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extraction.core.errors import PromptError
from extraction.core.records import Example, Prompt
from extraction.core.text import show, show_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Some templates write today's date, and a run that is resumed tomorrow must see the same prompts. This date is Llama
# 3.1's own default. Newer transformers hand a template no functions, so a macro before it takes the clock's place.
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)

_GUARDS = ("\n", "|", "a")

Messages = tuple[tuple[str, str], ...]


# --- examples -------------------------------------------------------------------------------------------------------


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    *,
    instruction_as: str = "auto",
    raw: bool = False,
    max_tokens: int | None = None,
    max_new_tokens: int = 0,
) -> Prompt:
    """The text and token ids that a model sees of an example.

    `instruction_as` is `system`, `user` (before the question, with a blank line between) or `auto`: `system` where the
    chat template has that role. `raw` uses no template: instruction, blank line, question, as a base model reads it.
    `max_tokens` is the model's context, which must hold the prompt and `max_new_tokens`. Raises PromptError.
    """
    for words in (example.system or "", example.question):
        if re.search("[\ud800-\udfff]", words):
            raise PromptError(f"example {example.id}: {show(words)} holds a lone surrogate; remove it")
    if raw:
        text = _folded(example)
        ids = _raw_ids(tokenizer, text)
    else:
        text, ids = _encode_chat(tokenizer, example, instruction_as)
    _check_length(example, len(ids), max_new_tokens, max_tokens)
    return Prompt(example=example, text=text, token_ids=tuple(ids))


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[str, tuple[int, ...]]:
    """The text and token ids of a conversation (roles and contents), up to where the next answer starts.

    Where the chat template has no system role, a system message goes before the user's next one. Raises PromptError.
    """
    if any(role == "system" for role, _ in messages) and instruction_policy(tokenizer) != "system":
        messages = _without_system(messages)
    text, ids = _encode_messages(tokenizer, messages)
    return text, tuple(ids)


def encode_raw(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """The token ids of a text without a template, as a base model reads it."""
    return tuple(_raw_ids(tokenizer, text))


def _without_system(messages: Messages) -> Messages:
    """System messages folded into the user's turns."""
    folded: list[tuple[str, str]] = []
    pending: list[str] = []
    for role, content in messages:
        if role == "system":
            pending.append(content)
        elif role == "user" and pending:
            folded.append((role, "\n\n".join([*pending, content])))
            pending = []
        else:
            folded.append((role, content))
    return (*folded, *([("user", "\n\n".join(pending))] if pending else []))


def instruction_policy(tokenizer: PreTrainedTokenizerBase) -> str:
    """`system` where the chat template shows a system message to the model, else `user`."""
    _template_of(tokenizer)
    try:
        shown = _render(tokenizer, (("system", "TRAITLINE-SYSTEM"), ("user", "TRAITLINE-USER")))
    except PromptError:
        return "user"
    return "system" if "TRAITLINE-SYSTEM" in shown else "user"


def _check_length(example: Example, n_prompt: int, n_new: int, max_tokens: int | None) -> None:
    if n_prompt == 0:
        raise PromptError(f"example {example.id}: {show(example.question)} gives no tokens; write a prompt")
    if max_tokens is not None and n_prompt + n_new > max_tokens:
        asked = f" and {n_new} new" if n_new else ""
        remedy = "shorten the prompt" + (" or lower --max-new-tokens" if n_prompt < max_tokens and n_new > 1 else "")
        size = f"{n_prompt} prompt tokens{asked} don't fit the model's context of {max_tokens}"
        raise PromptError(f"example {example.id}: {size}; {remedy}")


def _folded(example: Example) -> str:
    return f"{example.system}\n\n{example.question}" if example.system else example.question


# --- chat templates -------------------------------------------------------------------------------------------------


def _encode_chat(tokenizer: PreTrainedTokenizerBase, example: Example, instruction_as: str) -> tuple[str, list[int]]:
    messages = _messages(tokenizer, example, instruction_as)
    try:
        return _encode_messages(tokenizer, messages)
    except PromptError as failure:
        raise PromptError(f"example {example.id}: {failure}") from failure


def _encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[str, list[int]]:
    rendered = _render(tokenizer, messages)
    ids = _ids(tokenizer, rendered)
    skeleton = _Skeleton.of(tokenizer, messages, rendered)
    if _controls_in(tokenizer, ids) != _controls_in(tokenizer, _ids(tokenizer, skeleton.text)):
        ids = _literal_ids(tokenizer, skeleton.pieces(messages, rendered))
    return rendered, _one_bos(tokenizer, ids)


def _messages(tokenizer: PreTrainedTokenizerBase, example: Example, instruction_as: str) -> Messages:
    if instruction_as not in ("auto", "system", "user"):
        raise PromptError(f"--instruction-as {show(instruction_as)}: not known; give auto, system or user")
    policy = instruction_policy(tokenizer)
    if instruction_as == "system" and policy != "system":
        raise PromptError("--instruction-as 'system': the chat template has no system role; give auto or user")
    if not example.system or "user" in (instruction_as, policy):
        return (("user", _folded(example)),)
    return (("system", example.system), ("user", example.question))


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise PromptError(f"{_name(tokenizer)}: the tokenizer has no chat template; give --raw to prompt a base model")
    return str(template)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """The conversation as the model's text, up to where its answer starts."""
    _template_of(tokenizer)
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
            chat_template=_timeless(tokenizer.get_chat_template()),
        )
    except Exception as failure:  # a template is a stranger's program: it may raise anything
        reason = " ".join(str(failure).split())
        raise PromptError(
            f"{_name(tokenizer)}: the chat template fails ({show(reason)}); give --raw, or another model"
        ) from failure
    return str(rendered)


def _timeless(template: str) -> str:
    """The template with a clock that stands still, where it reads one."""
    if "strftime_now" not in template:
        return template
    codes = ("%Y", "%y", "%m", "%d", "%B", "%b", "%A", "%a", "%j", "%H", "%I", "%M", "%S", "%p")
    filled = "".join(f" | replace('{code}', '{TEMPLATE_DATE.strftime(code)}')" for code in codes)
    return "{%- macro strftime_now(format) -%}{{ format" + filled + " }}{%- endmacro +%}" + template


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return show_path(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


@dataclass(frozen=True)
class _Skeleton:
    """A conversation rendered with marks in place of the contents: what the template itself writes."""

    text: str
    marks: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, messages: Messages, rendered: str) -> _Skeleton:
        seed = next(n for n in range(len(rendered) + 1) if f"traitline{n}mark" not in rendered)
        marks = tuple(f"traitline{seed}mark{i}." for i in range(len(messages)))
        marked = tuple((role, mark) for (role, _), mark in zip(messages, marks, strict=True))
        return cls(_render(tokenizer, marked), marks)

    def pieces(self, messages: Messages, rendered: str) -> list[tuple[bool, str]]:
        """The rendered text cut up: (True, what the template wrote) or (False, a content)."""
        parts = re.split("(" + "|".join(map(re.escape, self.marks)) + ")", self.text)
        roles = sorted({role for role, _ in messages})  # a template strips all contents of a role, or none
        for stripped in itertools.product((False, True), repeat=len(roles)):
            strips = dict(zip(roles, stripped, strict=True))
            contents = [content.strip() if strips[role] else content for role, content in messages]
            filled = dict(zip(self.marks, contents, strict=True))
            pieces = [(part not in filled, filled.get(part, part)) for part in parts]
            if "".join(piece for _, piece in pieces) == rendered:
                return pieces
        raise PromptError(
            "the text holds a control token, and the chat template rewrites the text, so the two can't be told "
            "apart; remove the control token from the text"
        )


# --- token ids ------------------------------------------------------------------------------------------------------


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, literal: bool = False) -> list[int]:
    """Text to ids, without BOS or EOS; with `literal`, what looks like a control token is text."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=literal, verbose=False)["input_ids"])


def _raw_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """As a base model reads it: behind what the tokenizer puts first (BOS or nothing), without what it puts last."""
    whole = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    bare = _ids(tokenizer, "a")
    starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    return _one_bos(tokenizer, whole[: starts[0] if starts else 0] + _ids(tokenizer, text, literal=True))


def _one_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def _controls(tokenizer: PreTrainedTokenizerBase) -> dict[int, Any]:
    """The tokenizer's special tokens by id."""
    return {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _controls_in(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    controls = _controls(tokenizer)
    return [number for number in ids if number in controls]


def _literal_ids(tokenizer: PreTrainedTokenizerBase, pieces: list[tuple[bool, str]]) -> list[int]:
    """Ids in which only the template's own control tokens are control tokens.

    A tokenizer cuts text at control tokens first, and treats what lies between piece by piece. So does this: cut at
    the template's control tokens only, and read the text between, template's and user's together, as plain text.
    """
    ids: list[int] = []
    before: Any = None
    for stretch, control_id, control in _stretches(tokenizer, pieces):
        plain = stretch.lstrip() if before is not None and before.rstrip else stretch
        plain = plain.rstrip() if control is not None and control.lstrip else plain
        ids += _plain_ids(tokenizer, plain, before)
        ids += [control_id] if control_id is not None else []
        before = control
    return ids


def _stretches(
    tokenizer: PreTrainedTokenizerBase, pieces: list[tuple[bool, str]]
) -> Iterator[tuple[str, int | None, Any]]:
    """(plain text, the control token that ends it), and a last one that nothing ends."""
    by_text = {token.content: (number, token) for number, token in _controls(tokenizer).items()}
    pattern = re.compile("(" + "|".join(map(re.escape, sorted(by_text, key=len, reverse=True))) + ")")
    plain = ""
    for is_template, piece in pieces:
        for part in pattern.split(piece) if is_template else [piece]:
            if is_template and part in by_text:
                yield (plain, *by_text[part])
                plain = ""
            else:
                plain += part
    yield plain, None, None


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str, control: Any) -> list[int]:
    """Plain text after a control token (None: at the start), without the space marker that starts a whole text.

    Tokenizers of the SentencePiece kind put a marker before the first word of a text, and some of them only there.
    For those the text is read behind a guard, which is then cut off.
    """
    if not text:
        return []
    if control is None or _ids(tokenizer, control.content + "a")[1:] == _ids(tokenizer, "a"):
        return _ids(tokenizer, text, literal=True)
    for guard in _GUARDS:
        read = tokenizer(
            guard + text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        if not any(start < len(guard) < end for start, end in read["offset_mapping"]):
            pairs = zip(read["input_ids"], read["offset_mapping"], strict=True)
            return [number for number, (_, end) in pairs if end > len(guard)]
    return _ids(tokenizer, text, literal=True)


# --- prompt files ---------------------------------------------------------------------------------------------------

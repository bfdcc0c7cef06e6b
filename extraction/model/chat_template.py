"""Encode examples and conversations as a model's token ids, through its chat template.

Control tokens are the tokenizer's special tokens. With a chat template, only those that the template writes become
control tokens; the same text in a user's message is encoded as plain text (see `_literal_ids`). Without a template, a
prompt may hold control tokens of its own, as for vLLM's completions; with `literal` they are plain text there too.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from extraction.core.errors import PromptError
from extraction.core.records import Example, Prompt
from extraction.core.text import show, show_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Some templates write today's date, but a run that is resumed tomorrow must see the same prompts. This date is Llama
# 3.1's own default.
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)

# texts to put before a text whose encoding must not depend on being at the start; see `_plain_ids`
_GUARDS = ("\n", "|", "a")

# of each tokenizer: where instructions go and whether contents are lists of parts, by chat template; outlines, by chat
# template, roles and seed
_policies: WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, str]] = WeakKeyDictionary()
_part_templates: WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, bool]] = WeakKeyDictionary()
_outlines: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, str, tuple[str, ...], int], _TemplateOutline]] = (
    WeakKeyDictionary()
)
_TEMPLATE_REMEDY = "give --raw, or another model"
_MAX_OUTLINES = 64  # of one tokenizer: a server sees conversations of every length
Messages = tuple[tuple[str, str], ...]


# --- examples -------------------------------------------------------------------------------------------------------


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    *,
    instruction_as: str = "auto",
    raw: bool = False,
    literal: bool = True,
    thinking: str = "close",
    max_tokens: int | None = None,
    max_new_tokens: int = 0,
) -> Prompt:
    """Render an example and encode it as token ids.

    Args:
        instruction_as: where the instruction goes: `system`, `user` (before the question, with a blank line between)
            or `auto` (`system` if the chat template has that role).
        raw: use no chat template, as for a base model: instruction, blank line, question.
        literal: with `raw`, encode control tokens in the text as plain text.
        thinking: `close` turns a model's thinking off, and ends at once a thought that the chat template opens; `keep`
            lets the model think.
        max_tokens: the model's context, which must hold the prompt and `max_new_tokens`.

    Raises:
        PromptError: the example does not fit the context or the template, or gives no tokens.
    """
    for part in (example.system or "", example.question):
        if re.search("[\ud800-\udfff]", part):
            raise PromptError(f"example {example.id}: {show(part)} holds a lone surrogate; remove it")
    if raw:
        text = _prompt_text(example)
        ids = _raw_ids(tokenizer, text, literal=literal)
    else:
        text, ids = _encode_chat(tokenizer, example, instruction_as, thinking)
    _check_length(example, len(ids), max_new_tokens, max_tokens)
    return Prompt(example=example, text=text, token_ids=tuple(ids))


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[str, tuple[int, ...]]:
    """Render and encode a conversation of (role, content) messages, up to where the next response starts.

    If the chat template has no system role, a system message is put before the next user message. Raises PromptError.
    """
    if any(role == "system" for role, _ in messages) and instruction_policy(tokenizer) != "system":
        messages = _fold_system(messages)
    text, ids = _encode_messages(tokenizer, messages)
    return text, tuple(ids)


def encode_raw(tokenizer: PreTrainedTokenizerBase, text: str, *, literal: bool = False) -> tuple[int, ...]:
    """Encode a text without a chat template. Control tokens in it are control tokens, with `literal` plain text."""
    return tuple(_raw_ids(tokenizer, text, literal=literal))


def control_tokens_in(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> tuple[str, ...]:
    """Return the control tokens that some texts hold, in the tokenizer's order."""
    together = "\0".join(texts)
    return tuple(token.content for token in _control_tokens(tokenizer).values() if token.content in together)


def _fold_system(messages: Messages) -> Messages:
    """Put each system message before the next user message, with a blank line between."""
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
    """Return `system` if the chat template renders system messages, else `user`. Probed once per template."""
    template = _template_of(tokenizer)
    by_template = _policies.setdefault(tokenizer, {})
    if template not in by_template:
        try:
            rendered = _render(tokenizer, (("system", "TRAITLINE-SYSTEM"), ("user", "TRAITLINE-USER")))
        except PromptError:
            rendered = ""
        by_template[template] = "system" if "TRAITLINE-SYSTEM" in rendered else "user"
    return by_template[template]


def _check_length(example: Example, n_prompt: int, n_new: int, max_tokens: int | None) -> None:
    if n_prompt == 0:
        raise PromptError(f"example {example.id}: {show(example.question)} encodes to no tokens; write a prompt")
    if max_tokens is not None and n_prompt + n_new > max_tokens:
        new = f" and {n_new} new" if n_new else ""
        remedy = "shorten the prompt" + (" or lower --max-new-tokens" if n_prompt < max_tokens and n_new > 1 else "")
        size = f"{n_prompt} prompt tokens{new} don't fit the model's context of {max_tokens}"
        raise PromptError(f"example {example.id}: {size}; {remedy}")


def _prompt_text(example: Example) -> str:
    return f"{example.system}\n\n{example.question}" if example.system else example.question


# --- chat templates -------------------------------------------------------------------------------------------------


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase, example: Example, instruction_as: str, thinking: str
) -> tuple[str, list[int]]:
    messages = _messages(tokenizer, example, instruction_as)
    try:
        return _encode_messages(tokenizer, messages, thinking)
    except PromptError as failure:
        raise PromptError(f"example {example.id}: {failure}") from failure


def _encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, thinking: str = "close"
) -> tuple[str, list[int]]:
    rendered = _render(tokenizer, messages, thinking)
    ids = _ids(tokenizer, rendered)
    outline = _TemplateOutline.of(tokenizer, messages, rendered, thinking)
    if tuple(_control_ids(tokenizer, ids)) != outline.control_ids:
        ids = _literal_ids(tokenizer, outline.split(messages, rendered))
    return rendered, _one_bos(tokenizer, ids)


def _messages(tokenizer: PreTrainedTokenizerBase, example: Example, instruction_as: str) -> Messages:
    if instruction_as not in ("auto", "system", "user"):
        raise PromptError(f"--instruction-as {show(instruction_as)}: not known; give auto, system or user")
    policy = instruction_policy(tokenizer)
    if instruction_as == "system" and policy != "system":
        raise PromptError("--instruction-as 'system': the chat template has no system role; give auto or user")
    if not example.system or "user" in (instruction_as, policy):
        return (("user", _prompt_text(example)),)
    return (("system", example.system), ("user", example.question))


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template; of several named ones, `default` or the only one."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict) and template:
        named = template.get("default", next(iter(template.values())) if len(template) == 1 else None)
        if named is None:
            raise PromptError(
                f"{_name(tokenizer)}: the tokenizer has several chat templates and none is the default: "
                f"{', '.join(map(str, template))}; save the one to use as its chat_template.jinja"
            )
        template = named
    if not template:
        raise PromptError(f"{_name(tokenizer)}: the tokenizer has no chat template; give --raw to prompt a base model")
    return str(template)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, thinking: str = "close") -> str:
    """Render a conversation by the chat template, up to where the response starts, or the thought before it."""
    think = thinking != "close"
    rendered = _apply_template(tokenizer, messages, as_parts=_takes_parts(tokenizer), think=think)
    return rendered if think else rendered + _end_of_thought(tokenizer, rendered)


def opens_thought(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the chat template lets every response begin with a chain of thought, whatever it is asked."""
    if not getattr(tokenizer, "chat_template", None):
        return False
    probe = (("user", "TRAITLINE-USER"),)
    rendered = _apply_template(tokenizer, probe, as_parts=_takes_parts(tokenizer))
    return bool(_end_of_thought(tokenizer, rendered))


def _end_of_thought(tokenizer: PreTrainedTokenizerBase, rendered: str) -> str:
    """Return the text that ends a thought which a rendered conversation leaves open; an empty text if none is.

    A thought begins behind `<think>` (DeepSeek-R1, Qwen3-Thinking) or in a channel of its own (gpt-oss).
    """
    if rendered.rstrip().endswith("<think>"):
        return ("" if rendered.endswith("\n") else "\n") + "\n</think>\n\n"
    if "<|channel|>analysis" in _template_of(tokenizer) and rendered.endswith("<|start|>assistant"):
        return "<|channel|>final<|message|>"
    return ""


def _takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the chat template wants a message's content as a list of parts, as multimodal ones may.

    Such a template renders a plain string as nothing, without an error. Raises PromptError if it drops both forms.
    Probed once per template.
    """
    template, by_template = _template_of(tokenizer), _part_templates.setdefault(tokenizer, {})
    if template not in by_template:
        by_template[template] = _probe_parts(tokenizer)
    return by_template[template]


def _probe_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    probe, failures = (("user", "TRAITLINE-USER"),), list[PromptError]()
    for as_parts in (False, True):
        try:
            if "TRAITLINE-USER" in _apply_template(tokenizer, probe, as_parts=as_parts):
                return as_parts
        except PromptError as failure:
            failures.append(failure)
    if failures:
        raise failures[0]
    raise PromptError(f"{_name(tokenizer)}: the chat template drops the user's message; {_TEMPLATE_REMEDY}")


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, as_parts: bool, think: bool = False
) -> str:
    contents: list[Any] = [
        {"role": role, "content": [{"type": "text", "text": content}] if as_parts else content}
        for role, content in messages
    ]
    try:
        rendered = tokenizer.apply_chat_template(
            contents,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=think,
            chat_template=_with_fixed_date(_template_of(tokenizer)),
        )
    except Exception as failure:  # a template is third-party code and may raise anything
        reason = " ".join(str(failure).split())
        raise PromptError(
            f"{_name(tokenizer)}: the chat template fails ({show(reason)}); {_TEMPLATE_REMEDY}"
        ) from failure
    return str(rendered)


def _with_fixed_date(template: str) -> str:
    """Make a template's `strftime_now` return TEMPLATE_DATE, by a macro of that name put before the template.

    Newer transformers pass no functions into a template's context, so the function can't be replaced there.
    """
    if "strftime_now" not in template:
        return template
    directives = ("%Y", "%y", "%m", "%d", "%B", "%b", "%A", "%a", "%j", "%H", "%I", "%M", "%S", "%p")
    filters = "".join(f" | replace('{code}', '{TEMPLATE_DATE.strftime(code)}')" for code in directives)
    return "{%- macro strftime_now(format) -%}{{ format" + filters + " }}{%- endmacro +%}" + template


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return show_path(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


@dataclass(frozen=True)
class _TemplateOutline:
    """A conversation rendered with a placeholder for each message's content: the text that the template adds."""

    text: str
    placeholders: tuple[str, ...]
    control_ids: tuple[int, ...]  # of the text

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, messages: Messages, rendered: str, thinking: str = "close"
    ) -> _TemplateOutline:
        """Return the outline of these roles, rendered once per template. No placeholder occurs in `rendered`."""
        seed = next(n for n in range(len(rendered) + 1) if f"traitline{n}mark" not in rendered)
        roles = tuple(role for role, _ in messages)
        key = (_template_of(tokenizer), thinking, roles, seed)
        outlines = _outlines.setdefault(tokenizer, {})
        if key not in outlines:
            if len(outlines) >= _MAX_OUTLINES:
                outlines.clear()
            placeholders = tuple(f"traitline{seed}mark{i}." for i in range(len(roles)))
            text = _render(tokenizer, tuple(zip(roles, placeholders, strict=True)), thinking)
            for role, placeholder in zip(roles, placeholders, strict=True):
                if role in ("system", "user") and placeholder not in text:
                    raise PromptError(
                        f"{_name(tokenizer)}: the chat template drops a {role} message; {_TEMPLATE_REMEDY}"
                    )
            outlines[key] = cls(text, placeholders, tuple(_control_ids(tokenizer, _ids(tokenizer, text))))
        return outlines[key]

    def split(self, messages: Messages, rendered: str) -> list[tuple[bool, str]]:
        """Split the rendered text into (True, text that the template wrote) and (False, a message's content).

        Raises PromptError if the template changes contents in another way than stripping white space.
        """
        parts = re.split("(" + "|".join(map(re.escape, self.placeholders)) + ")", self.text)
        roles = sorted({role for role, _ in messages})  # a template strips all contents of a role, or none
        for choice in itertools.product((False, True), repeat=len(roles)):
            strips = dict(zip(roles, choice, strict=True))
            contents = [content.strip() if strips[role] else content for role, content in messages]
            content_of = dict(zip(self.placeholders, contents, strict=True))
            pieces = [(part not in content_of, content_of.get(part, part)) for part in parts]
            if "".join(piece for _, piece in pieces) == rendered:
                return pieces
        raise PromptError(
            "a message holds a control token and the chat template rewrites messages, so the template's own control "
            "tokens can't be located; remove the control token from the message"
        )


# --- token ids ------------------------------------------------------------------------------------------------------


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, literal: bool = False) -> list[int]:
    """Encode a text without BOS or EOS; with `literal`, control tokens in it are plain text."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=literal, verbose=False)["input_ids"])


def _raw_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, literal: bool) -> list[int]:
    """Encode a text after the ids that the tokenizer puts first (BOS or none), without those it puts last."""
    with_special = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    without = _ids(tokenizer, "a")
    starts = [i for i in range(len(with_special)) if with_special[i : i + len(without)] == without]
    prefix = with_special[: starts[0] if starts else 0]
    return _one_bos(tokenizer, prefix + _ids(tokenizer, text, literal=literal))


def _one_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Drop all but one BOS token at the start: some templates and tokenizers both add one."""
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, Any]:
    """Return the tokenizer's special tokens by id."""
    return {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _control_ids(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    control_tokens = _control_tokens(tokenizer)
    return [number for number in ids if number in control_tokens]


def _literal_ids(tokenizer: PreTrainedTokenizerBase, pieces: list[tuple[bool, str]]) -> list[int]:
    """Encode a rendered conversation so that only the template's own control tokens are control tokens.

    A tokenizer splits text at control tokens first, and encodes each segment between them. This does the same, but
    splits at the template's control tokens only: text of the template and of messages in between is plain text.
    """
    ids: list[int] = []
    previous: Any = None
    for segment, control_id, control in _segments(tokenizer, pieces):
        plain = segment.lstrip() if previous is not None and previous.rstrip else segment
        plain = plain.rstrip() if control is not None and control.lstrip else plain
        ids += _plain_ids(tokenizer, plain, previous)
        ids += [control_id] if control_id is not None else []
        previous = control
    return ids


def _segments(
    tokenizer: PreTrainedTokenizerBase, pieces: list[tuple[bool, str]]
) -> Iterator[tuple[str, int | None, Any]]:
    """Yield (plain text, id and control token that end it); the last segment has None for both."""
    by_text = {token.content: (number, token) for number, token in _control_tokens(tokenizer).items()}
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
    """Encode a segment that follows a control token (None: at the start), without a marker of the text's start.

    SentencePiece tokenizers put a space marker before the first word of a text, some only there and not after a
    control token. For those the segment is encoded behind a guard text, whose ids are then dropped.
    """
    if not text:
        return []
    if control is None or _ids(tokenizer, control.content + "a")[1:] == _ids(tokenizer, "a"):
        return _ids(tokenizer, text, literal=True)
    for guard in _GUARDS:
        encoded = tokenizer(
            guard + text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        if not any(start < len(guard) < end for start, end in encoded["offset_mapping"]):
            pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            return [number for number, (_, end) in pairs if end > len(guard)]
    return _ids(tokenizer, text, literal=True)

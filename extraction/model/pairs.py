"""Pairs of models with one vocabulary: before and after a training, or a target and its draft model.

If one is a LoRA adapter over the other, or both are adapters over one base, the two share the base's tensors. Each has
modules and hooks of its own.

Vocabularies are of one family if no ordinary token has two ids: ids that only one tokenizer has are left out of the
comparison of logits, and special tokens may have other names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from extraction.config.experiments import ModelSpec
from extraction.core.errors import ModelError
from extraction.core.text import show
from extraction.model.language_model import LanguageModel
from extraction.model.loading import adapter_of, base_of, load, load_over

MAX_SHOWN = 10  # most differing tokens that `compatibility` lists
PAIR_NAMES = ("after", "before")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
PROBE_TEXT = "Is this one text, or 2 texts?\n\nIt's naïve to guess: 東京 🙂."


@dataclass(frozen=True)
class ModelPair:
    """A model after and before a training. `shares_weights` is True if there is one copy of the base's tensors.

    `notes`: one-line remarks on differences of their vocabularies.
    """

    after: LanguageModel
    before: LanguageModel
    after_name: str
    before_name: str
    shares_weights: bool
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, str]:
        """Names of the two models: after, before."""
        return self.after_name, self.before_name


def load_pair(after: ModelSpec, before: ModelSpec) -> ModelPair:
    """Load two models, sharing weights where possible. Raises ModelError if loading fails or vocabularies differ."""
    base, other_base = _shareable_base(after), _shareable_base(before)
    shares = _has_same_weights(base, other_base)
    if shares:
        after_lm, before_lm = _load_shared(after, before, base if base.dtype != "auto" else other_base)
    else:
        after_lm, before_lm = load(after), load(before)
    refuse_different(after_lm, before_lm, (after.name, before.name))
    notes = tuple(vocabulary_notes(after_lm, before_lm))
    return ModelPair(after_lm, before_lm, after.name, before.name, shares, notes)


def _shareable_base(spec: ModelSpec) -> ModelSpec:
    """Return the model whose tensors a model can share: its base, or itself."""
    adapter = adapter_of(spec)
    return base_of(spec, adapter) if adapter is not None and adapter.keeps_base_weights else spec


def _has_same_weights(one: ModelSpec, other: ModelSpec) -> bool:
    """Return True if two specs load the same weights; the dtype `auto` matches any."""
    same_dtype = one.dtype == other.dtype or "auto" in (one.dtype, other.dtype)
    return same_dtype and replace(one, name="", dtype="auto", raw=False) == replace(
        other, name="", dtype="auto", raw=False
    )


def _load_shared(after: ModelSpec, before: ModelSpec, base: ModelSpec) -> tuple[LanguageModel, LanguageModel]:
    base_lm = load(base)
    loaded: dict[str, LanguageModel] = {base.source: base_lm}
    for spec in (after, before):
        if spec.source not in loaded:
            loaded[spec.source] = load_over(base_lm, replace(spec, dtype=base.dtype))
    return loaded[after.source], loaded[before.source]


# --- vocabularies ---------------------------------------------------------------------------------------------------


def refuse_different(first: LanguageModel, second: LanguageModel, names: Sequence[str] = PAIR_NAMES) -> None:
    """Raise ModelError with the first token id that stands for different tokens in the two models."""
    if first.tokenizer is second.tokenizer is not None:
        return
    problems = compatibility(first, second, names)["problems"]
    if problems:
        raise ModelError(
            f"{names[0]} and {names[1]} don't share a vocabulary: {problems[0]}; give two models of one family"
        )


def compatibility(first: LanguageModel, second: LanguageModel, names: Sequence[str] = PAIR_NAMES) -> dict[str, Any]:
    """Compare two models' vocabularies; return a JSON-ready dictionary.

    `problems` are reasons not to use them together. `notes` are harmless differences: text is always tokenized by the
    first model's tokenizer, and ids past the vocabulary are padding.
    """
    differences = _differences(first, second)
    differing = [{"id": each.id, "first": each.first, "second": each.second} for each in differences]
    problems = _problems(first, second, differences)
    return {
        "compatible": not problems,
        "problems": problems,
        "notes": [*vocabulary_notes(first, second), *_notes(first, second)],
        "models": [_summary(lm, name) for lm, name in zip((first, second), names, strict=True)],
        "differing_tokens": len(differing),
        "first_differing_tokens": differing[:MAX_SHOWN],
    }


def unshared_ids(first: LanguageModel, second: LanguageModel) -> tuple[int, ...]:
    """Return the token ids that only one of two models has, in order; none where a model has no tokenizer."""
    return tuple(each.id for each in _differences(first, second) if each.kind == UNSHARED)


UNSHARED, RENAMED, ORDINARY = "unshared", "renamed", "ordinary"


@dataclass(frozen=True)
class _Difference:
    """A token id that stands for two tokens, or for a token in one model only (the other's is None)."""

    id: int
    first: str | None
    second: str | None
    kind: str  # UNSHARED, RENAMED (both special) or ORDINARY


def _differences(first: LanguageModel, second: LanguageModel) -> list[_Difference]:
    """Return the ids that stand for different tokens, in order; none where a model has no tokenizer."""
    if first.tokenizer is second.tokenizer or first.tokenizer is None or second.tokenizer is None:
        return []
    ids = [lm.tokenizer.get_vocab() for lm in (first, second) if lm.tokenizer is not None]
    tokens = [{number: token for token, number in vocabulary.items()} for vocabulary in ids]
    differing = sorted(number for number in {*tokens[0], *tokens[1]} if tokens[0].get(number) != tokens[1].get(number))
    special = [_special_ids(lm.tokenizer) for lm in (first, second)] if differing else []
    found = []
    for number in differing:
        one, other = (of_model.get(number) for of_model in tokens)
        if one is None or other is None:
            has_two_ids = (one if other is None else other) in ids[one is not None]
            is_special = number in special[one is None]
            kind = ORDINARY if has_two_ids and not is_special else UNSHARED
        else:
            kind = RENAMED if all(number in of_model for of_model in special) else ORDINARY
        found.append(_Difference(number, one, other, kind))
    return found


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}


def _problems(first: LanguageModel, second: LanguageModel, differences: Sequence[_Difference]) -> list[str]:
    ordinary = [each for each in differences if each.kind == ORDINARY]
    if ordinary:
        return [f"{_count(ordinary, 'token')} differ{'s' * (len(ordinary) == 1)}, {_first(ordinary)}"]
    has_tokenizers = first.tokenizer is not None and second.tokenizer is not None
    if not has_tokenizers and first.vocab_size != second.vocab_size:
        return [f"{first.vocab_size} and {second.vocab_size} tokens"]
    return []


def vocabulary_notes(first: LanguageModel, second: LanguageModel) -> list[str]:
    """Return notes on ids that only one model has, and on special tokens of other names."""
    differences = _differences(first, second)
    unshared, renamed = ([each for each in differences if each.kind == kind] for kind in (UNSHARED, RENAMED))
    notes = []
    if unshared:
        notes.append(f"{_count(unshared, 'token id')} of one model only, {_first(unshared)}; they are not compared")
    if renamed:
        notes.append(f"{_count(renamed, 'special token')} of other names, {_first(renamed)}")
    return notes


def _count(differences: Sequence[_Difference], noun: str) -> str:
    return f"{len(differences):,} {noun}{'s' * (len(differences) > 1)}"


def _first(differences: Sequence[_Difference]) -> str:
    each = differences[0]
    return f"the first is {each.id}: {_token_text(each.first)} and {_token_text(each.second)}"


def _token_text(token: str | None) -> str:
    return "nothing" if token is None else show(token)


def _notes(first: LanguageModel, second: LanguageModel) -> list[str]:
    notes = {
        f"the logits are {first.vocab_size} and {second.vocab_size} wide; ids past the vocabulary are padding": (
            first.vocab_size != second.vocab_size
        ),
        f"answers end at {sorted(first.stop_ids)} and {sorted(second.stop_ids)}; the first model's are used": (
            first.stop_ids != second.stop_ids
        ),
    }
    if first.tokenizer is None or second.tokenizer is None:
        notes["a model has no tokenizer: only the sizes were compared"] = True
    else:
        templates = [getattr(lm.tokenizer, "chat_template", None) for lm in (first, second)]
        notes["the chat templates differ; the first model's is used"] = templates[0] != templates[1]
        ids = [
            lm.tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"] for lm in (first, second) if lm.tokenizer
        ]
        notes["the tokenizers split text differently; the first model's is used"] = ids[0] != ids[1]
    return [note for note, holds in notes.items() if holds]


def _summary(lm: LanguageModel, name: str) -> dict[str, Any]:
    special = {key: getattr(lm.tokenizer, key, None) for key in SPECIAL_IDS}
    size = None if lm.tokenizer is None else len(lm.tokenizer)
    return {"name": name, "tokens": size, "logits": lm.vocab_size, "stop_token_ids": sorted(lm.stop_ids), **special}

"""Pairs of models with one vocabulary: before and after a training, or a target and its draft model.

If one is a LoRA adapter over the other, or both are adapters over one base, the two share the base's tensors. Each has
modules and hooks of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """A model after and before a training. `shares_weights` is True if there is one copy of the base's tensors."""

    after: LanguageModel
    before: LanguageModel
    after_name: str
    before_name: str
    shares_weights: bool

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
    return ModelPair(after_lm, before_lm, after.name, before.name, shares)


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
    vocabularies = [_vocabulary(lm) for lm in (first, second)]
    differing = _differing(*vocabularies) if all(vocabularies) else []
    problems = _problems(first, second, differing, has_tokenizers=all(vocabularies))
    return {
        "compatible": not problems,
        "problems": problems,
        "notes": _notes(first, second),
        "models": [_summary(lm, name) for lm, name in zip((first, second), names, strict=True)],
        "differing_tokens": len(differing),
        "first_differing_tokens": differing[:MAX_SHOWN],
    }


def _vocabulary(lm: LanguageModel) -> dict[int, str]:
    return {} if lm.tokenizer is None else {number: token for token, number in lm.tokenizer.get_vocab().items()}


def _differing(first: Mapping[int, str], second: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return the ids that stand for different tokens, in order."""
    ids = sorted(number for number in {*first, *second} if first.get(number) != second.get(number))
    return [{"id": number, "first": first.get(number), "second": second.get(number)} for number in ids]


def _problems(
    first: LanguageModel, second: LanguageModel, differing: Sequence[Mapping[str, Any]], *, has_tokenizers: bool
) -> list[str]:
    if differing:
        token = differing[0]
        count = f"{len(differing)} token{'s' if len(differing) > 1 else ''} differ"
        return [
            f"{count}, the first is {token['id']}: {_token_text(token['first'])} and {_token_text(token['second'])}"
        ]
    if not has_tokenizers and first.vocab_size != second.vocab_size:
        return [f"{first.vocab_size} and {second.vocab_size} tokens"]
    return []


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

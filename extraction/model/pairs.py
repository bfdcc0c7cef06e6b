"""Two models that share a vocabulary: before and after a training, or a target and its draft.

Where one is an adapter over the other, or both are adapters over a third, there is one copy of the weights. The two are
models of their own all the same, with modules and hooks of their own: only the tensors are shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from extraction.config.experiments import ModelSpec
from extraction.core.errors import ModelError
from extraction.core.text import show
from extraction.model.loading import LanguageModel, adapter_of, base_of, load, load_over

SHOWN = 10  # differing tokens that a report lists
NAMES = ("after", "before")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
PROBE = "Is this one text, or 2 texts?\n\nIt's naïve to guess: 東京 🙂."


@dataclass(frozen=True)
class ModelPair:
    """A model after and before a training."""

    after: LanguageModel
    before: LanguageModel
    after_name: str
    before_name: str
    shares_weights: bool

    @property
    def names(self) -> tuple[str, str]:
        """After, before."""
        return self.after_name, self.before_name


def load_pair(after: ModelSpec, before: ModelSpec) -> ModelPair:
    """Load both, once where they share weights. Raises ModelError where one can't be loaded, or vocabularies differ."""
    root, other_root = _root(after), _root(before)
    shares = _is_same(root, other_root)
    if shares:
        after_lm, before_lm = _load_shared(after, before, root if root.dtype != "auto" else other_root)
    else:
        after_lm, before_lm = load(after), load(before)
    refuse_different(after_lm, before_lm, (after.name, before.name))
    return ModelPair(after_lm, before_lm, after.name, before.name, shares)


def _root(spec: ModelSpec) -> ModelSpec:
    """The whole model whose tensors a model can share."""
    adapter = adapter_of(spec)
    return base_of(spec, adapter) if adapter is not None and adapter.leaves_base_alone else spec


def _is_same(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether two would load the same weights; a dtype of `auto` goes along with any."""
    same_dtype = one.dtype == other.dtype or "auto" in (one.dtype, other.dtype)
    return same_dtype and replace(one, name="", dtype="auto", raw=False) == replace(
        other, name="", dtype="auto", raw=False
    )


def _load_shared(after: ModelSpec, before: ModelSpec, root: ModelSpec) -> tuple[LanguageModel, LanguageModel]:
    base = load(root)
    found: dict[str, LanguageModel] = {root.source: base}
    for spec in (after, before):
        if spec.source not in found:
            found[spec.source] = load_over(base, replace(spec, dtype=root.dtype))
    return found[after.source], found[before.source]


# --- whether two belong together ------------------------------------------------------------------------------------


def refuse_different(first: LanguageModel, second: LanguageModel, names: Sequence[str] = NAMES) -> None:
    """Raise ModelError, naming the first difference, where a token id does not mean the same to both models."""
    if first.tokenizer is second.tokenizer is not None:
        return
    problems = compatibility(first, second, names)["problems"]
    if problems:
        raise ModelError(
            f"{names[0]} and {names[1]} don't share a vocabulary: {problems[0]}; give two models of one family"
        )


def compatibility(first: LanguageModel, second: LanguageModel, names: Sequence[str] = NAMES) -> dict[str, Any]:
    """What two models' vocabularies have in common, JSON-ready.

    `problems` are reasons not to use them together; `notes` are differences that do no harm, since text is made into
    ids by the first model's tokenizer alone, and ids past the vocabulary are padding.
    """
    vocabularies = [_vocabulary(lm) for lm in (first, second)]
    differing = _differing(*vocabularies) if all(vocabularies) else []
    problems = _problems(first, second, differing, known=all(vocabularies))
    return {
        "compatible": not problems,
        "problems": problems,
        "notes": _notes(first, second),
        "models": [_facts(lm, name) for lm, name in zip((first, second), names, strict=True)],
        "differing_tokens": len(differing),
        "first_differing_tokens": differing[:SHOWN],
    }


def _vocabulary(lm: LanguageModel) -> dict[int, str]:
    return {} if lm.tokenizer is None else {number: token for token, number in lm.tokenizer.get_vocab().items()}


def _differing(first: Mapping[int, str], second: Mapping[int, str]) -> list[dict[str, Any]]:
    """The ids that do not mean the same, in order."""
    ids = sorted(number for number in {*first, *second} if first.get(number) != second.get(number))
    return [{"id": number, "first": first.get(number), "second": second.get(number)} for number in ids]


def _problems(
    first: LanguageModel, second: LanguageModel, differing: Sequence[Mapping[str, Any]], *, known: bool
) -> list[str]:
    if differing:
        token = differing[0]
        count = f"{len(differing)} token{'s' if len(differing) > 1 else ''} differ"
        return [f"{count}, the first is {token['id']}: {_shown(token['first'])} and {_shown(token['second'])}"]
    if not known and first.vocab_size != second.vocab_size:
        return [f"{first.vocab_size} and {second.vocab_size} tokens"]
    return []


def _shown(token: str | None) -> str:
    return "nothing" if token is None else show(token)


def _notes(first: LanguageModel, second: LanguageModel) -> list[str]:
    told = {
        f"the logits are {first.vocab_size} and {second.vocab_size} wide; what is past the vocabulary is padding": (
            first.vocab_size != second.vocab_size
        ),
        f"answers end at {sorted(first.stop_ids)} and {sorted(second.stop_ids)}; the first model's count": (
            first.stop_ids != second.stop_ids
        ),
    }
    if first.tokenizer is None or second.tokenizer is None:
        told["a model has no tokenizer: sizes alone were compared"] = True
    else:
        templates = [getattr(lm.tokenizer, "chat_template", None) for lm in (first, second)]
        told["the chat templates differ; the first model's is used"] = templates[0] != templates[1]
        ids = [lm.tokenizer(PROBE, add_special_tokens=False)["input_ids"] for lm in (first, second) if lm.tokenizer]
        told["the tokenizers cut text in different ways; the first model's is used"] = ids[0] != ids[1]
    return [note for note, holds in told.items() if holds]


def _facts(lm: LanguageModel, name: str) -> dict[str, Any]:
    special = {key: getattr(lm.tokenizer, key, None) for key in SPECIAL}
    size = None if lm.tokenizer is None else len(lm.tokenizer)
    return {"name": name, "tokens": size, "logits": lm.vocab_size, "stop_token_ids": sorted(lm.stop_ids), **special}

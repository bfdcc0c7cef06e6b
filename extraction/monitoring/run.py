"""A plan carried out: the model loaded once, every set's prompts in batches, a file a prompt as soon as it ends.

A shard (a fixed list of prompts) always runs whole, from a clean state, so that a set which was interrupted ends with
the bytes of one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from extraction.core.errors import TraitlineError
from extraction.core.progress import ProgressReporter
from extraction.core.records import POINTS, STREAM, Example, Prompt
from extraction.engine.lazy_model import LazyModel, load_model, retry_with_smaller_batch
from extraction.model.chat_template import encode_example
from extraction.monitoring.plan import MonitoringPlan, SetPlan
from extraction.monitoring.token_text import pieces_of, tokens_of
from extraction.storage.token_captures import prompt_id

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.activations.pooled import CaptureSpec
    from extraction.config.experiments import ModelSpec
    from extraction.engine.requests import Completion

CONVENTIONS: dict[str, str] = {
    "rows": "row i is the state where token i is the input; the first n_prompt rows are the prompt's",
    "layers": "layer k is the output of decoder block k, counted from 0; the embeddings are not a layer",
    "points": "residual_in is a block's input, after_attention the residual stream after the attention block was added "
    "(where attention and MLP run side by side: residual_in and what attention adds), residual_out its output",
    "projections": "the dot product with the vector over its norm, float32",
}
INTERNALS = {
    "q, k, v": "what the projections give, by head, before any normalisation and rotary embedding",
    "rot_q, rot_k": "queries and keys as attention compares them, after both",
    "mlp": "mlp_up and mlp_gate are what these projections give, mlp_activation is what goes into the down projection, "
    "mlp_down what comes out of it",
    "residual_mid": "the same as after_attention",
}
ATTENTION = {
    2: "weights averaged over heads, one row a response token, 0 to the right of the row's own token",
    3: "weights of every head, 0 to the right of the row's own token",
}


@dataclass
class MonitoringSession(LazyModel):
    """What a plan has come to so far, and the model."""

    plan: MonitoringPlan
    n_made: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    checked: bool = False
    fits: int | None = None
    batch_sizes: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    fresh: set[str] = field(default_factory=set)  # stems of sets that have new files

    @property
    def spec(self) -> ModelSpec:
        """Which model."""
        return self.plan.spec

    @cached_property
    def recording(self) -> CaptureSpec:
        """What is kept of every token."""
        from extraction.activations.per_token import TokenInternals, TokenProjections

        if self.plan.tier == 3:
            return TokenInternals(self.plan.layers[0], attention=self.plan.attention)
        return TokenProjections(self.plan.layers, self.plan.unit_LDK, self.plan.attention)


def run_sets(plan: MonitoringPlan, listener: ProgressReporter) -> MonitoringSession:
    """Read every prompt of every set that is not there yet. Raises TraitlineError, or with `keep_going` notes it."""
    taking = MonitoringSession(plan, failures=list(plan.failures))
    for each in plan.sets:
        with going_on(taking, each.stem, listener):
            if pending_of(plan, each):
                _take_set(taking, each, listener)
    return taking


def pending_of(plan: MonitoringPlan, each: SetPlan) -> list[range]:
    """The shards of a set, by the numbers of their prompts, of which some file is missing."""
    shards = shards_of(plan, each)
    return [shard for shard in shards if not all(each.folder.prompt_done(prompt_id(i)) for i in shard)]


@contextmanager
def going_on(taking: MonitoringSession, stem: str, listener: ProgressReporter) -> Iterator[None]:
    """Where the plan keeps going, put down what fails instead of raising it."""
    try:
        yield
    except TraitlineError as failure:
        if not taking.plan.keep_going:
            raise
        taking.failures.append(f"{stem}: {failure}")
        listener.note(f"{stem}: {failure}")


def _take_set(taking: MonitoringSession, each: SetPlan, listener: ProgressReporter) -> None:
    load_model(taking, listener)
    prompts = prompts_of(taking, each)  # every prompt is checked before the first is answered
    _check_once(taking, prompts, listener)
    with each.folder.lock():
        each.folder.open(each.config)
        taking.fresh.add(each.stem)
        pending = pending_of(taking.plan, each)
        listener.begin(f"{each.stem}, tier {taking.plan.tier}", len(prompts), len(prompts) - sum(map(len, pending)))
        try:
            for shard in pending:
                _take_shard(taking, each, [prompts[i] for i in shard], listener)
        finally:
            listener.end()


def shards_of(plan: MonitoringPlan, each: SetPlan) -> list[range]:
    """The prompts of a set, by number, in fixed shards."""
    count, size = len(each.found.prompts), plan.settings.shard_size
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def prompts_of(taking: MonitoringSession, each: SetPlan) -> list[Prompt]:
    """A set's prompts as the model sees them. Raises PromptError for one that it can't take."""
    plan, lm = taking.plan, taking.lm
    assert lm.tokenizer is not None
    return [
        encode_example(
            lm.tokenizer,
            Example(prompt_id(i), each.stem, "pos", 0, i, 0, asked.prompt, asked.system or plan.system),
            instruction_as=plan.settings.instruction_as,
            raw=plan.spec.raw,
            max_tokens=lm.max_positions,
            max_new_tokens=plan.settings.generation.max_new_tokens,
        )
        for i, asked in enumerate(each.found.prompts)
    ]


def _check_once(taking: MonitoringSession, prompts: Sequence[Prompt], listener: ProgressReporter) -> None:
    """Before the first shard of a process: a few prompts, in a batch and alone, must agree."""
    from extraction.pipeline.self_check import self_check

    if taking.plan.self_check and not taking.checked:
        checked = prompts[: taking.plan.self_check]
        deviation = self_check(taking.lm, checked, taking.plan.layers)
        listener.note(f"self-check: {len(checked)} prompts alone and in a batch agree within {deviation:.0e}")
    taking.checked = True


def _take_shard(
    taking: MonitoringSession, each: SetPlan, prompts: Sequence[Prompt], listener: ProgressReporter
) -> None:
    """One shard from a clean state; each prompt's file is written when its response ends."""
    from extraction.engine.generate import generate
    from extraction.engine.requests import Request
    from extraction.engine.sampler import Sample

    plan, lm = taking.plan, taking.lm
    settings = plan.settings.generation
    by_id = {f"{each.stem}/{prompt.example.id}": prompt for prompt in prompts}  # sets draw other random numbers
    done: list[int] = []

    def run(batch_size: int) -> None:
        """All prompts, from a clean state."""
        done.clear()
        for completion in generate(
            lm,
            [Request(id, p.token_ids, settings.max_new_tokens, plan.settings.seed) for id, p in by_id.items()],
            batch_size=batch_size,
            strategy=Sample.of(settings),
            capture=taking.recording,
            stop_strings=settings.stop_strings,
            on_progress=lambda n_tokens: listener.advance(0, n_tokens),
        ):
            _write(taking, each, by_id[completion.id], completion, batch_size)
            done.append(len(completion.token_ids))
            listener.advance(1, 0)

    started = time.perf_counter()
    asked = taking.slots(plan.settings, [len(prompt.token_ids) for prompt in prompts])
    batch_size = retry_with_smaller_batch(run, asked, taking, listener, lambda: listener.advance(-len(done), 0))
    taking.seconds += time.perf_counter() - started
    taking.n_made += len(done)
    taking.n_tokens += sum(done)
    taking.batch_sizes.append(batch_size)


# --- files ----------------------------------------------------------------------------------------------------------


def _write(taking: MonitoringSession, each: SetPlan, prompt: Prompt, completion: Completion, batch_size: int) -> None:
    id = prompt.example.id
    if each.folder.prompt_done(id):  # of a shard that was interrupted: the same
        return
    tensors = tensors_of(taking.plan, completion.activations)
    header = header_of(taking, prompt, completion, tensors)
    meta = {"batch_size": batch_size, "device": taking.lm.device.type}
    each.folder.write_prompt(id, {name: tensor for name, (tensor, _) in tensors.items()}, header, meta)


def tensors_of(plan: MonitoringPlan, found: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    """What goes into a prompt's file: tensors by name, each with what its axes are."""
    tensors = {name: (tensor, axes_of(plan.tier, name, tensor.ndim)) for name, tensor in found.items()}
    if plan.vectors:
        projections_TLPK = tensors.pop("projections")[0] if plan.tier == 2 else _projected(plan, found)
        for k, vector in enumerate(plan.vectors):
            tensors[f"projections.{vector.trait}"] = (projections_TLPK[..., k], ("token", "layer", "point"))
    return tensors


def _projected(plan: MonitoringPlan, found: Mapping[str, Tensor]) -> Tensor:
    """Tier 3 keeps the stream itself: projections [T, 1, 3, K] of it."""
    import torch

    stream_T1PD = torch.stack([found[name] for name in STREAM], dim=1).unsqueeze(1)
    return stream_T1PD @ plan.unit_LDK[0]


def axes_of(tier: int, name: str, n_axes: int) -> tuple[str, ...]:
    """What a tensor's axes are; a mixture's neurons are those of the experts that were chosen."""
    if name == "attention":
        return ("token", "layer" if tier == 2 else "head", "column")
    if name in HEADS:
        return ("token", HEADS[name], "channel")
    if name in STREAM or name == "mlp_down":
        return ("token", "hidden")
    return ("token", *(("expert", "neuron") if n_axes == 3 else ("expert" if name.startswith("expert") else "neuron",)))


HEADS = {"q": "head", "rot_q": "head", **dict.fromkeys(("k", "v", "rot_k"), "key_head")}


def header_of(
    taking: MonitoringSession,
    prompt: Prompt,
    completion: Completion,
    tensors: Mapping[str, tuple[Tensor, tuple[str, ...]]],
) -> dict[str, Any]:
    """What a prompt's file tells of itself."""
    plan, tokenizer = taking.plan, taking.lm.tokenizer
    assert tokenizer is not None
    token_ids = [*prompt.token_ids, *completion.token_ids]
    return {
        "id": prompt.example.id,
        "prompt": prompt.example.question,
        "system": prompt.example.system,
        "text": prompt.text,
        "response": tokenizer.decode(list(completion.token_ids), skip_special_tokens=True),
        "tokens": tokens_of(tokenizer, token_ids),
        "pieces": pieces_of(tokenizer, token_ids),
        "token_ids": token_ids,
        "n_prompt": len(prompt.token_ids),
        "finish_reason": completion.finish_reason,
        "tier": plan.tier,
        "model": plan.spec.name,
        "dtype": str(taking.lm.dtype).removeprefix("torch."),
        "layers": list(plan.layers),
        "points": list(POINTS),
        "traits": [vector.facts() for vector in plan.vectors],
        "tensors": {name: list(axes) for name, (_, axes) in tensors.items()},
        "conventions": {**CONVENTIONS, "attention": ATTENTION[plan.tier], **(INTERNALS if plan.tier == 3 else {})},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What made a file."""
    import torch
    import transformers

    from extraction import __version__

    return {"traitline": __version__, "torch": torch.__version__, "transformers": transformers.__version__}

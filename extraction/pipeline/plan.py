"""A job: every input of it read and checked, before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.config.experiments import (
    Experiment,
    ModelSpec,
    experiment_from_dict,
    experiment_to_dict,
    find_root,
    load_experiment,
    parse_layers,
    resolve_model,
)
from extraction.config.traits import (
    list_traits,
    load_trait,
    make_examples,
    parse_trait_list,
    trait_fingerprint,
    trait_notes,
)
from extraction.core.errors import ConfigError, StoreError
from extraction.core.records import Example, Prompt, Trait
from extraction.core.text import show_path
from extraction.judging.registry import check_judge, check_judge_access
from extraction.storage.trait_run import TraitRun, trait_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class GenerationMode:
    """One way of making responses: `serial` is one prompt at a time, `captures` reads activations in the same pass."""

    title: str
    serial: bool
    captures: bool


MODES = {
    "responses": GenerationMode("generating", serial=True, captures=False),
    "combined": GenerationMode("generating and capturing, one at a time", serial=True, captures=True),
    "batched": GenerationMode("generating and capturing", serial=False, captures=True),
}


@dataclass(frozen=True)
class Shard:
    """Examples of one trait that are committed together, and their number among the trait's shards."""

    trait: Trait
    index: int
    examples: tuple[Example, ...]


RunGroup = tuple[Shard, ...]  # what runs in one running batch, from a clean state


@dataclass(frozen=True)
class RunPlan:
    """Everything that is known before a model is loaded: checked, and the same on every start."""

    root: Path
    experiment: Experiment
    spec: ModelSpec
    traits: tuple[Trait, ...]
    notes: tuple[str, ...] = ()
    self_check: int = 2
    slice: tuple[int, int] = (0, 1)
    unqueued: frozenset[str] = frozenset()  # traits whose runs were begun before there were queues

    def folder(self, trait: Trait) -> TraitRun:
        """The run's folder of one trait."""
        return trait_run(self.root / "experiments", self.experiment.name, trait.name)

    def config(self, trait: Trait) -> dict[str, Any]:
        """What run.json pins: all that decides the bytes of the result."""
        fields = experiment_to_dict(replace(self.experiment, traits=()))
        if trait.name in self.unqueued:
            del fields["queue_size"]
        named = {"name": trait.name, "sha256": trait_fingerprint(trait)}
        return {**fields, "model": model_identity(self.spec), "trait": named}

    def shards(self, trait: Trait) -> list[tuple[Example, ...]]:
        """The trait's examples in fixed shards."""
        examples, size = make_examples(trait, self.experiment.n_examples), self.experiment.shard_size
        return [examples[i : i + size] for i in range(0, len(examples), size)]

    def queues(self, mode: GenerationMode) -> list[RunGroup]:
        """All shards, in order, cut into what runs together: as many as `queue_size` examples hold, at least one.

        Where a mode makes one example at a time nothing is gained by more than one; and a run that was begun before
        there were queues goes on as it began.
        """
        queues: list[list[Shard]] = []
        room = 0
        for shard in self._all_shards():
            alone = mode.serial or shard.trait.name in self.unqueued
            if alone or len(shard.examples) > room:
                queues.append([])
                room = 0 if alone else self.experiment.queue_size
            queues[-1].append(shard)
            room -= len(shard.examples)
        return [tuple(queue) for queue in queues]

    def _all_shards(self) -> Iterator[Shard]:
        return (Shard(trait, i, shard) for trait in self.traits for i, shard in enumerate(self.shards(trait)))

    def own_queues(self, mode: GenerationMode) -> list[RunGroup]:
        """The queues that this slice of the job makes.

        One at a time they go by the shard's number, so that stage 2, which works trait by trait, takes the same.
        """
        index, count = self.slice
        numbered = (
            (queue[0].index if mode.serial else number, queue) for number, queue in enumerate(self.queues(mode))
        )
        return [queue for number, queue in numbered if number % count == index]

    def own_shards(self, trait: Trait, mode: GenerationMode) -> dict[int, tuple[Example, ...]]:
        """The shards of a trait that this slice of the job makes, by number."""
        shards = (shard for queue in self.own_queues(mode) for shard in queue)
        return {shard.index: shard.examples for shard in shards if shard.trait.name == trait.name}

    @property
    def is_whole(self) -> bool:
        """True unless this is one slice of many."""
        return self.slice[1] == 1

    def prompts(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, max_tokens: int | None
    ) -> list[Prompt]:
        """Examples as the model sees them. Raises PromptError for one that it can't take."""
        from extraction.model.chat_template import encode_example

        settings = self.experiment
        return [
            encode_example(
                tokenizer,
                example,
                instruction_as=settings.instruction_as,
                raw=self.spec.raw,
                max_tokens=max_tokens,
                max_new_tokens=settings.generation.max_new_tokens,
            )
            for example in examples
        ]

    @cached_property
    def model_config(self) -> Any:
        """The model's text config, read without its weights."""
        from extraction.model.loading import read_config

        return read_config(self.spec)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers to capture. Raises ConfigError for one that the model lacks, before its weights are loaded."""
        return parse_layers(self.experiment.capture.layers, int(self.model_config.num_hidden_layers))


def shard_names(shards: Iterable[Shard]) -> list[str]:
    """The names of shards, those that follow one another as one: `calm/0-9`, `warm/3`."""
    spans: list[tuple[str, int, int]] = []
    for shard in shards:
        name, index = shard.trait.name, shard.index
        if spans and spans[-1][0] == name and spans[-1][2] == index - 1:
            spans[-1] = (name, spans[-1][1], index)
        else:
            spans.append((name, index, index))
    return [f"{name}/{first}" if first == last else f"{name}/{first}-{last}" for name, first, last in spans]


def model_identity(spec: ModelSpec) -> dict[str, Any]:
    """What run.json keeps of a model; of a folder's place, its last part."""
    found = {
        "name": spec.name,
        "source": Path(spec.source).name if spec.is_local else spec.source,
        **{key: getattr(spec, key) for key in ("revision", "dtype", "raw", "device")},
    }
    if spec.quantize is not None:  # left out otherwise: runs that were made before go on
        found["quantize"] = spec.quantize
    return found


MODEL_OPTIONS = ("dtype", "device", "revision", "raw", "trust_remote_code", "quantize")
PINNED_MODEL_OPTIONS = ("dtype", "revision", "raw", "quantize")


def make_plan(
    experiment: str,
    traits: str | None = None,
    *,
    root: str | None = None,
    options: Mapping[str, Any] | None = None,
    self_check: int = 2,
    slice_text: str = "1/1",
) -> RunPlan:
    """Read and check every input of a job. `options` are flat overrides of the experiment and of the model."""
    folder, (given, model_options) = find_root(root), _split(options)
    settings, notes = load_experiment(experiment, folder, given)
    names = parse_trait_list(traits) if traits is not None else settings.traits
    if not names:
        raise ConfigError(f"experiment {experiment!r} names no traits: give --trait NAME or --traits a,b")
    loaded = tuple(load_trait(name, folder) for name in names)
    said = tuple(note for trait in loaded for note in trait_notes(trait, settings.n_examples))
    for trait in loaded:
        check_judge(settings, trait, folder)
        check_judge_access(settings, folder)
    return RunPlan(
        root=folder,
        experiment=settings,
        spec=resolve_model(settings.model, folder, model_options),
        traits=loaded,
        notes=notes + said,
        self_check=self_check,
        slice=_parse_slice(slice_text),
        unqueued=_unqueued(folder, settings, loaded),
    )


def _unqueued(root: Path, settings: Experiment, traits: Iterable[Trait]) -> frozenset[str]:
    """Traits whose runs were begun before there were queues: what they do is that of a size of 1.

    Where another size is asked for, they are refused, as for any setting that is not theirs.
    """
    if settings.queue_size not in (1, Experiment.queue_size):
        return frozenset()
    stored = {
        trait.name: trait_run(root / "experiments", settings.name, trait.name).stored_config() for trait in traits
    }
    return frozenset(name for name, config in stored.items() if config is not None and "queue_size" not in config)


def _split(options: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options that were given: the experiment's, and the model's."""
    given = {key: value for key, value in (options or {}).items() if value is not None}
    return given, {key: given.pop(key) for key in MODEL_OPTIONS if key in given}


def _parse_slice(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    known = slash and all(part.isascii() and part.isdecimal() and len(part) < 7 for part in (index, count))
    if not (known and 1 <= int(index) <= int(count)):
        raise ConfigError(f"--slice {text!r}: write which of how many, such as 1/4")
    return int(index) - 1, int(count)


def stored_plans(
    experiment: str,
    traits: str | None = None,
    *,
    root: str | None = None,
    options: Mapping[str, Any] | None = None,
    slice_text: str = "1/1",
    loads_model: bool = False,
) -> Iterator[RunPlan]:
    """The jobs of runs that exist, one a trait: what is not given is as run.json has it, so it need not be repeated.

    Without traits, all that have a run. A job that `loads_model` must be able to find its folder again.
    """
    folder, part = find_root(root), _parse_slice(slice_text)
    names = parse_trait_list(traits) if traits is not None else _traits_with_runs(folder, experiment)
    if not names:
        path = show_path(folder / "experiments" / experiment)
        raise StoreError(f"{path}: no run has begun there; make the responses first (`traitline extract` does all)")
    loaded = [load_trait(name, folder) for name in names]
    jobs = [_stored_job(experiment, trait, folder, options, loads_model=loads_model) for trait in loaded]
    return (replace(job, slice=part) for job in jobs)


def _traits_with_runs(root: Path, experiment: str) -> tuple[str, ...]:
    runs = {name: trait_run(root / "experiments", experiment, name) for name in list_traits(root)}
    return tuple(name for name, run in runs.items() if run.stored_config() is not None)


def _stored_job(
    experiment: str, trait: Trait, root: Path, options: Mapping[str, Any] | None, *, loads_model: bool
) -> RunPlan:
    folder = trait_run(root / "experiments", experiment, trait.name)
    stored = folder.stored_config()
    if stored is None:
        raise StoreError(
            f"{show_path(folder.path)}: no run has begun there; make the responses first (`traitline extract` does all)"
        )
    given, model_options = _split(options)
    model = stored["model"]
    fields = {key: value for key, value in stored.items() if key != "trait"} | {"model": model["name"]}
    settings = experiment_from_dict(fields, show_path(folder.config_path), given)
    check_judge(settings, trait, root)
    model_options = {key: model.get(key) for key in PINNED_MODEL_OPTIONS} | model_options
    if not loads_model and "model" not in given:
        spec = ModelSpec(model["name"], model["source"], **{key: model.get(key) for key in PINNED_MODEL_OPTIONS})
    else:
        spec = resolve_model(_model_again(settings.model, root, given), root, model_options)
    unqueued = _unqueued(root, settings, (trait,))
    return RunPlan(root=root, experiment=settings, spec=spec, traits=(trait,), unqueued=unqueued)


def _model_again(name: str, root: Path, given: Mapping[str, Any]) -> str:
    """A model that was given as a folder can't be found by what run.json keeps of it, its last part."""
    try:
        resolve_model(name, root)
    except ConfigError:
        if "model" in given:
            raise
        raise ConfigError(f"--model: this run's model {name!r} was a folder; give its path again") from None
    return name

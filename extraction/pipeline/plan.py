"""The plan of a run: every input read and checked before a model is loaded, and the cut into shards and run groups.

A shard is the unit of commit, a run group the unit of generation: whole shards that share one running batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from extraction.config.experiments import (
    Experiment,
    ModelSpec,
    experiment_from_dict,
    experiment_to_dict,
    find_root,
    is_model_file,
    load_experiment,
    model_of_run,
    parse_layers,
    resolve_model,
)
from extraction.config.traits import (
    TraitSets,
    list_traits,
    load_trait_sets,
    make_examples,
    parse_trait_list,
    trait_fingerprint,
    trait_notes,
)
from extraction.core.errors import ConfigError, StoreError
from extraction.core.records import Example, Trait
from extraction.core.text import show_path
from extraction.judging.registry import JUDGES, check_judge, check_judge_access, resolve_judge
from extraction.storage.trait_run import TraitRun, trait_run


@dataclass(frozen=True)
class GenerationMode:
    """One way of making responses.

    `serial`: one prompt at a time; `captures`: activations are read in the same forward passes.
    """

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
    """Examples of one trait that are committed together, and their index among the trait's shards."""

    trait: Trait
    index: int
    examples: tuple[Example, ...]


RunGroup = tuple[Shard, ...]  # shards that run in one batch, which starts empty


@dataclass(frozen=True)
class RunPlan:
    """Every checked input of a run; equal for every process that starts with the same command.

    `slice` is (I, N): this process runs every N-th run group, from the I-th, counted from 0.
    """

    root: Path
    experiment: Experiment
    spec: ModelSpec
    traits: tuple[Trait, ...]
    notes: tuple[str, ...] = ()
    self_check: int = 2
    slice: tuple[int, int] = (0, 1)

    def folder(self, trait: Trait) -> TraitRun:
        """Return the run folder of one trait."""
        return trait_run(self.root / "experiments", self.experiment.name, trait.name)

    def config(self, trait: Trait) -> dict[str, Any]:
        """Return the fields of run.json: every setting that decides the bytes of the result.

        The path of a model that was given as a folder stands there too, so that it need not be given again.
        """
        fields = experiment_to_dict(self.experiment.with_(traits=()))
        named = {"name": trait.name, "sha256": trait_fingerprint(trait)}
        is_named = is_model_file(self.experiment.model, self.root)
        path = {"path": self.spec.source} if self.spec.is_local and not is_named else {}
        return {**fields, "model": {**model_identity(self.spec), **path}, "trait": named}

    def shards(self, trait: Trait) -> list[tuple[Example, ...]]:
        """Return the trait's examples, cut into shards."""
        examples, size = make_examples(trait, self.experiment.n_examples), self.experiment.shard_size
        return [examples[i : i + size] for i in range(0, len(examples), size)]

    def run_groups(self, mode: GenerationMode) -> list[RunGroup]:
        """Return all shards in order, cut into run groups of at most `queue_size` examples, or of one larger shard.

        In a serial mode every shard is a group of its own: sharing a batch would gain nothing.
        """
        groups: list[list[Shard]] = []
        room = 0
        for shard in self._all_shards():
            if mode.serial or len(shard.examples) > room:
                groups.append([])
                room = 0 if mode.serial else self.experiment.queue_size
            groups[-1].append(shard)
            room -= len(shard.examples)
        return [tuple(group) for group in groups]

    def _all_shards(self) -> Iterator[Shard]:
        return (Shard(trait, i, shard) for trait in self.traits for i, shard in enumerate(self.shards(trait)))

    @property
    def is_whole(self) -> bool:
        """True unless the plan is one slice of several."""
        return self.slice[1] == 1

    @cached_property
    def model_config(self) -> Any:
        """The config of the text model, read without the weights."""
        from extraction.model.loading import read_config

        return read_config(self.spec)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers to capture. Raises ConfigError for a layer that the model does not have."""
        return parse_layers(self.experiment.capture.layers, int(self.model_config.num_hidden_layers))


def shard_names(shards: Iterable[Shard]) -> list[str]:
    """Return the names of shards, consecutive ones as a range: `calm/0-9`, `warm/3`."""
    spans: list[tuple[str, int, int]] = []
    for shard in shards:
        name, index = shard.trait.name, shard.index
        if spans and spans[-1][0] == name and spans[-1][2] == index - 1:
            spans[-1] = (name, spans[-1][1], index)
        else:
            spans.append((name, index, index))
    return [f"{name}/{first}" if first == last else f"{name}/{first}-{last}" for name, first, last in spans]


def model_identity(spec: ModelSpec) -> dict[str, Any]:
    """Return the fields of run.json that identify a model; a local folder by the last part of its path."""
    found = {
        "name": spec.name,
        "source": Path(spec.source).name if spec.is_local else spec.source,
        **{key: getattr(spec, key) for key in ("revision", "dtype", "raw", "device")},
    }
    if spec.quantize is not None:
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
    """Read and check every input of a run. `options` are flat overrides of the experiment's and the model's settings.

    `slice_text` is `I/N`, counted from 1. Raises ConfigError or TraitError, with the file and line where there is one.
    """
    folder, (given, model_options) = find_root(root), _split(options)
    settings, notes = load_experiment(experiment, folder, given, judges=("auto", *JUDGES))
    names = parse_trait_list(traits) if traits is not None else settings.traits
    if not names:
        raise ConfigError(f"experiment {experiment!r} names no traits: give --trait NAME or --traits a,b")
    spec = resolve_model(settings.model, folder, model_options)
    files = tuple(load_trait_sets(name, folder) for name in names)
    loaded = tuple(sets.resolve(spec.family, settings.questions) for sets in files)
    unequal = tuple(note for trait in loaded for note in trait_notes(trait, settings.n_examples))
    for sets, trait in zip(files, loaded, strict=True):
        _check_judge(settings, sets, trait, spec.family, folder)
        check_judge_access(settings, folder)
    return RunPlan(
        root=folder,
        experiment=settings,
        spec=spec,
        traits=loaded,
        notes=notes + unequal + _unjudged_note(settings, loaded),
        self_check=self_check,
        slice=_parse_slice(slice_text),
    )


def _unjudged_note(settings: Experiment, traits: Sequence[Trait]) -> tuple[str, ...]:
    """Return a note if `auto` finds no judge for some traits."""
    names = [trait.name for trait in traits if resolve_judge(settings.judge, trait) == "none"]
    if settings.judge != "auto" or not names:
        return ()
    which = "responses are" if len(names) == len(traits) else f"responses of {', '.join(names)} are"
    return (
        f"{which} not judged but kept as told, so no verdict is better than weak: give --judge local or openai with a "
        "--judge-model, or --judge likelihood",
    )


def _check_judge(settings: Experiment, sets: TraitSets, trait: Trait, family: str | None, root: Path) -> None:
    if settings.judge == "lexical":
        sets.check_lexical(settings.model, family)
    check_judge(settings, trait, root)


def _split(options: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that are not None, split into the experiment's and the model's."""
    given = {key: value for key, value in (options or {}).items() if value is not None}
    return given, {key: given.pop(key) for key in MODEL_OPTIONS if key in given}


def _parse_slice(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    known = slash and all(part.isascii() and part.isdecimal() and len(part) < 7 for part in (index, count))
    if not (known and 1 <= int(index) <= int(count)):
        raise ConfigError(f"--slice {text!r}: not a slice; write the number of this one and of all, such as 1/4")
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
    """Yield the plans of existing runs, one a trait (`traits` None: all with a run), with the settings of run.json.

    `options` override them. With `loads_model` the model must be found again. Raises StoreError where no run has begun.
    """
    folder, part = find_root(root), _parse_slice(slice_text)
    names = parse_trait_list(traits) if traits is not None else _traits_with_runs(folder, experiment)
    if not names:
        path = show_path(folder / "experiments" / experiment)
        raise StoreError(f"{path}: no run has begun there; make the responses first (`traitline extract` does all)")
    loaded = [load_trait_sets(name, folder) for name in names]
    plans = [_stored_plan(experiment, sets, folder, options, loads_model=loads_model) for sets in loaded]
    return (replace(plan, slice=part) for plan in plans)


def _traits_with_runs(root: Path, experiment: str) -> tuple[str, ...]:
    runs = {name: trait_run(root / "experiments", experiment, name) for name in list_traits(root)}
    return tuple(name for name, run in runs.items() if run.stored_config() is not None)


def _stored_plan(
    experiment: str, sets: TraitSets, root: Path, options: Mapping[str, Any] | None, *, loads_model: bool
) -> RunPlan:
    folder = trait_run(root / "experiments", experiment, sets.file.name)
    stored = folder.stored_config()
    if stored is None:
        raise StoreError(
            f"{show_path(folder.path)}: no run has begun there; make the responses first (`traitline extract` does all)"
        )
    given, model_options = _split(options)
    model = stored["model"]
    fields = {key: value for key, value in stored.items() if key != "trait"} | {"model": model["name"]}
    settings = experiment_from_dict(fields, show_path(folder.config_path), given)
    family = _family_of_run(sets, stored, root)
    trait = sets.resolve(family, settings.questions)
    _check_judge(settings, sets, trait, family, root)
    model_options = {key: model.get(key) for key in PINNED_MODEL_OPTIONS} | model_options
    if not loads_model and "model" not in given:
        spec = ModelSpec(model["name"], model["source"], **{key: model.get(key) for key in PINNED_MODEL_OPTIONS})
    else:
        spec = resolve_model(given.get("model") or model_of_run(model, root), root, model_options)
    return RunPlan(root=root, experiment=settings, spec=spec, traits=(trait,))


def _family_of_run(sets: TraitSets, stored: Mapping[str, Any], root: Path) -> str | None:
    """Return the family for which the trait is that of run.json; if the trait has changed, that of the model's file.

    A folder may have the name of a model's file, and runs older than families used one set of questions for all models.
    """
    try:
        own = resolve_model(stored["model"]["name"], root).family
    except ConfigError:
        own = None
    for family in (own, None, *sets.families):
        trait = sets.resolve(family, stored.get("questions", "auto"))
        if trait_fingerprint(trait) == stored["trait"]["sha256"]:
            return family
    return own

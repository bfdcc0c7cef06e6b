"""What is to be read, of which prompts, along which vectors: every input checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extraction.config.experiments import (
    Experiment,
    ModelSpec,
    experiment_to_dict,
    find_root,
    load_experiment,
    parse_layers,
    resolve_model,
)
from extraction.config.prompt_files import PromptEntry, PromptSet, read_prompt_set
from extraction.config.settings import SAMPLING
from extraction.config.traits import parse_trait_list
from extraction.core.errors import ConfigError, StoreError, TraitlineError
from extraction.core.text import show, show_path
from extraction.pipeline.plan import MODEL_OPTIONS, RunPlan, model_identity, stored_plans
from extraction.storage.atomic import digest, read_receipt
from extraction.storage.token_captures import CaptureSet, capture_set, set_name
from extraction.storage.trait_run import TraitRun, trait_run

if TYPE_CHECKING:
    from torch import Tensor

    from extraction.vectors.direction import Direction

INLINE = "prompts"  # what the set of prompts that were given on the command line is called


@dataclass(frozen=True)
class Vector:
    """A trait's direction, and the run that it comes from (`job` None: it was imported)."""

    trait: str
    method: str
    direction: Direction
    folder: TraitRun
    sha256: str
    job: RunPlan | None

    @property
    def description(self) -> str:
        """What the trait's positive side is."""
        return self.job.traits[0].description if self.job else "imported"

    def facts(self) -> dict[str, Any]:
        """What a reading is pinned to."""
        return {"trait": self.trait, "method": self.method, "sha256": self.sha256}


@dataclass(frozen=True)
class SetPlan:
    """One capture set: a prompt file (or the prompts of the command line) under one config."""

    stem: str
    found: PromptSet
    folder: CaptureSet
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Extras:
    """What to write besides the files themselves."""

    json: bool = False
    png: bool = False


@dataclass(frozen=True)
class MonitoringPlan:
    """Everything that is known before a model is loaded. `failures`: what can't be done, where the rest goes on."""

    tier: int
    root: Path
    settings: Experiment
    spec: ModelSpec
    vectors: tuple[Vector, ...]
    layers: tuple[int, ...]
    sets: tuple[SetPlan, ...]
    system: str | None = None
    attention: bool = True
    extras: Extras = Extras()
    self_check: int = 2
    keep_going: bool = False
    notes: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()

    @cached_property
    def unit_LDK(self) -> Tensor:
        """The vectors' unit directions at the layers read. ConfigError for a vector that is zero there."""
        import torch

        return torch.stack([_unit(vector, self.layers) for vector in self.vectors], dim=-1)


def plan_of(tier: int, given: Mapping[str, Any]) -> MonitoringPlan:
    """The plan that a command's options make. Raises TraitlineError for what can't be; no weights are loaded.

    With `keep_going`, a trait or a prompt file that can't be read becomes a failure of the plan, and the rest goes on.
    """
    root = find_root(given["root"])
    options = {name: given[name] for name in OPTIONS if given.get(name) is not None}
    attempt = _Attempts(given["keep_going"])
    vectors = _vectors(root, given, options, attempt)
    if tier == 2 and not vectors:
        raise ConfigError("; ".join(attempt.failures) or "no trait: give --trait NAME or --traits a,b")
    settings, spec, notes = _settings(root, given, options, vectors)
    found = _prompts(given, attempt)
    layers = _layers(tier, given, spec, vectors)
    plan = MonitoringPlan(
        tier=tier,
        root=root,
        settings=settings,
        spec=spec,
        vectors=vectors,
        layers=layers,
        sets=(),
        system=_system(given["system"]),
        attention=not given.get("no_attention"),
        extras=Extras(given["save_json"], given["png"]),
        self_check=given["self_check"],
        keep_going=given["keep_going"],
        notes=(*notes, *(note for each in found.values() for note in each.notes)),
        failures=tuple(attempt.failures),
    )
    return replace(plan, sets=tuple(_set(plan, stem, each) for stem, each in found.items()))


OPTIONS = (
    *("model", "max_new_tokens", *SAMPLING, "seed", "batch_size", "shard_size"),
    *MODEL_OPTIONS,
)


class _Attempts:
    """Things that are tried one by one; where the rest goes on, what fails is put down."""

    def __init__(self, keep_going: bool) -> None:
        self.keep_going, self.failures = keep_going, list[str]()

    def __call__(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except TraitlineError as failure:
            if not self.keep_going:
                raise
            self.failures.append(str(failure))
        return None


# --- vectors --------------------------------------------------------------------------------------------------------


def _vectors(
    root: Path, given: Mapping[str, Any], options: Mapping[str, Any], attempt: _Attempts
) -> tuple[Vector, ...]:
    names = parse_trait_list(given["traits"]) if given["traits"] is not None else ()
    tried = [attempt(partial(_vector, root, given, options, name)) for name in names]
    return tuple(vector for vector in tried if vector is not None)


def _vector(root: Path, given: Mapping[str, Any], options: Mapping[str, Any], name: str) -> Vector:
    from extraction.vectors.direction import Direction

    folder = trait_run(root / "experiments", given["experiment"], name)
    stored = folder.stored_config()
    if stored is None:
        raise StoreError(f"{show_path(folder.path)}: no run has begun there; make vectors first (`traitline extract`)")
    job = None
    if "imported" not in stored:
        (job,) = stored_plans(given["experiment"], name, root=str(root), options=options, loads_model=True)
    method = given["method"] or _chosen(folder)
    direction = Direction.from_run(folder, method)
    return Vector(name, method, direction, folder, str(read_receipt(folder.vectors_path(method))["sha256"]), job)


def _chosen(folder: TraitRun) -> str:
    """The method that the run's card chose; without a card mean_diff, or what there is."""
    if folder.has_card():
        return str(folder.read_card()["chosen"]["method"])
    known = folder.methods()
    return "mean_diff" if "mean_diff" in known or not known else known[0]


def shown_layer(vector: Vector, layers: Sequence[int]) -> int:
    """The layer to look at first: the one that the card chose, else the middle one."""
    card = vector.folder.read_card() if vector.folder.has_card() else {}
    chosen = card.get("chosen", {}).get("layer")
    return int(chosen) if chosen in layers else layers[len(layers) // 2]


def _unit(vector: Vector, layers: tuple[int, ...]) -> Tensor:
    direction = vector.direction.select(layers)
    zero = [layer for layer, norm in zip(layers, direction.norms_L.tolist(), strict=True) if norm == 0]
    if zero:
        raise ConfigError(
            f"{vector.trait}: its {vector.method} vector is zero at layer {zero[0]}, so nothing can be read along it; "
            "give --layers without it, or another --method"
        )
    return (direction.direction_LD.double() / direction.norms_L[:, None]).float()


# --- settings -------------------------------------------------------------------------------------------------------


def _settings(
    root: Path, given: Mapping[str, Any], options: Mapping[str, Any], vectors: tuple[Vector, ...]
) -> tuple[Experiment, ModelSpec, tuple[str, ...]]:
    """As the runs of the vectors have it, which must be of one model; else as the experiment's file says."""
    jobs = [vector.job for vector in vectors if vector.job is not None]
    if not jobs:
        own = {key: value for key, value in options.items() if key not in MODEL_OPTIONS}
        settings, notes = load_experiment(given["experiment"], root, own)
        model_options = {key: value for key, value in options.items() if key in MODEL_OPTIONS}
        return settings, resolve_model(settings.model, root, model_options), notes
    different = [job for job in jobs if job.spec != jobs[0].spec]
    if different:
        one, other = jobs[0], different[0]
        raise ConfigError(
            f"traits {one.traits[0].name!r} and {other.traits[0].name!r} have vectors of different models or types, "
            f"{one.spec.name} and {other.spec.name}; read them one at a time, or give --model"
        )
    notes = tuple(
        f"{vector.trait}: the vector is of {vector.direction.model}, read in {jobs[0].spec.name}"
        for vector in vectors
        if vector.direction.model not in (None, jobs[0].spec.name)
    )
    return jobs[0].experiment, jobs[0].spec, notes


def _layers(tier: int, given: Mapping[str, Any], spec: ModelSpec, vectors: tuple[Vector, ...]) -> tuple[int, ...]:
    """The layers asked for, of those that all vectors have. ConfigError or VectorError for one that is absent."""
    from extraction.model.loading import read_config

    config = read_config(spec)
    n_layers = int(config.num_hidden_layers)
    for vector in vectors:
        vector.direction.check_fits(n_layers, int(config.hidden_size), spec.name)
    known = [layer for layer in range(n_layers) if all(layer in vector.direction.layers for vector in vectors)]
    if not known:
        raise ConfigError("the traits' vectors have no layer in common; read them one at a time")
    if tier == 3:
        asked = given["layer"]
        if asked == "auto":
            return (shown_layer(vectors[0], known) if vectors else n_layers // 2,)
        layers = parse_layers(asked, n_layers, "--layer")
        if len(layers) != 1:
            raise ConfigError(f"--layer {asked!r}: one layer at a time; give a number, or auto")
    else:
        asked = given["layers"]
        layers = tuple(known) if asked in (None, "all") else parse_layers(asked, n_layers)
    for vector in vectors:
        vector.direction.select(layers)
    return layers


def _system(words: str | None) -> str | None:
    if words is not None and not words.strip():
        raise ConfigError("--system is empty; write some words, or leave it out")
    return words


# --- prompts --------------------------------------------------------------------------------------------------------


def _prompts(given: Mapping[str, Any], attempt: _Attempts) -> dict[str, PromptSet]:
    """Prompt sets by stem: files, and what stands on the command line itself."""
    if not given["prompts"] and not given["prompts_file"]:
        raise ConfigError('no prompts: give --prompts "..." or --prompts-file FILE')
    found: dict[str, PromptSet] = {}
    if given["prompts"]:
        found[INLINE] = PromptSet("--prompts", tuple(PromptEntry(_words(words)) for words in given["prompts"]))
    for path in given["prompts_file"]:
        read = attempt(partial(read_prompt_set, path))
        if read is None:
            continue
        stem = Path(path).stem
        if stem in found:
            raise ConfigError(f"--prompts-file {show_path(path)}: another one is called {stem!r} too; rename one")
        found[stem] = read
    return found


def _words(words: str) -> str:
    if not words.strip():
        raise ConfigError(f"--prompts {show(words)}: no prompt; write some words")
    return words


# --- sets -----------------------------------------------------------------------------------------------------------


def _set(plan: MonitoringPlan, stem: str, found: PromptSet) -> SetPlan:
    config = _config(plan, stem, found)
    name = set_name(plan.tier, stem, config)
    return SetPlan(stem, found, capture_set(plan.root / "experiments", plan.settings.name, name), config)


def _config(plan: MonitoringPlan, stem: str, found: PromptSet) -> dict[str, Any]:
    """What run.json pins: all that decides the bytes of the result."""
    settings = experiment_to_dict(plan.settings)
    prompts = [[asked.prompt, asked.system] for asked in found.prompts]
    return {
        "tier": plan.tier,
        "model": model_identity(plan.spec),
        "vectors": [vector.facts() for vector in plan.vectors],
        "layers": list(plan.layers),
        "attention": plan.attention,
        "prompts": {"name": stem, "count": len(prompts), "sha256": digest(prompts)},
        "system": plan.system,
        **{key: settings[key] for key in ("generation", "seed", "instruction_as", "shard_size", "batch_size")},
    }

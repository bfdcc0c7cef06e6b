"""Plan a capture: vectors, layers, prompt sets and settings, all checked before a model is loaded.

Shapes: L layers read, D hidden, K traits.
"""

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
from extraction.config.settings import ADDED, SAMPLING
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

INLINE = "prompts"  # stem of the set of prompts from the command line


@dataclass(frozen=True)
class Vector:
    """A trait's vector and the run that it is from. `run_plan` is None for an imported vector."""

    trait: str
    method: str
    direction: Direction
    folder: TraitRun
    sha256: str
    run_plan: RunPlan | None

    @property
    def description(self) -> str:
        """Description of the trait."""
        return self.run_plan.traits[0].description if self.run_plan else "imported"

    def identity(self) -> dict[str, Any]:
        """Return what identifies the vector in a capture set's config."""
        return {"trait": self.trait, "method": self.method, "sha256": self.sha256}


@dataclass(frozen=True)
class SetPlan:
    """One capture set: a prompt file (or the prompts of the command line) under one config.

    `stem` is the file's name without its ending.
    """

    stem: str
    prompt_set: PromptSet
    folder: CaptureSet
    config: Mapping[str, Any]


@dataclass(frozen=True)
class ExtraOutputs:
    """The optional outputs: plain JSON, pictures."""

    json: bool = False
    png: bool = False


@dataclass(frozen=True)
class MonitoringPlan:
    """Everything that is known before a model is loaded.

    Attributes:
        system: System prompt for the prompts that have none.
        self_check: Number of prompts to check alone against in a batch before the first shard; 0 for none.
        failures: One line for each input that failed, with `keep_going`.
    """

    tier: int
    root: Path
    settings: Experiment
    spec: ModelSpec
    vectors: tuple[Vector, ...]
    layers: tuple[int, ...]
    sets: tuple[SetPlan, ...]
    system: str | None = None
    attention: bool = True
    extras: ExtraOutputs = ExtraOutputs()
    self_check: int = 2
    keep_going: bool = False
    notes: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()

    @cached_property
    def unit_LDK(self) -> Tensor:
        """Unit directions [L, D, K] of the vectors. Raises ConfigError for a vector that is zero at a layer."""
        import torch

        return torch.stack([_unit_direction(vector, self.layers) for vector in self.vectors], dim=-1)


def build_plan(tier: int, options: Mapping[str, Any]) -> MonitoringPlan:
    """Build the plan from a command's options, without loading weights.

    Args:
        tier: 2 for projections, 3 for one layer's internals.
        options: The command's options by parameter name.

    Raises:
        TraitlineError: An option or an input is wrong. With `keep_going`, a trait or a prompt file that can't be read
            becomes a failure of the plan instead.
    """
    root = find_root(options["root"])
    overrides = {name: options[name] for name in SETTINGS if options.get(name) is not None}
    attempts = _Attempts(options["keep_going"])
    vectors = _load_vectors(root, options, overrides, attempts)
    if tier == 2 and not vectors:
        raise ConfigError("; ".join(attempts.failures) or "no trait: give --trait NAME or --traits a,b")
    settings, spec, notes = _resolve_settings(root, options, overrides, vectors)
    prompt_sets = _read_prompt_sets(options, attempts)
    layers = _resolve_layers(tier, options, spec, vectors)
    plan = MonitoringPlan(
        tier=tier,
        root=root,
        settings=settings,
        spec=spec,
        vectors=vectors,
        layers=layers,
        sets=(),
        system=_checked_system(options["system"]),
        attention=not options.get("no_attention"),
        extras=ExtraOutputs(options["save_json"], options["png"]),
        self_check=options["self_check"],
        keep_going=options["keep_going"],
        notes=(*notes, *(note for prompt_set in prompt_sets.values() for note in prompt_set.notes)),
        failures=tuple(attempts.failures),
    )
    return replace(plan, sets=tuple(_plan_set(plan, stem, prompt_set) for stem, prompt_set in prompt_sets.items()))


SETTINGS = (  # options that override the settings of a vector's run, or of the experiment
    *("model", "max_new_tokens", *SAMPLING, "seed", "batch_size", "shard_size"),
    *MODEL_OPTIONS,
)


class _Attempts:
    """Calls that are tried one by one. With `keep_going`, a TraitlineError is recorded and the result is None."""

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


def _load_vectors(
    root: Path, options: Mapping[str, Any], overrides: Mapping[str, Any], attempts: _Attempts
) -> tuple[Vector, ...]:
    names = parse_trait_list(options["traits"]) if options["traits"] is not None else ()
    vectors = [attempts(partial(_load_vector, root, options, overrides, name)) for name in names]
    return tuple(vector for vector in vectors if vector is not None)


def _load_vector(root: Path, options: Mapping[str, Any], overrides: Mapping[str, Any], name: str) -> Vector:
    from extraction.vectors.direction import Direction

    folder = trait_run(root / "experiments", options["experiment"], name)
    stored = folder.stored_config()
    if stored is None:
        raise StoreError(f"{show_path(folder.path)}: no run has begun there; make vectors first (`traitline extract`)")
    run_plan = None
    if "imported" not in stored:
        (run_plan,) = stored_plans(options["experiment"], name, root=str(root), options=overrides, loads_model=True)
    method = options["method"] or _default_method(folder)
    direction = Direction.from_run(folder, method)
    return Vector(name, method, direction, folder, str(read_receipt(folder.vectors_path(method))["sha256"]), run_plan)


def _default_method(folder: TraitRun) -> str:
    """Return the method that the run's card chose; without a card mean_diff, or the first method there is."""
    if folder.has_card():
        return str(folder.read_card()["chosen"]["method"])
    known = folder.methods()
    return "mean_diff" if "mean_diff" in known or not known else known[0]


def first_layer(vector: Vector, layers: Sequence[int]) -> int:
    """Return the layer that is shown first: the one that the card chose, else the middle one."""
    card = vector.folder.read_card() if vector.folder.has_card() else {}
    chosen = card.get("chosen", {}).get("layer")
    return int(chosen) if chosen in layers else layers[len(layers) // 2]


def _unit_direction(vector: Vector, layers: tuple[int, ...]) -> Tensor:
    direction = vector.direction.select(layers)
    zero_layers = [layer for layer, norm in zip(layers, direction.norms_L.tolist(), strict=True) if norm == 0]
    if zero_layers:
        raise ConfigError(
            f"{vector.trait}: its {vector.method} vector is zero at layer {zero_layers[0]}; "
            "give --layers without it, or another --method"
        )
    return (direction.direction_LD.double() / direction.norms_L[:, None]).float()


# --- settings -------------------------------------------------------------------------------------------------------


def _resolve_settings(
    root: Path, options: Mapping[str, Any], overrides: Mapping[str, Any], vectors: tuple[Vector, ...]
) -> tuple[Experiment, ModelSpec, tuple[str, ...]]:
    """Return settings, model and notes of the vectors' runs, which share one model; else of the experiment."""
    run_plans = [vector.run_plan for vector in vectors if vector.run_plan is not None]
    if not run_plans:
        experiment_options = {key: value for key, value in overrides.items() if key not in MODEL_OPTIONS}
        settings, notes = load_experiment(options["experiment"], root, experiment_options)
        model_options = {key: value for key, value in overrides.items() if key in MODEL_OPTIONS}
        return settings, resolve_model(settings.model, root, model_options), notes
    different = [run_plan for run_plan in run_plans if run_plan.spec != run_plans[0].spec]
    if different:
        one, other = run_plans[0], different[0]
        raise ConfigError(
            f"traits {one.traits[0].name!r} and {other.traits[0].name!r} have vectors of different models or types, "
            f"{one.spec.name} and {other.spec.name}; read them one at a time, or give --model"
        )
    notes = tuple(
        f"{vector.trait}: the vector is of {vector.direction.model}, read in {run_plans[0].spec.name}"
        for vector in vectors
        if vector.direction.model not in (None, run_plans[0].spec.name)
    )
    return run_plans[0].experiment, run_plans[0].spec, notes


def _resolve_layers(
    tier: int, options: Mapping[str, Any], spec: ModelSpec, vectors: tuple[Vector, ...]
) -> tuple[int, ...]:
    """Return the layers to read. ConfigError or VectorError for a layer that the model or a vector lacks."""
    from extraction.model.loading import read_config

    config = read_config(spec)
    n_layers = int(config.num_hidden_layers)
    for vector in vectors:
        vector.direction.check_fits(n_layers, int(config.hidden_size), spec.name)
    common = [layer for layer in range(n_layers) if all(layer in vector.direction.layers for vector in vectors)]
    if not common:
        raise ConfigError("the traits' vectors have no layer in common; read them one at a time")
    if tier == 3:
        text = options["layer"]
        if text == "auto":
            return (first_layer(vectors[0], common) if vectors else n_layers // 2,)
        layers = parse_layers(text, n_layers, "--layer")
        if len(layers) != 1:
            raise ConfigError(f"--layer {text!r}: one layer at a time; give a number, or auto")
    else:
        text = options["layers"]
        layers = tuple(common) if text in (None, "all") else parse_layers(text, n_layers)
    for vector in vectors:
        vector.direction.select(layers)
    return layers


def _checked_system(text: str | None) -> str | None:
    if text is not None and not text.strip():
        raise ConfigError("--system is empty; give a text, or leave the option out")
    return text


# --- prompts --------------------------------------------------------------------------------------------------------


def _read_prompt_sets(options: Mapping[str, Any], attempts: _Attempts) -> dict[str, PromptSet]:
    """Return the prompt sets by stem: the command line's own prompts, and prompt files."""
    if not options["prompts"] and not options["prompts_file"]:
        raise ConfigError('no prompts: give --prompts "..." or --prompts-file FILE')
    prompt_sets: dict[str, PromptSet] = {}
    if options["prompts"]:
        prompt_sets[INLINE] = PromptSet(
            "--prompts", tuple(PromptEntry(_checked_prompt(text)) for text in options["prompts"])
        )
    for path in options["prompts_file"]:
        prompt_set = attempts(partial(read_prompt_set, path))
        if prompt_set is None:
            continue
        stem = Path(path).stem
        if stem in prompt_sets:
            raise ConfigError(f"--prompts-file {show_path(path)}: another one is called {stem!r} too; rename one")
        prompt_sets[stem] = prompt_set
    return prompt_sets


def _checked_prompt(text: str) -> str:
    if not text.strip():
        raise ConfigError(f"--prompts {show(text)}: an empty prompt; give a text")
    return text


# --- sets -----------------------------------------------------------------------------------------------------------


def _plan_set(plan: MonitoringPlan, stem: str, prompt_set: PromptSet) -> SetPlan:
    config = _set_config(plan, stem, prompt_set)
    name = set_name(plan.tier, stem, config)
    return SetPlan(stem, prompt_set, capture_set(plan.root / "experiments", plan.settings.name, name), config)


def _set_config(plan: MonitoringPlan, stem: str, prompt_set: PromptSet) -> dict[str, Any]:
    """Return the set's run.json: everything that decides the bytes of its captures."""
    settings = experiment_to_dict(plan.settings)
    prompts = [[entry.prompt, entry.system] for entry in prompt_set.prompts]
    return {
        "tier": plan.tier,
        "model": model_identity(plan.spec),
        "vectors": [vector.identity() for vector in plan.vectors],
        "layers": list(plan.layers),
        "attention": plan.attention,
        "prompts": {"name": stem, "count": len(prompts), "sha256": digest(prompts)},
        "system": plan.system,
        **{key: settings[key] for key in ("generation", "seed", "instruction_as", "shard_size", "batch_size")},
        **{key: settings[key] for key in ("literal", "thinking") if settings[key] != ADDED[key]},
    }

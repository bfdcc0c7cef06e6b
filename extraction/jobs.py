"""A job: every input of it read and checked, before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from extraction.configs import (
    Experiment,
    ModelSpec,
    experiment_to_dict,
    find_root,
    load_experiment,
    parse_layers,
    resolve_model,
)
from extraction.errors import ConfigError
from extraction.judges import resolve_judge
from extraction.records import Example, Trait
from extraction.store import RunFolder, run_folder
from extraction.traits import load_trait, make_examples, parse_trait_list, trait_fingerprint, trait_notes


@dataclass(frozen=True)
class Mode:
    """One way of making responses: `serial` is one prompt at a time, `captures` reads activations in the same pass."""

    title: str
    serial: bool
    captures: bool


MODES = {
    "responses": Mode("generating", serial=True, captures=False),
    "combined": Mode("generating and capturing, one at a time", serial=True, captures=True),
    "batched": Mode("generating and capturing", serial=False, captures=True),
}


@dataclass(frozen=True)
class Job:
    """Everything that is known before a model is loaded: checked, and the same on every start."""

    root: Path
    experiment: Experiment
    spec: ModelSpec
    traits: tuple[Trait, ...]
    notes: tuple[str, ...] = ()
    self_check: int = 2
    slice: tuple[int, int] = (0, 1)

    def folder(self, trait: Trait) -> RunFolder:
        """The run's folder of one trait."""
        return run_folder(self.root / "experiments", self.experiment.name, trait.name)

    def config(self, trait: Trait) -> dict[str, Any]:
        """What run.json pins: all that decides the bytes of the result."""
        fields = experiment_to_dict(replace(self.experiment, traits=()))
        model = {
            "name": self.spec.name,
            "source": Path(self.spec.source).name if self.spec.is_local else self.spec.source,
            "revision": self.spec.revision,
            "dtype": self.spec.dtype,
            "raw": self.spec.raw,
            "device": self.spec.device,
        }
        return {**fields, "model": model, "trait": {"name": trait.name, "sha256": trait_fingerprint(trait)}}

    def shards(self, trait: Trait) -> list[tuple[Example, ...]]:
        """The trait's examples in fixed shards."""
        examples, size = make_examples(trait, self.experiment.n_examples), self.experiment.shard_size
        return [examples[i : i + size] for i in range(0, len(examples), size)]

    @cached_property
    def model_config(self) -> Any:
        """The model's text config, read without its weights."""
        from extraction.models import read_config

        return read_config(self.spec)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers to capture. Raises ConfigError for one that the model lacks, before its weights are loaded."""
        return parse_layers(self.experiment.capture.layers, int(self.model_config.num_hidden_layers))


MODEL_OPTIONS = ("dtype", "device", "revision", "raw", "trust_remote_code")


def plan(
    experiment: str,
    traits: str | None = None,
    *,
    root: str | None = None,
    options: Mapping[str, Any] | None = None,
    self_check: int = 2,
    slice_text: str = "1/1",
) -> Job:
    """Read and check every input of a job. `options` are flat overrides of the experiment and of the model."""
    given = {key: value for key, value in (options or {}).items() if value is not None}
    folder = find_root(root)
    model_options = {key: given.pop(key) for key in MODEL_OPTIONS if key in given}
    settings, notes = load_experiment(experiment, folder, given)
    names = parse_trait_list(traits) if traits else settings.traits
    if not names:
        raise ConfigError(f"experiment {experiment!r} names no traits: give --trait NAME or --traits a,b")
    loaded = tuple(load_trait(name, folder) for name in names)
    said = tuple(note for trait in loaded for note in trait_notes(trait, settings.n_examples))
    for trait in loaded:
        resolve_judge(settings.judge, trait)
    return Job(
        root=folder,
        experiment=settings,
        spec=resolve_model(settings.model, folder, model_options),
        traits=loaded,
        notes=notes + said,
        self_check=self_check,
        slice=_parse_slice(slice_text),
    )


def _parse_slice(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ConfigError(f"--slice {text!r}: write which of how many, such as 1/4")
    return int(index) - 1, int(count)


def stored_plan(
    experiment: str, traits: str | None, *, root: str | None = None, options: Mapping[str, Any] | None = None
) -> Job:
    """The job of a run that exists: settings of stage 1 come from its run.json, so they need not be given again."""
    given = {key: value for key, value in (options or {}).items() if value is not None}
    job = plan(experiment, traits, root=root, options=given)
    stored = job.folder(job.traits[0]).stored_config()
    if stored is None:
        return job
    flat = {**stored["generation"], **stored["capture"]}
    flat |= {key: stored[key] for key in ("n_examples", "seed", "judge", "threshold", "shard_size", "instruction_as")}
    flat |= {key: stored["model"][key] for key in MODEL_OPTIONS if key in stored["model"]}
    return plan(experiment, traits, root=root, options={**flat, **given})

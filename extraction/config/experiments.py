"""Experiments and models: where their files are looked for, and how files and overrides become settings."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from extraction.config.settings import (
    EXPERIMENT_SETTINGS,
    MODEL_SETTINGS,
    CaptureSettings,
    Experiment,
    ExperimentSettings,
    GenerationSettings,
    ModelSpec,
    layer_ranges,
)
from extraction.config.validation import validate
from extraction.config.yaml_loader import SourceLocation, read_document
from extraction.core.errors import ConfigError
from extraction.core.names import check_name, is_safe_name
from extraction.core.text import one_line, show, show_path, suggest

__all__ = [
    "CaptureSettings",
    "Experiment",
    "GenerationSettings",
    "ModelSpec",
    "config_names",
    "experiment_from_dict",
    "experiment_to_dict",
    "find_config",
    "find_root",
    "load_experiment",
    "parse_layers",
    "resolve_model",
]

PACKAGE = Path(__file__).resolve().parent.parent
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


# --- names and places -----------------------------------------------------------------------------------------------


def find_root(explicit: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder whose configs are read and whose experiments are written.

    `--root` or TRAITLINE_ROOT; else the current folder if it has `configs/`; else the checkout that holds this
    package; else the current folder.
    """
    named = explicit or os.environ.get("TRAITLINE_ROOT")
    if named:
        folder = Path(named)
        if "\0" in str(named) or not folder.is_dir():
            raise ConfigError(
                f"--root {show(str(named))}: no such folder; create it, or leave --root and TRAITLINE_ROOT out"
            )
        return folder.resolve()
    here = Path.cwd()
    if not (here / "configs").is_dir() and (PACKAGE.parent / "configs").is_dir():
        return PACKAGE.parent
    return here


def config_folders(kind: str, root: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return the folders of a kind of config, nearest first: in the root, the checkout, the package."""
    bases = (Path(root) / "configs", PACKAGE.parent / "configs", PACKAGE / "_configs")
    found = {(base / kind).resolve(): base / kind for base in reversed(bases) if (base / kind).is_dir()}
    return tuple(reversed(found.values()))


def config_names(kind: str, root: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the names of all configs of a kind, sorted."""
    paths = (path for folder in config_folders(kind, root) for path in folder.glob("*.yaml"))
    return tuple(sorted({path.stem for path in paths if is_safe_name(path.stem)}))


def find_config(
    kind: str, name: str, root: str | os.PathLike[str], error: type[ConfigError] = ConfigError
) -> Path | None:
    """Return the file of a named config, or None. Raises for an unsafe name, and for a link out of the folder."""
    check_name(name, kind.removesuffix("s"), error)
    for folder in config_folders(kind, root):
        path = folder / f"{name}.yaml"
        if path.exists() or path.is_symlink():
            if not path.resolve().is_relative_to(folder.resolve()):
                raise error(f"{show_path(path)}: links to a place outside {show_path(folder)}; copy the file there")
            return path
    return None


# --- models ---------------------------------------------------------------------------------------------------------


def resolve_model(name: str, root: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """Return the model of a short name (configs/models), else a folder or GGUF file, else a hub id with a `/`.

    An override of None is no override.
    """
    options = {key: value for key, value in (overrides or {}).items() if value is not None}
    spec = _named_model(name, root) or _model_at(name)
    if spec is None:
        raise ConfigError(
            f"model {show(name)}: no such short name, folder, .gguf file or hub id (owner/name); "
            + suggest(name, config_names("models", root))
        )
    for key in options:
        if key not in MODEL_SETTINGS:
            raise ConfigError(f"{show(key)} is not an option of a model; {suggest(key, MODEL_SETTINGS)}")
    return validate(ModelSpec, {**asdict(spec), **options}, SourceLocation(None))


def _named_model(name: str, root: str | os.PathLike[str]) -> ModelSpec | None:
    if not is_model_file(name, root):
        return None
    path = find_config("models", name, root)
    assert path is not None
    document = read_document(path)
    place, data = document.place, document.data
    if not isinstance(data, Mapping):
        raise place.fail(f"{show(data)} is not a mapping; write 'key: value' lines")
    fields = dict(data)
    for key in fields:
        if key not in MODEL_FILE_KEYS:
            raise place.at(key).fail(f"{show(key)} is not a known key; {suggest(key, MODEL_FILE_KEYS)}")
    if ("path" in fields) == ("source" in fields):
        raise place.fail("give either 'source' (a hub id) or 'path' (a folder), one of them")
    key = "path" if "path" in fields else "source"
    source = fields.pop(key)
    spec = validate(ModelSpec, {**fields, "name": name, "source": source}, place)
    if spec.trust_remote_code:
        raise place.at("trust_remote_code").fail(
            "a file can't allow a model's own code to run; give --trust-remote-code"
        )
    if key == "path":
        return replace(spec, source=str(_model_folder(source, root)))
    if not _HUB_ID.fullmatch(source):
        raise place.at("source").fail(
            f"{show(source)} is not a hub id; write it as owner/name, or give a folder as 'path: {one_line(source)}'"
        )
    return spec


def is_model_file(name: str, root: str | os.PathLike[str]) -> bool:
    """Return True if a name is that of a file in configs/models."""
    return is_safe_name(name) and find_config("models", name, root) is not None


def model_of_run(stored: Mapping[str, Any], root: str | os.PathLike[str]) -> str:
    """Return what `resolve_model` takes for the model in run.json: the path of a folder, else its name.

    Raises ConfigError if the folder is not there any more, and for a run of an older version, which has no path.
    """
    name, path = str(stored["name"]), stored.get("path")
    if path is not None and Path(path).exists():
        return str(path)
    try:
        resolve_model(name, root)
    except ConfigError:
        where = "a local folder" if path is None else f"{show(str(path))}, which is not there"
        raise ConfigError(f"--model: the model {name!r} of this run was {where}; give its path again") from None
    return name


MODEL_FILE_KEYS = ("source", "path", *MODEL_SETTINGS)


def _model_folder(path: str, root: str | os.PathLike[str]) -> Path:
    """Return a relative path under the root if it is a folder there, else under the package (the bundled models)."""
    path = os.path.expanduser(path)
    own = Path(root) / path
    return own.resolve() if own.is_dir() else PACKAGE / path


def _model_at(name: str) -> ModelSpec | None:
    try:
        path = Path(name)
        if name and (path.is_dir() or (path.suffix == ".gguf" and path.is_file())):
            return ModelSpec(name=path.resolve().name.removesuffix(".gguf"), source=str(path.resolve()))
    except (OSError, ValueError):
        return None
    return ModelSpec(name=name, source=name) if len(name) <= 200 and _HUB_ID.fullmatch(name) else None


# --- layers ---------------------------------------------------------------------------------------------------------


def parse_layers(spec: str, n_layers: int, place: str = "--layers") -> tuple[int, ...]:
    """Return increasing layer numbers, counted from 0, of `all`, `16`, `10-20` (both ends) or `3,5,8-10`."""
    ranges = layer_ranges(spec, place)
    if ranges is None:
        return tuple(range(n_layers))
    for _, high in ranges:
        if high >= n_layers:
            raise ConfigError(f"{place} {show(spec)}: layer {high} is out of range; the last layer is {n_layers - 1}")
    layers = [layer for low, high in ranges for layer in range(low, high + 1)]
    twice = next((layer for i, layer in enumerate(layers) if layer in layers[:i]), None)
    if twice is not None:
        raise ConfigError(f"{place} {show(spec)}: layer {twice} stands there twice; name it once")
    return tuple(sorted(layers))


# --- experiments ----------------------------------------------------------------------------------------------------


def load_experiment(
    name: str,
    root: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    judges: Iterable[str] = (),
) -> tuple[Experiment, tuple[str, ...]]:
    """Return an experiment by name, and notes for the user where something was inferred.

    `judges`: the names that the file's `judge` may have (none given: any).

    Overrides are flat (`model`, `temperature`, `layers`, ...), as options are; one of None is no override. A name
    without a file takes its model from its prefix (`gemma_2b_foo` -> gemma_2b) and the other settings by default.
    """
    path = find_config("experiments", name, root)
    options = {key: value for key, value in (overrides or {}).items() if value is not None}
    notes: tuple[str, ...] = ()
    if path is not None:
        document = read_document(path)
        settings = validate(ExperimentSettings, document.data, document.place)
        known = tuple(judges)
        if known and settings.judge not in known:
            raise document.place.at("judge").fail(
                f"{show(settings.judge)} is not known; {suggest(settings.judge, known)}"
            )
        model = options.get("model", settings.model)
        if model != settings.model:
            other = f"its model is {show(settings.model)}, --model {show(model)} takes its place"
            notes = (f"configs/experiments/{name}.yaml: {other}; the results go to experiments/{name}",)
    else:
        fields, notes = _inferred(name, root, options.get("model"))
        settings = validate(ExperimentSettings, fields, SourceLocation(None))
    return _experiment(name, settings, options), notes


def experiment_from_dict(stored: Mapping[str, Any], source: str, overrides: Mapping[str, Any]) -> Experiment:
    """Return the experiment that `experiment_to_dict` wrote to `source`, with overrides as of `load_experiment`."""
    fields = {key: value for key, value in stored.items() if key != "name"}
    settings = validate(ExperimentSettings, fields, SourceLocation(source))
    options = {key: value for key, value in overrides.items() if value is not None}
    return _experiment(stored["name"], settings, options)


def _experiment(name: str, settings: ExperimentSettings, options: Mapping[str, Any]) -> Experiment:
    """Return the settings with flat options over them: `temperature` is one of `generation`."""
    fields = settings.model_dump()
    for key, value in options.items():
        if key not in EXPERIMENT_SETTINGS:
            known = suggest(key, EXPERIMENT_SETTINGS)
            raise ConfigError(f"{show(key)} is not an option of an experiment; {known}")
        section = EXPERIMENT_SETTINGS[key].path.rpartition(".")[0]
        (fields[section] if section else fields)[key] = value
    return Experiment(name=name, **dict(validate(ExperimentSettings, fields, SourceLocation(None))))


def _inferred(name: str, root: str | os.PathLike[str], model: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the fields of an experiment without a file, and a note about it."""
    experiments, models = config_names("experiments", root), config_names("models", root)
    prefixes = [known for known in models if re.match(rf"{re.escape(known)}([._-]|$)", name)]
    near = difflib.get_close_matches(name, experiments, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    if model is None and not prefixes:
        raise ConfigError(
            f"configs/experiments/{name}.yaml: no such file, and no model's short name starts the name{hint}; "
            f"create it, give --model, or take one of: {', '.join(experiments) or 'none'}"
        )
    source = "from --model" if model else "from the name"
    fields = {"model": model or max(prefixes, key=len)}
    note = f"configs/experiments/{name}.yaml: no such file{hint}: model {fields['model']} {source}, the rest by default"
    return fields, (note,)


def experiment_to_dict(experiment: Experiment) -> dict[str, Any]:
    """Return the experiment as JSON holds it, for run.json."""
    return experiment.model_dump(mode="json")

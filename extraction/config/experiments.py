"""Config files: what models and experiments may hold, what their names may be, and where the files are looked for."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from extraction.config.yaml_loader import (
    Rule,
    SourceLocation,
    choice,
    flag,
    items,
    number,
    read_document,
    section,
    text,
    whole,
)
from extraction.core.errors import ConfigError
from extraction.core.names import check_name, distinct_names, is_safe_name
from extraction.core.records import COUNTED_POOLINGS, DEVICE_STRATEGIES, POOLINGS, SITES
from extraction.core.text import show, show_path, suggest

PACKAGE = Path(__file__).resolve().parent.parent
QUANTIZED = ("8bit", "4bit")

_DEVICE = re.compile("|".join((r"auto|cpu|mps|xpu|cuda(:[0-9]{1,3})?", *DEVICE_STRATEGIES)))
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COUNTED_POOLING = re.compile("(" + "|".join(COUNTED_POOLINGS) + "):[1-9][0-9]{0,5}")
_LAYER_RANGE = re.compile(r"([0-9]{1,6})(?:\s*-\s*([0-9]{1,6}))?")


# --- names and places -----------------------------------------------------------------------------------------------


def find_root(explicit: str | os.PathLike[str] | None = None) -> Path:
    """The folder whose configs are read and whose experiments are written.

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
    """Where configs of a kind are looked for, nearest first: the root, the checkout, the copy in the package."""
    bases = (Path(root) / "configs", PACKAGE.parent / "configs", PACKAGE / "_configs")
    found = {(base / kind).resolve(): base / kind for base in reversed(bases) if (base / kind).is_dir()}
    return tuple(reversed(found.values()))


def config_names(kind: str, root: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of all configs of a kind, sorted."""
    paths = (path for folder in config_folders(kind, root) for path in folder.glob("*.yaml"))
    return tuple(sorted({path.stem for path in paths if is_safe_name(path.stem)}))


def find_config(
    kind: str, name: str, root: str | os.PathLike[str], error: type[ConfigError] = ConfigError
) -> Path | None:
    """The file of a named config, or None. Raises for an unsafe name, and for a link that leads out of its folder."""
    check_name(name, kind.removesuffix("s"), error)
    for folder in config_folders(kind, root):
        path = folder / f"{name}.yaml"
        if path.exists() or path.is_symlink():
            if not path.resolve().is_relative_to(folder.resolve()):
                raise error(f"{show_path(path)}: links to a place outside {show_path(folder)}; copy the file there")
            return path
    return None


# --- models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how to load it. `source` is a hub id, or the absolute path of a folder."""

    name: str
    source: str
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    raw: bool = False
    trust_remote_code: bool = False
    quantize: str | None = None

    @property
    def is_local(self) -> bool:
        """True when the source is a folder of this machine."""
        return os.path.isabs(self.source)


def _only_on_the_command_line(value: Any, place: SourceLocation) -> bool:
    if flag(value, place) and place.source is not None:
        raise place.fail("a file can't allow a model's own code to run; give --trust-remote-code")
    return bool(value)


def _device(value: Any, place: SourceLocation) -> str:
    if not isinstance(value, str) or not _DEVICE.fullmatch(value):
        raise place.fail(f"{show(value)} is not a device; give auto, cpu, cuda, cuda:1, mps or balanced")
    return value


_MODEL: dict[str, Rule] = {
    "dtype": choice("auto", "float32", "bfloat16", "float16"),
    "device": _device,
    "quantize": choice(*QUANTIZED),
    "revision": text,
    "raw": flag,
    "trust_remote_code": _only_on_the_command_line,
}
_MODEL_FILE = {**_MODEL, "source": text, "path": text}


def resolve_model(name: str, root: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """A short name of configs/models, else a folder, else a hub id with a `/`. An override of None was not given."""
    options = {key: value for key, value in (overrides or {}).items() if value is not None}
    spec = _named_model(name, root) or _model_at(name)
    if spec is None:
        raise ConfigError(
            f"model {show(name)}: no such short name, folder or hub id (owner/name); "
            + suggest(name, config_names("models", root))
        )
    return replace(spec, **section(_MODEL)(options, SourceLocation(None)))


def _named_model(name: str, root: str | os.PathLike[str]) -> ModelSpec | None:
    path = find_config("models", name, root) if is_safe_name(name) else None
    if path is None:
        return None
    document = read_document(path)
    fields = section(_MODEL_FILE)(document.data, document.place)
    if ("path" in fields) == ("source" in fields):
        raise document.place.fail("give either 'source' (a hub id) or 'path' (a folder), one of them")
    if "path" in fields:
        fields["source"] = str(_model_folder(fields.pop("path"), root))
    elif not _HUB_ID.fullmatch(fields["source"]):
        raise document.place.at("source").fail(f"{show(fields['source'])} is not a hub id; write it as owner/name")
    return ModelSpec(name=name, **fields)


def _model_folder(path: str, root: str | os.PathLike[str]) -> Path:
    """Return a relative path under the root if it is a folder there, else under the package (the bundled models)."""
    own = Path(root) / path
    return own.resolve() if own.is_dir() else PACKAGE / path


def _model_at(name: str) -> ModelSpec | None:
    try:
        if name and Path(name).is_dir():
            return ModelSpec(name=Path(name).resolve().name, source=str(Path(name).resolve()))
    except (OSError, ValueError):
        return None
    return ModelSpec(name=name, source=name) if len(name) <= 200 and _HUB_ID.fullmatch(name) else None


# --- layers ---------------------------------------------------------------------------------------------------------


def parse_layers(spec: str, n_layers: int, place: str = "--layers") -> tuple[int, ...]:
    """`all`, `16`, `10-20` (both ends), `3,5,8-10` as increasing layer numbers, counted from 0."""
    ranges = _layer_ranges(spec, place)
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


def _layer_ranges(spec: str, place: str) -> list[tuple[int, int]] | None:
    """The ranges as written; None for all."""
    if spec.strip().lower() == "all":
        return None
    ranges = []
    for part in spec.split(","):
        match = _LAYER_RANGE.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"{place} {show(spec)}: {show(part)} is not a layer; write all, 16, 10-20 or 3,5,8-10")
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low:
            raise ConfigError(f"{place} {show(spec)}: {show(part)} runs backwards; write {high}-{low}")
        ranges.append((low, high))
    return ranges


def layers_text(value: Any, place: SourceLocation) -> str:
    """Layers as text, in any of the forms of a config file; whether they exist is known once the model is."""
    parts = value if isinstance(value, list | tuple) else [value]
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, str | int):
            raise place.fail(f"{show(part)} is not a layer; write all, 16, '10-20' or [3, 5, '8-10']")
    spec = ",".join(str(part) for part in parts)
    try:
        _layer_ranges(spec, "")
    except ConfigError as failure:
        raise place.fail(str(failure).strip()) from failure
    return spec


# --- experiments ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationSettings:
    """How responses are sampled. Temperature 0 is greedy, top_k 0 and top_p 1 cut nothing."""

    max_new_tokens: int = 80
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaptureSettings:
    """What is kept of the activations. `layers` as `parse_layers` reads it."""

    layers: str = "all"
    sites: tuple[str, ...] = ("residual",)
    poolings: tuple[str, ...] = ("response_mean",)
    dtype: str = "float32"


@dataclass(frozen=True)
class Experiment:
    """One experiment, resolved. `n_examples` counts per polarity; `traits` is what runs when none is named."""

    name: str
    model: str
    traits: tuple[str, ...] = ()
    n_examples: int = 100
    seed: int = 0
    generation: GenerationSettings = GenerationSettings()
    capture: CaptureSettings = CaptureSettings()
    judge: str = "auto"
    judge_model: str | None = None
    judge_url: str | None = None
    judge_concurrency: int = 8
    judge_price: tuple[float, float] | None = None  # per million tokens, in and out
    threshold: float = 50.0
    coherence_threshold: float = 50.0
    batch_size: int | str = "auto"
    shard_size: int = 100
    queue_size: int = 1000
    instruction_as: str = "auto"


def _batch_size(value: Any, place: SourceLocation) -> int | str:
    if value == "auto":
        return "auto"
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,6}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100_000:
        raise place.fail(f"{show(value)} is not a batch size; give a whole number from 1 to 100000, or auto")
    return value


def _pooling(value: Any, place: SourceLocation) -> str:
    if value in POOLINGS or (isinstance(value, str) and _COUNTED_POOLING.fullmatch(value)):
        return str(value)
    raise place.fail(
        f"{show(value)} is not a pooling; {suggest(value, [*POOLINGS, *(f'{name}:8' for name in COUNTED_POOLINGS)])}"
    )


def _not_empty(rule: Rule) -> Rule:
    def check(value: Any, place: SourceLocation) -> Any:
        if value in ([], ()):
            raise place.fail("[] names nothing; give at least one")
        return rule(value, place)

    return check


def _optional(rule: Rule) -> Rule:
    """Nothing, or what the rule says."""
    return lambda value, place: None if value is None else rule(value, place)


def _address(value: Any, place: SourceLocation) -> str:
    """An http or https address. One that may hold a secret is not shown."""
    try:
        parts = urlsplit(text(value, place))
        secret = bool(parts.username or parts.password or parts.query or parts.fragment or "@" in value)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        secret, sound = "@" in value, False
    if secret:
        raise place.fail("holds more than an address; leave out user, password and query: a key goes in OPENAI_API_KEY")
    if not sound or not re.fullmatch(r"[!-~]+", value):
        raise place.fail(f"{show(value)} is not an http or https address; write it as http://localhost:8000/v1")
    return str(value)


def _prices(value: Any, place: SourceLocation) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise place.fail(f"{show(value)} is not two prices; give those of a million tokens in and out, as 0.15,0.60")
    low, high = (number(0, 1_000_000)(price, place) for price in value)
    return low, high


def _trait_names(value: Any, place: SourceLocation) -> tuple[str, ...]:
    return distinct_names(items(text)(value, place), f"{place}: trait", place.error)


_GENERATION: dict[str, Rule] = {
    "max_new_tokens": whole(1, 1_000_000),
    "temperature": number(0, 100),
    "top_k": whole(0, 10_000_000),
    "top_p": number(0, 1, above=True),
    "stop_strings": items(text, distinct=True),
}
_CAPTURE: dict[str, Rule] = {
    "layers": layers_text,
    "sites": _not_empty(items(choice(*SITES), distinct=True)),
    "poolings": _not_empty(items(_pooling, distinct=True)),
    "dtype": choice("float32", "bfloat16", "float16"),
}
_EXPERIMENT: dict[str, Rule] = {
    "model": text,
    "traits": _trait_names,
    "n_examples": whole(1, 1_000_000),
    "seed": whole(0),
    "generation": section(_GENERATION),
    "capture": section(_CAPTURE),
    "judge": text,  # one of judging.registry.JUDGE_NAMES, which check_judge compares
    "judge_model": _optional(text),
    "judge_url": _optional(_address),
    "judge_concurrency": whole(1, 1000),
    "judge_price": _optional(_prices),
    "threshold": number(0, 100),
    "coherence_threshold": number(0, 100),
    "batch_size": _batch_size,
    "shard_size": whole(1, 1_000_000),
    "queue_size": whole(1, 1_000_000),
    "instruction_as": choice("auto", "system", "user"),
}
_SECTIONS = {"generation": _GENERATION, "capture": _CAPTURE}
_KINDS: dict[str, Callable[..., Any]] = {"generation": GenerationSettings, "capture": CaptureSettings}


def load_experiment(
    name: str, root: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None
) -> tuple[Experiment, tuple[str, ...]]:
    """An experiment by name, and notes for the user where something was inferred.

    Overrides are flat (`model`, `temperature`, `layers`, ...), as options are; one that is None was not given. A name
    without a file takes its model from its prefix (`gemma_2b_foo` -> gemma_2b) and the other settings by default.
    """
    path = find_config("experiments", name, root)
    options = _nest({key: value for key, value in (overrides or {}).items() if value is not None})
    chosen = section(_EXPERIMENT)(options, SourceLocation(None))
    notes: tuple[str, ...] = ()
    if path is not None:
        document = read_document(path)
        fields = section(_EXPERIMENT, required=("model",))(document.data, document.place)
    else:
        fields, notes = _inferred(name, root, chosen.get("model"))
    return _experiment(name, fields, chosen), notes


def experiment_from_dict(stored: Mapping[str, Any], source: str, overrides: Mapping[str, Any]) -> Experiment:
    """What `experiment_to_dict` gave, kept at `source`, with flat overrides as `load_experiment` takes them."""
    options = _nest({key: value for key, value in overrides.items() if value is not None})
    fields = {key: value for key, value in stored.items() if key != "name"}
    checked = section(_EXPERIMENT, required=("model",))(fields, SourceLocation(source))
    return _experiment(stored["name"], checked, section(_EXPERIMENT)(options, SourceLocation(None)))


def _experiment(name: str, fields: Mapping[str, Any], chosen: Mapping[str, Any]) -> Experiment:
    sections = {key: kind(**{**fields.get(key, {}), **chosen.get(key, {})}) for key, kind in _KINDS.items()}
    return Experiment(name=name, **{**fields, **chosen, **sections})


def _nest(options: Mapping[str, Any]) -> dict[str, Any]:
    """Flat options in the experiment's own form: `temperature` goes under `generation`."""
    nested: dict[str, Any] = {}
    for key, value in options.items():
        home = next((name for name, table in _SECTIONS.items() if key in table), None)
        if home:
            nested.setdefault(home, {})[key] = value
        elif key in _EXPERIMENT and key not in _SECTIONS:
            nested[key] = value
        else:
            known = [*_EXPERIMENT, *_GENERATION, *_CAPTURE]
            raise ConfigError(f"{show(key)} is not an option of an experiment; {suggest(key, known)}")
    return nested


def _inferred(name: str, root: str | os.PathLike[str], model: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The fields of an experiment that has no file, and the note that says so."""
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
    """The experiment as JSON holds it, for run.json."""
    return {key: _plain(value) for key, value in asdict(experiment).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value

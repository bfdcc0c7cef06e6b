"""Every setting of an experiment and of a model, defined once: type, bounds, default and help.

The checks of YAML files, the options of the command line, the sampling fields of HTTP requests, the report's list of
settings and the table in docs/guide.md are derived from these models. A new sampling option is a field of
`SamplingSettings` here and its arithmetic in `extraction/engine/sampler.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic.fields import FieldInfo

from extraction.config.validation import Bounds, Model, Text, distinct, nonempty, problem, spec_bounds
from extraction.core.errors import ConfigError
from extraction.core.names import distinct_names
from extraction.core.pooling import parse_pooling
from extraction.core.records import DEVICE_STRATEGIES, SITES
from extraction.core.text import show, suggest

MAX_INT = 2**63 - 1

_DEVICE = re.compile("|".join((r"auto|cpu|mps|xpu|cuda(:[0-9]{1,3})?", *DEVICE_STRATEGIES)))
_LAYER_RANGE = re.compile(r"([0-9]{1,6})(?:\s*-\s*([0-9]{1,6}))?")


@dataclass(frozen=True)
class Option:
    """Facts about a setting that its type does not hold.

    `metavar` stands for the value in --help. `execution`: changes no response and no activation, so a run goes on with
    another value. `added`: runs older than the setting lack it, so at its default it is no part of a run's identity.
    `on_command_line`: False for a setting of files alone.
    """

    metavar: str = "X"
    execution: bool = False
    added: bool = False
    on_command_line: bool = True


# --- value types ----------------------------------------------------------------------------------------------------


def layer_ranges(spec: str, place: str) -> list[tuple[int, int]] | None:
    """Return the ranges of a layer text as written; None for `all`. Raises ConfigError."""
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


def _layers(value: Any) -> str:
    """Return layers as one text, from any form of a YAML file. Whether the model has them is checked later."""
    parts = value if isinstance(value, list | tuple) else [value]
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, str | int):
            raise problem(f"{show(part)} is not a layer; write all, 16, '10-20' or [3, 5, '8-10']")
    spec = ",".join(str(part) for part in parts)
    try:
        layer_ranges(spec, "")
    except ConfigError as failure:
        raise problem(str(failure).strip()) from failure
    return spec


def _pooling(value: Any) -> str:
    try:
        return str(parse_pooling(value if isinstance(value, str) else show(value)))
    except ConfigError as failure:
        raise problem(str(failure)) from failure


def _site(value: Any) -> str:
    if value not in SITES:
        raise problem(f"{show(value)} is not known; {suggest(value, SITES)}")
    return str(value)


def _device(value: Any) -> str:
    if not isinstance(value, str) or not _DEVICE.fullmatch(value):
        raise problem(f"{show(value)} is not a device; give auto, cpu, cuda, cuda:1, mps or balanced")
    return value


def _batch_size(value: Any) -> int | str:
    if value == "auto":
        return "auto"
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,6}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100_000:
        raise problem(f"{show(value)} is not a batch size; give a whole number from 1 to 100000, or auto")
    return value


def _address(value: str) -> str:
    """Check an http or https address. One that may hold a secret is not shown."""
    try:
        parts = urlsplit(value)
        secret = bool(parts.username or parts.password or parts.query or parts.fragment or "@" in value)
        is_http = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        secret, is_http = "@" in value, False
    if secret:
        raise problem("holds more than an address; leave out user, password and query: a key goes in OPENAI_API_KEY")
    if not is_http or not re.fullmatch(r"[!-~]+", value):
        raise problem(f"{show(value)} is not an http or https address; write it as http://localhost:8000/v1")
    return value


def _prices(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise problem(f"{show(value)} is not two prices; give those of a million tokens in and out, as 0.15,0.60")
    return tuple(value)


def _trait_names(names: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return distinct_names(names, "trait")
    except ConfigError as failure:
        raise problem(str(failure)) from failure


Temperature = Annotated[float, Field(ge=0, le=100)]
TopK = Annotated[int, Field(ge=0, le=10_000_000)]
TopP = Annotated[float, Field(gt=0, le=1)]
MinP = Annotated[float, Field(ge=0, le=1)]
MaxNewTokens = Annotated[int, Field(ge=1, le=1_000_000)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Percent = Annotated[float, Field(ge=0, le=100)]
Price = Annotated[float, Field(ge=0, le=1_000_000)]
Texts = Annotated[tuple[Text, ...], Field(strict=False)]


# --- experiments ----------------------------------------------------------------------------------------------------


SampledTemperature = Annotated[
    Temperature,
    Field(description="Divide the logits by this before the softmax; 0 takes the likeliest token."),
    Option("X"),
]


class SamplingSettings(Model):
    """Settings of the draw of a token from the logits; the defaults keep the model's own distribution."""

    temperature: SampledTemperature = 1.0
    top_k: Annotated[TopK, Field(description="Sample among the N likeliest tokens; 0: all."), Option("N")] = 0
    top_p: Annotated[
        TopP,
        Field(description="Sample among the fewest likeliest tokens that hold this probability; 1: all."),
        Option("X"),
    ] = 1.0
    min_p: Annotated[
        MinP,
        Field(description="Sample among tokens with at least this share of the likeliest one's probability; 0: all."),
        Option("X", added=True),
    ] = 0.0


class GenerationSettings(SamplingSettings):
    """Settings of generation.

    The temperature is that of the field's experiments: at 1 small models lose the thread.
    """

    temperature: SampledTemperature = 0.7
    max_new_tokens: Annotated[MaxNewTokens, Field(description="Tokens of a response, at most."), Option("N")] = 80
    stop_strings: Annotated[
        Texts,
        AfterValidator(distinct),
        Field(description="Texts that end a response."),
        Option("A,B", on_command_line=False),
    ] = ()


class CaptureSettings(Model):
    """Which activations are stored. `layers` as `parse_layers` reads it."""

    layers: Annotated[
        str,
        PlainValidator(_layers),
        Field(description="Layers whose activations are captured, counted from 0: all, 16, 10-20 or 3,5,8-10."),
        Option("L"),
    ] = "all"
    sites: Annotated[
        Annotated[tuple[Annotated[str, PlainValidator(_site)], ...], Field(strict=False)],
        AfterValidator(nonempty),
        AfterValidator(distinct),
        Field(description=f"Points of a decoder block that are captured: {', '.join(SITES)}."),
        Option("A,B"),
    ] = ("residual",)
    poolings: Annotated[
        Annotated[tuple[Annotated[str, PlainValidator(_pooling)], ...], Field(strict=False)],
        AfterValidator(nonempty),
        AfterValidator(distinct),
        Field(
            description="How the activations of tokens become one vector: response_mean, response_first:N, "
            "response_last, prompt_mean, prompt_last; all: every token is kept."
        ),
        Option("A,B"),
    ] = ("response_mean",)
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        Field(description="Number type in which activations are stored."),
        Option("TYPE", on_command_line=False),
    ] = "float32"


class ExperimentSettings(Model):
    """The keys of a file in configs/experiments. `n_examples` counts per side."""

    model: Annotated[Text, Field(description="A file of configs/models, a folder, or a hub id."), Option("NAME")]
    traits: Annotated[
        Texts,
        AfterValidator(_trait_names),
        Field(description="Traits of configs/traits that run when none is named."),
        Option("A,B"),
    ] = ()
    n_examples: Annotated[Count, Field(description="Examples of each side, positive and negative."), Option("N")] = 100
    questions: Annotated[
        Text,
        Field(
            description="Questions and instructions of a trait; auto: those for the model's family, else the general "
            "ones; general; or a family's name."
        ),
        Option("NAME", added=True),
    ] = "auto"
    seed: Annotated[
        Annotated[int, Field(ge=0, le=MAX_INT)],
        Field(description="Seed of the random numbers; another seed gives other responses."),
        Option("N"),
    ] = 0
    generation: GenerationSettings = GenerationSettings()
    capture: CaptureSettings = CaptureSettings()
    judge: Annotated[
        Text,
        Field(description="Judge that scores the responses; auto: by the trait and the model, see docs/judges.md."),
        Option("NAME", execution=True),
    ] = "auto"
    judge_model: Annotated[
        Text | None,
        Field(description="Model of the judge: as --model for local; the server's name for openai."),
        Option("NAME", execution=True),
    ] = None
    judge_url: Annotated[
        Annotated[Text, AfterValidator(_address)] | None,
        Field(description="Address of an OpenAI-compatible server; OpenAI's if not set."),
        Option("URL", execution=True),
    ] = None
    judge_concurrency: Annotated[
        Annotated[int, Field(ge=1, le=1000)],
        Field(description="Calls to the judge at a time."),
        Option("N", execution=True),
    ] = 8
    judge_price: Annotated[
        Annotated[tuple[Price, Price], Field(strict=False), BeforeValidator(_prices)] | None,
        Field(description="Price of a million tokens in and out, for the estimate of the judge's cost."),
        Option("IN,OUT", execution=True),
    ] = None
    threshold: Annotated[
        Percent,
        Field(description="A positive response counts at this judge score or above, a negative one below."),
        Option("X", execution=True),
    ] = 50.0
    coherence_threshold: Annotated[
        Percent,
        Field(description="A response counts at this coherence or above, where the judge rates coherence."),
        Option("X", execution=True),
    ] = 50.0
    batch_size: Annotated[
        int | str,
        PlainValidator(_batch_size),
        Field(description="Sequences that run at a time; auto: measured."),
        Option("N", execution=True),
    ] = "auto"
    shard_size: Annotated[Count, Field(description="Examples that are written together."), Option("N")] = 100
    queue_size: Annotated[
        Count, Field(description="Examples that share one running batch, shard after shard."), Option("N")
    ] = 1000
    instruction_as: Annotated[
        Literal["auto", "system", "user"],
        Field(description="Message that holds the instruction; auto: system where the chat template has it."),
        Option("ROLE"),
    ] = "auto"
    literal: Annotated[
        bool,
        Field(description="With --raw, read control tokens that stand in a prompt as plain text."),
        Option(added=True),
    ] = False
    thinking: Annotated[
        Literal["close", "keep"],
        Field(
            description="Chain of thought of a model that thinks; close: ended before it begins; keep: part of the "
            "response, and so of its activations."
        ),
        Option("HOW", added=True),
    ] = "close"


class Experiment(ExperimentSettings):
    """One experiment with all its settings: those of its file, the defaults, and what the command line overrides."""

    name: str

    def with_(self, **changes: Any) -> Experiment:
        """Return a copy with other values; they are not checked again."""
        return self.model_copy(update=changes)


# --- models ---------------------------------------------------------------------------------------------------------


@checked_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class ModelSpec:
    """Which model, and how to load it. `source` is a hub id, or the absolute path of a folder.

    `family` names the models that a trait may have questions, instructions and markers for.
    """

    name: str
    source: str
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="Number type of the weights; auto: the checkpoint's own."),
        Option("TYPE"),
    ] = "auto"
    device: Annotated[
        str,
        PlainValidator(_device),
        Field(
            description="Where the weights go: auto, cpu, cuda, cuda:1 or mps; balanced or sequential: all GPUs, and "
            "main memory where they are short."
        ),
        Option("DEVICE", execution=True),
    ] = "auto"
    revision: Annotated[Text | None, Field(description="Revision of a hub id."), Option(on_command_line=False)] = None
    raw: Annotated[bool, Field(description="Use no chat template: for base models."), Option()] = False
    trust_remote_code: Annotated[bool, Field(description="Run Python code that comes with the model."), Option()] = (
        False
    )
    quantize: Annotated[
        Literal["8bit", "4bit"] | None,
        Field(description="Round the weights of linear layers to 8 or 4 bits while they load (bitsandbytes)."),
        Option("BITS"),
    ] = None

    family: Annotated[
        Text | None,
        Field(description="Family of models for which a trait may have its own questions, instructions and markers."),
        Option(on_command_line=False),
    ] = None

    @property
    def is_local(self) -> bool:
        """True if the source is a folder of this machine."""
        return os.path.isabs(self.source)


# --- tables of settings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One setting as a table has it. `path` is its place in run.json, as `generation.temperature`."""

    name: str
    path: str
    info: FieldInfo = field(repr=False)

    @property
    def option(self) -> Option:
        """Facts that the type does not hold."""
        return next((item for item in self.info.metadata if isinstance(item, Option)), Option())

    @property
    def bounds(self) -> Bounds | None:
        """Bounds of a number; None for other values."""
        return spec_bounds(self.info)

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def help(self) -> str:
        """One or two sentences."""
        return self.info.description or ""

    @property
    def default(self) -> Any:
        """The value without a file or an option."""
        return self.info.default

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that are allowed; none where others are."""
        options = [self.info.annotation, *get_args(self.info.annotation)]
        return next((get_args(option) for option in options if get_origin(option) is Literal), ())

    @property
    def values(self) -> str:
        """Allowed values in words, for tables and messages; empty where the help says them."""
        return ", ".join(self.choices) or (str(self.bounds or ""))

    @property
    def default_text(self) -> str:
        """The default as it is typed."""
        if self.default is None or self.default == ():
            return "not set" if self.default is None else "none"
        if isinstance(self.default, tuple):
            return ",".join(self.default)
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


def _settings(fields: Mapping[str, FieldInfo], above: str = "") -> Iterator[Setting]:
    for name, info in fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Model):
            yield from _settings(kind.model_fields, f"{name}.")
        else:
            yield Setting(name, above + name, info)


EXPERIMENT_SETTINGS = {setting.name: setting for setting in _settings(ExperimentSettings.model_fields)}
MODEL_SETTINGS = {
    setting.name: setting
    for setting in _settings(ModelSpec.__pydantic_fields__, "model.")  # type: ignore[attr-defined]
    if setting.name not in ("name", "source")
}
SAMPLING = tuple(SamplingSettings.model_fields)
SECTIONS: dict[str, type[Model]] = {"generation": GenerationSettings, "capture": CaptureSettings}

# keys of a run's config that change no byte of its result, at any depth
EXECUTION_FIELDS = (
    *(name for name, setting in {**EXPERIMENT_SETTINGS, **MODEL_SETTINGS}.items() if setting.option.execution),
    *("workers", "threads", "self_check", "gpu_price"),
    "path",  # of the model
)
# settings that a later stage may give again, and that the stages after it then use
REMEMBERED_FIELDS = ("judge", "judge_model", "judge_url", "threshold", "coherence_threshold")
# settings that older runs lack, by their place in run.json: at these values they are no part of a run's identity
ADDED = {setting.path: setting.default for setting in EXPERIMENT_SETTINGS.values() if setting.option.added}


def check_sampling(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a sampling value out of its range."""
    for name, value in values.items():
        bounds = spec_bounds(SamplingSettings.model_fields[name])
        if bounds is not None and value not in bounds:
            raise ConfigError(f"{name} {value} is out of range; give {bounds}")

"""Values that packages pass to each other. Frozen, and without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

POLARITIES = ("pos", "neg")
LAYER_CONVENTION = "layer k is the output of decoder block k, counted from 0; the embeddings are not a layer"
POINTS = ("residual_in", "after_attention", "residual_out")  # of a block, in this order everywhere
STREAM = ("residual_in", "residual_mid", "residual_out")  # the stream itself there, as the parts of a layer name it
SITES = ("residual", "attention", "mlp", "residual_mid")  # of a block, where activations can be captured
POOLINGS = ("response_mean", "response_last", "prompt_mean", "prompt_last", "all")  # names as in settings and files
COUNTED_POOLINGS = ("response_first",)  # poolings that take a count of tokens, as in `response_first:8`
DEVICE_STRATEGIES = ("balanced", "balanced_low_0", "sequential")  # accelerate's, to place a model over all GPUs


@dataclass(frozen=True)
class InstructionPair:
    """Two instructions that ask for opposite ends of a trait."""

    positive: str
    negative: str


@dataclass(frozen=True)
class Markers:
    """Texts that the lexical judge counts: phrases (any case, whole words), or patterns that start with `re:`."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True)
class NaturalPrompt:
    """A prompt whose response shows one side of a trait without an instruction."""

    prompt: str
    system: str | None = None


@dataclass(frozen=True)
class Trait:
    """A trait: either instruction pairs x questions, or two lists of natural prompts."""

    name: str
    description: str
    instructions: tuple[InstructionPair, ...] = ()
    questions: tuple[str, ...] = ()
    positive_prompts: tuple[NaturalPrompt, ...] = ()
    negative_prompts: tuple[NaturalPrompt, ...] = ()
    rubric: str | None = None
    markers: Markers | None = None

    @property
    def is_natural(self) -> bool:
        """True if the sides are lists of natural prompts."""
        return not self.instructions

    @property
    def is_told(self) -> bool:
        """True if some prompt has an instruction, or a system message."""
        return bool(self.instructions) or any(p.system for p in (*self.positive_prompts, *self.negative_prompts))


@dataclass(frozen=True)
class Example:
    """One prompt of one trait and polarity, with a stable id: the unit that a user sees.

    `system` is the instruction of an instructed trait (or the system prompt of a natural one).
    """

    id: str
    trait: str
    polarity: str
    instruction_id: int
    question_id: int
    repeat: int
    question: str
    system: str | None = None


@dataclass(frozen=True)
class Prompt:
    """An example as one model reads it: text and token ids."""

    example: Example
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Response:
    """The response of a model. `token_ids` holds no stop token.

    `finish_reason` is `stop`, `stop_string` or `length`.
    """

    prompt: Prompt
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    scores: dict[str, float | None] = field(default_factory=dict)

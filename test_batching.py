"""Measure the speedup of batching: `python test_batching.py` times the same prompts one at a time, then in batches.

Serial is transformers' `model.generate`, one prompt after the other; batched is the engine. Both are greedy and in
float32, so their texts must be equal: the script compares them and exits with 1 if they differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from extraction.cli.terminal import Command

if TYPE_CHECKING:
    from extraction.model.loading import LanguageModel
    from extraction.utils_batch import Request

Texts = dict[str, str]


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="pocket", show_default=True, metavar="NAME", help="Short name, folder or hub id.")
@click.option(
    "--trait",
    default="uncertainty_calibration",
    show_default=True,
    metavar="NAME",
    help="Trait of the questions.",
)
@click.option("--n-prompts", default=32, show_default=True, type=click.IntRange(1), help="Number of prompts.")
@click.option("--max-new-tokens", default=80, show_default=True, type=click.IntRange(1), help="Longest response.")
@click.option("--batch-sizes", default="4,8,16,32", show_default=True, metavar="N,N", help="Batch sizes to try.")
@click.option("--threads", type=click.IntRange(1), help="Processor threads. Default: torch's choice.")
@click.pass_context
def main(
    ctx: click.Context,
    model: str,
    trait: str,
    n_prompts: int,
    max_new_tokens: int,
    batch_sizes: str,
    threads: int | None,
) -> None:
    """Time generation one prompt at a time, then in batches, and compare the texts."""
    sizes = parse_sizes(batch_sizes)
    lm = load_model(model, threads)
    requests = make_requests(lm, model, trait, n_prompts, max_new_tokens)
    generate_serial(lm, requests[:1])  # the first run of anything is slow

    click.echo("Testing SERIAL generation...")
    expected, serial_seconds = timed(lambda: generate_serial(lm, requests))
    click.echo(f"  Time: {serial_seconds:.2f} seconds")
    all_equal = True
    for size in sizes:
        click.echo(f"\nTesting BATCHED generation (batch_size={size})...")
        texts, seconds = timed(lambda size=size: generate_batched(lm, requests, size))  # type: ignore[misc]
        click.echo(f"  Time: {seconds:.2f} seconds")
        click.echo(f"  Speedup: {speedup(serial_seconds, seconds)}")
        all_equal &= report(expected, texts)
    ctx.exit(0 if all_equal else 1)


def parse_sizes(text: str) -> list[int]:
    """Parse `4,8` into numbers."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise click.BadParameter(f"{text!r}: write numbers from 1 upwards, such as 4,8,16", param_hint="--batch-sizes")
    return sizes


def load_model(name: str, threads: int | None) -> LanguageModel:
    """Load the model in float32."""
    import torch
    from transformers.utils import logging

    from extraction.config.experiments import find_root, resolve_model
    from extraction.model.loading import load

    if threads is not None:
        torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load(resolve_model(name, find_root(), {"dtype": "float32"}))


def make_requests(lm: LanguageModel, model: str, trait: str, n_prompts: int, max_new_tokens: int) -> list[Request]:
    """Make prompts from a trait's instructions and questions."""
    from extraction.config.experiments import find_root, resolve_model
    from extraction.config.traits import load_trait, make_examples
    from extraction.model.chat_template import encode_example
    from extraction.utils_batch import Request

    assert lm.tokenizer is not None
    raw = not lm.tokenizer.chat_template
    family = resolve_model(model, find_root()).family
    examples = make_examples(load_trait(trait, find_root(), family), (n_prompts + 1) // 2)[:n_prompts]
    limits: Any = {"max_tokens": lm.max_positions, "max_new_tokens": max_new_tokens}
    prompts = [encode_example(lm.tokenizer, example, raw=raw, **limits) for example in examples]
    return [Request(prompt.example.id, prompt.token_ids, max_new_tokens) for prompt in prompts]


def generate_serial(lm: LanguageModel, requests: Sequence[Request]) -> Texts:
    """Generate with transformers, one prompt at a time."""
    import torch
    from transformers import GenerationConfig

    model: Any = lm.model
    texts = {}
    for request in requests:
        ids_1T = torch.tensor([request.token_ids], device=lm.device)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=sorted(lm.stop_ids) or None,
            pad_token_id=lm.pad_id,
            repetition_penalty=1.0,
        )
        out_1T = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=config)
        texts[request.id] = decode(lm, out_1T[0, ids_1T.shape[1] :].tolist())
    return texts


def generate_batched(lm: LanguageModel, requests: Sequence[Request], batch_size: int) -> Texts:
    """Generate with the engine."""
    from extraction.utils_batch import generate

    return {done.id: decode(lm, done.token_ids) for done in generate(lm, requests, batch_size=batch_size)}


def decode(lm: LanguageModel, token_ids: Sequence[int]) -> str:
    """Decode tokens without stop tokens."""
    assert lm.tokenizer is not None
    kept = [token for token in token_ids if token not in lm.stop_ids]
    return str(lm.tokenizer.decode(kept, skip_special_tokens=True))


def timed(work: Callable[[], Texts]) -> tuple[Texts, float]:
    """Call a function; return its result and its seconds."""
    started = time.perf_counter()
    texts = work()
    return texts, time.perf_counter() - started


def speedup(serial_seconds: float, seconds: float) -> str:
    """Format a speedup: `3.54x faster`, or `1.20x slower`."""
    factor = serial_seconds / seconds
    return f"{factor:.2f}x faster" if factor >= 1 else f"{1 / factor:.2f}x slower"


def report(expected: Texts, texts: Texts) -> bool:
    """Print the number of equal texts and the first difference."""
    different = [key for key in expected if texts.get(key) != expected[key]]
    click.echo(f"  Texts equal: {len(expected) - len(different)} of {len(expected)}")
    if different:
        key = different[0]
        click.echo(f"  First difference, {key}:\n    serial:  {expected[key]!r}\n    batched: {texts.get(key)!r}")
    return not different


if __name__ == "__main__":
    main()

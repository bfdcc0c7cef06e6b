"""The options of reading tokens, tiers 2 and 3."""

from __future__ import annotations

import click

from extraction.cli.options import BATCH, CHECK, DEVICE, THREADS, Decorator

READ: tuple[Decorator, ...] = (
    click.option(
        "--experiment", required=True, metavar="NAME", help="Whose vectors; captures are kept in its folder, too."
    ),
    click.option("--trait", "--traits", "traits", metavar="A,B", help="Traits with vectors there; one pass for all."),
    click.option("--method", metavar="NAME", help="Which of their vectors; default: the one that the card chose."),
    click.option("--model", metavar="NAME", help="Default: the model that the vectors were made on."),
    click.option("--prompts", metavar="TEXT", multiple=True, help="A prompt; may be given again."),
    click.option(
        "--prompts-file",
        metavar="FILE",
        multiple=True,
        help="A prompt a line; or JSON, whole or a line each. May be given again.",
    ),
    click.option("--system", metavar="TEXT", help="A system prompt, for prompts that have none of their own."),
    click.option("--max-new-tokens", metavar="N", help="Longest response; default: the run's."),
    click.option("--temperature", metavar="X", help="0 is greedy; default: the run's."),
    click.option("--top-k", metavar="N", help="Sample among the N likeliest tokens; default: the run's."),
    click.option("--top-p", metavar="X", help="Sample within this probability mass; default: the run's."),
    click.option("--seed", metavar="N", help="Another seed gives other responses; default: the run's."),
)
LAYERS: tuple[Decorator, ...] = (
    click.option("--layers", metavar="L", help="all, 16, 10-20 or 3,5,8-10, counted from 0; default: all."),
)
LAYER: tuple[Decorator, ...] = (
    click.option(
        "--layer",
        metavar="L",
        default="auto",
        show_default=True,
        help="Which one, counted from 0; auto: the one that the first trait's card chose, else the middle one.",
    ),
)
WRITE: tuple[Decorator, ...] = (
    click.option(
        "--no-attention", is_flag=True, help="Leave attention out (in tier 3 with q, k and v): smaller files, faster."
    ),
    click.option("--save-json", is_flag=True, help="Each prompt as plain JSON, too."),
    click.option("--png", is_flag=True, help="Pictures, too: an overview, and one of each prompt."),
    click.option("--keep-going", is_flag=True, help="Do what can be done, tell the rest at the end; exit code 1."),
    click.option("--shard-size", metavar="N", help="Prompts that run together; default: the run's."),
    click.option("--dry-run", is_flag=True, help="Say what would be read and where it would go, and stop."),
    click.option("--root", metavar="DIR", help="Where configs/ and experiments/ are; default: here, or the checkout."),
)
TIER_2 = (READ, LAYERS, WRITE, BATCH, DEVICE, CHECK, THREADS)
TIER_3 = (READ, LAYER, WRITE, BATCH, DEVICE, CHECK, THREADS)

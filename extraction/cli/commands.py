"""The `traitline` command: every command, in the sections that `traitline --help` shows."""

from __future__ import annotations

import click

from extraction import __version__
from extraction.cli.option_types import CONTEXT
from extraction.cli.pair_commands import amplify_command, serve_command
from extraction.cli.terminal import Group
from extraction.cli.tool_commands import new_command, traits_command, verify_command
from extraction.cli.use_commands import export_command, import_command, internals_command, read_command, steer_command
from extraction.cli.vector_commands import (
    batched_command,
    capture_command,
    combined_command,
    extract_command,
    generate_command,
    report_command,
    validate_command,
    vectors_command,
)

__all__ = [
    "amplify_command",
    "batched_command",
    "capture_command",
    "combined_command",
    "extract_command",
    "generate_command",
    "internals_command",
    "main",
    "read_command",
    "validate_command",
    "vectors_command",
]

SECTIONS = {
    "Make vectors": (
        extract_command,
        generate_command,
        combined_command,
        batched_command,
        capture_command,
        vectors_command,
        validate_command,
        report_command,
    ),
    "Use vectors": (steer_command, read_command, internals_command, export_command, import_command),
    "Two models": (amplify_command, serve_command),
    "Tools": (verify_command, traits_command, new_command),
}


@click.group(cls=Group, sections=SECTIONS, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="traitline")
def main() -> None:
    """Turn a trait into a validated direction in a language model's activations.

    Start with `traitline extract --experiment pocket`: it needs no GPU and no network. Each command has a --help.
    """

"""Commands about files: check the runs, list the traits, write a new one."""

from __future__ import annotations

import sys
from typing import Any

import click

from extraction.cli.arguments import print_lines
from extraction.cli.option_types import command
from extraction.cli.options import NEW, ROOT
from extraction.core.text import one_line


@command("verify", (click.argument("folder", required=False, type=click.Path()), *ROOT))
def verify_command(folder: str | None, root: str | None) -> None:
    """Check every file of a run, or of all runs, against its checksum.

    Exit code 1 if a file is damaged, missing or left over.
    """
    from pathlib import Path

    from extraction.config.experiments import find_root
    from extraction.core.errors import StoreError
    from extraction.storage.experiment_dir import verify_tree

    top = Path(folder) if folder else find_root(root) / "experiments"
    if not top.is_dir():
        raise StoreError(f"{top}: no such folder; give a run's folder, or make a run first")
    findings = verify_tree(top)
    for finding in findings:
        click.echo(one_line(finding))
    verdict = f"{len(findings)} findings" if findings else "every file is what its receipt says"
    click.echo(one_line(f"{top}: {verdict}"))
    sys.exit(1 if findings else 0)


@command("traits", ROOT)
def traits_command(root: str | None) -> None:
    """List the traits, with their descriptions and the families of models that they have questions for."""
    from extraction.config.experiments import find_root
    from extraction.config.traits import list_traits, load_trait_sets

    folder = find_root(root)
    for name in list_traits(folder):
        sets = load_trait_sets(name, folder)
        families = f"\n    Own questions for models of: {', '.join(sets.families)}" if sets.families else ""
        click.echo(f"{name}\n    {one_line(sets.file.description)}{families}")


@command("new", NEW)
def new_command(name: str, **given: Any) -> None:
    """Write a trait file, with the instructions, questions and rubric of a chat model.

    The model is one of this machine (--judge-model) or behind an OpenAI-compatible server (--judge-url).
    """
    from extraction.exchange.new_trait import new_trait

    def note(text: str) -> None:
        click.echo(one_line(text), err=True)

    print_lines(map(one_line, new_trait(name, note=note, **given)))

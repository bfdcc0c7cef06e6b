"""Tier 2: where in a text a trait shows: projections of every token of new prompts and their answers."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import the package, not this folder's files
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from extraction.cli.commands import read_command

if __name__ == "__main__":
    read_command()

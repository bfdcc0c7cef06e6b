"""Tier 3: one layer from within, of every token of new prompts and their answers."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import the package, not this folder's files
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from extraction.cli.commands import internals_command

if __name__ == "__main__":
    internals_command()

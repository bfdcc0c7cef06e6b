"""Stage 1, combined: one prompt at a time, activations captured in the same pass."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import the package, not this folder's files
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from extraction.cli.commands import combined_command

if __name__ == "__main__":
    combined_command()

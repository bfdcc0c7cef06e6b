"""Stage 1, batched: responses and activations in one pass, many prompts at a time."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import the package, not this folder's files
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from extraction.cli.commands import batched_command

if __name__ == "__main__":
    batched_command()

"""Stage 1, serial: responses, one prompt at a time, no activations."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import the package, not this folder's files
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from extraction.cli.commands import generate_command

if __name__ == "__main__":
    generate_command()

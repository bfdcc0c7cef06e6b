"""Measure how often a hidden behaviour shows when the difference of two models is amplified: `traitline amplify`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import the package of this checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from extraction.cli.commands import amplify_command

if __name__ == "__main__":
    amplify_command()

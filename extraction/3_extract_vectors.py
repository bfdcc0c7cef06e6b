"""Stage 3: a direction per method and layer."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import the package, not this folder's files
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from extraction.cli.commands import vectors_command

if __name__ == "__main__":
    vectors_command()

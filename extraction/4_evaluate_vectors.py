"""Stage 4: what the vectors are worth on questions that they have not seen."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import the package, not this folder's files
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from extraction.cli.commands import validate_command

if __name__ == "__main__":
    validate_command()

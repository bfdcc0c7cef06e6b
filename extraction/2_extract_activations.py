"""Stage 2: activations of stored responses, teacher-forced from their token ids."""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by path: import the package, not this folder's files
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from extraction.cli.commands import capture_command

if __name__ == "__main__":
    capture_command()

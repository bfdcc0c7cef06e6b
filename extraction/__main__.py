"""`python -m extraction`: the same program as `traitline`."""

import extraction.cli.commands  # noqa: F401  (defines the commands)
from extraction.cli.options import main

if __name__ == "__main__":
    main(prog_name="python -m extraction")

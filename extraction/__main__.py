"""`python -m extraction`: the same program as `traitline`."""

from extraction.cli.commands import main

if __name__ == "__main__":
    main(prog_name="python -m extraction")

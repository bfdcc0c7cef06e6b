"""`python -m extraction.serving`: the same as `traitline serve`."""

from extraction.cli import serve_command

if __name__ == "__main__":
    serve_command(prog_name="python -m extraction.serving")

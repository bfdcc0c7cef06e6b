"""The command line: options from the settings, one command for every stage, progress and summaries.

May import every package; loads them when a command runs, so that --help stays quick. `main` is the program.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "main": "commands",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)

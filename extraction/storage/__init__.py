"""Storage: a run's files, written atomically, checked on reading, and safe under a kill at any point.

May import `core`, `config`, `model`, `activations` and `engine`; it needs only `core`. Start at `trait_run.TraitRun`,
the folder of one trait's run; `atomic` holds the rules of writing.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "BackgroundWriter": "background_writer",
    "CaptureSet": "token_captures",
    "Finding": "atomic",
    "LazyTensor": "lazy_tensors",
    "RunDir": "run_dir",
    "TraitRun": "trait_run",
    "capture_set": "token_captures",
    "capture_sets": "experiment_dir",
    "trait_runs": "experiment_dir",
    "verify_tree": "experiment_dir",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)

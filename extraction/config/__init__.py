"""Files and settings: experiments, models, traits and prompts, read and checked.

May import `core`. Start at `settings`, where every setting is defined once.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "CaptureSettings": "settings",
    "Experiment": "settings",
    "ExperimentSettings": "settings",
    "GenerationSettings": "settings",
    "ModelSpec": "settings",
    "SamplingSettings": "settings",
    "load_experiment": "experiments",
    "load_trait": "traits",
    "make_examples": "traits",
    "parse_layers": "experiments",
    "read_prompt_set": "prompt_files",
    "resolve_model": "experiments",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)

"""Turn a trait into a validated direction in a language model's activations.

The names below are what scripts import; their modules, and torch with them, load on first use.
"""

from extraction.core.exports import lazy_exports

__version__ = "0.1.0"
_EXPORTS = {
    "Direction": "vectors.direction",
    "GenerationConfig": "amplification.helix",
    "HelixEngine": "amplification.helix",
    "LDAModelPair": "amplification.lda",
    "batch_speculative_generate": "amplification.helix",
    "generate_batch_with_activations": "utils_batch",
    "get_activations_from_texts": "utils_batch",
    "load": "model.loading",
    "load_experiment": "config.experiments",
    "load_trait": "config.traits",
    "resolve_model": "config.experiments",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)

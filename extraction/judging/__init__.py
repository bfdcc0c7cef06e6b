"""Judges: score how far a response shows a trait, and filter responses by their scores.

May import `core`, `config`, `model`, `activations`, `engine` and `storage`. Start at `registry.JUDGES`, the table of
judges; `filtering.filter_responses` applies their scores.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "JUDGES": "registry",
    "Judgement": "base",
    "KeptResponses": "filtering",
    "ModelJudge": "base",
    "Rating": "base",
    "RuleJudge": "base",
    "filter_responses": "filtering",
    "judge_lexical": "lexical",
    "lexical_score": "lexical",
    "resolve_judge": "registry",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)

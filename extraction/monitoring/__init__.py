"""Monitoring: project new prompts and responses onto traits' vectors, token by token.

Tier 2 keeps the projections at every layer, tier 3 the internals of one layer. The flow is `plan.build_plan` ->
`run.run_sets` -> `postprocess.postprocess_sets` -> `page.set_page`. May import every package up to `pipeline`.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "MonitoringPlan": "plan",
    "MonitoringSession": "run",
    "build_plan": "plan",
    "overview_picture": "pictures",
    "postprocess_sets": "postprocess",
    "reading_picture": "pictures",
    "run_sets": "run",
    "set_page": "page",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)

"""The pipeline: a run's plan, and the stages that carry it out, from responses to the report.

May import everything below `monitoring`. Start at `stages`, whose functions are the commands; `plan.make_plan` reads
and checks a run's inputs, and `executors` decide where its run groups run.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "EvalOptions": "evaluate",
    "MODES": "plan",
    "ModelSession": "session",
    "RunPlan": "plan",
    "RunResult": "session",
    "TraitContext": "session",
    "TraitResult": "session",
    "VectorOptions": "fit",
    "extract": "stages",
    "fit_vectors": "stages",
    "generate": "stages",
    "make_plan": "plan",
    "stored_plans": "plan",
    "validate": "stages",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)

"""Evaluation by steering: answers with a vector added, their metrics, and the sweep over layers and coefficients.

May import `core`, `config`, `model`, `activations`, `engine`, `storage`, `judging` and `vectors`. Start at
`steering_sweep.run_sweep`; `steered_generation.answer_all` answers prompts under any conditions.
"""

from extraction.core.exports import lazy_exports

_EXPORTS = {
    "Condition": "steered_generation",
    "LayerDirections": "steered_generation",
    "SteeredAnswer": "steered_generation",
    "SteeredGeneration": "steered_generation",
    "SweepPlan": "steering_sweep",
    "answer_all": "steered_generation",
    "condition_metrics": "steered_generation",
    "layer_directions": "steered_generation",
    "run_sweep": "steering_sweep",
}
__all__ = list(_EXPORTS)
__getattr__ = lazy_exports(__name__, _EXPORTS)

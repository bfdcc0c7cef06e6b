"""The bundled models: their weights and tokenizers. experiments/pocket_model holds how they were trained."""

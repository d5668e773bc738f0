"""Around an optimizer step: metrics, finite steps, checkpoints and exact resume, the run's folder."""

"""The commands of ``python -m lit_dpo``, and those among them that are not a Trainer's."""

DESCRIPTIONS = {
    "fit": "Align a model on preference pairs.",
    "validate": "Measure loss and reward accuracy on the held-out pairs.",
    "test": "The same under test/.",
    "predict": "Write the implicit rewards of each held-out pair as JSON lines.",
    "generate": "Answer prompts with the base and with the aligned model, side by side.",
}

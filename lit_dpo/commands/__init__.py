"""The commands of ``python -m lit_dpo``. Commands that are not methods of the Trainer are modules of this package."""

DESCRIPTIONS = {
    "fit": "Align a model on preference pairs.",
    "validate": "Measure loss and reward accuracy on the held-out pairs.",
    "test": "The same under test/.",
    "predict": "Write the implicit rewards of each held-out pair as JSON lines.",
    "generate": "Answer prompts with the base and with the aligned model, side by side.",
}

"""The commands of ``python -m lit_dpo``: those of Lightning's Trainer, and our own, one file each.

A command of ours is a function with the name of its file. Its arguments and its docstring are its options and their
help. To add one, write the file and add a line to ``DESCRIPTIONS``.
"""

import importlib
from collections.abc import Callable
from typing import Any

DESCRIPTIONS = {
    "fit": "Align a model on preference pairs.",
    "validate": "Measure loss and reward accuracy on the held-out pairs.",
    "test": "Measure the held-out pairs with intervals, by group, and against another model.",
    "predict": "Write the implicit rewards of each held-out pair as JSON lines.",
    "audit": "Read the data as fit would, and judge it before it is trained on.",
    "estimate": "Estimate memory, disk and time of a run, and whether it fits, from its configuration.",
    "prepare": "Tokenize the pairs and compute the reference log-probs ahead of fit.",
    "generate": "Answer prompts with the base and with the aligned model, side by side.",
    "chat": "Talk to the base, the aligned model, or both, in the terminal.",
    "compare": "Open a local page with two models side by side, and vote: pairs and a win rate.",
    "judge": "Let a judge compare the answers of two models: win rate, with and without length.",
    "evaluate": "Ask base and aligned model the tasks of lm-evaluation-harness.",
    "explain": "Show which words of a pair the preference was learned from.",
    "suspects": "Rank the training pairs whose label the model contradicts, to keep, flip or drop them.",
    "report": "Write the report of a run, or of several on one page.",
    "export": "Write the adapter, a merged model or a GGUF file, with a model card, checked.",
}
OWN = tuple(DESCRIPTIONS)[4:]  # the first four are methods of the Trainer
LIKE_FIT = ("audit", "estimate", "prepare")  # ours that take the options of fit, and get what they build


def function_of(command: str) -> Callable[..., Any]:
    """The function of a command of ours, imported when it is needed."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"{__name__}.{command}"), command)
    return function

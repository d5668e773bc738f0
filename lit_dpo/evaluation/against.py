"""A second checkpoint on the held-out pairs of the first."""

from typing import Any

import torch
from lightning.pytorch import Trainer

from lit_dpo.evaluation.trained import Trained


def run_against(trainer: Trainer, module: Any, other: Trained) -> None:
    """Tests a second model on the pairs that the first was tested on, with the same callbacks and without loggers.

    The first model's weights are freed, so that two models need the memory of one.

    Args:
        trainer: The Trainer that tested the first model.
        module: The first model.
        other: The second model.

    Raises:
        ValueError: If the two have different tokenizers, so that their pairs are not the same.
    """
    tokenizer = trainer.datamodule.load_tokenizer()  # type: ignore[attr-defined]
    if other.module.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--against {other.path}: its base has another tokenizer, so its pairs would be others.")
    del module.policy
    vars(module).pop("reference", None)
    torch.cuda.empty_cache()
    loggers, trainer.loggers = trainer.loggers, []
    own = {type(callback) for callback in other.module.configure_callbacks()}  # the Trainer has those of the first
    trainer.callbacks = [callback for callback in trainer.callbacks if type(callback) not in own]  # type: ignore[attr-defined]
    try:
        path = str(other.path)
        trainer.test(other.module, datamodule=trainer.datamodule, ckpt_path=path, verbose=False, weights_only=True)  # type: ignore[attr-defined]
    finally:
        trainer.loggers = loggers

"""AdapterAverage: an exponential moving average of the adapters, evaluated, saved and exported in their place."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_dpo.callbacks.adapter import AdapterExport
from lit_dpo.callbacks.samples import ComparisonSamples
from lit_dpo.training.checkpoint import trained_parameters
from lit_dpo.training.resume import AVERAGE


class AdapterAverage(Callback):
    """Keeps an exponential moving average (EMA) of the trained adapters.

    Evaluations, checkpoints' weights, the exported adapter and the samples are those of the average. Training itself
    goes on with the adapters, which a checkpoint keeps beside. The base is never averaged: an average of packed 4-bit
    codes would be meaningless.

    Args:
        decay: Weight of the old average at each optimizer step. It rises to this as (1 + t) / (10 + t), so that the
            first steps do not keep the average at its beginning.

    Raises:
        ValueError: If ``decay`` is not in [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"AdapterAverage.decay must be in [0, 1), not {decay}.")
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self._updates = 0
        self._steps = 0  # optimizer steps at the last update
        self._swapped = False  # whether the policy holds the average, and the average the policy's adapters
        self._current: dict[str, Tensor] | None = None  # of a checkpoint

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Begins anew, and checks that nothing would save the adapters in training as if they were the average.

        Raises:
            ValueError: If something would.
        """
        self._average, self._current, self._swapped = {}, None, False  # nothing of an earlier fit
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[: callbacks.index(self)]:
            if isinstance(callback, AdapterExport | ComparisonSamples):
                raise ValueError(f"AdapterAverage must come before {type(callback).__name__} in the list of callbacks.")
        if any(isinstance(one, ModelCheckpoint) and one.save_weights_only for one in callbacks):
            raise ValueError(
                "ModelCheckpoint.save_weights_only would leave AdapterAverage's average out. Set it to false."
            )

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begins with the adapters as they are, or as a checkpoint left both."""
        trained = trained_parameters(pl_module)
        if self._current is not None:
            for name, value in self._current.items():
                trained[name].data.copy_(value)
            self._average = {name: value.to(trained[name].device) for name, value in self._average.items()}
        else:
            self._average, self._updates = {name: value.detach().clone() for name, value in trained.items()}, 0
        self._current, self._steps = None, trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Updates the average after an optimizer step."""
        if trainer.global_step == self._steps or not pl_module.step.taken:
            return
        self._steps = trainer.global_step
        decay = min(self.decay, (1 + self._updates) / (10 + self._updates))
        for name, value in trained_parameters(pl_module).items():
            self._average[name].lerp_(value, 1 - decay)
        self._updates += 1

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Puts the average into the policy."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Puts the adapters in training back."""
        if self._swapped:
            self._swap(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Leaves the average in the policy."""
        self._swap(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leaves the average in the policy, for the adapter that an interrupted run exports."""
        if self._average and self._current is None and not self._swapped:
            self._swap(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Stores the average as the weights, and the adapters in training beside it."""
        if not self._average:
            return
        policy, kept = trained_parameters(pl_module), self._average
        average, current = (policy, kept) if self._swapped else (kept, policy)
        checkpoint["state_dict"].update({name: value.detach().clone() for name, value in average.items()})
        copies = {name: value.detach().clone() for name, value in current.items()}
        checkpoint[AVERAGE] = {"current": copies, "updates": self._updates}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Takes both from a checkpoint. One without an average begins a new one."""
        if AVERAGE in checkpoint and trainer.state.fn == "fit":
            self._current, self._updates = checkpoint[AVERAGE]["current"], checkpoint[AVERAGE]["updates"]
            self._average = {name: checkpoint["state_dict"][name].clone() for name in self._current}

    @torch.no_grad()
    def _swap(self, module: Any) -> None:
        for name, value in trained_parameters(module).items():
            other = self._average[name].clone()
            self._average[name].copy_(value)
            value.data.copy_(other)
        self._swapped = not self._swapped

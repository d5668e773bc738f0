"""Gradient accumulation: the loss is the mean over all pairs of a window, even if the last window is short."""

from lightning.pytorch import Trainer


def window_weight(trainer: Trainer, batch_idx: int) -> float:
    """The factor on a batch's loss that corrects Lightning's division in a short last window.

    Lightning divides each loss by A = ``accumulate_grad_batches``, even in a last window of n < A batches. The factor
    is A / n in that window, and 1 in all others.
    """
    accumulate, num_batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if num_batches == float("inf"):
        return 1.0
    last_window = int(num_batches) % accumulate
    return accumulate / last_window if batch_idx >= num_batches - last_window else 1.0

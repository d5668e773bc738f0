"""Gradient accumulation: the loss is the mean over all pairs of a window, even if the window is short."""

from lightning.pytorch import Trainer

from lit_dpo.data.sampler import PairSampler


def window_weight(trainer: Trainer, batch_idx: int) -> float:
    """The factor on a batch's loss that corrects Lightning's division in a short window.

    Lightning divides each loss by A = ``accumulate_grad_batches``, even in a window of n < A batches: the last of an
    epoch, or the first after a run resumed with another size of batches. The factor is A / n.
    """
    accumulate, num_batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if num_batches == float("inf"):
        return 1.0
    sampler = getattr(trainer.train_dataloader, "sampler", None)
    first = sampler.first_batch(trainer.current_epoch) if isinstance(sampler, PairSampler) else 0
    start = max(batch_idx // accumulate * accumulate, first)
    end = min((batch_idx // accumulate + 1) * accumulate, int(num_batches))
    return accumulate / (end - start)

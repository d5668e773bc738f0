"""The pass over the pairs that a run is going to meet, which fills the reference cache before they are met."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer

from lit_dpo.data.preparation import PairDataset
from lit_dpo.data.sampler import EvalSampler, PairSampler
from lit_dpo.policy.reference import CachedReference, Reference


def fill_reference(trainer: Trainer, reference: Reference) -> None:
    """Computes the reference log-probs of the pairs ahead, by all processes together.

    Of loaders of another kind nothing is known beforehand: their pairs are computed as they come.

    Args:
        trainer: In training, all that is left of it is ahead; in evaluation, all of that.
        reference: Filled if it is a cache.
    """
    if not isinstance(reference, CachedReference):
        return
    machine = (trainer.local_rank, trainer.num_devices)
    for pairs, indices in _ahead(trainer):
        with trainer.precision_plugin.forward_context():
            reference.fill(
                pairs,
                indices,
                shares=[(trainer.global_rank, trainer.world_size), *([machine] if trainer.num_nodes > 1 else [])],
                barrier=trainer.strategy.barrier,
            )


def _ahead(trainer: Trainer) -> list[tuple[PairDataset, Sequence[int]]]:
    """Data sets, and which of their pairs will be met, over all processes."""
    if trainer.training and not trainer.sanity_checking:
        loaders, batches = [trainer.train_dataloader], [trainer.num_training_batches]
    elif trainer.testing:
        loaders, batches = _listed(trainer.test_dataloaders), trainer.num_test_batches
    elif trainer.predicting:
        loaders, batches = _listed(trainer.predict_dataloaders), trainer.num_predict_batches
    else:
        loaders, batches = _listed(trainer.val_dataloaders), trainer.num_val_batches
    found: list[tuple[PairDataset, Sequence[int]]] = []
    for loader, number in zip(loaders, batches, strict=True):
        pairs, sampler = getattr(loader, "dataset", None), getattr(loader, "sampler", None)
        if not isinstance(pairs, PairDataset):
            continue
        if isinstance(sampler, PairSampler):
            found.append((pairs, _in_training(trainer, sampler)))
        elif isinstance(sampler, EvalSampler):
            found.append((pairs, range(min(len(pairs), int(number) * sampler.batch_size * sampler.num_replicas))))
    return found


def _in_training(trainer: Trainer, sampler: PairSampler) -> Sequence[int]:
    """The pairs of all batches that are left, in every epoch."""
    size = sampler.batch_size * sampler.num_replicas
    per_epoch = int(trainer.num_training_batches)
    epoch, left = trainer.current_epoch, float("inf")
    if trainer.max_steps >= 0:
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
    met = torch.zeros(sampler.num_pairs, dtype=torch.bool)
    while left > 0 and epoch != trainer.max_epochs and not met.all():
        done = sampler.resume_at[1] if sampler.resume_at[0] == epoch else 0
        batches = int(min(per_epoch - done, left))
        met[sampler.order(epoch)[done * size : (done + batches) * size]] = True
        left -= batches
        epoch += 1
    return met.nonzero()[:, 0].tolist()


def _listed(loaders: Any) -> list[Any]:
    return loaders if isinstance(loaders, list) else [loaders]

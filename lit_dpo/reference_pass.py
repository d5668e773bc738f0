"""The pass over the pairs that a run is going to meet, which fills the reference cache before they are met."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_dpo.data.preparation import PairDataset
from lit_dpo.data.sampler import EvalSampler, PairSampler
from lit_dpo.policy.reference_cache import CachedReference


class ReferencePass(Callback):
    """Fills the reference cache of a ``DPOModule``, which brings this callback with it.

    In training, all that is left of it is ahead; in evaluation, all of that. Of loaders of another kind than ours
    nothing is known beforehand: their pairs are computed as they come.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The training pairs; the held-out ones came before, in the sanity check, or come later."""
        self._fill(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The held-out pairs."""
        self._fill(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The test pairs."""
        self._fill(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The pairs to predict."""
        self._fill(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keeps on disk what came from other loaders."""
        reference = vars(pl_module).get("reference")  # if it was ever needed
        if isinstance(reference, CachedReference):
            reference.save()

    def _fill(self, trainer: Trainer, module: Any) -> None:
        """Computes what is missing, by all processes together."""
        if not isinstance(module.reference, CachedReference):
            return
        shares = [(trainer.global_rank, trainer.world_size)]
        if trainer.num_nodes > 1:  # which may not share a disk
            shares.append((trainer.local_rank, trainer.num_devices))
        title = f"Reference log-probs, {'training' if trainer.training else 'held-out'} pairs"
        for pairs, indices in _ahead(trainer):
            with trainer.precision_plugin.forward_context():
                module.reference.fill(pairs, indices, shares=shares, barrier=trainer.strategy.barrier, title=title)
        if not trainer.sanity_checking:  # after which the training pairs come
            module.reference.initial.release()


def _ahead(trainer: Trainer) -> list[tuple[PairDataset, Sequence[int]]]:
    """Data sets, and which of their pairs will be met, over all processes."""
    if trainer.training:
        loaders, batches = [trainer.train_dataloader], [trainer.num_training_batches]
    elif trainer.testing:
        loaders, batches = _listed(trainer.test_dataloaders), trainer.num_test_batches
    elif trainer.predicting:
        loaders, batches = _listed(trainer.predict_dataloaders), trainer.num_predict_batches
    else:
        loaders, batches = _listed(trainer.val_dataloaders), trainer.num_val_batches
    found: list[tuple[PairDataset, Sequence[int]]] = []
    for loader, number in zip(loaders, batches, strict=False):
        pairs, sampler = getattr(loader, "dataset", None), getattr(loader, "sampler", None)
        if not isinstance(pairs, PairDataset):
            continue
        if isinstance(sampler, PairSampler):
            found.append((pairs, _in_training(trainer, sampler)))
        elif isinstance(sampler, EvalSampler):
            limited = int(number) * sampler.batch_size * sampler.num_replicas
            found.append((pairs, range(limited if number < len(sampler) else len(pairs))))
    return found


def _in_training(trainer: Trainer, sampler: PairSampler) -> Sequence[int]:
    """The pairs of all batches that are left, in every epoch."""
    if trainer.max_steps < 0 and (trainer.max_epochs or -1) < 0:  # until it is stopped
        return range(sampler.num_pairs)
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
    """The loaders that a data module returned as one, or as a collection of them."""
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]

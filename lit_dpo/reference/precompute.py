"""The reference pass: computes the reference log-probs of all pairs that a run will use, before it uses them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_dpo.data.pairs import PairDataset
from lit_dpo.data.sampler import EvalSampler, PairSampler
from lit_dpo.reference.cache import CachedReference


def shows_progress(trainer: Trainer | None) -> bool:
    """Whether ``trainer.enable_progress_bar`` is on. It also controls the bars of tokenization and reference pass."""
    return trainer is None or trainer.progress_bar_callback is not None


class ReferencePass(Callback):
    """Fills the reference cache before training and before each evaluation. ``DPOModule`` adds this callback itself.

    Only the loaders of ``PreferenceDataModule`` tell in advance which pairs will be used. The log-probs of other pairs
    are computed when their batch is used.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fills in the training pairs. The sanity check or the first evaluation fills in the held-out pairs."""
        self._fill(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fills in the held-out pairs."""
        self._fill(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fills in the test pairs."""
        self._fill(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fills in the pairs to predict."""
        self._fill(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the log-probs that are not on disk yet."""
        reference = vars(pl_module).get("reference")  # absent if the reference was never used
        if isinstance(reference, CachedReference):
            reference.save()

    def _fill(self, trainer: Trainer, module: Any) -> None:
        """Computes the log-probs of the missing pairs. All ranks share the work."""
        if not isinstance(module.reference, CachedReference):
            return
        shares = [(trainer.global_rank, trainer.world_size)]
        if trainer.num_nodes > 1:  # nodes may not share a disk
            shares.append((trainer.local_rank, trainer.num_devices))
        title = f"Reference log-probs, {'training' if trainer.training else 'held-out'} pairs"
        for pairs, indices in _pairs_ahead(trainer):
            with trainer.precision_plugin.forward_context():
                module.reference.fill(
                    pairs,
                    indices,
                    shares=shares,
                    barrier=trainer.strategy.barrier,
                    title=title,
                    progress_bar=shows_progress(trainer),
                )
        if not trainer.sanity_checking:  # the training pairs come after the sanity check
            module.reference.initial.release()


def _pairs_ahead(trainer: Trainer) -> list[tuple[PairDataset, Sequence[int]]]:
    """The data sets of the coming stage, each with the indices of the pairs that the ranks together will use."""
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
            found.append((pairs, _training_pairs_ahead(trainer, sampler)))
        elif isinstance(sampler, EvalSampler):
            limited = int(number) * sampler.batch_size * sampler.num_replicas
            found.append((pairs, range(limited if number < len(sampler) else len(pairs))))
    return found


def _training_pairs_ahead(trainer: Trainer, sampler: PairSampler) -> Sequence[int]:
    """Indices of the pairs in all remaining training batches, over all epochs."""
    if trainer.max_steps < 0 and (trainer.max_epochs or -1) < 0:  # training has no end
        return range(len(sampler.dataset))  # type: ignore[arg-type]
    used = torch.zeros(len(sampler.dataset), dtype=torch.bool)  # type: ignore[arg-type]
    for batches in batches_ahead(trainer, sampler):
        used[batches.flatten()] = True
        if used.all():
            break
    return used.nonzero()[:, 0].tolist()


def batches_ahead(trainer: Trainer, sampler: PairSampler) -> Iterator[Tensor]:
    """Indices of the pairs in the remaining training batches over all ranks, (batches, pairs), an epoch at a time."""
    size = sampler.batch_size * sampler.num_replicas
    per_epoch = int(trainer.num_training_batches)
    epoch, left = trainer.current_epoch, float("inf")
    if trainer.max_steps >= 0:
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
    while left > 0 and epoch != trainer.max_epochs:
        done = sampler.resume_at[1] if sampler.resume_at[0] == epoch else 0
        batches = int(min(per_epoch - sampler.first_batch(epoch), left))
        yield sampler.order(epoch)[done : done + batches * size].view(-1, size)
        left -= batches
        epoch += 1


def _listed(loaders: Any) -> list[Any]:
    """A data module's loaders as a list. A data module may return one loader, a list or a mapping."""
    if isinstance(loaders, Mapping):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]

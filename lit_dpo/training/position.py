"""Where a run is in its training data: the loader of the batches that are left, and what a checkpoint keeps of it.

A position has ``order``, all that the order of the pairs depends on, by name. A run resumes only in the same order.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.loader import batch_loader
from lit_dpo.data.pairs import PairDataset
from lit_dpo.data.sampler import PairSampler
from lit_dpo.data.stream import PairStream, Progress, StreamBatch, report
from lit_dpo.training.ranks import gather_objects

State: TypeAlias = Mapping[str, Any]  # what a checkpoint keeps
STATE = ("epoch", "batches", "workers", "next_worker")  # keys of a checkpoint's state that are not of the order


class EpochPosition:
    """The position in pairs on disk, which come in a new permutation in each epoch.

    Args:
        pairs: The pairs.
        batch_size: Number of pairs in a batch of one rank.
        seed: Seed of the order.
        shuffle: Whether the order is random.
        ranks: ``rank`` and ``num_replicas``.
    """

    def __init__(self, pairs: PairDataset, batch_size: int, seed: int, shuffle: bool, ranks: dict[str, int]) -> None:
        self.pairs, self.batch_size, self.seed, self.shuffle, self.ranks = pairs, batch_size, seed, shuffle, ranks

    @property
    def order(self) -> dict[str, int | bool]:
        """All that the order depends on."""
        return {
            "number of pairs": len(self.pairs),
            "pairs in a batch over all processes": self.batch_size * self.ranks["num_replicas"],
            "data.seed": self.seed,
            "data.shuffle": self.shuffle,
        }

    def loader(
        self, trainer: Trainer | None, stored: Mapping[str, Any] | None, **options: Any
    ) -> DataLoader[PairBatch]:
        """The batches of each epoch, after a stored position."""
        sampler = PairSampler(
            self.pairs, batch_size=self.batch_size, shuffle=self.shuffle, seed=self.seed, **self.ranks
        )
        sampler.resume_at = (-1, 0) if stored is None else (stored["epoch"], stored["batches"])
        return batch_loader(self.pairs, sampler, seed=self.seed, **options)

    def note(self, batch: Any) -> None:
        """Does nothing: Lightning counts the batches."""

    def state(self, trainer: Trainer) -> dict[str, Any]:
        """The epoch, and the number of its batches already trained on."""
        loop: Any = trainer.fit_loop
        epochs = loop.epoch_progress.current
        finished = epochs.processed == epochs.started  # then the batch count is still that of the previous epoch
        batches = 0 if finished else loop.epoch_loop.batch_progress.current.processed
        return {"epoch": epochs.processed, "batches": batches}

    def report(self) -> list[str]:
        """Nothing: what was left out has been told."""
        return []


class StreamPosition:
    """The position in a stream, which each worker of each rank reads a part of.

    Args:
        pairs: The stream.
        batch_size: Number of pairs in a batch of one rank.
        seed: Seed of the order.
        ranks: ``rank`` and ``num_replicas``.
        num_workers: Number of processes of each rank that read; 0 reads in the training process.
    """

    def __init__(self, pairs: PairStream, batch_size: int, seed: int, ranks: dict[str, int], num_workers: int) -> None:
        self.pairs, self.batch_size, self.seed, self.ranks = pairs, batch_size, seed, ranks
        self.num_workers = num_workers
        self._last: dict[int, Progress] = {}
        self._next_worker = 0

    @property
    def order(self) -> dict[str, int | bool]:
        """All that the order depends on."""
        return {
            "number of sources": len(self.pairs.sources),
            "pairs in a batch of a process": self.batch_size,
            "number of processes": self.ranks["num_replicas"],
            "data.num_workers": max(self.num_workers, 1),
            "data.shuffle_buffer": self.pairs.buffer_size,
            "data.seed": self.seed,
        }

    def loader(
        self, trainer: Trainer | None, stored: Mapping[str, Any] | None, **options: Any
    ) -> DataLoader[PairBatch]:
        """The batches after a stored position.

        Raises:
            ValueError: If nothing ends the training.
        """
        if trainer is not None and trainer.max_steps < 0 and not isinstance(trainer.limit_train_batches, int):
            raise ValueError("data.streaming has no end: set trainer.max_steps or trainer.limit_train_batches.")
        own = {} if stored is None else stored["workers"][self.ranks["rank"]]
        self._next_worker = 0 if stored is None else stored["next_worker"]
        self._last = {worker: Progress(worker, passes, rows, ()) for worker, (passes, rows) in own.items()}
        self.pairs.plan(
            batch_size=self.batch_size,
            seed=self.seed,
            resume_at=own,
            first_worker=self._next_worker,
            **self.ranks,
        )
        return batch_loader(self.pairs, None, seed=self.seed, **options)

    def note(self, batch: Any) -> None:
        """Notes a batch that is about to be trained on."""
        if isinstance(batch, StreamBatch):
            self._last[batch.progress.worker] = batch.progress
            self._next_worker = (batch.progress.worker + 1) % max(self.num_workers, 1)

    def state(self, trainer: Trainer) -> dict[str, Any]:
        """Passes and rows of each worker of each rank. Collective: every rank must call it."""
        own = {worker: (progress.passes, progress.rows) for worker, progress in self._last.items()}
        return {"workers": gather_objects(trainer, own), "next_worker": self._next_worker}

    def report(self) -> list[str]:
        """Lines about the rows of this rank that were left out."""
        left_out: dict[str, int] = {}
        for progress in self._last.values():
            for key, count in progress.left_out:
                left_out[key] = left_out.get(key, 0) + count
        return report(left_out)


Position = EpochPosition | StreamPosition


def check_order(stored: State | None, order: Mapping[str, int | bool]) -> None:
    """Checks that a checkpoint's position fits the order of this run.

    Raises:
        ValueError: If something that the order depends on differs.
    """
    before = {} if stored is None else {name: value for name, value in stored.items() if name not in STATE}
    differing = [
        f"{name} was {before.get(name)} and is now {order.get(name)}"
        for name in {**before, **order}
        if stored is not None and before.get(name) != order.get(name)
    ]
    if differing:
        raise ValueError(
            f"The checkpoint's position in the training data does not fit this run: {', '.join(differing)}."
        )

"""Where a run is in its training data: the loader of the batches that are left, and what a checkpoint keeps of it.

A position has ``order``, all that the order of the pairs depends on, by name. A run resumes only in the same order.
"""

import collections
import hashlib
from collections.abc import Mapping
from typing import Any, TypeAlias

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.loader import batch_loader
from lit_dpo.data.pairs import PairDataset
from lit_dpo.data.sampler import PairSampler
from lit_dpo.data.stream import PairStream, Progress, StreamBatch, report
from lit_dpo.training.ranks import gather_objects

Order: TypeAlias = Mapping[str, int | bool | str]
State: TypeAlias = Mapping[str, Any]  # what a checkpoint keeps
ACCUMULATE = "batches in a step"
STATE = ("epoch", "pairs", "batches", "workers", "next_worker", ACCUMULATE)  # its keys that are not of the order
PER_BATCH = "pairs in a batch over all processes"


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
        self._sampler: PairSampler | None = None  # of the training

    @property
    def order(self) -> Order:
        """All that the order depends on."""
        keys = self.pairs.digests("key").tobytes()
        return {
            "number of pairs": len(self.pairs),
            "digest of the pairs": hashlib.blake2b(keys, digest_size=8).hexdigest(),
            "weights of the sources": ", ".join(f"{part.weight:g}" for part in self.pairs.parts),
            PER_BATCH: self.batch_size * self.ranks["num_replicas"],
            "data.seed": self.seed,
            "data.shuffle": self.shuffle,
        }

    def sampler(self, stored: State | None) -> PairSampler:
        """The order of all epochs, of which the first begins at a stored position."""
        sampler = PairSampler(
            self.pairs, batch_size=self.batch_size, shuffle=self.shuffle, seed=self.seed, **self.ranks
        )
        if stored is not None:
            sampler.resume_at = (stored["epoch"], stored["pairs"])
            sampler.set_epoch(stored["epoch"])
        return sampler

    def loader(self, trainer: Trainer | None, stored: State | None, **options: Any) -> DataLoader[PairBatch]:
        """The batches of each epoch, after a stored position."""
        self._sampler = self.sampler(stored)
        return batch_loader(self.pairs, self._sampler, seed=self.seed, **options)

    def fitted(self, stored: State, differing: list[str], allow_mismatch: bool) -> State | None:
        """A stored position as this run takes it, where what the order depends on differs.

        Another size of batches goes on with the pairs that are left. With ``allow_mismatch``, other pairs begin the
        epoch anew. At the beginning of an epoch nothing has to fit.
        """
        if "pairs" not in stored:  # a stream's
            return {"epoch": 0, "pairs": 0} if allow_mismatch else None
        if stored["pairs"] == stored["epoch"] == 0:  # nothing was trained, as when the Tuner tries sizes of batches
            return stored
        same_pairs = all(name.startswith(PER_BATCH) for name in differing)
        if stored["pairs"] and not same_pairs:
            if not allow_mismatch:
                return None
            stored = {**stored, "pairs": 0}
        where = f"goes on after {stored['pairs']} pairs of its epoch" if stored["pairs"] else "begins an epoch"
        rank_zero_warn(
            f"The data is not that of the checkpoint: {', '.join(differing)}. The run {where}, but not bit for bit."
        )
        return stored

    def note(self, batch: Any) -> None:
        """Does nothing: Lightning counts the batches."""

    def state(self, trainer: Trainer) -> dict[str, Any]:
        """The epoch, and the number of its pairs already trained on."""
        loop: Any = trainer.fit_loop
        epochs = loop.epoch_progress.current
        progress = loop.epoch_loop.batch_progress
        # Between two epochs the batch count is still that of the first.
        if epochs.processed == epochs.started or progress.is_last_batch:
            return {"epoch": epochs.started, "pairs": 0, ACCUMULATE: trainer.accumulate_grad_batches}
        epoch, sampler = epochs.processed, self._sampler or self.sampler(None)
        before = sampler.resume_at[1] if sampler.resume_at[0] == epoch else 0
        batches = progress.current.processed - sampler.first_batch(epoch)
        done = before + batches * self.batch_size * self.ranks["num_replicas"]
        return {"epoch": epoch, "pairs": done, ACCUMULATE: trainer.accumulate_grad_batches}

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
        self._last: dict[int, Progress] = {}  # of each worker
        self._next_worker = 0
        self._told: collections.Counter[str] = collections.Counter()  # before the stream was opened anew

    @property
    def order(self) -> Order:
        """All that the order depends on."""
        return {
            "sources and weights": ", ".join(f"{one.place} ({one.weight:g})" for one in self.pairs.sources),
            "pairs in a batch of a process": self.batch_size,
            "number of processes": self.ranks["num_replicas"],
            "data.num_workers": max(self.num_workers, 1),
            "data.shuffle_buffer": self.pairs.buffer_size,
            "data.seed": self.seed,
        }

    def loader(self, trainer: Trainer | None, stored: State | None, **options: Any) -> DataLoader[PairBatch]:
        """The batches after a stored position. Each epoch goes on where the one before it ended.

        Raises:
            ValueError: If nothing ends the training.
        """
        if trainer is not None and trainer.max_steps < 0 and not isinstance(trainer.limit_train_batches, int):
            raise ValueError("data.streaming has no end: set trainer.max_steps or trainer.limit_train_batches.")
        if stored is not None and not self._last:
            own = stored["workers"][self.ranks["rank"]]
            self._last = {worker: Progress(worker, passes, rows, ()) for worker, (passes, rows) in own.items()}
            self._next_worker = stored["next_worker"]
        return batch_loader(self.pairs, None, seed=self.seed, before_each=self._plan, **options)

    def fitted(self, stored: State, differing: list[str], allow_mismatch: bool) -> State | None:
        """With ``allow_mismatch``, the beginning of the stream, where what the order depends on differs."""
        if not allow_mismatch:
            return None
        rank_zero_warn(f"The stream is not that of the checkpoint: {', '.join(differing)}. So it begins anew.")
        return {"workers": [{}] * self.ranks["num_replicas"], "next_worker": 0}

    def _plan(self) -> None:
        """Lets the stream go on after the last batch that was trained on. Batches read ahead are read again."""
        self._collect()
        self.pairs.plan(
            batch_size=self.batch_size,
            seed=self.seed,
            resume_at={worker: (progress.passes, progress.rows) for worker, progress in self._last.items()},
            first_worker=self._next_worker,
            **self.ranks,
        )

    def _collect(self) -> None:
        """Moves the counts of the workers to those of the run."""
        for worker, progress in self._last.items():
            self._told.update(dict(progress.told))
            self._last[worker] = progress._replace(told=())

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
        """Lines about the rows that this rank has read in this run. They are told once."""
        self._collect()
        found = report(self._told)
        self._told.clear()
        others = self.ranks["num_replicas"] - 1
        where = f" (on this process; {others} more read other rows)" if others else ""
        return [line + where for line in found]


Position = EpochPosition | StreamPosition


def fitted_position(position: Position | None, stored: State | None, trainer: Trainer | None) -> State | None:
    """A checkpoint's position as this run takes it.

    Raises:
        ValueError: If it does not fit, because what the order depends on differs.
    """
    if stored is None or position is None:
        return None
    if "batches" in stored:  # format 1 counted batches
        done = stored["batches"] * stored[PER_BATCH]
        stored = {name: value for name, value in stored.items() if name != "batches"} | {"pairs": done}
    order = position.order
    before = {name: value for name, value in stored.items() if name not in STATE}
    differing = [
        f"{name} was {value} and is now {order.get(name)}" for name, value in before.items() if order.get(name) != value
    ]
    if not differing:
        return stored
    allow_mismatch = getattr(trainer and trainer.lightning_module, "allow_mismatch", False)
    fitted = position.fitted(stored, differing, bool(allow_mismatch))
    if fitted is None:
        raise ValueError(
            f"The checkpoint's position in the training data does not fit this run: {', '.join(differing)}. If that is "
            "meant, set model.allow_mismatch=true: the epoch, or the stream, then begins anew."
        )
    return {name: value for name, value in fitted.items() if name in STATE} | dict(order)

"""Pairs and a sampler ──► the DataLoader of batches."""

import signal
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.pairs import PairDataset
from lit_dpo.data.sampler import EvalSampler, PairSampler
from lit_dpo.data.stream import PairStream


def batch_loader(
    pairs: PairDataset | PairStream,
    sampler: PairSampler | EvalSampler | None,
    *,
    num_workers: int,
    seed: int,
    pin_memory: bool,
    before_each: Callable[[], None] | None = None,
) -> DataLoader[PairBatch]:
    """The batches that a sampler chooses, or those of a stream.

    Args:
        pairs: The pairs.
        sampler: Yields the indices of each batch; None for a stream.
        num_workers: Number of processes that load batches in advance; 0 loads them in this process.
        seed: Seed of the workers.
        pin_memory: Whether batches lie in page-locked memory, from which they are copied to a GPU.
        before_each: Called before each iteration. Workers are then started anew for each.
    """
    # The sampler yields whole batches and the data set collates them: batch_size=None disables PyTorch's batching.
    return _Loader(
        before_each,
        pairs,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=_ignore_interrupts if num_workers else None,
        persistent_workers=num_workers > 0 and before_each is None,
        # Each iterator draws a seed. Drawn from the global generator, it would change the dropout of a resumed run.
        generator=torch.Generator().manual_seed(seed),
        pin_memory=pin_memory,
    )


class _Loader(DataLoader[PairBatch]):
    """A DataLoader that calls a function before each iteration."""

    def __init__(self, before_each: Callable[[], None] | None, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._before_each = before_each

    def __iter__(self) -> Any:
        if self._before_each is not None:
            self._before_each()
        return super().__iter__()


def _ignore_interrupts(worker: int) -> None:
    """Ignores Ctrl-C in a worker. The training process handles it and still needs its workers to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

"""Pairs and a sampler ──► the DataLoader of batches."""

import signal

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
) -> DataLoader[PairBatch]:
    """The batches that a sampler chooses, or those of a stream.

    Args:
        pairs: The pairs.
        sampler: Yields the indices of each batch; None for a stream.
        num_workers: Number of processes that load batches in advance; 0 loads them in this process.
        seed: Seed of the workers.
        pin_memory: Whether batches lie in page-locked memory, from which they are copied to a GPU.
    """
    # The sampler yields whole batches and the data set collates them: batch_size=None disables PyTorch's batching.
    return DataLoader(
        pairs,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=_ignore_interrupts if num_workers else None,
        persistent_workers=num_workers > 0,
        # Each iterator draws a seed. Drawn from the global generator, it would change the dropout of a resumed run.
        generator=torch.Generator().manual_seed(seed),
        pin_memory=pin_memory,
    )


def _ignore_interrupts(worker: int) -> None:
    """Ignores Ctrl-C in a worker. The training process handles it and still needs its workers to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

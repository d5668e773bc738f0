"""Pairs and tokens per second, and peak memory, of each optimizer step."""

import sys
import time

import torch
from lightning.pytorch import Trainer

from lit_dpo.training.step import OptimizerStep

NAMES = ("pairs_per_second", "tokens_per_second", "peak_memory_gb")


class Throughput:
    """Measures the time from the first batch of an optimizer step to its end, without evaluations between steps."""

    def __init__(self) -> None:
        self._start: float | None = None

    def start_batch(self) -> None:
        """Called before each batch."""
        if self._start is None:
            self._start = time.perf_counter()

    def end_step(self, trainer: Trainer, step: OptimizerStep) -> dict[str, float]:
        """The metrics of a complete step: pairs and tokens per second over all ranks, and this process's peak memory.

        Collective: every rank must call it.
        """
        assert self._start is not None, "a step has at least one batch"
        seconds = time.perf_counter() - self._start
        self._start = None
        pairs = sum(len(record.batch) for record in step.batches)
        tokens = sum(record.batch.input_ids.numel() for record in step.batches)
        if trainer.world_size > 1:
            counts = torch.tensor([pairs, tokens], dtype=torch.float64, device=trainer.strategy.root_device)
            pairs, tokens = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        return dict(zip(NAMES, (pairs / seconds, tokens / seconds, peak_memory(trainer) / 1e9), strict=True))


def peak_memory(trainer: Trainer) -> int:
    """Largest number of bytes that this process has allocated on its GPU or, without a GPU, held in memory."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # POSIX only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

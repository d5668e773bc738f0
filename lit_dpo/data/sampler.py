"""Which pairs, in which order, on which rank: a pure function of (seed, epoch, position)."""

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import DistributedSampler


class PairSampler(DistributedSampler[list[int]]):
    """Yields the indices of one rank's batches.

    Each epoch's order is a permutation by ``(seed, epoch)``. Global batch k is the k-th run of
    ``num_replicas * batch_size`` pairs of it, and each rank takes its own share: so two ranks with ``batch_size`` B
    train on what one process with 2·B trains on. A last, incomplete global batch is left out; the permutation leaves
    out other pairs each epoch. Being a ``DistributedSampler``, it is not replaced by Lightning's own.

    Args:
        dataset: The pairs; only their number matters.
        batch_size: Pairs in a batch of one rank.
        num_replicas: Number of ranks.
        rank: This rank.
        shuffle: Whether to permute.
        seed: Seed of the permutations.

    Raises:
        ValueError: If there are fewer pairs than one global batch.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.num_pairs = len(dataset)
        self.batch_size = batch_size
        self.resume_at = (-1, 0)  # epoch and batches of it that are done
        if len(self) == 0:
            raise ValueError(
                f"{self.num_pairs} training pairs do not fill one batch of data.batch_size={batch_size} on "
                f"{num_replicas} process(es). Lower data.batch_size or add pairs."
            )

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self.num_pairs // (self.batch_size * self.num_replicas)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.num_pairs))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_pairs, generator=generator).tolist()
        epoch, done = self.resume_at
        for batch in range(done if epoch == self.epoch else 0, len(self)):
            start = (batch * self.num_replicas + self.rank) * self.batch_size
            yield order[start : start + self.batch_size]


class EvalSampler(DistributedSampler[list[int]]):
    """Yields every pair once, in order, over all ranks; the last batches may be shorter. No pair is repeated.

    Args:
        dataset: The pairs; only their number matters.
        batch_size: Most pairs in a batch.
        num_replicas: Number of ranks.
        rank: This rank.

    Raises:
        ValueError: If there are fewer pairs than ranks.
    """

    def __init__(self, dataset: Sized, *, batch_size: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        if len(dataset) < num_replicas:
            raise ValueError(f"{len(dataset)} pairs to evaluate are fewer than the {num_replicas} processes.")
        self.batch_size = batch_size
        self.indices = range(rank, len(dataset), num_replicas)

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield list(self.indices[start : start + self.batch_size])

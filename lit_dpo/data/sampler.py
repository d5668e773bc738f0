"""Which pairs, in which order, on which rank: a pure function of (seed, epoch, position)."""

from collections.abc import Iterator, Sequence, Sized

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


class PairSampler(DistributedSampler[list[int]]):
    """Yields the indices of one rank's batches.

    Each epoch's order is a permutation by ``(seed, epoch)``. Global batch k is the k-th run of
    ``num_replicas * batch_size`` pairs of it, and each rank takes its own share: so two ranks with ``batch_size`` B
    train on what one process with 2·B trains on. The shares have as many tokens each as can be, for the ranks wait for
    one another. A last, incomplete global batch is left out; the permutation leaves out other pairs each epoch. Being a
    ``DistributedSampler``, it is not replaced by Lightning's own.

    Args:
        dataset: The pairs; their number matters, and on several ranks their ``num_tokens``, if they tell them.
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

    def order(self, epoch: int) -> Tensor:
        """All pairs, in the order of an epoch; every ``num_replicas * batch_size`` of them are a global batch."""
        if not self.shuffle:
            return torch.arange(self.num_pairs)
        return torch.randperm(self.num_pairs, generator=torch.Generator().manual_seed(self.seed + epoch))

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(self.epoch)
        epoch, done = self.resume_at
        size = self.num_replicas * self.batch_size
        for batch in range(done if epoch == self.epoch else 0, len(self)):
            pairs = order[batch * size : (batch + 1) * size].tolist()
            if self.num_replicas > 1 and hasattr(self.dataset, "num_tokens"):
                yield share(pairs, self.dataset.num_tokens(pairs), self.num_replicas)[self.rank]
            else:
                yield pairs[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]


def share(pairs: Sequence[int], num_tokens: Sequence[int], num_shares: int) -> list[list[int]]:
    """Deals pairs out in shares of as many pairs and, as near as can be, as many tokens: longest first.

    Example:
        >>> share([0, 1, 2, 3], num_tokens=[90, 80, 20, 10], num_shares=2)
        [[0, 3], [1, 2]]
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals = [0] * num_shares
    for tokens, pair in sorted(zip(num_tokens, pairs, strict=True), reverse=True):
        room = [number for number in range(num_shares) if len(shares[number]) < len(pairs) // num_shares]
        least = min(room, key=totals.__getitem__)
        shares[least].append(pair)
        totals[least] += tokens
    return shares


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

"""Samplers: which pairs each rank gets, and in which order. The order depends only on (seed, epoch, position)."""

from collections.abc import Iterator, Sequence, Sized

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, SequentialSampler


class PairSampler(DistributedSampler[list[int]], SequentialSampler):
    """Yields the indices of one rank's batches.

    ``(seed, epoch)`` determines the permutation of the pairs in each epoch. The permutation is cut into global batches
    of ``num_replicas * batch_size`` consecutive pairs, and each rank takes its share of every global batch. Two ranks
    with ``batch_size`` B therefore train on the same pairs as one process with 2·B. Shares have nearly equal numbers of
    tokens, because ranks wait for each other. An incomplete last global batch is left out; with shuffling, other pairs
    are left out in each epoch. Lightning does not replace this sampler, because it is a ``DistributedSampler`` and,
    for ``overfit_batches``, a ``SequentialSampler``.

    If the data set has ``parts`` with weights, an epoch has each pair of a part as often as its weight says.

    Args:
        dataset: The pairs. The sampler uses their number, their ``parts`` and, on several ranks, their ``num_tokens``,
            if available.
        batch_size: Number of pairs in a batch of one rank.
        num_replicas: Number of ranks.
        rank: Index of this rank.
        shuffle: Whether to permute the pairs.
        seed: Seed of the permutations.

    Raises:
        ValueError: If there are fewer pairs than one global batch, or if a weight leaves none of a source's pairs.
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
        self.parts = _parts(dataset)
        self.num_pairs = sum(round(weight * len(pairs)) for pairs, weight in self.parts)  # in an epoch
        self.batch_size = batch_size
        self.resume_at = (-1, 0)  # an epoch, and the number of its pairs already done
        for pairs, weight in self.parts:
            if round(weight * len(pairs)) == 0:
                raise ValueError(f"A source of {len(pairs)} pairs with weight {weight:g} gives none to an epoch.")
        if len(self) == 0:
            raise ValueError(
                f"{self.num_pairs} training pairs do not fill one batch of data.batch_size={batch_size} on "
                f"{num_replicas} process(es). Lower data.batch_size or add pairs."
            )

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, but none before that to resume in.

        Lightning sets the epoch before when a run resumes at the beginning of an epoch, and sets the right one later.
        By then, workers have been given the first batches.
        """
        super().set_epoch(max(epoch, self.resume_at[0]))

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        return self.num_pairs // (self.batch_size * self.num_replicas)

    def first_batch(self, epoch: int) -> int:
        """The index of the first batch of an epoch: not 0 if a run resumes in the middle of it.

        Batches are counted from the end, because those before may have had another size.
        """
        done = self.resume_at[1] if epoch == self.resume_at[0] else 0
        return len(self) - (self.num_pairs - done) // (self.batch_size * self.num_replicas)

    def order(self, epoch: int) -> Tensor:
        """The pairs of an epoch, in order. Each run of ``num_replicas * batch_size`` pairs is a global batch."""
        if all(weight == 1 for _, weight in self.parts):
            pairs = torch.arange(self.num_pairs)
        else:
            pairs = torch.cat([self._drawn(part, weight, epoch) for part, weight in self.parts])
        if not self.shuffle:
            return pairs
        return pairs[torch.randperm(self.num_pairs, generator=torch.Generator().manual_seed(self.seed + epoch))]

    def _drawn(self, pairs: Tensor, weight: float, epoch: int) -> Tensor:
        """The pairs of a part that an epoch sees. Each epoch goes on where the one before it ended."""
        number = round(weight * len(pairs))
        if self.shuffle:
            pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(self.seed))]
        return pairs[torch.arange(epoch * number, (epoch + 1) * number) % len(pairs)]

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        order = self.order(self.epoch)
        order = order[self.resume_at[1] :] if self.epoch == self.resume_at[0] else order
        size = self.num_replicas * self.batch_size
        for batch in range(len(order) // size):
            pairs = order[batch * size : (batch + 1) * size].tolist()
            if self.num_replicas > 1 and hasattr(self.dataset, "num_tokens"):
                yield share(pairs, self.dataset.num_tokens(pairs), self.num_replicas)[self.rank]
            else:
                yield pairs[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]


def _parts(dataset: Sized) -> list[tuple[Tensor, float]]:
    """The pairs of each part of a data set, and its weight."""
    parts = getattr(dataset, "parts", ())
    if all(part.weight == 1 for part in parts):
        return [(torch.arange(len(dataset)), 1.0)]
    numbers = torch.from_numpy(dataset.part_numbers())  # type: ignore[attr-defined]
    return [((numbers == number).nonzero()[:, 0], part.weight) for number, part in enumerate(parts)]


def share(pairs: Sequence[int], num_tokens: Sequence[int], num_shares: int) -> list[list[int]]:
    """Splits pairs into shares of equal numbers of pairs and nearly equal numbers of tokens.

    Greedy: from longest to shortest, each pair goes to the share that has the fewest tokens and still has room.

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


class EvalSampler(DistributedSampler[list[int]], SequentialSampler):
    """Yields every pair exactly once, in order, over all ranks. The last batch of a rank may be shorter.

    Args:
        dataset: The pairs. Only their number is used.
        batch_size: Maximum number of pairs in a batch.
        num_replicas: Number of ranks.
        rank: Index of this rank.

    Raises:
        ValueError: If there are fewer pairs than ranks.
    """

    def __init__(self, dataset: Sized, *, batch_size: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        if len(dataset) < num_replicas:
            raise ValueError(
                f"{len(dataset)} evaluation pairs are too few for {num_replicas} processes: each needs one."
            )
        self.batch_size = batch_size
        self.indices = range(rank, len(dataset), num_replicas)

    def __len__(self) -> int:
        """Number of batches on this rank."""
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        for start in range(0, len(self.indices), self.batch_size):
            yield list(self.indices[start : start + self.batch_size])

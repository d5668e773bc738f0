"""A batch of a million pairs costs what one of a thousand costs, in time and in memory."""

import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from lit_dpo.data.pairs import PairDataset, Part
from lit_dpo.data.sampler import PairSampler


class Endless:
    """Stands for the cached columns: rows made from their numbers, none of them stored."""

    data: "Endless"

    def __init__(self) -> None:
        self.data = self

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = [index % 97 + 1] * 60
        parts = {
            "prompt": tokens[:20],
            "chosen": tokens,
            "rejected": tokens[:40],
            "between": [],
            "scores": [],
            "runs": [],
        }
        return {**parts, "row": index, "key": b"key"}

    def column(self, name: str) -> "Endless":
        return self

    def take(self, rows: Sequence[int]) -> Any:
        return pa.array([120 for _ in rows])


def measure(pairs: int) -> tuple[float, float]:
    """Seconds a batch, at best, and the most bytes in use."""
    dataset = PairDataset(Endless(), range(pairs), [Part("endless")])  # type: ignore[arg-type]
    tracemalloc.start()
    batches = iter(PairSampler(dataset, batch_size=4, num_replicas=2))
    seconds = []
    for _ in range(60):
        start = time.perf_counter()
        dataset[next(batches)]
        seconds.append(time.perf_counter() - start)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return min(seconds), peak


def test_time_and_memory_of_a_batch_do_not_grow_with_the_data() -> None:
    (few_seconds, few_bytes), (many_seconds, many_bytes) = measure(1_000), measure(1_000_000)
    assert many_seconds < 2 * few_seconds
    assert many_bytes - few_bytes < 2**20  # the order of an epoch is a tensor, 8 bytes a pair

"""Tokenized pairs on disk: by index, as batches, split in two, and compared by their digests."""

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.tokenization import TokenizedPair

if TYPE_CHECKING:
    from datasets import Dataset


class Part(NamedTuple):
    """The pairs of one source, in a data set of several."""

    source: str  # name of the source, for messages
    name: str = ""  # name under which its pairs are measured; empty for the only source
    weight: float = 1.0  # how often an epoch sees each pair
    start: int = 0  # its first row in the columns


class PairDataset(torch.utils.data.Dataset[PairBatch]):
    """Tokenized pairs. Indexing with a list of indices gives a batch.

    Args:
        columns: The cached data set. Its columns are those of ``preparation.cache_features``.
        indices: Row numbers of the pairs in ``columns``, in the order to use.
        parts: The sources, in the order of their rows in ``columns``.
    """

    def __init__(self, columns: "Dataset", indices: Sequence[int], parts: Sequence[Part]) -> None:
        self.columns, self.indices, self.parts = columns, indices, tuple(parts)
        self._starts = [part.start for part in parts]

    @classmethod
    def concatenate(cls, datasets: Sequence["PairDataset"]) -> "PairDataset":
        """The pairs of several data sets, one after another. Nothing is copied."""
        from datasets import concatenate_datasets

        if len(datasets) == 1:
            return datasets[0]
        columns = concatenate_datasets([dataset.columns for dataset in datasets])
        starts = np.cumsum([0, *(len(dataset.columns) for dataset in datasets)]).tolist()
        indices = [np.asarray(one.indices, np.int64) + start for one, start in zip(datasets, starts, strict=False)]
        moved = [
            part._replace(start=part.start + start)
            for one, start in zip(datasets, starts, strict=False)
            for part in one.parts
        ]
        return cls(columns, index_array(np.concatenate(indices)), moved)

    @property
    def source(self) -> str:
        """Names of the sources, for messages."""
        return ", ".join(part.source for part in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts to measure apart; none if there is one source."""
        return tuple(part.name for part in self.parts) if len(self.parts) > 1 else ()

    def part_numbers(self) -> np.ndarray:
        """The number of each pair's part, (P,)."""
        return np.searchsorted(self._starts, np.asarray(self.indices, np.int64), "right") - 1

    def mixed(self) -> "PairDataset":
        """The same pairs with those of the parts spread evenly, so that the first batches have some of each."""
        if len(self.parts) < 2:
            return self
        numbers = self.part_numbers()
        place = np.empty(len(self))
        for number in range(len(self.parts)):
            count = int((numbers == number).sum())
            place[numbers == number] = (np.arange(count) + 0.5) / max(count, 1)
        return PairDataset(
            self.columns, index_array(np.asarray(self.indices)[np.argsort(place, kind="stable")]), self.parts
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: list[int]) -> PairBatch:
        return PairBatch.from_pairs([self.pair(index) for index in indices])

    def pair(self, index: int) -> TokenizedPair:
        """The tokenized pair at ``index``."""
        number = self.indices[index]
        row, group = self.columns[number], bisect_right(self._starts, number) - 1
        parts = (row["prompt"], row["chosen"], row["rejected"], self.parts[group].source, row["row"])
        runs = tuple(map(tuple, row["runs"]))
        return TokenizedPair(*parts, tuple(row["between"]), tuple(row["scores"]), runs, group, row["key"])

    def require_scores(self, reader: str) -> None:
        """Checks that every pair has scores, and that the chosen score is not below the rejected score.

        Args:
            reader: Name of the objective that uses the scores, for the message.

        Raises:
            ValueError: If a pair has no scores, or if its rejected response has the higher score.
        """
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        scores = self._taken("scores")
        number = pc.list_value_length(scores).to_numpy(zero_copy_only=False)
        wrong = number == 0
        if not wrong.any():
            best, worst = (
                pc.list_flatten(scores).to_numpy()[place] for place in (number.cumsum() - number, number.cumsum() - 1)
            )
            wrong = best < worst
        if not wrong.any():
            return
        first = int(wrong.argmax())
        row = self.place(first)
        if number[first] == 0:
            raise ValueError(
                f"{row}: the row has no scores, but {reader} needs them. Give each row score_chosen and "
                "score_rejected, or a list of responses with scores."
            )
        raise ValueError(
            f"{row}: the chosen response has the score {best[first]:g} and the rejected one {worst[first]:g}; {reader} "
            "takes no pair whose scores contradict its order. Leave such rows out."
        )

    def place(self, index: int) -> str:
        """Source and row number of a pair, for messages."""
        number = int(self.indices[index])
        return f"{self.parts[bisect_right(self._starts, number) - 1].source}, row {self.columns[number]['row']}"

    def origins(self) -> list[tuple[int, int]]:
        """Number of the source, and row number in it, of each pair, P entries."""
        return list(zip(self.part_numbers().tolist(), self._taken("row").to_pylist(), strict=True))

    def groups(self) -> list[str]:
        """Value of the column to group by of each pair, P entries; none if no pair has one."""
        found: list[str] = self._taken("group").to_pylist()
        return found if any(found) else []

    def score_differences(self) -> np.ndarray:
        """Score of the best response in the data minus that of the worst, (P,); NaN for a pair without scores."""
        scores = self._taken("scores").to_pylist()
        return np.array([one[0] - one[-1] if one else np.nan for one in scores])

    def keys(self, indices: Sequence[int]) -> list[bytes]:
        """``TokenizedPair.key`` of the pairs at ``indices``. Their tokens are not read."""
        return self._column("key", indices)

    def num_tokens(self, indices: Sequence[int]) -> list[int]:
        """Number of tokens, prompt and responses together, of each of the pairs at ``indices``."""
        return self._column("num_tokens", indices)

    def prompt_lengths(self) -> np.ndarray:
        """Number of prompt tokens of each pair, (P,)."""
        import pyarrow.compute as pc

        lengths = pc.list_value_length(self.columns.data.column("prompt"))
        return np.asarray(lengths.to_numpy(), np.int64)[np.asarray(self.indices, np.int64)]

    def _column(self, name: str, indices: Sequence[int]) -> list[Any]:
        rows = np.array([self.indices[index] for index in indices], np.int64)
        return self.columns.data.column(name).take(rows).to_pylist()  # type: ignore[no-any-return]

    def prompt(self, index: int) -> tuple[str, list[int]]:
        """The text of the last user turn in a pair's prompt, and the token ids of the whole prompt."""
        row = self.columns[self.indices[index]]
        return row["question"], row["prompt"]

    def split_off(self, size: float, seed: int) -> tuple["PairDataset", "PairDataset"]:
        """Splits off ``size`` pairs at random. Pairs with the same prompt stay together.

        Args:
            size: Number of pairs to split off, or their share if below 1.
            seed: Seed of the random choice.

        Returns:
            The remaining pairs, and the pairs that were split off.

        Raises:
            ValueError: If either part would be empty.
        """
        # Groups of the same prompt, numbered in the order of their first pairs
        _, first, group = np.unique(self.digests("prompt_key"), return_index=True, return_inverse=True)
        group = np.argsort(np.argsort(first))[group]
        wanted = round(size * len(self)) if size < 1 else int(size)
        order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed)).numpy()
        number = int(np.searchsorted(np.bincount(group)[order].cumsum(), wanted)) + 1
        held_out = np.isin(group, order[:number])
        if not 0 < held_out.sum() < len(self):
            raise ValueError(
                f"data.val_size={size} would hold out {held_out.sum()} of the {len(self)} pairs of {self.source}."
            )
        return self.select(~held_out), self.select(held_out)

    def select(self, mask: np.ndarray) -> "PairDataset":
        """The pairs for which the mask, (P,), is true."""
        return PairDataset(self.columns, index_array(np.asarray(self.indices)[mask]), self.parts)

    def digests(self, name: str) -> np.ndarray:
        """A column of 16-byte digests of all pairs, (P,): ``key``, ``swapped_key`` or ``prompt_key``."""
        return as_digests(self._taken(name))

    def _taken(self, name: str) -> Any:
        """A column of all pairs, as an Arrow array."""
        return self.columns.data.column(name).take(np.asarray(self.indices, np.int64)).combine_chunks()


def as_digests(column: Any) -> np.ndarray:
    """An Arrow array of 16-byte digests as NumPy's, without a copy of each."""
    import pyarrow as pa

    fixed = column.cast(pa.binary(16))
    return np.frombuffer(fixed.buffers()[1], "S16", len(fixed), 16 * fixed.offset)


def index_array(indices: np.ndarray) -> "array[int]":
    """Row numbers as Python's compact array, whose items are plain integers."""
    return array("q", indices.astype(np.int64).tobytes())

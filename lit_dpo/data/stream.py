"""Sources that exceed the disk ──► batches without end. Rows are shuffled in a buffer and tokenized on the way."""

import collections
import itertools
import json
import lzma
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.file_kinds import builder_of, open_text
from lit_dpo.data.filters import LEAKED
from lit_dpo.data.preparation import Preparation
from lit_dpo.data.tokenization import TokenizedPair

ARROW_FILE = b"ARROW1"  # how an Arrow file begins that is not a stream
ROWS_AT_ONCE = 1024  # of a columnar file


class StreamSource(NamedTuple):
    """A source to stream."""

    place: str  # its name, for messages
    rows: Any  # names of files of one kind, or a datasets.Dataset
    prepare: Preparation
    weight: float = 1.0  # how many of its rows come for one of a source of weight 1


class Progress(NamedTuple):
    """How far one shard of a stream is."""

    worker: int  # of the rank
    passes: int  # over all sources that are complete
    rows: int  # taken from the buffer since the pass began
    told: tuple[tuple[str, int], ...]  # what is to be told, and of how many rows since the stream was opened


@dataclass(frozen=True)
class StreamBatch(PairBatch):
    """A batch of a stream, with how far its shard is after it."""

    progress: Progress = field(default=Progress(0, 0, 0, ()))


class PairStream(IterableDataset[PairBatch]):
    """Batches without end. Their order depends only on what ``plan`` is given and on the size of the buffer.

    Each worker of each rank is a shard. A shard takes every n-th row of each source, so no row is trained on twice in a
    pass. When all sources end, the next pass begins, in another order. Resuming reads the rows before the position
    again, but tokenizes none of them.

    Args:
        sources: The sources. Their rows are mixed by weight.
        buffer_size: Number of rows of each shard among which the next one is drawn; 1 keeps the order.
        held_out: Digests of prompts that are held out, (N,); pairs with such a prompt are left out.

    Raises:
        ValueError: While iterating: if a row cannot be read, or if a whole pass has no usable pair.
    """

    def __init__(self, sources: Sequence[StreamSource], buffer_size: int, held_out: np.ndarray | None = None) -> None:
        self.sources, self.buffer_size = list(sources), buffer_size
        # NumPy's texts of bytes end before trailing zeros
        self.held_out = frozenset(() if held_out is None else held_out.tolist())
        self.needs_scores: str | None = None  # name of the objective that does
        self.plan(batch_size=1, seed=0)

    @property
    def source(self) -> str:
        """Names of the sources, for messages."""
        return ", ".join(source.place for source in self.sources)

    def plan(
        self,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_replicas: int = 1,
        resume_at: Mapping[int, tuple[int, int]] | None = None,
        first_worker: int = 0,
    ) -> None:
        """Sets which batches come, and in which order.

        Args:
            batch_size: Number of pairs in a batch.
            seed: Seed of the order.
            rank: Index of this rank.
            num_replicas: Number of ranks.
            resume_at: For each worker, passes that are done, and rows of the next pass.
            first_worker: Worker whose batch comes first.
        """
        self.batch_size, self.seed, self.rank, self.num_replicas = batch_size, seed, rank, num_replicas
        self.resume_at, self.first_worker = dict(resume_at or {}), first_worker

    def require_scores(self, reader: str) -> None:
        """Makes a row without scores stop the stream.

        Args:
            reader: Name of the objective that uses the scores, for the message.
        """
        self.needs_scores = reader

    def __iter__(self) -> Iterator[PairBatch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        own = (worker + self.first_worker) % workers
        shard, shards = self.rank * workers + own, self.num_replicas * workers
        passes, done = self.resume_at.get(own, (0, 0))
        told: collections.Counter[str] = collections.Counter()
        pairs: list[TokenizedPair] = []
        while True:
            found, taken = 0, 0
            for taken, (source, number, load) in enumerate(self._shuffled(passes, shard, shards), 1):
                if taken <= done:
                    found = 1  # a pass that was begun had its pairs
                    continue
                pair = self._pair(source, number, load(), told)
                if pair is None:
                    continue
                found += 1
                pairs.append(pair)
                if len(pairs) == self.batch_size:
                    batch = PairBatch.from_pairs(pairs)
                    state = Progress(own, passes, taken, tuple(sorted(told.items())))
                    yield StreamBatch(**vars(batch), progress=state)
                    pairs = []
            if not found:
                share = f"share {shard + 1} of {shards}"
                raise ValueError("\n".join([f"{self.source}: {share} has no usable pair.", *report(told)]))
            passes, done = passes + 1, 0

    def first_rows(self) -> list[str]:
        """Lines about the first row of each source: its format, and the columns that are not read.

        Raises:
            ValueError: If it cannot be read.
        """
        lines = []
        for source in self.sources:
            for number, load in itertools.islice(_rows(source.rows, source.place, 0, 1), 1):
                columns = source.prepare.row(load(), number)
                lines.append(f"{source.place}: its first row is read as: {columns['format']}")
                if columns["unread"]:
                    lines.append(f"{source.place}: columns that are not read: {', '.join(sorted(columns['unread']))}")
        return lines

    def _pair(
        self, source: StreamSource, number: int, row: dict[str, Any], told: "collections.Counter[str]"
    ) -> TokenizedPair | None:
        """The pair of a row; None if it is left out."""
        columns = source.prepare.row(row, number)
        reason = columns["reason"]
        if not reason and columns["prompt_key"].rstrip(b"\0") in self.held_out:
            reason = LEAKED
        told.update(f"{source.place}: column that is not read: {name}" for name in columns["unread"])
        if reason:
            told[f"{source.place}: left out: {reason}"] += 1
            return None
        told.update(f"{source.place}: {note}" for note in columns["notes"])
        scores = tuple(columns["scores"])
        if self.needs_scores and (not scores or scores[0] < scores[-1]):
            what = "has no scores" if not scores else "has scores that contradict its order"
            raise ValueError(f"{source.place}, row {number}: the row {what}, but {self.needs_scores} needs them.")
        parts = (columns["prompt"], columns["chosen"], columns["rejected"], source.place, number)
        runs = tuple(map(tuple, columns["runs"]))
        return TokenizedPair(
            *parts, tuple(columns["between"]), scores, runs, self.sources.index(source), columns["key"]
        )

    def _shuffled(self, passes: int, shard: int, shards: int) -> Iterator[tuple[StreamSource, int, Callable[[], Any]]]:
        """The rows of a pass, each drawn from a buffer of those that follow."""
        draw = random.Random(f"{self.seed} {passes} {shard}")  # noqa: S311  not for cryptography
        buffer: list[tuple[StreamSource, int, Callable[[], Any]]] = []
        for row in self._mixed(shard, shards):
            if len(buffer) < self.buffer_size:
                buffer.append(row)
                continue
            place = draw.randrange(len(buffer))
            yield buffer[place]
            buffer[place] = row
        draw.shuffle(buffer)
        yield from buffer

    def _mixed(self, shard: int, shards: int) -> Iterator[tuple[StreamSource, int, Callable[[], Any]]]:
        """The rows of all sources in turns, by weight, until all have ended."""
        left = {number: _rows(one.rows, one.place, shard, shards) for number, one in enumerate(self.sources)}
        due = dict.fromkeys(left, 0.0)  # rows that each source is behind its share
        while left:
            total = sum(self.sources[number].weight for number in left)
            for number in left:
                due[number] += self.sources[number].weight / total
            number = max(left, key=due.__getitem__)
            row = next(left[number], None)
            if row is None:
                del left[number]
            else:
                due[number] -= 1
                yield (self.sources[number], *row)


def report(told: Mapping[str, int]) -> list[str]:
    """Lines about the rows of a stream.

    Args:
        told: What is to be told, and of how many rows, as in ``Progress``.
    """
    return [f"{what} ({count} row{'s'[: count != 1]})" for what, count in sorted(told.items())]


def _rows(rows: Any, place: str, shard: int, shards: int) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
    """The rows of one shard, each with its number and a function that gives it. Other rows are not parsed."""
    if not isinstance(rows, list):
        for number in range(shard, len(rows), shards):
            yield number, partial(rows.__getitem__, number)
        return
    number = 0
    for file in rows:
        try:
            kind = builder_of(file)
            if kind == "json":
                with open_text(file) as text:
                    for line_number, line in enumerate(text, 1):
                        if not line.strip():
                            continue
                        if line_number == 1 and line.startswith("["):
                            raise ValueError("it is one list, and a stream takes a row in each line")
                        if number % shards == shard:
                            yield number, partial(_parsed, f"{place}: {file}, line {line_number}", line)
                        number += 1
                continue
            for table in _tables(file, kind):
                own = list(range((shard - number) % shards, len(table), shards))
                for at in own:
                    yield number + at, partial(_row_of, table, at)
                number += len(table)
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(f"{place}: {file} cannot be read: {str(error).splitlines()[0]:.200}") from error


def _parsed(place: str, line: str) -> dict[str, Any]:
    """The row in a line of a file of JSON lines."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}, is not JSON: {error.msg} at character {error.pos + 1}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}, is no object with the columns of a row.")
    return row


def _row_of(table: Any, at: int) -> dict[str, Any]:
    row: dict[str, Any] = table.slice(at, 1).to_pylist()[0]
    return row


def _tables(file: str, kind: str | None) -> Iterator[Any]:
    """The rows of a columnar file, some at once."""
    import fsspec
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with fsspec.open(file, "rb").open() as opened:
        if kind == "parquet":
            batches = pq.ParquetFile(opened).iter_batches(ROWS_AT_ONCE)
        else:
            is_file = opened.read(len(ARROW_FILE)) == ARROW_FILE
            opened.seek(0)
            reader = pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            yield pa.Table.from_batches([batch])

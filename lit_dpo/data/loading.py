"""Names of sources and splits ──► tokenized pairs for training and held-out pairs, with a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lit_dpo.data.encoding import Encoder
from lit_dpo.data.filters import Filters
from lit_dpo.data.findings import Finding, leave_out, leave_out_leaks
from lit_dpo.data.formats import Reader
from lit_dpo.data.mixture import Source
from lit_dpo.data.pairs import PairDataset, Part
from lit_dpo.data.preparation import OnBadRow, Preparation, prepare_pairs
from lit_dpo.data.rendering import ChatTemplate
from lit_dpo.data.sources import EVAL_SPLITS, TRAIN_SPLITS, SplitNotFoundError, load_rows, stream_rows
from lit_dpo.data.stream import PairStream, StreamSource
from lit_dpo.data.tokenization import Truncation
from lit_dpo.files.console import library_bars

MOST_GROUPS = 100  # of held-out pairs


class Loaded(NamedTuple):
    """Training pairs and held-out pairs, where they were asked for, and what is to be told of them."""

    train: PairDataset | None
    val: PairDataset | None
    report: list[str]  # lines of text
    findings: list[Finding]  # about the training pairs, beside others
    rows: list[Any]  # those of each source, first of the training pairs
    held_out_findings: Sequence[Finding] = ()  # about the held-out pairs
    stream: PairStream | None = None  # the training pairs, if they are streamed


@dataclass(frozen=True)
class PairLoading:
    """Loads and tokenizes the pairs of a run. For the arguments see ``PreferenceDataModule``.

    Raises:
        ValueError: If an argument is outside its range, or if arguments contradict one another.
    """

    sources: list[Source]
    val_sources: list[Source] | None
    val_split: str | None
    val_size: float | None
    seed: int
    truncation: Truncation
    reader: Reader
    filters: Filters
    on_bad_row: OnBadRow
    num_proc: int | None
    buffer_size: int | None  # of a stream; None for pairs on disk
    template: Mapping[str, Any] = field(default_factory=dict)  # options of ChatTemplate

    def __post_init__(self) -> None:
        if self.val_size is not None and (self.val_sources is not None or self.val_split is not None):
            raise ValueError("data.val_size takes pairs from the training split: it excludes val_source and val_split.")
        if self.val_size is not None and self.val_size <= 0:
            raise ValueError(f"data.val_size must be positive, not {self.val_size}.")
        if self.buffer_size is not None:
            self._check_stream(self.buffer_size)
        if self.reader.max_responses < 2:
            raise ValueError(f"data.max_responses must be at least 2, not {self.reader.max_responses}.")

    def _check_stream(self, buffer_size: int) -> None:
        """Refuses what needs all pairs at once."""
        if buffer_size < 1:
            raise ValueError(f"data.shuffle_buffer must be at least 1, not {buffer_size}.")
        if self.val_size is not None:
            raise ValueError("data.streaming: pairs cannot be split off a stream. Set val_source or val_split.")
        whole = {"duplicates", "contradictions"} & {
            name for name, value in vars(self.filters).items() if value == "drop"
        }
        whole |= {"near_duplicates"} if self.filters.near_duplicates is not None else set()
        if whole:
            names = ", ".join(f"data.filters.{name}" for name in sorted(whole))
            raise ValueError(f"data.streaming: {names} would need all pairs at once.")

    def load(self, tokenizer: PreTrainedTokenizerBase, *, trains: bool, evaluates: bool, progress_bar: bool) -> Loaded:
        """Loads the held-out pairs and, with ``trains``, the training pairs.

        Args:
            tokenizer: The tokenizer, with its chat template.
            trains: Whether training pairs are needed.
            evaluates: Whether held-out pairs are needed. If not, it is no error if there are none.
            progress_bar: Whether to show progress bars.

        Raises:
            ValueError: If held-out pairs are needed, and nothing says which they are.
        """
        template = ChatTemplate(tokenizer, **self.template)
        prepare = partial(self._pairs, template, progress_bar)
        train: PairDataset | None = None
        report: list[str] = []
        findings: list[Finding] = []
        rows: list[Any] = []
        if (trains and self.buffer_size is None) or self.val_size is not None:
            found = [prepare(source, source.split, TRAIN_SPLITS) for source in self.sources]
            train, report, findings = self._joined(found, rows, progress_bar)
        if self.val_size is not None:
            assert train is not None
            train, val = train.split_off(self.val_size, self.seed)
            self._check_groups(val, rows)
            train, leaks = leave_out_leaks(train, val, self.filters, progress_bar)  # prompts that are nearly the same
            return Loaded(train, val.mixed(), [*report, *map(str, leaks)], findings + leaks, rows)
        held_out, absent = [], []
        for source in self.val_sources or self.sources:
            # A separate val_source may be a single file, with only the split "train": then all of it is held out.
            names = EVAL_SPLITS if self.val_sources is None else (*EVAL_SPLITS, "train")
            split = (source.split if self.val_sources else None) or self.val_split
            try:
                held_out.append(prepare(source, split, names))
            except SplitNotFoundError as error:
                absent.append(f"No held-out pairs: {error}")
        if absent and evaluates and not (held_out and self.val_sources is None):
            raise ValueError(
                f"{absent[0]} Set data.val_source, data.val_split or data.val_size. To train without them, set "
                "trainer.limit_val_batches=0."
            )
        if not held_out:
            report.append(f"{absent[0]} None are needed, because trainer.limit_val_batches=0.")
            stream = self._stream(template, None) if trains and self.buffer_size is not None else None
            report += [] if stream is None else stream.first_rows()
            return Loaded(train, None, report, findings, rows, stream=stream)
        val, more, of_held_out = self._joined(held_out, rows, progress_bar)
        self._check_groups(val, rows)
        report += absent + more
        if trains and self.buffer_size is not None:
            stream = self._stream(template, val)
            report = [*stream.first_rows(), *report]
            return Loaded(None, val.mixed(), report, findings, rows, of_held_out, stream)
        if train is not None:
            train, leaks = leave_out_leaks(train, val, self.filters, progress_bar)
            report += map(str, leaks)
            findings += leaks
        return Loaded(train, val.mixed(), report, findings, rows, of_held_out)

    def _pairs(
        self, template: ChatTemplate, bar: bool, source: Source, split: str | None, defaults: tuple[str, ...]
    ) -> tuple[PairDataset, list[str], Any]:
        """The pairs of one source, a report, and the rows."""
        where = (source.source, split, defaults, source.subset, source.revision)
        with library_bars(bar, "datasets"):
            rows, place = load_rows(*where, one_split=self.buffer_size is not None)
        place = source.place or place
        options: dict[str, Any] = {"on_bad_row": self.on_bad_row, "num_proc": self.num_proc, "progress_bar": bar}
        reader = replace(self.reader, **source.of_rows)
        pairs, report = prepare_pairs(rows, place, template, self.truncation, reader, self.filters, **options)
        pairs.parts = (Part(place, source.name, source.weight),)
        return pairs, report, rows

    def _check_groups(self, val: PairDataset, rows: list[Any]) -> None:
        """Checks that the column to group by is there, and groups.

        Raises:
            ValueError: If no held-out pair has a value in it, or if there are too many values.
        """
        column = self.reader.group_by
        if column is not None and not val.groups():
            raise ValueError(
                f"data.group_by={column}: no held-out pair has a value in a column of this name. The columns are "
                f"{', '.join(sorted({name for source in rows for name in source.column_names}))}."
            )
        number = len(set(val.groups())) if column is not None else 0
        if number > MOST_GROUPS:
            raise ValueError(
                f"data.group_by={column}: the held-out pairs have {number:,} different values. Name a column with "
                f"{MOST_GROUPS} at most: a group of few pairs tells nothing."
            )

    def _stream(self, template: ChatTemplate, held_out: PairDataset | None) -> PairStream:
        """The training pairs, without those whose prompt is held out."""
        encode, found = Encoder(template.tokenizer), []
        for source in self.sources:
            rows, place = stream_rows(source.source, source.split, TRAIN_SPLITS, source.subset, source.revision)
            place = source.place or place
            reader = replace(self.reader, **source.of_rows)
            options = (template, encode, self.truncation, reader, self.filters, self.on_bad_row)
            found.append(StreamSource(place, rows, Preparation(place, *options), source.weight))
        drops = held_out is not None and self.filters.leaks == "drop"
        assert self.buffer_size is not None
        return PairStream(found, self.buffer_size, held_out.digests("prompt_key") if held_out and drops else None)

    def _joined(
        self, found: list[tuple[PairDataset, list[str], Any]], rows: list[Any], bar: bool
    ) -> tuple[PairDataset, list[str], list[Finding]]:
        """The pairs of all sources, without those left out for what others are. Adds the sources' rows to ``rows``."""
        rows += (own for _, _, own in found)
        pairs, findings = leave_out(PairDataset.concatenate([pairs for pairs, _, _ in found]), self.filters, bar)
        return pairs, [*(line for _, lines, _ in found for line in lines), *map(str, findings)], findings


def template_text(given: str) -> str:
    """A chat template that is given as text or as the name of its file.

    Raises:
        FileNotFoundError: If it looks like the name of a file, and there is no such file.
    """
    if "{" in given or "\n" in given:
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data.chat_template={given} is neither a template nor a file.")
    return path.read_text(encoding="utf-8")

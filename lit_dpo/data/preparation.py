"""Rows ──► tokenized pairs on disk. Rows are read, tokenized and truncated once; left-out pairs are reported."""

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.filters import Action, Filters
from lit_dpo.data.formats import Reader, Reading, RowError
from lit_dpo.data.rendering import ChatTemplate, RejectedByTemplateError
from lit_dpo.data.tokenization import TokenizedPair, Truncation, tokenize
from lit_dpo.files.cache import cache_dir
from lit_dpo.files.console import library_bars

if TYPE_CHECKING:
    from datasets import Dataset, Features

MOST_REASONS = 20  # that are told in a line each; the messages of a template may differ from row to row
OnBadRow: TypeAlias = Literal["stop", "drop"]
FORMAT_VERSION = 4  # increment when the meaning of the cached columns changes


class PairDataset(torch.utils.data.Dataset[PairBatch]):
    """Tokenized pairs. Indexing with a list of indices gives a batch.

    Args:
        columns: The cached data set. Its columns are those of ``cache_features``.
        indices: Row numbers of the pairs in ``columns``, in the order to use.
        source: Name of the data source, for messages.
    """

    def __init__(self, columns: "Dataset", indices: Sequence[int], source: str) -> None:
        self.columns, self.indices, self.source = columns, indices, source

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: list[int]) -> PairBatch:
        return PairBatch.from_pairs([self.pair(index) for index in indices])

    def pair(self, index: int) -> TokenizedPair:
        """The tokenized pair at ``index``."""
        row = self.columns[self.indices[index]]
        parts = (row["prompt"], row["chosen"], row["rejected"], self.source, row["row"])
        runs = tuple(map(tuple, row["runs"]))
        return TokenizedPair(*parts, tuple(row["between"]), tuple(row["scores"]), runs)

    def require_scores(self, reader: str) -> None:
        """Checks that every pair has scores, and that the chosen score is not below the rejected score.

        Args:
            reader: Name of the objective that uses the scores, for the message.

        Raises:
            ValueError: If a pair has no scores, or if its rejected response has the higher score.
        """
        everything = range(len(self))
        for row, scores in zip(self._column("row", everything), self._column("scores", everything), strict=True):
            if not scores:
                raise ValueError(
                    f"{self.source}, row {row}: the row has no scores, but {reader} needs them. Give each row "
                    "score_chosen and score_rejected, or a list of responses with scores."
                )
            if scores[0] < scores[-1]:
                raise ValueError(
                    f"{self.source}, row {row}: the chosen response has the score {scores[0]:g} and the rejected one "
                    f"{scores[-1]:g}; {reader} takes no pair whose scores contradict its order. Leave such rows out."
                )

    def keys(self, indices: Sequence[int]) -> list[bytes]:
        """``TokenizedPair.key`` of the pairs at ``indices``. Their tokens are not read."""
        return self._column("key", indices)

    def num_tokens(self, indices: Sequence[int]) -> list[int]:
        """Number of tokens, prompt and responses together, of each of the pairs at ``indices``."""
        return self._column("num_tokens", indices)

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
        return PairDataset(self.columns, _index_array(np.asarray(self.indices)[mask]), self.source)

    def digests(self, name: str) -> np.ndarray:
        """A column of 16-byte digests of all pairs, (P,): ``key``, ``swapped_key`` or ``prompt_key``."""
        column = self.columns.data.column(name).take(np.asarray(self.indices, np.int64)).combine_chunks()
        return np.frombuffer(b"".join(column.to_pylist()), "S16")


def cache_features() -> "Features":
    """Names and types of the columns of the cached data set."""
    from datasets import Features, Value
    from datasets import Sequence as ListOf

    return Features(
        {
            "prompt": ListOf(Value("int32")),
            "chosen": ListOf(Value("int32")),
            "rejected": ListOf(Value("int32")),
            "between": ListOf(ListOf(Value("int32"))),  # the other responses of a ranked list
            "runs": ListOf(ListOf(Value("int32"))),  # TokenizedPair.runs
            "scores": ListOf(Value("float64")),  # the data's scores, from best to worst response; empty if none
            "question": Value("string"),  # text of the last user turn
            "row": Value("int64"),
            "num_tokens": Value("int32"),
            "key": Value("binary"),  # TokenizedPair.key
            "swapped_key": Value("binary"),  # the same with the responses in the other order
            "prompt_key": Value("binary"),  # digest of the prompt's ids
            "reason": Value("string"),  # why the pair is left out; "" if it is kept
            "format": Value("string"),  # name of the row's format
            "notes": ListOf(Value("string")),  # what is to be told of a pair that is kept
            "unread": ListOf(Value("string")),  # names of the row's columns that nothing reads
        }
    )


def prepare_pairs(
    rows: "Dataset",
    source: str,
    template: ChatTemplate,
    truncation: Truncation,
    reader: Reader | None = None,
    filters: Filters | None = None,
    *,
    on_bad_row: OnBadRow = "stop",
    num_proc: int | None = None,
    progress_bar: bool = True,
) -> tuple[PairDataset, list[str]]:
    """Tokenizes all rows, or loads them from the cache, and leaves out pairs that cannot be trained on.

    The cache key contains everything that the columns depend on, and nothing else: the fingerprint of the rows, the
    tokenizer, the chat template with its options, the truncation, how rows are read and the version of the cache
    format.

    Args:
        rows: The rows.
        source: Name of the data source, for messages.
        template: Chat template, with its tokenizer.
        truncation: Length limits, and what to do with longer pairs.
        reader: Reads rows; by default any known format.
        filters: Leaves out pairs that could be trained on; by default none. Its ``leaks`` are not looked at here.
        on_bad_row: What to do with a row in no known format, or that the chat template rejects: ``stop``, or ``drop``
            it and count it.
        num_proc: Number of processes that tokenize; None tokenizes in this process.
        progress_bar: Whether to show a progress bar.

    Returns:
        The pairs, and a report: lines of text about formats, columns that were not read, what was left out and why.

    Raises:
        ValueError: If a row cannot be read and ``on_bad_row`` is ``stop`` (the message names the row), or if no pair is
            left.
    """
    if not len(rows):
        raise ValueError(f"{source}: there are no rows.")
    rows = rows.with_format(None)  # rows of a data set in memory may be in NumPy's or pandas' format
    reader, filters = reader or Reader(), filters or Filters()
    how = [asdict(truncation), asdict(reader), filters.of_row_settings, template.identity, on_bad_row]
    key = json.dumps([FORMAT_VERSION, rows._fingerprint, _identity(template.tokenizer), *how])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
    folder = cache_dir() / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    with library_bars(progress_bar, "datasets"):
        columns = rows.map(
            _prepare_row,
            with_indices=True,
            fn_kwargs={
                "source": source,
                "template": template,
                "truncation": truncation,
                "reader": reader,
                "filters": filters,
                "on_bad_row": on_bad_row,
            },
            remove_columns=rows.column_names,
            features=cache_features(),
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            load_from_cache_file=True,
            new_fingerprint=fingerprint,
            num_proc=num_proc,
            desc=f"Tokenizing {source}",
        )
    kept, report = _report(columns, source)
    pairs = PairDataset(columns, kept, source)
    if kept:
        found = filters.of_set(pairs.digests("key"), pairs.digests("swapped_key"))
        left = np.ones(len(pairs), bool)
        for what, (action, rows) in found.items():
            report += told(pairs, what, rows & left, action)  # each pair is left out, and counted, once
            left &= ~rows | (action == "keep")
        pairs = pairs.select(left)
    if not len(pairs):
        raise ValueError("\n".join([f"{source}: no usable pair is left.", *report]))
    return pairs, report


def told(pairs: PairDataset, what: str, found: np.ndarray, action: Action) -> list[str]:
    """A line of the report about some of the pairs; none if there are none.

    Args:
        pairs: All pairs.
        what: What is said of the pairs that were found.
        found: Which pairs were found, (P,) bool.
        action: Whether they are left out.
    """
    if not found.any():
        return []
    first = pairs.columns[int(pairs.indices[int(found.argmax())])]["row"]
    verb = "left out " if action == "drop" else ""
    return [f"{pairs.source}: {verb}{found.sum()} of {len(pairs)} pairs: {what} (first: row {first})"]


def _report(columns: "Dataset", source: str) -> tuple["array[int]", list[str]]:
    """The indices of the rows that are kept, and lines of text about the data."""
    total = len(columns)
    formats, unread, reasons, notes = (_counts(columns, name) for name in ("format", "unread", "reason", "notes"))
    reasons.pop("", None)
    formats.pop("", None)
    names = [name if len(formats) == 1 else f"{name} ({count} rows)" for name, (count, _) in formats.items()]
    report = [f"{source}: read as: {', '.join(names)}"] if names else []
    if unread:
        report.append(f"{source}: columns that are not read: {', '.join(sorted(unread))}")
    reported = sorted(reasons.items(), key=lambda item: (-item[1][0], item[0]))
    report += [
        f"{source}: left out {count} of {total} pairs: {reason} (first: row {first})"
        for reason, (count, first) in sorted(reported[:MOST_REASONS])
    ]
    if rare := reported[MOST_REASONS:]:
        number = sum(count for _, (count, _) in rare)
        report.append(f"{source}: left out {number} of {total} pairs: {len(rare)} other reasons")
    report += [
        f"{source}: {count} of {total} pairs: {note} (first: row {first})"
        for note, (count, first) in sorted(notes.items())
    ]
    return _index_array(np.flatnonzero(columns.data.column("reason").to_numpy() == "")), report


def _index_array(indices: np.ndarray) -> "array[int]":
    """Row numbers as Python's compact array, whose items are plain integers."""
    return array("q", indices.astype(np.int64).tobytes())


def _counts(columns: "Dataset", name: str) -> dict[str, tuple[int, int]]:
    """For each text in a column of texts, or of lists of texts, how many rows have it, and the first that has it."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    texts = columns.data.column(name).combine_chunks()
    rows = np.arange(len(texts))
    if pa.types.is_list(texts.type):
        texts, rows = pc.list_flatten(texts), pc.list_parent_indices(texts).to_numpy()
    encoded = texts.dictionary_encode()
    codes, first, count = np.unique(encoded.indices.to_numpy(), return_index=True, return_counts=True)
    texts = encoded.dictionary.to_pylist()
    return {texts[c]: (int(n), int(rows[f])) for c, f, n in zip(codes, first, count, strict=True)}


def _prepare_row(
    row: dict[str, Any],
    index: int,
    source: str,
    template: ChatTemplate,
    truncation: Truncation,
    reader: Reader,
    filters: Filters,
    on_bad_row: OnBadRow,
) -> dict[str, Any]:
    """Turns one source row into one row of the cached data set."""
    reading = Reading("", "", ())
    notes: list[str] = []
    result: TokenizedPair | str
    try:
        reading = reader(row)
        if isinstance(reading.result, str):
            result = reading.result
        else:
            rendered = template(reading.result)
            unwanted, notes = filters.of_row(reading.result)
            notes += rendered.notes
            result = unwanted or truncation(tokenize(rendered, template.tokenizer, reading.result.scores))
    except (RowError, RejectedByTemplateError) as error:
        if on_bad_row == "stop":
            raise ValueError(
                f"{source}, row {index}: {str(error).rstrip('.')}. To leave out such rows, set data.on_bad_row=drop."
            ) from error
        result = str(error)
    reason, pair = (result, TokenizedPair([], [], [])) if isinstance(result, str) else ("", result)
    question = "" if isinstance(reading.result, str) or reason else str(reading.result.prompt[-1]["content"])
    return {
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "between": list(pair.between),
        "runs": [list(run) for run in pair.runs],
        "scores": list(pair.scores),
        "question": question,
        "row": index,
        "num_tokens": pair.num_tokens,
        "key": pair.key,
        "swapped_key": replace(pair, chosen=pair.rejected, rejected=pair.chosen, runs=pair.runs[::-1]).key,
        "prompt_key": TokenizedPair(pair.prompt, [], []).key,
        "reason": reason,
        "format": reading.format,
        "notes": [] if reason else notes,
        "unread": list(reading.unread),
    }


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that the tokenizer's output depends on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [type(tokenizer).__name__, model, json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()

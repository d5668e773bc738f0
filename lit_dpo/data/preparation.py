"""Rows ──► tokenized pairs on disk. Rows are read, tokenized and truncated once; left-out pairs are reported."""

import hashlib
import json
import os
from array import array
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_dpo.data.encoding import Encoder
from lit_dpo.data.filters import Filters
from lit_dpo.data.formats import Reader, Reading, RowError
from lit_dpo.data.pairs import PairDataset, Part, index_array
from lit_dpo.data.rendering import ChatTemplate, RejectedByTemplateError
from lit_dpo.data.tokenization import TokenizedPair, Truncation, tokenize
from lit_dpo.files.cache import cache_dir
from lit_dpo.files.console import library_bars

if TYPE_CHECKING:
    from datasets import Dataset, Features

MANY_ROWS = 200  # for which it pays to keep the ids of words
ROWS_OF_A_PROCESS = 2000  # for which it pays to start one
MOST_REASONS = 20  # that are told in a line each; the messages of a template may differ from row to row
OnBadRow: TypeAlias = Literal["stop", "drop"]
LEFT_OUT = TokenizedPair([], [], [])
FORMAT_VERSION = 6  # increment when the meaning of the cached columns changes


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
            "group": Value("string"),  # value of the column that an evaluation groups by; empty if there is none
            "row": Value("int64"),
            "num_tokens": Value("int32"),
            "full_lengths": ListOf(Value("int32")),  # tokens of prompt and responses before truncation; empty if unread
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
        filters: Leaves out pairs that could be trained on, each for itself; by default none.
        on_bad_row: What to do with a row in no known format, or that the chat template rejects: ``stop``, or ``drop``
            it and count it.
        num_proc: Number of processes that tokenize; None takes one for each CPU core, if there are many rows and the
            system can fork processes.
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
    encode = Encoder(template.tokenizer, keep_words=len(rows) >= MANY_ROWS)
    with library_bars(progress_bar, "datasets"):
        columns = rows.map(
            Preparation(source, template, encode, truncation, reader, filters, on_bad_row),
            with_indices=True,
            batched=True,
            remove_columns=rows.column_names,
            features=cache_features(),
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            load_from_cache_file=True,
            new_fingerprint=fingerprint,
            num_proc=num_proc or _processes(len(rows)),
            desc=f"Tokenizing {source}",
        )
    kept, report = _report(columns, source)
    if not kept:
        raise ValueError("\n".join([f"{source}: no usable pair is left.", *report]))
    return PairDataset(columns, kept, [Part(source)]), report


def _report(columns: "Dataset", source: str) -> tuple["array[int]", list[str]]:
    """The indices of the rows that are kept, and lines of text about the data."""
    total = len(columns)
    formats, unread, reasons, notes = (
        counts(columns.data.column(name).combine_chunks()) for name in ("format", "unread", "reason", "notes")
    )
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
    return index_array(np.flatnonzero(columns.data.column("reason").to_numpy() == "")), report


def counts(texts: Any) -> dict[str, tuple[int, int]]:
    """For each text in an Arrow array of texts, or of lists of texts, how many rows have it, and the first of them."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    rows = np.arange(len(texts))
    if pa.types.is_list(texts.type):
        texts, rows = pc.list_flatten(texts), pc.list_parent_indices(texts).to_numpy()
    encoded = texts.dictionary_encode()
    codes, first, count = np.unique(encoded.indices.to_numpy(), return_index=True, return_counts=True)
    texts = encoded.dictionary.to_pylist()
    return {texts[c]: (int(n), int(rows[f])) for c, f, n in zip(codes, first, count, strict=True)}


@dataclass(frozen=True)
class Preparation:
    """How rows become pairs. For the fields see ``prepare_pairs``."""

    source: str
    template: ChatTemplate
    encode: Encoder
    truncation: Truncation
    reader: Reader
    filters: Filters
    on_bad_row: OnBadRow

    def __call__(self, columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Turns source rows, column by column, into rows of the cached data set."""
        rows = zip(*columns.values(), strict=True)
        found = [
            self.row(dict(zip(columns, row, strict=True)), index) for row, index in zip(rows, indices, strict=True)
        ]
        return {name: [row[name] for row in found] for name in found[0]}

    def row(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """Turns one source row into one row of the cached data set."""
        reading = Reading("", "", ())
        notes: list[str] = []
        full_lengths: list[int] = []
        result: TokenizedPair | str
        try:
            reading = self.reader(row)
            if isinstance(reading.result, str):
                result = reading.result
            else:
                rendered = self.template(reading.result)
                unwanted, notes = self.filters.of_row(reading.result)
                notes += rendered.notes
                whole = tokenize(rendered, self.encode, reading.result.scores)
                full_lengths = [len(whole.prompt), *map(len, whole.responses)]
                result = unwanted or self.truncation(whole)
        except (RowError, RejectedByTemplateError) as error:
            if self.on_bad_row == "stop":
                raise ValueError(
                    f"{self.source}, row {index}: {str(error).rstrip('.')}. To leave out such rows, set "
                    "data.on_bad_row=drop."
                ) from error
            result = str(error)
        reason, pair = (result, LEFT_OUT) if isinstance(result, str) else ("", result)
        question = "" if isinstance(reading.result, str) or reason else str(reading.result.prompt[-1]["content"])
        return {
            "prompt": pair.prompt,
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "between": list(pair.between),
            "runs": [list(run) for run in pair.runs],
            "scores": list(pair.scores) if not reason else list(reading.scores),
            "question": question,
            "group": reading.group,
            "row": index,
            "num_tokens": pair.num_tokens,
            "full_lengths": full_lengths,
            "key": pair.key,
            "swapped_key": replace(pair, chosen=pair.rejected, rejected=pair.chosen, runs=pair.runs[::-1]).key,
            "prompt_key": TokenizedPair(pair.prompt, [], []).key,
            "reason": reason,
            "format": reading.format,
            "notes": [] if reason else notes,
            "unread": list(reading.unread),
        }


def _processes(rows: int) -> int | None:
    """Number of processes to tokenize so many rows with; None for this process alone."""
    import multiprocess  # type: ignore[import-untyped]  # what datasets starts processes with

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    number = min(cores, rows // ROWS_OF_A_PROCESS)
    return number if number > 1 and multiprocess.get_start_method() == "fork" else None


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that the tokenizer's output depends on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # as it will be used
        backend.no_truncation()
        backend.no_padding()
    model = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [type(tokenizer).__name__, model, json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True)]
    parts.append(str(getattr(tokenizer, "split_special_tokens", False)))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()

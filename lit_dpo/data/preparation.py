"""Rows ──► tokenized pairs on disk: read, tokenized and truncated once, with an account of what was left out."""

import hashlib
import json
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.formats import read_pair
from lit_dpo.data.tokenization import TokenizedPair, Truncation, tokenize
from lit_dpo.files.cache import cache_dir
from lit_dpo.files.console import library_bars

if TYPE_CHECKING:
    from datasets import Dataset, Features

FORMAT_VERSION = 3  # raise it when the meaning of the cached columns changes


class PairDataset(torch.utils.data.Dataset[PairBatch]):
    """Tokenized pairs; a list of indices gives a batch.

    Args:
        columns: The cached data set, with the columns of ``columns_of_the_cache``.
        indices: Which of its rows, in which order.
        source: Where the pairs came from, for messages.
    """

    def __init__(self, columns: "Dataset", indices: Sequence[int], source: str) -> None:
        self.columns, self.indices, self.source = columns, indices, source

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: list[int]) -> PairBatch:
        return PairBatch.from_pairs([self.pair(index) for index in indices])

    def pair(self, index: int) -> TokenizedPair:
        """One tokenized pair."""
        row = self.columns[self.indices[index]]
        parts = (row["prompt"], row["chosen"], row["rejected"], self.source, row["row"])
        return TokenizedPair(*parts, tuple(row["between"]), tuple(row["scores"]))

    def require_scores(self, reader: str) -> None:
        """Checks that every pair has scores, and that the chosen response's is not below the rejected one's.

        Args:
            reader: Name of the objective that uses them, for the message.

        Raises:
            ValueError: If one has none, or they contradict it.
        """
        everything = range(len(self))
        for row, scores in zip(self._column("row", everything), self._column("scores", everything), strict=True):
            if not scores:
                raise ValueError(
                    f"{self.source}, row {row}: there are no scores, which {reader} uses. Give each row "
                    "score_chosen and score_rejected, or a list of responses with scores."
                )
            if scores[0] < scores[-1]:
                raise ValueError(
                    f"{self.source}, row {row}: the chosen response has the score {scores[0]:g} and the rejected one "
                    f"{scores[-1]:g}; {reader} takes no pair whose scores contradict its order. Leave such rows out."
                )

    def keys(self, indices: Sequence[int]) -> list[bytes]:
        """``TokenizedPair.key`` of some pairs, without reading their tokens."""
        return self._column("key", indices)

    def num_tokens(self, indices: Sequence[int]) -> list[int]:
        """Tokens of some pairs, prompt and responses."""
        return self._column("num_tokens", indices)

    def _column(self, name: str, indices: Sequence[int]) -> list[Any]:
        rows = np.array([self.indices[index] for index in indices], np.int64)
        return self.columns.data.column(name).take(rows).to_pylist()  # type: ignore[no-any-return]

    def prompt(self, index: int) -> tuple[str, list[int]]:
        """The last user turn of one pair's prompt, as it was written, and the token ids of the whole prompt."""
        row = self.columns[self.indices[index]]
        return row["question"], row["prompt"]

    def carve(self, size: float, seed: int) -> tuple["PairDataset", "PairDataset"]:
        """Splits off ``size`` pairs (a share if below 1), never parting the pairs of one prompt.

        Returns:
            What is left, and what was split off.

        Raises:
            ValueError: If either part would be empty.
        """
        groups: dict[bytes, list[int]] = defaultdict(list)
        for index in self.indices:
            prompt = self.columns[index]["prompt"]
            groups[hashlib.sha256(json.dumps(prompt).encode()).digest()].append(index)
        wanted = round(size * len(self)) if size < 1 else int(size)
        held_out: set[int] = set()
        members = list(groups.values())
        for group in torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist():
            if len(held_out) >= wanted:
                break
            held_out.update(members[group])
        if not 0 < len(held_out) < len(self):
            raise ValueError(
                f"data.val_size={size} would hold out {len(held_out)} of the {len(self)} pairs of {self.source}."
            )
        kept = [index for index in self.indices if index not in held_out]
        return (
            PairDataset(self.columns, kept, self.source),
            PairDataset(self.columns, sorted(held_out), self.source),
        )


def columns_of_the_cache() -> "Features":
    """The columns of the cached data set."""
    from datasets import Features, Value
    from datasets import Sequence as ListOf

    return Features(
        {
            "prompt": ListOf(Value("int32")),
            "chosen": ListOf(Value("int32")),
            "rejected": ListOf(Value("int32")),
            "between": ListOf(ListOf(Value("int32"))),  # the other responses of a ranked list
            "scores": ListOf(Value("float64")),  # the data's own scores, from best to worst response, or none
            "question": Value("string"),  # the last user turn, as written
            "row": Value("int64"),
            "num_tokens": Value("int32"),
            "key": Value("binary"),  # TokenizedPair.key
            "reason": Value("string"),  # why the pair is left out, or ""
        }
    )


def prepare_pairs(
    rows: "Dataset",
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    truncation: Truncation,
    num_proc: int | None = None,
    max_responses: int = 2,
    progress_bar: bool = True,
) -> tuple[PairDataset, list[str]]:
    """Tokenizes all rows, or takes them from the cache, and leaves out what cannot be trained on.

    The cache's key is made of the rows' own fingerprint, the tokenizer with its chat template, the truncation, and the
    version of the format: what the columns depend on, and nothing else.

    Args:
        rows: The rows.
        source: Where they came from, for messages.
        tokenizer: Tokenizer with a chat template.
        truncation: How long a pair may be.
        num_proc: Processes that tokenize; None for this one.
        max_responses: Most responses to take from a ranked list.
        progress_bar: Whether to show one.

    Returns:
        The pairs, and one line for each reason that left some out.

    Raises:
        ValueError: If a row is in no known format, naming the row, or if no pair is left.
    """
    key = json.dumps([FORMAT_VERSION, rows._fingerprint, _identity(tokenizer), asdict(truncation), max_responses])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
    folder = cache_dir() / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    with library_bars(progress_bar):
        columns = rows.map(
            _prepare_row,
            with_indices=True,
            fn_kwargs={
                "source": source,
                "tokenizer": tokenizer,
                "truncation": truncation,
                "max_responses": max_responses,
            },
            remove_columns=rows.column_names,
            features=columns_of_the_cache(),
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            load_from_cache_file=True,
            new_fingerprint=fingerprint,
            num_proc=num_proc,
            desc=f"Tokenizing {source}",
        )
    left_out: dict[str, array[int]] = defaultdict(lambda: array("q"))
    for row, reason in enumerate(columns["reason"]):
        left_out[reason].append(row)
    kept = left_out.pop("", array("q"))
    report = [
        f"{source}: left out {len(found)} of {len(rows)} pairs: {reason} (first: row {found[0]})"
        for reason, found in sorted(left_out.items())
    ]
    if not kept:
        raise ValueError("\n".join([f"{source}: no pair is left to work with.", *report]))
    return PairDataset(columns, kept, source), report


def _prepare_row(
    row: dict[str, Any],
    index: int,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    truncation: Truncation,
    max_responses: int,
) -> dict[str, Any]:
    """One row of the cached data set."""
    try:
        pair = read_pair(row, max_responses)
        result = pair if isinstance(pair, str) else truncation(tokenize(pair, tokenizer))
    except ValueError as error:  # a RowError, or a template that does not take these messages
        raise ValueError(f"{source}, row {index}: {str(error).rstrip('.')}.") from error
    if isinstance(pair, str) or isinstance(result, str):
        result, question, reason = TokenizedPair([], [], []), "", str(result)
    else:
        question, reason = str(pair.prompt[-1]["content"]), ""
    return {
        "prompt": result.prompt,
        "chosen": result.chosen,
        "rejected": result.rejected,
        "between": list(result.between),
        "scores": list(result.scores),
        "question": question,
        "row": index,
        "num_tokens": result.num_tokens,
        "key": result.key,
        "reason": reason,
    }


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer's output depends on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = [type(tokenizer).__name__, model, str(tokenizer.chat_template), str(tokenizer.eos_token)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()

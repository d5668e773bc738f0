"""Runs ──► all that a report says, as plain values: ``report.json``, which the page is drawn from."""

from dataclasses import asdict
from typing import Any

import yaml

from lit_dpo.evaluation.held_out import ACCURACY
from lit_dpo.files.atomic import finite
from lit_dpo.report.diagnosis import diagnose
from lit_dpo.report.folder import Run
from lit_dpo.report.quantities import calibration, histogram

ROWS = (  # of the table before and after
    ("loss", "loss", "lower is better"),
    ("rewards/accuracies", "accuracy", "share of pairs whose chosen response has the higher reward"),
    ("rewards/accuracies_length_controlled", "accuracy, lengths controlled", "0.5 is what length alone gives"),
    ("rewards/margins", "margin", "reward of the chosen response minus that of the rejected one"),
    ("logps/chosen", "log-prob, chosen", "nats per response"),
    ("logps/rejected", "log-prob, rejected", "nats per response"),
    ("displacement/chosen", "displacement, chosen", "log-prob minus the reference's, nats per token"),
    ("displacement/rejected", "displacement, rejected", "log-prob minus the reference's, nats per token"),
    ("kl", "KL from the reference", "nats per token, estimated on the data"),
)
CHARTS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (  # title, unit, (name, label, role)
    ("Loss", "", (("train/loss", "training", "train"), ("val/loss", "held-out", "val"))),
    (
        "Accuracy",
        "share of pairs",
        (("train/rewards/accuracies", "training", "train"), ("val/rewards/accuracies", "held-out", "val")),
    ),
    (
        "Margin",
        "implicit reward",
        (("train/rewards/margins", "training", "train"), ("val/rewards/margins", "held-out", "val")),
    ),
    (
        "Log-probs, held-out",
        "nats per token",
        (("val/logps/chosen_per_token", "chosen", "chosen"), ("val/logps/rejected_per_token", "rejected", "rejected")),
    ),
    (
        "Displacement, training",
        "nats per token",
        (("train/displacement/chosen", "chosen", "chosen"), ("train/displacement/rejected", "rejected", "rejected")),
    ),
    (
        "Displacement, held-out",
        "nats per token",
        (("val/displacement/chosen", "chosen", "chosen"), ("val/displacement/rejected", "rejected", "rejected")),
    ),
    ("KL from the reference", "nats per token", (("train/kl", "training", "train"), ("val/kl", "held-out", "val"))),
    ("Gradient norm", "before clipping", (("train/grad_norm", "training", "train"),)),
    ("Learning rate", "", (("train/learning_rate", "training", "train"),)),
    ("Speed", "pairs per second", (("train/pairs_per_second", "training", "train"),)),
    ("Peak memory", "GB", (("train/peak_memory_gb", "training", "train"),)),
)


def report_content(runs: list[Run]) -> dict[str, Any]:
    """All that a report of some runs says. Numbers that are not finite are None.

    Args:
        runs: The runs; at least one.
    """
    content: dict[str, Any] = {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "rows": [{"key": key, "label": label, "help": meaning} for key, label, meaning in ROWS],
        "charts": [
            {
                "title": title,
                "unit": unit,
                "series": [dict(zip(("key", "label", "role"), one, strict=True)) for one in series],
            }
            for title, unit, series in CHARTS
            if any(key in run.curves for run in runs for key, _, _ in series)
        ],
        "runs": [_of_run(run) for run in runs],
    }
    if len(runs) > 1:
        content["differences"] = _differences(runs)
        content["frontier"] = [
            {"run": number, "accuracy": accuracy, "kl": kl, "low": low, "high": high}
            for number, run in enumerate(runs)
            for accuracy, low, high, kl in [_accuracy_and_kl(run)]
            if accuracy is not None and kl is not None
        ]
    plain: dict[str, Any] = finite(content)
    return plain


def _of_run(run: Run) -> dict[str, Any]:
    summary, before, after = run.summary, run.before, run.after
    metrics = {} if run.held_out is None else run.held_out.total.metrics
    values = []
    for key, _, _ in ROWS:
        estimate = metrics.get(key)
        after_value = run.metrics("after").get(key, None if estimate is None else estimate.value)
        bounds = summary.get("intervals", {}).get(f"val/{key}") or (
            None if estimate is None else [estimate.low, estimate.high]
        )
        was = run.metrics("before").get(key)
        values.append({"key": key, "before": was, "after": after_value, "interval": bounds})
    found: dict[str, Any] = {
        "name": run.name,
        "missing": run.missing,
        "verdicts": [asdict(one) for one in diagnose(run)],
        "facts": run.facts,
        "values": values,
        "curves": {
            name: {"steps": curve.steps, "values": curve.values, "mean_of": curve.mean_of}
            for name, curve in run.curves.items()
            if name in {key for _, _, series in CHARTS for key, _, _ in series}
        },
        "num_pairs": summary.get("num_pairs", {}),
        "warnings": run.warnings,
        "audit": _audit(run),
        "read_as": summary.get("data", []),
        "changed": None if run.changed is None else {name: _shown(value) for name, value in run.changed.items()},
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
        "environment": _environment(run),
        "tokens": [view.to_dict() for view in run.tokens],
    }
    if after is not None and run.held_out is not None:
        names = ("rewards/margins", "logps")
        values_of = {
            "rewards/margins": lambda table: table.values["rewards/margins"],
            "logps": lambda table: table.values["logps/chosen"] - table.values["logps/rejected"],
        }
        found["histograms"] = {
            name: histogram(None if before is None else values_of[name](before), values_of[name](after))._asdict()
            for name in names
        }
        found["calibration"] = calibration(after.values["rewards/margins"])._asdict()
        found["groups"] = [
            {
                "kind": group.kind,
                "name": group.name,
                "num_pairs": group.num_pairs,
                "accuracy": list(group.metrics[ACCURACY]),
                "longer": group.metrics["longer_wins"].value,
            }
            for group in [run.held_out.total, *run.held_out.groups]
            if group.kind == "" or group.num_pairs < len(after)  # not what is all pairs
        ]
        found["level"] = run.held_out.level
    return found


def _audit(run: Run) -> dict[str, Any]:
    if not run.audit:
        return {}
    keys = ("source", "use", "rows", "kept", "longer_wins", "ties", "scored", "prompts", "tokens", "left_out")
    sources = [{key: source.get(key) for key in keys} for source in run.audit.get("sources", [])]
    return {"verdicts": run.audit.get("verdicts", []), "sources": sources}


def _environment(run: Run) -> dict[str, str]:
    summary = run.summary
    if not summary:
        return {}
    seconds = float(summary.get("seconds") or 0)
    minutes, rest = divmod(round(seconds), 60)
    found = {
        "date": summary.get("date", ""),
        "hardware": summary.get("hardware", ""),
        "processes": str(summary.get("processes", "")),
        "precision": summary.get("precision", ""),
        "time": f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s",
        "peak memory": f"{summary.get('peak_memory_gb', 0)} GB",
        "optimizer steps": f"{summary.get('steps', 0):,}",
    }
    found |= {f"only {name}": str(value) for name, value in summary.get("limits", {}).items()}
    return found | {name: str(value) for name, value in summary.get("releases", {}).items()}


def _differences(runs: list[Run]) -> list[dict[str, Any]]:
    """The settings in which the runs differ, but for their names."""
    flat, own = [flatten(run.config) for run in runs], [flatten(run.own_config) for run in runs]
    rows = []
    for name in dict.fromkeys(name for one in flat for name in one):
        different = {_shown(one.get(name)) for one in own}
        values = [_shown(one.get(name)) for one in flat]
        if len(different) > 1 and name not in ("run_name", "config"):
            if len(set(values)) == 1:  # they differ in the folder, which is not told
                values = [f"{value} (folder {number})" for number, value in enumerate(values, 1)]
            rows.append({"name": name, "values": values})
    return rows


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by dotted names. Lists stay whole, and so do empty mappings."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flatten(item, f"{name}.{key}".lstrip("."))
    return found


def _accuracy_and_kl(run: Run) -> tuple[float | None, float | None, float | None, float | None]:
    after = run.metrics("after")
    low, high = run.summary.get("intervals", {}).get(f"val/{ACCURACY}", (None, None))
    return after.get(ACCURACY), low, high, after.get("kl")


def _shown(value: Any) -> str:
    """A setting as YAML writes it, in one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)

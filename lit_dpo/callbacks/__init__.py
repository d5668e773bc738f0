"""Ordinary Lightning callbacks, which users can add or remove."""

from lit_dpo.callbacks.adapter import AdapterExport
from lit_dpo.callbacks.guard import CollapseGuard
from lit_dpo.callbacks.last import LastCheckpoint
from lit_dpo.callbacks.predictions import PredictionWriter
from lit_dpo.callbacks.progress import StepProgress
from lit_dpo.callbacks.samples import ComparisonSamples
from lit_dpo.callbacks.summary import RunSummary

__all__ = [
    "AdapterExport",
    "CollapseGuard",
    "ComparisonSamples",
    "LastCheckpoint",
    "PredictionWriter",
    "RunSummary",
    "StepProgress",
]

"""Ordinary Lightning callbacks, which users can add or remove."""

from lit_dpo.callbacks.adapter import AdapterExport
from lit_dpo.callbacks.answers import HeldOutAnswers
from lit_dpo.callbacks.average import AdapterAverage
from lit_dpo.callbacks.guard import CollapseGuard
from lit_dpo.callbacks.intervals import HeldOutIntervals
from lit_dpo.callbacks.last import LastCheckpoint
from lit_dpo.callbacks.model_summary import ParameterSummary
from lit_dpo.callbacks.predictions import PredictionWriter
from lit_dpo.callbacks.progress import StepProgress
from lit_dpo.callbacks.report import RunReport
from lit_dpo.callbacks.samples import ComparisonSamples
from lit_dpo.callbacks.summary import RunSummary

__all__ = [
    "AdapterAverage",
    "AdapterExport",
    "CollapseGuard",
    "ComparisonSamples",
    "HeldOutAnswers",
    "HeldOutIntervals",
    "LastCheckpoint",
    "ParameterSummary",
    "PredictionWriter",
    "RunReport",
    "RunSummary",
    "StepProgress",
]

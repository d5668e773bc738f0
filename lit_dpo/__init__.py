"""Direct Preference Optimization with QLoRA as two PyTorch Lightning parts.

Reading order: ``module`` (the algorithm), ``objectives`` (the mathematics), ``data`` (rows to batches, a file a step),
``policy`` (batches to log-probs), ``datamodule``, ``metrics``, ``callbacks``, ``commands``, ``cli``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_dpo.datamodule import PreferenceDataModule
    from lit_dpo.module import DPOModule

__version__ = "0.1.0"
__all__ = ["DPOModule", "PreferenceDataModule", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports the two parts when they are first asked for, so that importing the package alone is quick."""
    if name == "DPOModule":
        from lit_dpo.module import DPOModule

        return DPOModule
    if name == "PreferenceDataModule":
        from lit_dpo.datamodule import PreferenceDataModule

        return PreferenceDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Direct Preference Optimization with QLoRA, as a ``LightningModule`` and a ``LightningDataModule``.

Reading order:

- ``module``: the algorithm.
- ``objectives``: the preference losses, as functions of log-probs.
- ``data`` and ``datamodule``: from rows of text to batches of tokens.
- ``base`` and ``policy``: from the name of a base model to log-probs of a batch.
- ``reference``: log-probs of the reference.
- ``training``: metrics, checkpoints and checks around an optimizer step.
- ``callbacks``: what users can add to a Trainer or remove.
- ``commands`` and ``cli``: the command line.
- ``files``: the cache folder, atomic writes and printing, used by all the others.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_dpo.datamodule import PreferenceDataModule
    from lit_dpo.module import DPOModule

__version__ = "0.1.0"
__all__ = ["DPOModule", "PreferenceDataModule", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports the two classes at their first use, so that importing the package alone is quick."""
    if name == "DPOModule":
        from lit_dpo.module import DPOModule

        return DPOModule
    if name == "PreferenceDataModule":
        from lit_dpo.datamodule import PreferenceDataModule

        return PreferenceDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""``python -m lit_dpo audit``: what the data is like, before it is trained on."""

import os
import sys

from lit_dpo.audit.run import audit_data
from lit_dpo.datamodule import PreferenceDataModule
from lit_dpo.files.console import say
from lit_dpo.module import DPOModule


def audit(model: DPOModule, data: PreferenceDataModule, output: str | None = None, progress_bar: bool = True) -> None:
    """Reads the data as ``fit`` would and judges it. Ends with status 1 if a verdict is an error.

    Args:
        model: The model that would be trained. Its weights are not loaded.
        data: The data.
        output: Folder for ``audit.json`` and ``audit.html``; by default none is written.
        progress_bar: Whether to show progress bars.
    """
    found = audit_data(data, model, progress_bar=progress_bar)
    unicode = "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    say(found.as_text(color=color, bars=unicode))
    if output is not None:
        for path in found.save(output):
            say(f"Wrote {path}")
    if found.failed:
        sys.exit(1)

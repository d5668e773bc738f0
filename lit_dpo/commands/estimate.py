"""``python -m lit_dpo estimate``: what training takes, and whether it fits."""

from pathlib import Path
from typing import Any

import torch

from lit_dpo.audit.estimate import DeviceName, Length, estimate_text, place_of
from lit_dpo.audit.estimate import estimate as estimate_needs
from lit_dpo.datamodule import PreferenceDataModule
from lit_dpo.files.atomic import write_json
from lit_dpo.files.console import say
from lit_dpo.module import DPOModule


def estimate(
    model: DPOModule,
    data: PreferenceDataModule,
    length: dict[str, Any],
    device: DeviceName | None = None,
    memory_gb: float | None = None,
    precision: str | None = None,
    output: str | None = None,
    progress_bar: bool = True,
) -> None:
    """Estimates memory by part, disk, operations and time of a run, and says whether it fits. Loads no weights.

    Args:
        model: The model that would be trained.
        data: Its data, which is tokenized.
        length: How the Trainer would train.
        device: The device; by default this machine's CPU.
        memory_gb: Memory of the device in GB, if it is another than the usual: so any card can be estimated. Of a card,
            93 % count as usable.
        precision: Precision there, if it is another than ``trainer.precision``; by default what suits the device.
        output: File to write the estimate to as JSON.
        progress_bar: Whether to show progress bars.
    """
    if memory_gb is not None and not memory_gb > 0:
        raise ValueError(f"--memory_gb must be positive, not {memory_gb}.")
    if device is None:
        device = "mps" if torch.backends.mps.is_available() else "cpu"
    given = length.pop("precision")
    place = place_of(device, precision or given, memory_gb)
    needs = estimate_needs(model, data, place, Length(**length), progress_bar=progress_bar)
    say(estimate_text(needs))
    if output is not None:
        write_json(Path(output), needs.to_dict())
        say(f"Wrote {output}")

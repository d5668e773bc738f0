"""What a run ran on: hardware, and releases of the libraries."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from lightning.pytorch import Trainer

PACKAGES = ("lit_dpo", "torch", "lightning", "transformers", "peft", "bitsandbytes", "datasets")


def hardware(trainer: Trainer) -> str:
    """The devices of a run in words, such as ``2 x NVIDIA H100`` or ``2 cores of Intel Xeon``."""
    if trainer.strategy.root_device.type == "cuda":
        return f"{trainer.world_size} x {torch.cuda.get_device_name(trainer.strategy.root_device)}"
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count()
    return f"{cores} cores of {_processor()}"


def releases() -> dict[str, str]:
    """The releases of the libraries that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a folder, or without bitsandbytes
            continue
    return found


def _processor() -> str:
    """The name of the processor. Python knows it on some systems alone."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

"""Atomic writes: a file is written under a temporary name in the same folder, flushed to disk, then renamed."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder to write to, and renames it to ``path`` at the end.

    If the block raises, the temporary file is removed and an older file at ``path`` stays unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        descriptor = os.open(beside, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # a rename may reach the disk before the content does
        finally:
            os.close(descriptor)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes plain values as JSON. Numbers that are not finite, for which JSON has no form, become null."""
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(finite(content), indent=2, default=str) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The same nested plain values with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

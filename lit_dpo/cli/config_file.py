"""The ``config.yaml`` that a run leaves: without secrets, and beside those of earlier starts of the same run."""

import re
import shutil
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_warn

SECRET = re.compile(r"(^|_)(api_?key|token|password|secret|secret_access_key|access_key)$", re.IGNORECASE)  # arguments
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")  # user and password


def without_secrets(config: Namespace) -> Namespace:
    """A copy of a configuration without keys and passwords. Warns of what it leaves out."""
    copy = config.clone()
    left_out = sorted(set(_remove("", copy)))
    if left_out:
        rank_zero_warn(
            f"config.yaml does not hold the secret {', '.join(left_out)}. Give it again, or in the environment "
            "variable that the library reads."
        )
    return copy


def is_inside(path: Any, folder: Path) -> bool:
    """Whether a path, if there is one, lies in a folder."""
    return path is not None and Path(path).resolve().is_relative_to(folder.resolve())


def keep_earlier(*paths: Path) -> None:
    """Copies files that are about to be replaced to the next free number: ``metrics.csv`` to ``metrics_1.csv``."""
    for path in paths:
        if path.exists():
            number = 1
            while (kept := path.with_name(f"{path.stem}_{number}{path.suffix}")).exists():
                number += 1
            shutil.copy2(path, kept)


def _remove(key: str, value: Any) -> list[str]:
    """Sets secrets to None, at every depth, and returns their keys."""
    found: list[str] = []
    if isinstance(value, list | tuple):
        for item in value:
            found += _remove(key, item)
    elif isinstance(value, dict | Namespace):
        items = value.items() if isinstance(value, dict) else vars(value).items()
        for name, item in list(items):
            inner = f"{key}.{name}".lstrip(".")
            if isinstance(item, str) and (SECRET.search(name) or IN_ADDRESS.search(item)):
                value[name] = None if SECRET.search(name) else IN_ADDRESS.sub("***", item)
                found.append(inner)
            else:
                found += _remove(inner, item)
    return found

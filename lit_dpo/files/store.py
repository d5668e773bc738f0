"""Values by key in a file of JSON lines, added one at a time, so that an interrupted program goes on where it was."""

import hashlib
import json
from pathlib import Path
from typing import Any


class Store:
    """Values by key.

    Args:
        path: The file; it is made with the first value. A last line that was cut in mid-write is left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            path.write_bytes(b"".join(lines := lines[:-1]))
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} was not written by this program. Remove the file.") from error

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")
        self._values[key] = value


def digest(*parts: Any) -> str:
    """A key of plain values."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()

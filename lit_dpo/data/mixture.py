"""``data.source`` and ``data.val_source`` ──► a list of sources, each with a name of its own."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import PurePosixPath
from typing import Any, TypeAlias

from lit_dpo.data.sources import Rows, describe

# One source, or a list of them. The list comes first, so that a list on the command line is not taken for a name.
Sources: TypeAlias = list[str | dict[str, Any]] | str | Rows
OF_ROWS = ("columns", "ignore", "system")  # keys of an entry that go to the reader of its rows


@dataclass(frozen=True)
class Source:
    """A source of pairs, with what is said of it alone.

    Args:
        source: The data, in any form that ``sources.load_rows`` takes.
        name: Name under which its held-out pairs are measured; empty for the only source.
        split: Split to use; None takes the first known one that exists.
        subset: Subset of a data set on the hub.
        revision: Revision of a data set on the hub.
        weight: How often an epoch sees each of its pairs: 1 once, 2 twice; 0.5 every second pair, others in each epoch.
        columns: As ``data.columns``; None takes that.
        ignore: As ``data.ignore``; None takes that.
        system: As ``data.system``; None takes that.
    """

    source: str | Rows
    name: str = ""
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    weight: float = 1.0
    columns: Mapping[str, str] | None = None
    ignore: tuple[str, ...] | None = None
    system: str | None = None

    @property
    def place(self) -> str | None:
        """Name for messages where that of the source alone could mean two; None where it could not."""
        if not isinstance(self.source, str):
            return self.name or None
        return f"{self.source} ({self.subset})" if self.subset else None

    @property
    def of_rows(self) -> dict[str, Any]:
        """Options of the reader that this source sets."""
        return {name: getattr(self, name) for name in OF_ROWS if getattr(self, name) is not None}


def sources_of(given: Any, option: str, **defaults: str | None) -> list[Source]:
    """The sources that an option names.

    Args:
        given: One source, or a list. An entry of a list is a source, or a dict with the fields of ``Source``.
        option: Name of the option, for messages.
        defaults: Fields of ``Source`` for entries that do not set them.

    Raises:
        ValueError: If the list is empty, if an entry has an unknown key, no source or a weight that is not positive, or
            if two entries have the same name.
    """
    defaults = {name: value for name, value in defaults.items() if value is not None}
    if not isinstance(given, list | tuple):
        return [Source(given, **defaults)]  # type: ignore[arg-type]
    known = [one.name for one in fields(Source)]
    found = []
    for number, entry in enumerate(given):
        place = f"data.{option}[{number}]"
        settings = {**defaults, **(entry if isinstance(entry, Mapping) else {"source": entry})}
        if unknown := sorted(settings.keys() - set(known)):
            raise ValueError(f"{place} has {', '.join(map(repr, unknown))}; known keys are {', '.join(known)}.")
        if settings.get("source") is None:
            raise ValueError(f"{place} has no 'source'.")
        source = Source(**settings)
        if not (isinstance(source.weight, int | float) and 0 < source.weight < math.inf):
            raise ValueError(f"{place}: weight must be positive, not {source.weight}.")
        if option == "val_source" and source.weight != 1:
            raise ValueError(f"{place} has a weight, but each held-out pair is measured once. Leave it out.")
        if not isinstance(source.name, str) or "/" in source.name:
            raise ValueError(
                f"{place}: the name {source.name!r} must be a text without '/', which parts names of metrics."
            )
        found.append(replace(source, name=source.name or _name(source.source), ignore=_tuple(source.ignore)))
    names = [source.name for source in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"data.{option} has two sources of the name {twice[0]!r}: give each a 'name' of its own.")
    if not found:
        raise ValueError(f"data.{option} is an empty list.")
    return found


def is_plain(given: Any) -> bool:
    """Whether a value of ``data.source`` is made of texts and numbers alone, and so may stand in a checkpoint."""
    if isinstance(given, Mapping):
        return all(map(is_plain, given.values()))
    return all(map(is_plain, given)) if isinstance(given, list | tuple) else isinstance(given, str | int | float | None)


def _name(source: str | Rows) -> str:
    """The last part of a source's name, without the endings of a file."""
    last = PurePosixPath(re.split(r"[?#]", describe(source).rstrip("/"))[0]).name
    return re.sub(r"(\.[A-Za-z]\w{0,7})+$", "", last) or last


def _tuple(value: Any) -> tuple[str, ...] | None:
    return (value,) if isinstance(value, str) else None if value is None else tuple(value)

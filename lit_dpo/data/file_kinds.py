"""Files of rows ──► a ``datasets.Dataset``: how a file of each kind is read, and which line of it is broken."""

import csv
import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import fsspec

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
SEPARATORS = ",;\t|"
SAMPLE = 1 << 16  # characters of a file from which its separator is found


def builder_of(name: str) -> str | None:
    """Name of the reader for a file of this name, in ``datasets``; None for a file of another kind."""
    path = PurePosixPath(name)
    return BUILDERS.get((PurePosixPath(path.stem) if path.suffix in COMPRESSED else path).suffix)


def read_files(files: Sequence[str], source: str) -> "Dataset":
    """Reads the files of one split into one data set.

    Args:
        files: Paths or addresses of files of one kind.
        source: Name of the source, for messages.

    Raises:
        ValueError: If the files are of several kinds, or if one cannot be read. The message names file and line.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    builders = {str(builder_of(file)) for file in files}
    names = ", ".join(PurePosixPath(file).name for file in files)
    if len(builders) > 1:
        raise ValueError(f"{source}: {names} are files of several kinds. Give files of one kind.")
    (builder,) = builders
    try:
        find_options = {"json": _json_options, "csv": _csv_options}.get(builder)
        options = {} if find_options is None else find_options(files[0])
        return load_dataset(builder, data_files=list(files), split="train", **options)
    except (DatasetGenerationError, OSError, ValueError) as error:
        where = _broken_line(files) if builder == "json" else None
        what = where or f"{names} cannot be read: {str(error.__cause__ or error).splitlines()[0]:.200}"
        raise ValueError(f"{source}: {what}") from error


def _open(file: str) -> IO[str]:
    """The text of a file, decompressed."""
    opener: Any = fsspec.open  # has no types
    return opener(file, "r", compression="infer", encoding="utf-8-sig").open()  # type: ignore[no-any-return]


def _csv_options(file: str) -> dict[str, Any]:
    """Keeps texts such as "N/A" as they are, and finds the separator of the columns."""
    with _open(file) as text:
        sample = text.read(SAMPLE)
    try:
        separator = csv.Sniffer().sniff(sample.splitlines()[0] + "\n", SEPARATORS).delimiter
    except (csv.Error, IndexError):
        separator = "\t" if ".tsv" in file else ","
    # Only an empty field is null: pandas by itself reads "N/A", "None" and "null" as null too.
    return {"sep": separator, "keep_default_na": False, "na_values": [""], "encoding": "utf-8-sig"}


def _json_options(file: str) -> dict[str, Any]:
    """Finds the list of rows in a JSON object.

    Raises:
        ValueError: If the object has several lists of rows.
    """
    with _open(file) as text:
        start = text.read(SAMPLE).lstrip()
        if not start:
            raise ValueError("the file is empty")
        first, *more = start.splitlines()
        if not first.startswith("{") or (more and _is_json(first)):
            return {}  # a list of rows, or a row in each line
        text.seek(0)
        try:
            content = json.load(text)
        except json.JSONDecodeError:
            return {}
    lists = [key for key, value in content.items() if isinstance(value, list) and value and _is_row(value[0])]
    if len(lists) > 1:
        raise ValueError(f"the object has several lists of rows: {', '.join(lists)}. Keep one of them in a file")
    return {"field": lists[0]} if lists else {}


def _is_row(value: Any) -> bool:
    """Whether a value in a list is a row. It may be a message, if the object is a row itself."""
    return isinstance(value, dict) and not {"role", "from"} & value.keys()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _broken_line(files: Sequence[str]) -> str | None:
    """Says which line of a file of JSON lines is broken; None if it is none of them."""
    for file in files:
        name = PurePosixPath(file).name
        with _open(file) as text:
            for number, line in enumerate(text, 1):
                if number == 1 and line.lstrip().startswith("["):
                    break  # one list in many lines
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    json.dumps(row, ensure_ascii=False).encode()
                except json.JSONDecodeError as error:
                    return f"{name}, line {number}, is not JSON: {error.msg} at character {error.pos + 1}"
                except UnicodeEncodeError:
                    return f"{name}, line {number}, holds half of a surrogate pair, which is no character"
                if not isinstance(row, dict):
                    return f"{name}, line {number}, is no object with the columns of a row, but {line.strip()!r:.60}"
    return None

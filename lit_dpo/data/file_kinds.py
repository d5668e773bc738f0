"""Files of rows ──► a ``datasets.Dataset``: how a file of each kind is read, and which line of it is broken."""

import csv
import json
import logging
import lzma
import zlib
from collections.abc import Sequence
from contextlib import suppress
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
# An object with one of these keys is a row, not a document with rows in it
ROW_KEYS = {"chosen", "rejected", "prompt", "responses", "completions", "answers", "messages", "conversations"}
SEPARATORS = ",;\t|"
SAMPLE = 1 << 16  # characters of a file from which its separator is found


def builder_of(name: str) -> str | None:
    """Name of the reader for a file of this name, in ``datasets``; None for a file of another kind."""
    return BUILDERS.get(_uncompressed(name).suffix)


def stem_of(name: str) -> str:
    """The name of a file without the suffixes of its kind and compression."""
    return _uncompressed(name).stem


def _uncompressed(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    return path.with_suffix("") if path.suffix in COMPRESSED else path


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
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it would print an error of its own before ours
    try:
        find_options = {"json": _json_options, "csv": _csv_options}.get(builder)
        options = {} if find_options is None else find_options(files[0])
        return load_dataset(builder, data_files=list(files), split="train", **options)
    except (DatasetGenerationError, OSError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
        where = _broken_line(files) if builder == "json" else None
        what = where or f"{names} cannot be read: {str(error.__cause__ or error).splitlines()[0]:.200}"
        is_one_file = source.endswith(names)
        raise ValueError(source + what.removeprefix(names) if is_one_file else f"{source}: {what}") from error
    finally:
        logger.setLevel(level)


def open_text(file: str, errors: str = "strict") -> IO[str]:
    """The text of a file, decompressed. ``errors`` says what to do with bytes that are no text, as in ``open``."""
    opener: Any = fsspec.open  # has no types
    return opener(file, "r", compression="infer", encoding="utf-8-sig", errors=errors).open()  # type: ignore[no-any-return]


def _csv_options(file: str) -> dict[str, Any]:
    """Keeps texts such as "N/A" as they are, and finds the separator of the columns."""
    with open_text(file) as text:
        sample = text.read(SAMPLE)
    try:
        separator = csv.Sniffer().sniff(sample.splitlines()[0] + "\n", SEPARATORS).delimiter
    except (csv.Error, IndexError):
        separator = "\t" if ".tsv" in file else ","
    # Only an empty field is null: pandas by itself reads "N/A", "None" and "null" as null too. Every field is a text:
    # "007" is no number.
    lines = csv.reader(sample.splitlines(keepends=True), delimiter=separator)
    header, first = next(lines, []), next(lines, [])
    if len(first) > len(header):  # pandas would take the first field for an index, and shift the others
        raise ValueError(
            f"its first row has {len(first)} fields and its header {len(header)}: put quotes around a field with a "
            f"{separator!r} in it"
        )
    options: dict[str, Any] = {"sep": separator, "keep_default_na": False, "na_values": [""], "encoding": "utf-8-sig"}
    if len(set(header)) == len(header) and all(header):
        from datasets import Features, Value

        options["features"] = Features({name: Value("string") for name in header})
    return options


def _json_options(file: str) -> dict[str, Any]:
    """Finds the list of rows in a JSON object.

    Raises:
        ValueError: If the object has several lists of rows.
    """
    with open_text(file) as text:
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
    if ROW_KEYS & content.keys():
        return {}  # the object is a row itself
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
        with suppress(OSError, EOFError, zlib.error, lzma.LZMAError), open_text(file, "surrogateescape") as text:
            for number, line in enumerate(text, 1):
                if number == 1 and (line.lstrip().startswith("[") or line.strip() == "{"):
                    break  # one list or object in many lines
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    json.dumps(row, ensure_ascii=False).encode()
                except json.JSONDecodeError as error:
                    return f"{name}, line {number}, is not JSON: {error.msg} at character {error.pos + 1}"
                except UnicodeEncodeError:
                    return f"{name}, line {number}, holds bytes or half of a surrogate pair that are no UTF-8 character"
                if not isinstance(row, dict):
                    return f"{name}, line {number}, is no object with the columns of a row, but {line.strip()!r:.60}"
    return None

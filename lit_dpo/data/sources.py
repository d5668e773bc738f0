"""A hub id, a file, a folder or an in-memory data set ──► rows, as a ``datasets.Dataset``."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lit_dpo.files.packages import locate

if TYPE_CHECKING:
    from datasets import Dataset

# A datasets.Dataset. Importing the library takes over a second, so it is imported only where rows are read.
Rows: TypeAlias = Any
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
TRAIN_SPLITS = ("train_prefs", "train")
EVAL_SPLITS = ("test_prefs", "validation", "test")


class SplitNotFoundError(ValueError):
    """The source exists, but it does not have the requested split."""


def load_rows(source: str | Rows, split: str | None, defaults: tuple[str, ...]) -> tuple["Dataset", str]:
    """Loads the rows of one split. Also returns a name of the source and split, for messages.

    Args:
        source: A hub id; a JSONL, JSON, Parquet or CSV file; a folder of such files, where the name of a file before
            ``-`` and a digit is its split; a folder written by ``Dataset.save_to_disk``; ``package:NAME/FOLDER``; or a
            data set in memory.
        split: Name of the split. None takes the first of ``defaults`` that exists. A single file has one split,
            ``train``.
        defaults: Names of splits to try, in order, when ``split`` is None.

    Raises:
        FileNotFoundError: If the path does not exist or holds no readable file.
        SplitNotFoundError: If the source has no such split.
        ValueError: If a file cannot be read.
        ConnectionError: If the hub cannot be reached.
        TypeError: If the source is neither a string nor a ``datasets.Dataset``.
    """
    available: Any = _open(source) if isinstance(source, str) else {"train": _checked(source)}
    for name in (split,) if split is not None else defaults:
        if name in available:
            rows = available[name]
            place = describe(source) if len(available) == 1 else f"{describe(source)} [{name}]"
            return (_read(source, rows) if isinstance(rows, list) else rows), place
    wanted = f"split {split!r}" if split is not None else f"any of the splits {', '.join(defaults)}"
    raise SplitNotFoundError(f"{describe(source)} does not have {wanted}, only {', '.join(available)}.")


def describe(source: str | Rows) -> str:
    """A short name of the source, for messages."""
    return source if isinstance(source, str) else "the data set in memory"


def _checked(source: Rows) -> "Dataset":
    """Returns an in-memory data set unchanged.

    Raises:
        TypeError: If ``source`` is not a ``datasets.Dataset``.
    """
    from datasets import Dataset

    if not isinstance(source, Dataset):
        raise TypeError(
            f"data.source must be a name or a datasets.Dataset, not {type(source).__name__}. Dataset.from_list makes "
            "one from a list of rows."
        )
    return source


def _open(source: str) -> Any:
    """The splits of a source: a DatasetDict, or a dict from split names to data sets or to lists of files."""
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError

    path = Path(locate(source)).expanduser()
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(
                f"{source}: files of the kind {path.suffix!r} cannot be read. Known kinds: {', '.join(BUILDERS)}."
            )
        return {"train": [path]}
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = load_from_disk(str(path))
            return loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        files: dict[str, list[Path]] = {}
        for folder in (path, path / "data"):
            for file in sorted(folder.iterdir()) if folder.is_dir() else []:
                if file.suffix in BUILDERS:
                    files.setdefault(re.split(r"-\d", file.stem)[0], []).append(file)
        if not files:
            raise FileNotFoundError(f"{source} is a folder without any {', '.join(BUILDERS)} file.")
        return files
    if path.suffix in BUILDERS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"data source {source}: there is no such file or folder.")
    try:
        return load_dataset(source)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"data source {source}: not a local file or folder, and not an accessible data set on the hub "
            f"({' '.join(str(error).split()):.200})."
        ) from error
    except (ConnectionError, OSError) as error:
        raise ConnectionError(
            f"data source {source}: cannot be loaded from the hub ({' '.join(str(error).split()):.200}). Give a local "
            "file or folder, or check the network."
        ) from error


def _read(source: str | Rows, files: list[Path]) -> "Dataset":
    """Reads the files of one split into one data set."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(BUILDERS[files[0].suffix], data_files=[str(file) for file in files], split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{describe(source)}: {names} cannot be read: {str(cause).splitlines()[0]:.200}") from error

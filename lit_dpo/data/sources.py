"""A hub id, a file, a folder or an in-memory data set ──► rows, as a ``datasets.Dataset``."""

import glob
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lit_dpo.data.file_kinds import BUILDERS, COMPRESSED, builder_of, read_files, stem_of
from lit_dpo.files.packages import locate

if TYPE_CHECKING:
    from datasets import Dataset

# A datasets.Dataset. Importing the library takes over a second, so it is imported only where rows are read.
Rows: TypeAlias = Any
STREAMED = ("json", "parquet", "arrow")  # kinds of files that can be read row by row
TRAIN_SPLITS = ("train_prefs", "train")
EVAL_SPLITS = ("test_prefs", "validation", "test")


class SplitNotFoundError(ValueError):
    """The source exists, but it does not have the requested split."""


def load_rows(
    source: str | Rows,
    split: str | None,
    defaults: tuple[str, ...],
    subset: str | None = None,
    revision: str | None = None,
    one_split: bool = False,
) -> tuple["Dataset", str]:
    """Loads the rows of one split. Also returns a name of the source and split, for messages.

    Args:
        source: A hub id; a file of a kind in ``BUILDERS``, perhaps compressed; a pattern such as ``part-*.jsonl``; an
            address such as ``s3://…``; a folder of files, where the name of a file before ``-`` and a digit is its
            split; a folder written by ``Dataset.save_to_disk``; ``package:NAME/FOLDER``; or a data set in memory.
        split: Name of the split. None takes the first of ``defaults`` that exists. A single file has one split,
            ``train``.
        defaults: Names of splits to try, in order, when ``split`` is None.
        subset: Name of a subset (configuration) of a data set on the hub.
        revision: Revision of a data set on the hub.
        one_split: Whether to fetch only this split of a data set on the hub.

    Raises:
        FileNotFoundError: If the path does not exist or holds no readable file.
        SplitNotFoundError: If the source has no such split.
        ValueError: If a file cannot be read, or if the data set has several subsets and ``subset`` is not set.
        ConnectionError: If the hub cannot be reached.
        TypeError: If the source is neither a string nor a ``datasets.Dataset``.
    """
    hub = _files_on_hub if one_split else _from_hub
    rows, place = _chosen(source, split, defaults, partial(hub, subset=subset, revision=revision))
    return (read_files(rows, describe(source)) if isinstance(rows, list) else rows), place


def stream_rows(
    source: str | Rows,
    split: str | None,
    defaults: tuple[str, ...],
    subset: str | None = None,
    revision: str | None = None,
) -> tuple[Any, str]:
    """Finds the rows of one split without reading them: names of files of one kind, or a data set.

    For the arguments, and what else is raised, see ``load_rows``.

    Raises:
        ValueError: If the files are of a kind that cannot be read row by row.
    """
    rows, place = _chosen(source, split, defaults, partial(_files_on_hub, subset=subset, revision=revision))
    if isinstance(rows, list):
        kinds = {builder_of(name) for name in rows}
        if len(kinds) > 1 or not kinds <= set(STREAMED):
            raise ValueError(
                f"{place}: data.streaming reads JSON lines, Parquet and Arrow files, of one kind, but not "
                f"{', '.join(sorted(str(kind) for kind in kinds))}."
            )
    return rows, place


def _chosen(
    source: str | Rows, split: str | None, defaults: tuple[str, ...], hub: Callable[[str], Any]
) -> tuple[Any, str]:
    """The data set, or the names of the files, of the chosen split, and a name for messages.

    Raises:
        SplitNotFoundError: If the source has no such split.
    """
    available: Any = _open(source, hub) if isinstance(source, str) else {"train": _checked(source)}
    for name in (split,) if split is not None else defaults:
        if name in available:
            place = describe(source) if len(available) == 1 else f"{describe(source)} [{name}]"
            return available[name], place
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


def _open(source: str, hub: Callable[[str], Any]) -> Any:
    """The splits of a source: a DatasetDict, or a dict from split names to data sets or to lists of files."""
    from datasets import DatasetDict, load_from_disk

    if "://" in source:
        return {"train": _remote_files(source)}
    located = locate(source)
    path = Path(located).expanduser()
    if path.is_file():
        if builder_of(path.name) is None:
            raise ValueError(
                f"{source}: files of the kind {path.suffix!r} cannot be read. Known kinds: {', '.join(BUILDERS)}, also "
                f"compressed as {', '.join(COMPRESSED)}."
            )
        return {"train": [str(path)]}
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = load_from_disk(str(path))
            return loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        files: dict[str, list[str]] = {}
        for folder in (path, path / "data"):
            for file in sorted(folder.iterdir()) if folder.is_dir() else []:
                if builder_of(file.name) is not None:
                    files.setdefault(re.split(r"-\d", stem_of(file.name))[0], []).append(str(file))
        if not files:
            raise FileNotFoundError(f"{source} is a folder without any {', '.join(BUILDERS)} file.")
        return files
    if glob.has_magic(source):
        found = sorted(name for name in glob.glob(str(path), recursive=True) if builder_of(name))  # noqa: PTH207
        if not found:
            raise FileNotFoundError(f"data source {source}: no file of a known kind has such a name.")
        return {"train": found}
    if builder_of(source) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"data source {source}: there is no such file or folder.")
    return hub(source)


def _remote_files(source: str) -> list[str]:
    """The files at an address that fsspec knows: a file, a pattern or a folder.

    Raises:
        FileNotFoundError: If there is no file of a known kind.
        ConnectionError: If the address cannot be reached.
        ValueError: If nothing is installed that knows such addresses.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(source)
        names = system.glob(path) if glob.has_magic(path) else system.find(path)
        found = [str(system.unstrip_protocol(name)) for name in names if builder_of(str(name))]
    except (ImportError, ValueError) as error:
        raise ValueError(f"data source {source}: {error}.") from error
    except OSError as error:
        raise ConnectionError(f"data source {source}: cannot be reached ({error!s:.200}).") from error
    if not found:
        raise FileNotFoundError(f"data source {source}: there is no file of a known kind ({', '.join(BUILDERS)}).")
    return sorted(found)


def _from_hub(source: str, subset: str | None, revision: str | None) -> Any:
    """A data set of the hub."""
    from datasets import load_dataset

    with _hub_errors(source):
        return load_dataset(source, name=subset, revision=revision)


def _files_on_hub(source: str, subset: str | None, revision: str | None) -> dict[str, list[str]]:
    """The addresses of the files of a data set of the hub, by split."""
    from datasets import load_dataset_builder

    with _hub_errors(source):
        files = load_dataset_builder(source, name=subset, revision=revision).config.data_files or {}
    return {str(split): [str(name) for name in names] for split, names in files.items()}


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    """Turns errors of the hub's libraries into ones that name the source and the remedy."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except DatasetNotFoundError as error:
        what = " ".join(str(error).split())
        remedy = " Accept its terms on the hub, and log in with `hf auth login`." if "gated" in what else ""
        raise FileNotFoundError(
            f"data source {source}: not a local file or folder, and not an accessible data set on the hub "
            f"({what:.200}).{remedy}"
        ) from error
    except (ConnectionError, OSError) as error:
        raise ConnectionError(
            f"data source {source}: cannot be loaded from the hub ({' '.join(str(error).split()):.200}). Give a local "
            "file or folder, or check the network."
        ) from error
    except ValueError as error:
        what = " ".join(str(error).split())
        if "onfig" not in what:  # "Config name is missing", "BuilderConfig … not found"
            raise
        raise ValueError(f"data source {source}: choose one of its subsets with data.subset ({what:.300}).") from error

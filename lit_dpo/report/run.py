"""Folders of runs ──► ``report.html`` and ``report.json``."""

import json
from collections.abc import Sequence
from pathlib import Path

from lit_dpo.files.atomic import atomic_write
from lit_dpo.report.content import report_content
from lit_dpo.report.folder import read_run
from lit_dpo.report.page import as_page

FILENAMES = ("report.html", "report.json")


def verdict_line(report: Path) -> str:
    """The verdicts of a ``report.json`` in a few words: how many of each severity, and their names."""
    found = [one for run in json.loads(report.read_text(encoding="utf-8"))["runs"] for one in run["verdicts"]]
    serious = [one["code"] for one in found if one["severity"] != "note"]
    if not serious:
        return "no warnings" if not found else f"notes only: {', '.join(one['code'] for one in found)}"
    return f"{len(serious)} warning{'s'[: len(serious) > 1]}: {', '.join(serious)}"


def write_report(runs: Sequence[str | Path], output: str | Path | None = None) -> list[Path]:
    """Writes the report of one run, or of several on one page.

    Args:
        runs: Folders of runs.
        output: Folder for the two files; by default that of the run, or ``report`` for several runs.

    Returns:
        Paths of page and JSON.

    Raises:
        FileNotFoundError: If a folder is not that of a run.
        ValueError: If a run is given twice, or a file of one cannot be read.
    """
    found = [read_run(Path(path)) for path in runs]
    paths = [run.path.resolve() for run in found]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise ValueError(f"{found[number].path} is given twice.")
    content = report_content(found)
    texts = (
        as_page(content),
        json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n",
    )
    folder = Path(output) if output is not None else found[0].path if len(found) == 1 else Path("report")
    written = [folder / name for name in FILENAMES]
    for path, text in zip(written, texts, strict=True):
        with atomic_write(path) as beside:
            beside.write_text(text, encoding="utf-8", errors="backslashreplace")
    return written

"""``python -m lit_dpo report``: what a run learned, as a page."""

from pathlib import Path

from lit_dpo.files.console import say
from lit_dpo.report.run import verdict_line, write_report


def report(*runs: str, output: str | None = None) -> None:
    """Writes ``report.html`` and ``report.json`` of a run, or of several runs on one page.

    Args:
        runs: Folders of runs, such as ``runs/NAME/version_0``; of ``runs/NAME`` the last version.
        output: Folder for the two files; by default that of the run, or ``report`` for several runs.
    """
    page, plain = write_report(runs, None if output is None else Path(output))
    say(f"Wrote {page} ({verdict_line(plain)})")
    say(f"Wrote {plain}")

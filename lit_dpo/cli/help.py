"""The help of a command, kept in the cache folder: building it imports every large library, which takes seconds."""

import hashlib
import io
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path

import lit_dpo
from lit_dpo.files.atomic import atomic_write
from lit_dpo.files.cache import cache_dir
from lit_dpo.files.console import say


def print_help(command: str, run: Callable[[], None]) -> None:
    """Prints the help of a command, from the cache where it is as new as the installed packages.

    Args:
        command: Name of the command.
        run: Runs the command line, which prints the help and exits.
    """
    kept = cache_dir() / "help" / f"{command}-{installation()}.txt"
    try:
        text = kept.read_text(encoding="utf-8")
    except OSError:
        with redirect_stdout(io.StringIO()) as printed:
            try:
                run()
            except SystemExit as end:
                if end.code:
                    raise
        text = printed.getvalue()
        with suppress(OSError), atomic_write(kept) as path:  # without a cache folder the help is built each time
            path.write_text(text, encoding="utf-8")
    say(text.removesuffix("\n"))


def installation() -> str:
    """A digest of all that the help depends on: Python, installed packages, this package's code, terminal width."""
    digest = hashlib.sha256(f"{sys.version} {shutil.get_terminal_size().columns}".encode())
    for folder in sys.path:
        for package in sorted(Path(folder).glob("*.dist-info")):  # the name of this folder holds the version
            digest.update(package.name.encode())
    for source in sorted(Path(lit_dpo.__file__).parent.rglob("*.py")):
        changed = source.stat()
        digest.update(f"{source} {changed.st_mtime_ns} {changed.st_size}".encode())
    return digest.hexdigest()[:16]

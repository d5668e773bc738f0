"""Printing that never fails on a character, and switching off the progress bars of libraries."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# Replacements for a terminal without Unicode
ASCII = str.maketrans({"│": "|", "─": "-", "┼": "+", "»": ">", "…": "..."})


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line. Characters that the stream cannot encode are replaced instead of raising an error."""
    stream = sys.stdout if stream is None else stream
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(ASCII).encode(encoding, "replace").decode(encoding)
    print(text, file=stream, flush=True)


def make_streams_safe() -> None:
    """Makes standard output and error replace characters that they cannot encode, for all code that prints."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)  # absent where a notebook or a test replaced the stream
        if reconfigure is not None:
            reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")


@contextmanager
def library_bars(shown: bool, *libraries: str) -> Iterator[None]:
    """Within this context the progress bars of some libraries are hidden, unless ``shown``.

    Args:
        shown: Whether to leave them as they are.
        libraries: ``datasets``, ``transformers`` or both; they are imported.
    """
    hidden = [] if shown else [_bars_of(library) for library in libraries]
    restored = []
    for are_shown, hide, show in hidden:
        if are_shown():
            hide()
            restored.append(show)
    try:
        yield
    finally:
        for show in restored:
            show()


def _bars_of(library: str) -> tuple[Callable[[], bool], Callable[[], None], Callable[[], None]]:
    """Functions that tell whether a library shows progress bars, that hide them, and that show them."""
    if library == "datasets":
        import datasets

        return (
            lambda: not datasets.are_progress_bars_disabled(),
            datasets.disable_progress_bars,
            datasets.enable_progress_bars,
        )
    from transformers.utils import logging

    return logging.is_progress_bar_enabled, logging.disable_progress_bar, logging.enable_progress_bar

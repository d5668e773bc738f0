"""Printing that never fails on a character, and switching off the progress bars of libraries."""

import sys
from collections.abc import Iterator
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
def library_bars(shown: bool) -> Iterator[None]:
    """Within this context the progress bars of datasets and transformers are hidden, unless ``shown`` is true."""
    bars: list[Any] = []
    if not shown and "datasets" in sys.modules:
        import datasets

        bars.append(
            (datasets.are_progress_bars_disabled, datasets.disable_progress_bars, datasets.enable_progress_bars)
        )
    if not shown and "transformers" in sys.modules:
        from transformers.utils import logging

        bars.append(
            (lambda: not logging.is_progress_bar_enabled(), logging.disable_progress_bar, logging.enable_progress_bar)
        )
    restored = []
    for is_disabled, disable, enable in bars:
        if not is_disabled():
            disable()
            restored.append(enable)
    try:
        yield
    finally:
        for enable in restored:
            enable()

"""Nothing that is printed ends a run."""

import io
import sys

import pytest

from lit_dpo.files.console import library_bars, make_streams_safe, say


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_the_encoding_lacks_is_replaced(encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    say("» base │ aligned … 猫", stream)
    printed = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "base" in printed
    assert ("│" in printed) == (encoding == "utf-8")
    assert ("|" in printed) == (encoding != "utf-8")


def test_what_libraries_print_does_not_fail_either(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    make_streams_safe()
    print("│", flush=True)
    print("│", file=sys.stderr, flush=True)


def test_progress_bars_of_libraries_are_hidden_and_shown_again() -> None:
    import datasets
    from transformers.utils import logging

    for shown in (True, False):
        with library_bars(shown, "datasets", "transformers"):
            assert datasets.are_progress_bars_disabled() != shown
            assert logging.is_progress_bar_enabled() == shown
        assert not datasets.are_progress_bars_disabled()
        assert logging.is_progress_bar_enabled()

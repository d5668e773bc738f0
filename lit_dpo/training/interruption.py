"""Ctrl-C and SIGTERM: what ends a run early, and how a callback tells it from an error."""


class Terminated(SystemExit):
    """SIGTERM ended the run after its optimizer step. The process exits with 143, the status of that signal."""

    def __init__(self) -> None:
        super().__init__(128 + 15)


def is_interruption(exception: BaseException) -> bool:
    """Whether a run was stopped from outside, by Ctrl-C or SIGTERM, and not by an error."""
    return isinstance(exception, KeyboardInterrupt | Terminated)

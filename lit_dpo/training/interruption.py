"""Ctrl-C and SIGTERM end a run early. Callbacks can tell them from errors."""


class Terminated(SystemExit):
    """SIGTERM ended the run after its optimizer step. The process exits with status 143, as is usual for SIGTERM."""

    def __init__(self) -> None:
        super().__init__(128 + 15)


def is_interruption(exception: BaseException) -> bool:
    """Whether a run was stopped from outside, by Ctrl-C or SIGTERM, and not by an error."""
    return isinstance(exception, KeyboardInterrupt | Terminated)

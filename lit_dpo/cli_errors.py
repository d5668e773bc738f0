"""An error of the parser, or of a class that it builds ──► one line that tells the user what to do."""

import difflib
import inspect
import re
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_dpo import objectives


def in_a_line(message: str) -> str:
    """Says shortly that a value is of none of several types; other long errors as they are."""
    found = re.search(r'key "([\w.]+)":.*Subtypes: \[(.*?)\]\n.*Given value: ([^\n]*)', message, re.DOTALL)
    if not found:
        return " ".join(message.split()) if message.count("\n") <= 2 else message
    key, types, value = found.groups()
    types = re.sub(r"typing\.Literal\[(.*?)\]|<class '(?:\w+\.)*(\w+)'>", r"\1\2", types).replace("NoneType", "null")
    types = re.sub(r"\b(Objective|Divergence)\b", lambda kind: ", ".join(_names(kind[0])), types)
    problem = re.search(r"Problem with given class_path .*\n\s*([^\n]*)", message)
    reason = f": {problem[1]}" if problem else ""
    return f'Parser key "{key}": expected one of {types}, not {value}{reason}'


def _names(kind: str) -> list[str]:
    """The classes of ours of a kind, those that can be chosen by their name alone."""
    classes = {name: getattr(objectives, name) for name in objectives.__all__}
    return [
        name
        for name, found in classes.items()
        if issubclass(found, classes[kind]) and not inspect.isabstract(found) and name != kind
    ]


def with_suggestion(message: str, parser: Any) -> str:
    """Adds the nearest known key, or name of a class, to an error about an unknown one."""
    known = {key.removeprefix("--") for action in parser._actions for key in action.option_strings if key[:2] == "--"}
    known |= set(getattr(getattr(parser, "_subcommands_action", None), "choices", None) or ())
    unknown = message
    if "expected one of" in message:
        known, unknown = set(_names("Objective") + _names("Divergence")), message.rpartition(", not ")[2]
    for candidate in re.findall(r"[\w.]+", unknown):
        close = difflib.get_close_matches(candidate, known - {candidate}, n=1, cutoff=0.75)
        if close and candidate not in known and len(candidate) > 3:
            return f"{message.rstrip('.')}. Did you mean {close[0]}?"
    if re.search(r"Option '\w+' is not accepted", message):
        return f"{message} by the class that is chosen: --help, and --model.objective.help NAME, tell what is."
    return message


def own_words(message: str) -> str:
    """What a class of ours said when it was built, out of the parser's account of all the types that it tried."""
    said = re.search(r"Errors:\n(.*)\nGiven value type", message, re.DOTALL)
    items = re.split(r"^ *- ", said[1], flags=re.MULTILINE) if said else []
    theirs = ("Expected", "Does not validate", "Import path", "Problem with", "Not of type")
    words = [" ".join(item.split()) for item in items if item.strip() and not item.startswith(theirs)]
    return words[-1] if words else ""


def is_the_users(error: BaseException) -> bool:
    """Whether an error was raised here, or by Lightning's checks, and so tells the user what to do."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    raised_here = frame is not None and Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)
    return raised_here or isinstance(error, MisconfigurationException)

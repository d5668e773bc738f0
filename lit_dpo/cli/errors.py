"""An error of the parser, of a class that it builds, or of Lightning ──► one line that tells the user what to do."""

import difflib
import errno
import inspect
import re
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lit_dpo import objectives
from lit_dpo.training.interruption import is_dead_worker
from lit_dpo.training.memory import is_out_of_memory

# What a disk answers: no space, over quota, read-only, no permission, a file where a folder should be
OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
PACKAGE, LIGHTNING = Path(objectives.__file__).parents[1], Path(lightning.__file__).parent


def one_line(message: str) -> str:
    """Shortens the parser's message that a value has none of several types. Other long messages stay as they are."""
    name = re.search(r'key "([\w.]+)"', message)
    missing = re.search(r"(?:ModuleNotFoundError|ImportError): *([^\n]+)", message)
    if name and missing:
        return f'Parser key "{name[1]}": {missing[1].strip()}'
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
    """Short names of the classes of a kind that ``lit_dpo.objectives`` offers."""
    classes = {name: getattr(objectives, name) for name in objectives.__all__}
    return [
        name
        for name, found in classes.items()
        if issubclass(found, classes[kind]) and not inspect.isabstract(found) and name != kind
    ]


def with_suggestion(message: str, parser: Any) -> str:
    """Adds the nearest known key or class name to an error about an unknown one.

    The parser's actions hold the known keys. jsonargparse has no public list of them.
    """
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
        return f"{message} by the class that is chosen. See --help, or --model.objective.help NAME."
    return message


def line_for(error: Exception) -> str:
    """One line for an error in the user's settings or files. Empty for any other error, which needs its traceback.

    Errors raised in this package already say what to do. Errors raised in Lightning get the key of the Trainer's
    argument in front.
    """
    if isinstance(error, ValueError | OSError | ImportError) and _raised_in(error, PACKAGE):
        return str(error)
    if isinstance(error, TypeError) and str(error).startswith(("data.", "model.")):  # others are mistakes in the code
        return str(error)
    if is_out_of_memory(error):
        return str(error).splitlines()[0]
    if is_dead_worker(error):
        return (
            f"{str(error).splitlines()[0].rstrip('.')}. The system may have ended it because memory was short. Resume "
            "with --ckpt_path last, and lower data.num_workers."
        )
    if isinstance(error, OSError) and error.errno in OF_DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}. Runs are written under runs/, caches to the folder that LIT_DPO_CACHE names."
    if isinstance(error, MisconfigurationException):
        return _with_trainer_key(" ".join(str(error).split()))
    if isinstance(error, ValueError):
        said = message_of_class(str(error))
        if said:
            return said
    if isinstance(error, ValueError | TypeError | ImportError | OSError) and _raised_in(error, LIGHTNING):
        return _with_trainer_key(" ".join(str(error).split()))
    return ""


def message_of_class(message: str) -> str:
    """The error that a class raised when it was built, taken from the parser's list of all the types that it tried."""
    said = re.search(r"Errors:\n(.*)\nGiven value type", message, re.DOTALL)
    items = re.split(r"^ *- ", said[1], flags=re.MULTILINE) if said else []
    theirs = ("Expected", "Does not validate", "Import path", "Problem with", "Not of type")
    listed = ("Not a valid subclass", "a class path", "a dict")  # what a class could be
    words = [" ".join(item.split()) for item in items if item.strip() and not item.startswith(theirs + listed)]
    problem = re.search(r"Problem with given class_path '([^']+)':\n\s*([^\n]+)", message)
    if not words and problem:
        return f"{problem[1]}: {problem[2]}"
    return words[-1] if words else ""


def _with_trainer_key(message: str) -> str:
    """Adds the key of the Trainer's argument that a message is about, if the message mentions it."""
    keys = [key for key in inspect.signature(Trainer.__init__).parameters if key != "self"]
    places = {key: found.start() for key in keys if (found := re.search(rf"\b{key}\b", message))}
    if places:
        return f"trainer.{min(places, key=places.__getitem__)}: {message}"
    if "ccelerator" in message or "backend found" in message:
        return f"trainer.accelerator: {message}"
    return message


def _raised_in(error: BaseException, package: Path) -> bool:
    """Whether the innermost frame of an error's traceback belongs to a package."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and Path(frame.tb_frame.f_code.co_filename).is_relative_to(package)

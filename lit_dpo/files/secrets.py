"""Keys, passwords and folders of this machine in settings, which files for others must not hold."""

import re
from argparse import Namespace
from typing import Any

# Names of arguments. A pad_token or an eos_token is no secret.
SECRET = re.compile(r"(^|_)(api_?key|access_key|password|secret|(api|access|auth|hf|hub)_token)$|^token$", re.I)
FOLDERS = re.compile(r"(?<![\w:./~-])~?/(?:[^\s/:,;'\"\]]+/)+(?=[^\s/:,;'\"\]])")  # of an absolute path
IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")  # user and password


def remove_secrets(value: Any, key: str = "") -> list[str]:
    """Removes keys and passwords from settings, at every depth and in place.

    Args:
        value: Nested dicts, lists and namespaces.
        key: Where they stand, for the names that are returned.

    Returns:
        Dotted names of what was removed.
    """
    found: list[str] = []
    if isinstance(value, tuple):
        for item in value:
            found += remove_secrets(item, key)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            if isinstance(item, str) and IN_ADDRESS.search(item):
                value[place] = IN_ADDRESS.sub("***", item)
                found.append(key)
            else:
                found += remove_secrets(item, key)
    elif isinstance(value, dict | Namespace):
        items = value if isinstance(value, dict) else vars(value)
        for name, item in list(items.items()):
            inner = f"{key}.{name}".lstrip(".")
            if isinstance(item, str) and (SECRET.search(name) or IN_ADDRESS.search(item)):
                items[name] = None if SECRET.search(name) else IN_ADDRESS.sub("***", item)
                found.append(inner)
            else:
                found += remove_secrets(item, inner)
    return found


def shorten_paths(value: Any) -> Any:
    """The same nested values with folders of a machine cut from absolute paths, also within texts."""
    if isinstance(value, dict):
        return {name: shorten_paths(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [shorten_paths(item) for item in value]
    return FOLDERS.sub("", value) if isinstance(value, str) else value

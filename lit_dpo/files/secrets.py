"""Keys and passwords in settings, which no file that a run leaves may hold."""

import re
from argparse import Namespace
from typing import Any

# Names of arguments. A pad_token or an eos_token is no secret.
SECRET = re.compile(r"(^|_)(api_?key|access_key|password|secret|(api|access|auth|hf|hub)_token)$|^token$", re.I)
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
    if isinstance(value, list):
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

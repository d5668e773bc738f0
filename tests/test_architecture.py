"""The house: imports go down only, and nothing of the reading order is missing."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "lit_dpo"
# Each room may import from rooms of a smaller number; within `data` and `policy` the files are in the order of the way.
FLOORS = {
    "objectives": 0,
    "base_model": 0,
    "metrics": 1,
    "data": 1,
    "policy": 2,
    "run_dir": 2,
    "checkpointing": 3,
    "reference_pass": 3,
    "step": 3,
    "module": 4,
    "datamodule": 4,
    "callbacks": 5,
    "commands": 5,
    "cli_errors": 5,
    "cli": 6,
    "__main__": 7,
}
WAY = ["pairs", "tokenization", "batch", "sampler", "sources", "preparation"]


def room(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [name.name for name in node.names]
    return found


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    here = room(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
    for module in imports(path):
        if module.startswith("lit_dpo."):
            there = room(module)
            assert there == here or FLOORS[there] < FLOORS[here], f"{here} imports {module}"
            if here == "policy" and there == "data":
                assert module in ("lit_dpo.data.batch", "lit_dpo.data.tokenization"), (
                    "data and policy meet in PairBatch"
                )
        if here == "objectives":
            known = ("torch", "typing", "abc", "collections", "inspect", "math", "lit_dpo")
            assert module.split(".")[0] in known, f"objectives import {module}"
        assert module.split(".")[0] != "trl", "TRL is for tests and benchmarks"


@pytest.mark.parametrize("name", WAY)
def test_data_flows_one_way(name: str) -> None:
    for module in imports(PACKAGE / "data" / f"{name}.py"):
        if module.startswith("lit_dpo.data."):
            assert WAY.index(module.split(".")[2]) < WAY.index(name)


OBJECTIVES = [f"lit_dpo.objectives.{path.stem}" for path in (PACKAGE / "objectives").glob("[a-z]*.py")]


@pytest.mark.parametrize("name", [*sorted(set(OBJECTIVES) - {"lit_dpo.objectives.base"}), "lit_dpo.policy.attention"])
def test_examples_of_the_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    options = {
        "torch": importlib.import_module("torch"),
        "Segment": importlib.import_module("lit_dpo.data.batch").Segment,
    }
    results = doctest.testmod(module, extraglobs=options)
    assert results.attempted > 0
    assert results.failed == 0


def test_every_file_says_what_it_is() -> None:
    assert all(ast.get_docstring(ast.parse(path.read_text())) for path in sorted(PACKAGE.rglob("*.py")))


def test_importing_the_package_alone_is_quick() -> None:
    code = "import lit_dpo, sys; assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)

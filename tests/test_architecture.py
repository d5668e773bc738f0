"""The house: imports go down only, and nothing of the reading order is missing."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "lit_dpo"
# A room may import from rooms of a smaller number.
FLOORS = {
    "files": 0,
    "objectives": 0,
    "base": 1,
    "data": 2,
    "policy": 3,
    "reference": 4,
    "training": 5,
    "module": 6,
    "datamodule": 6,
    "evaluation": 7,
    "audit": 8,
    "export": 8,
    "report": 9,
    "callbacks": 10,
    "commands": 11,
    "cli": 12,
    "__main__": 13,
}
LOOSE = {"__init__.py", "__main__.py", "module.py", "datamodule.py"}  # files at the package's top
WAY = [
    "formats",
    "filters",
    "rendering",
    "encoding",
    "tokenization",
    "batch",
    "pairs",
    "near",
    "findings",
    "sampler",
    "file_kinds",
    "sources",
    "mixture",
    "preparation",
    "stream",
    "loader",
    "loading",
]


def room(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
    path = PACKAGE / "data" / name
    for module in imports(path / "__init__.py" if path.is_dir() else path.with_suffix(".py")):
        if module.startswith("lit_dpo.data."):
            there = module.split(".")[2]
            assert there == name or WAY.index(there) < WAY.index(name)


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


def test_only_the_two_parts_lie_at_the_top() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == LOOSE
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms | {Path(name).stem for name in LOOSE} - {"__init__"} == set(FLOORS)
    for part in ("module", "datamodule"):
        assert len((PACKAGE / f"{part}.py").read_text(encoding="utf-8").splitlines()) < 250


PRIVATE = {
    "_typehints": ["cli/overrides.py"],  # jsonargparse: arguments that a replaced class hands on
    "_subcommands_action": ["cli/errors.py"],  # jsonargparse: names of the commands
    "_typehint": ["cli/overrides.py"],  # jsonargparse: the type of an argument
    "_actions": ["cli/errors.py", "cli/overrides.py"],  # argparse: names of the options
    "_prepare_subcommand_parser": ["cli/app.py"],  # lightning: the arguments of one command
    "_fingerprint": ["data/preparation.py"],  # datasets: what the rows are
    "_is_avx512_bf16_supported": ["policy/precision.py"],  # torch: whether the CPU multiplies bfloat16
    "_attn_implementation": ["policy/policy.py"],  # transformers: the attention to go back to
    "_should_accumulate": [],  # lightning: replaced by the count of optimizer steps
}


@pytest.mark.parametrize("name", PRIVATE)
def test_each_private_name_of_a_library_stands_in_one_place(name: str) -> None:
    files = [str(path.relative_to(PACKAGE)) for path in FILES if re.search(rf"\b{name}\b", path.read_text("utf-8"))]
    assert files == PRIVATE[name]


def test_every_file_says_what_it_is() -> None:
    assert all(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(PACKAGE.rglob("*.py")))


def test_importing_the_package_alone_is_quick() -> None:
    code = "import lit_dpo, sys; assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)

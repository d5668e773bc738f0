"""A checkpoint never lets a repository's code run: only the caller and the command line can."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_dpo import DPOModule
from lit_dpo.cli.app import main
from lit_dpo.reference import AnotherModel
from lit_dpo.training.hyperparameters import without_trust
from tests.test_module import data, fit, module

pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches",
    "ignore:The '.*dataloader' does not have many workers",
)


@pytest.fixture
def hostile(tiny_base: str, pairs_file: str, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint whose arguments name a folder with code and allow it, and the file that the code would write."""
    folder, mark = tmp_path / "hostile", tmp_path / "code-has-run"
    folder.mkdir()
    for file in Path(tiny_base).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "hostile", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise ImportError('the code has run')\n")
    path = tmp_path / "hostile.ckpt"
    fit(module(tiny_base), data(pairs_file), limit_train_batches=1).save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert "trust_remote_code" not in checkpoint["hyper_parameters"]
    checkpoint["hyper_parameters"] |= {"base": str(folder), "trust_remote_code": True}
    torch.save(checkpoint, path)
    return path, mark


def test_loading_a_checkpoint_runs_no_code(hostile: tuple[Path, Path]) -> None:
    path, mark = hostile
    with pytest.raises(ValueError, match="trust_remote_code"):
        DPOModule.load_from_checkpoint(path, weights_only=True)
    with path.open("rb") as file, pytest.raises(ValueError, match="trust_remote_code"):
        DPOModule.load_from_checkpoint(file, weights_only=True)
    assert not mark.exists()
    with pytest.raises(ImportError, match="the code has run"):
        DPOModule.load_from_checkpoint(path, weights_only=True, trust_remote_code=True)
    assert mark.exists(), "the test would notice"


def test_the_command_line_takes_no_trust_from_a_checkpoint(
    hostile: tuple[Path, Path], pairs_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, mark = hostile
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lit_dpo"])
    arguments = ["--data.source", pairs_file, "--data.val_size", "4", "--trainer.accelerator", "cpu"]
    with (
        pytest.warns(UserWarning, match=r"hostile\.ckpt would set trust_remote_code\. Only the command line"),
        pytest.raises(ValueError, match="trust_remote_code"),
    ):
        main(["validate", "--ckpt_path", str(path), *arguments])
    with pytest.raises(ValueError, match="trust_remote_code"):
        main(["generate", "--ckpt_path", str(path), "--prompt", "x"])
    assert not mark.exists()


def test_nothing_of_it_is_stored_at_any_depth(tiny_base: str) -> None:
    other = AnotherModel(tiny_base, trust_remote_code=True)
    stored: Any = dict(module(tiny_base, reference=other, trust_remote_code=True).hparams)
    assert stored == without_trust(stored)
    assert "trust_remote_code" not in stored["reference"]["init_args"]

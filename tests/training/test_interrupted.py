"""Data workers that die, folders that cannot be written."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lit_dpo.cli.app import main
from lit_dpo.cli.errors import line_for
from tests.cli.test_cli import tiny  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended"),
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
]


class KillWorker(Callback):
    """Kills the process that loads batches after the second step."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            for process in multiprocessing.active_children():
                assert process.pid
                os.kill(process.pid, signal.SIGKILL)
                process.join()


def weights(version: int) -> dict[str, torch.Tensor]:
    return dict(torch.load(f"runs/dpo/version_{version}/checkpoints/last.ckpt", weights_only=True)["state_dict"])


@pytest.mark.ci
@pytest.mark.slow
def test_a_dead_worker_loses_nothing(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    run = ["fit", *tiny, "--data.num_workers", "1", "--trainer.max_epochs", "2"]
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        main([*run, "--trainer.callbacks+=tests.training.test_interrupted.KillWorker"])
    assert "Resume with --ckpt_path last, and lower data.num_workers." in line_for(caught.value)
    main([*run, "--ckpt_path", "last"])
    main(run)
    assert all(torch.equal(value, weights(2)[name]) for name, value in weights(1).items())


def test_a_folder_that_cannot_be_written(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("a file")
    with pytest.raises(OSError, match="runs") as caught:
        main(["fit", *tiny])
    assert ": Not a directory. Runs are written under runs/" in line_for(caught.value)

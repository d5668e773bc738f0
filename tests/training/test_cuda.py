"""What only a GPU can show of a run: 16-mixed with a GradScaler, resuming, the reference cache, waiting for the GPU."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lit_dpo import DPOModule, PreferenceDataModule
from lit_dpo.callbacks import CollapseGuard, LastCheckpoint
from tests.tiny import made_up_rows, write_jsonl

pytestmark = pytest.mark.gpu


class Record(Callback):
    """Keeps the loss of each batch, and how often its step waited for the GPU."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.waits: list[list[str]] = []
        self._caught: Any = None

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        torch.cuda.synchronize()
        self._caught = warnings.catch_warnings(record=True)
        self._found = self._caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(None, None, None)
        self.waits.append([str(w.filename) for w in self._found if "synchroniz" in str(w.message)])
        self.losses.append(outputs["loss"].item())


def fit(base: str, source: str, precision: str, ckpt: Path | None = None, root: Any = None, **options: Any) -> Any:
    seed_everything(5, verbose=False)
    settings = {"lr_scheduler": "constant", "warmup": 0.0, **options.pop("module", {})}
    module = DPOModule(base, optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3), **settings)
    data = PreferenceDataModule(source, val_size=4, batch_size=4)
    record = Record()
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        callbacks=[*options.pop("callbacks", []), CollapseGuard(), record],
        default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    return trainer, record


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "pairs.jsonl", made_up_rows(44))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_twenty_steps_learn_in_every_precision(tiny_base: str, source: str, tmp_path: Path, precision: str) -> None:
    trainer, record = fit(tiny_base, source, precision, root=tmp_path, max_epochs=2, enable_checkpointing=False)
    assert trainer.global_step == 20
    assert record.losses[0] == pytest.approx(math.log(2), abs=0.02)
    assert sum(record.losses[-5:]) < 0.9 * sum(record.losses[:5])
    assert all(math.isfinite(loss) for loss in record.losses)
    if precision == "16-mixed":
        scaler: Any = trainer.precision_plugin
        assert scaler.scaler.get_scale() > 1


@pytest.mark.parametrize(("precision", "most"), [("bf16-mixed", 1), ("16-mixed", 2)])  # a GradScaler reads its own flag
def test_the_host_waits_once_a_step(
    tiny_base: str, source: str, tmp_path: Path, precision: str, most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    _, record = fit(tiny_base, source, precision, root=tmp_path, max_epochs=1, enable_checkpointing=False)
    counts = [len(waits) for waits in record.waits]
    with capsys.disabled():
        print(f"\ntold: {precision} waits a step {counts} {record.waits[-1]}")
    assert max(counts[2:]) <= most


def test_a_resumed_run_goes_on(tiny_base: str, source: str, tmp_path: Path) -> None:
    _, expected = fit(
        tiny_base, source, "bf16-mixed", root=tmp_path / "whole", max_epochs=2, callbacks=[LastCheckpoint()]
    )
    fit(tiny_base, source, "bf16-mixed", root=tmp_path / "part", max_steps=7, callbacks=[LastCheckpoint()])
    (last,) = (tmp_path / "part").rglob("last.ckpt")
    trainer, found = fit(
        tiny_base, source, "bf16-mixed", last, tmp_path / "resumed", max_epochs=2, callbacks=[LastCheckpoint()]
    )
    assert trainer.global_step == 20
    # Attention's backward pass adds in any order on a GPU, so two runs are equal but for rounding.
    assert found.losses == pytest.approx(expected.losses[7:], abs=0.02)
    assert found.losses[0] == pytest.approx(expected.losses[7], abs=2e-3)


def test_the_cached_reference_equals_the_live_one(
    tiny_base: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {}
    for reference in ("cached", "live"):
        options: Any = {"module": {"reference": reference}, "max_epochs": 1, "enable_checkpointing": False}
        _, record = fit(tiny_base, source, "bf16-mixed", root=tmp_path, **options)
        first[reference] = record.losses
    with capsys.disabled():
        print(f"\ntold: first loss {first['cached'][0]} cached, {first['live'][0]} live")
    assert first["live"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert first["cached"][0] == pytest.approx(math.log(2), abs=0.02)

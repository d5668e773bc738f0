"""A resumed run goes on bit for bit: mid-epoch, at its end, with workers, accumulation and dropout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from peft import LoraConfig
from safetensors.torch import load_file

from lit_dpo import DPOModule, PreferenceDataModule
from lit_dpo.callbacks import AdapterExport, LastCheckpoint
from lit_dpo.training.throughput import NAMES

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create",
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:You're resuming",
    "ignore:Checkpoint directory .* exists and is not empty",
)
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")


class SaveAt(LastCheckpoint):
    """Keeps a checkpoint of one optimizer step."""

    def __init__(self, step: int) -> None:
        super().__init__(every_n_steps=max(step, 1))
        self.step = step

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / f"step{self.step}.ckpt", weights_only=False)

    def _try_to_save(self, trainer: Trainer) -> None:
        self._save(trainer)


def run(
    base: str, pairs: str, root: Path, step: int, workers: int = 0, accumulate: int = 1, ckpt: Path | None = None
) -> Any:
    seed_everything(5 if ckpt is None else 99, verbose=False)  # a resumed run must not lean on the seed
    model = DPOModule(base, quantization=None, lora=LORA, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    data = PreferenceDataModule(pairs, val_size=4, batch_size=2, num_workers=workers)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        callbacks=[SaveAt(step)],
        default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
    return model, trainer


@pytest.mark.parametrize(
    ("step", "workers", "accumulate"),
    [
        *((3, 0, 1), (8, 0, 1), (3, 0, 3), (5, 2, 1), (8, 1, 1)),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((11, 0, 1), (2, 0, 3), (4, 0, 3))),
    ],
)
def test_bit_for_bit(tiny_base: str, pairs_file: str, tmp_path: Path, step: int, workers: int, accumulate: int) -> None:
    model, trainer = run(tiny_base, pairs_file, tmp_path / "whole", step, workers, accumulate)
    resumed, again = run(
        tiny_base, pairs_file, tmp_path / "resumed", -1, workers, accumulate, tmp_path / f"whole/step{step}.ckpt"
    )
    assert again.global_step == trainer.global_step
    expected = dict(model.named_parameters())
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    for name, value in trainer.callback_metrics.items():
        if name.removeprefix("train/") not in NAMES:  # the clock's and the memory's
            assert torch.equal(value, again.callback_metrics[name]), name


class SaveFirstAt(SaveAt):
    """Keeps the first checkpoint of a step: at the last step of an epoch, the one before its evaluation."""

    def _save(self, trainer: Trainer) -> None:
        if not (Path(trainer.default_root_dir) / f"step{self.step}.ckpt").exists():
            super()._save(trainer)


@pytest.mark.parametrize(("step", "workers", "accumulate"), [(8, 0, 1), (4, 1, 2)])
def test_a_run_that_ends_after_the_last_step_of_an_epoch(
    tiny_base: str,
    pairs_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    workers: int,
    accumulate: int,
) -> None:
    """It goes on with the next epoch, whole."""
    monkeypatch.setattr("tests.training.test_resume.SaveAt", SaveFirstAt)
    model, trainer = run(tiny_base, pairs_file, tmp_path / "whole", step, workers, accumulate)
    ckpt = tmp_path / f"whole/step{step}.ckpt"
    assert torch.load(ckpt, weights_only=True)["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"] == {
        "ready": 0,
        "started": 0,
        "processed": 0,
        "completed": 0,
    }, "before the evaluation"
    resumed, again = run(tiny_base, pairs_file, tmp_path / "resumed", -1, workers, accumulate, ckpt)
    assert again.global_step == trainer.global_step
    expected = dict(model.named_parameters())
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(
    "first",
    [{"max_steps": 5}, *(pytest.param(one, marks=pytest.mark.slow) for one in ({"max_epochs": 1}, {"max_steps": 8}))],
)
def test_a_finished_run_goes_on_as_if_it_had_not_ended(
    tiny_base: str, pairs_file: str, tmp_path: Path, first: dict[str, int]
) -> None:
    def fit(root: Path, ckpt: Path | None = None, **length: int) -> tuple[DPOModule, Trainer]:
        seed_everything(5 if ckpt is None else 99, verbose=False)
        optimizer = lambda p: torch.optim.AdamW(p, lr=1e-2)  # noqa: E731
        model = DPOModule(
            tiny_base, quantization=None, lora=LORA, optimizer=optimizer, lr_scheduler="constant", warmup=0
        )
        data = PreferenceDataModule(pairs_file, val_size=4, batch_size=2)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        trainer = Trainer(accelerator="cpu", default_root_dir=root, callbacks=[LastCheckpoint()], **quiet, **length)
        trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
        return model, trainer

    whole, _ = fit(tmp_path / "whole", max_epochs=2)
    fit(tmp_path / "first", **first)
    resumed, trainer = fit(tmp_path / "second", tmp_path / "first/checkpoints/last.ckpt", max_epochs=2)
    assert trainer.global_step == 16
    expected = dict(whole.named_parameters())
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, expected[name]), name


class TwoGroups(DPOModule):
    """Two parameter groups with settings of their own, as in LoRA+, with or without a schedule."""

    def __init__(self, base: str, rates: tuple[float, float], decay: float, scheduled: bool, **options: Any) -> None:
        super().__init__(base, quantization=None, lora=LORA, **options)
        self.rates, self.decay, self.scheduled = rates, decay, scheduled

    def configure_optimizers(self) -> Any:
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = [[p for name, p in named if ("lora_B" in name) == is_b] for is_b in (False, True)]
        optimizer = torch.optim.AdamW(
            [
                {"params": groups[0], "lr": self.rates[0], "weight_decay": 0.0},
                {"params": groups[1], "lr": self.rates[1], "weight_decay": self.decay},
            ]
        )
        if not self.scheduled:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("scheduled", [True, False])
def test_each_parameter_group_keeps_its_own_settings(
    tiny_base: str, pairs_file: str, tmp_path: Path, scheduled: bool
) -> None:
    def fit(rates: tuple[float, float], decay: float, epochs: int, ckpt: Path | None = None) -> list[dict[str, Any]]:
        model = TwoGroups(tiny_base, rates, decay, scheduled)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        callbacks = [LastCheckpoint()] if ckpt is None else []
        trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, max_epochs=epochs, **quiet)
        data = PreferenceDataModule(pairs_file, val_size=4, batch_size=4)
        trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
        return trainer.optimizers[0].param_groups

    first = fit((1e-2, 1e-3), 0.1, 1)
    assert [group["weight_decay"] for group in first] == [0.0, 0.1]
    for rates, decay in (((1e-2, 1e-3), 0.1), ((2e-2, 4e-3), 0.3)):
        groups = fit(rates, decay, 2, tmp_path / "checkpoints/last.ckpt")
        assert [group["weight_decay"] for group in groups] == [0.0, decay]
        expected = [rate / 9 if scheduled else rate for rate in rates]  # after eight steps
        assert [group["lr"] for group in groups] == pytest.approx(expected)


def test_a_full_disk_ends_no_run(
    tiny_base: str, pairs_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint in between that cannot be written is told of. The one before it stays, and the run goes on."""
    write = torch.save
    folder = tmp_path / "checkpoints"

    def full(content: Any, file: Any, *args: Any, **options: Any) -> None:
        write(content, file, *args, **options)
        if content["global_step"] in (4, 6):
            raise OSError(28, "No space left on device")

    seed_everything(5, verbose=False)
    monkeypatch.setattr(torch, "save", full)
    model = DPOModule(tiny_base, quantization=None, lora=LORA)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=7,
        logger=False,
        callbacks=[LastCheckpoint(every_n_steps=2)],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.warns(UserWarning, match=r"last\.ckpt could not be written, so an older one stays: .*No space left"):
        trainer.fit(model, PreferenceDataModule(pairs_file, val_size=4, batch_size=2))
    assert trainer.global_step == 7
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 7
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"], "nothing half-written is left"


def test_a_finished_run_that_is_resumed_exports_its_adapter(tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    """It may have been killed between its last checkpoint and the export."""
    run(tiny_base, pairs_file, tmp_path / "whole", 16)
    model = DPOModule(tiny_base, quantization=None, lora=LORA)
    data = PreferenceDataModule(pairs_file, val_size=4, batch_size=2)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        callbacks=[AdapterExport()],
        default_root_dir=tmp_path / "resumed",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, data, ckpt_path=tmp_path / "whole/step16.ckpt", weights_only=True)
    exported = load_file(tmp_path / "resumed/adapter/adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in exported.items() if "lora_B" in name)

"""A run that resumes with another base, tokenizer, data or size of batches than its checkpoint's."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_dpo import DPOModule, PreferenceDataModule
from lit_dpo.callbacks import LastCheckpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:You're resuming",
    "ignore:trainer.accumulate_grad_batches was",
    "ignore:The PEFT config's `base_model_name_or_path` was renamed",
    "ignore:Checkpoint directory .* exists and is not empty",
)
LORA = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Seen(Callback):
    """Rows that were trained on, and the learning rate of each step."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.rows += [row for _, row in batch.origins]
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def run(base: str, pairs: str, root: Path, ckpt: Path | None = None, **options: Any) -> tuple[Seen, Trainer]:
    seed_everything(5, verbose=False)
    model = {"quantization": None, "lora": LORA, "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2)}
    module = DPOModule(base, **{**model, **options.pop("model", {})})
    data = PreferenceDataModule(pairs, **{"val_size": 4, "batch_size": 2, **options.pop("data", {})})
    seen = Seen()
    callbacks = [LastCheckpoint(), seen]
    trainer = Trainer(accelerator="cpu", callbacks=callbacks, default_root_dir=root, **QUIET, **options)
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    return seen, trainer


def last(root: Path) -> Path:
    return root / "checkpoints/last.ckpt"


@pytest.mark.parametrize(
    ("batch_size", "accumulate"), [(4, 1), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((1, 1), (3, 2)))]
)
def test_another_size_of_batches_goes_on_with_the_pairs_not_yet_seen(
    tiny_base: str, pairs_file: str, tmp_path: Path, batch_size: int, accumulate: int
) -> None:
    whole, _ = run(tiny_base, pairs_file, tmp_path / "whole", max_epochs=2)
    first, _ = run(tiny_base, pairs_file, tmp_path, max_steps=6)
    other = {"data": {"batch_size": batch_size}, "accumulate_grad_batches": accumulate}
    with pytest.warns(UserWarning, match=r"pairs in a batch over all processes was 2 .* goes on after 12 pairs"):
        then, trainer = run(tiny_base, pairs_file, tmp_path / "then", last(tmp_path), max_epochs=2, **other)
    left = 4 // batch_size * batch_size  # of the first epoch
    assert first.rows + then.rows[:left] == whole.rows[: 12 + left]
    second = then.rows[left:]
    assert len(second) == len(set(second)) == 16 // batch_size * batch_size, "the second epoch is whole"
    assert then.rates[-1] == pytest.approx(0, abs=2.5e-3)
    assert min(then.rates[: len(then.rates) // 2]) > 1e-3, "the schedule ends with the run, and no earlier"
    assert trainer.current_epoch == 2


def test_half_the_batches_accumulated_twice_go_on_as_before(tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    whole, trainer = run(tiny_base, pairs_file, tmp_path / "whole", max_epochs=2)
    run(tiny_base, pairs_file, tmp_path, max_steps=6)
    halves = {"data": {"batch_size": 1}, "accumulate_grad_batches": 2}
    with pytest.warns(UserWarning, match="not bit for bit"):
        then, again = run(tiny_base, pairs_file, tmp_path / "then", last(tmp_path), max_epochs=2, **halves)
    assert again.global_step == trainer.global_step == 16
    assert then.rows == whole.rows[12:]
    assert then.rates[1::2] == pytest.approx(whole.rates[6:])


def test_another_accumulation_is_told(tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    run(tiny_base, pairs_file, tmp_path, max_epochs=1)
    with pytest.warns(UserWarning, match="accumulate_grad_batches was 1 and is now 2.*same share of the run"):
        run(tiny_base, pairs_file, tmp_path / "then", last(tmp_path), max_epochs=2, accumulate_grad_batches=2)


def other_base(base: str, folder: Path, template: bool) -> str:
    """A copy with one other weight, or with another chat template."""
    shutil.copytree(base, folder)
    if template:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template += "{# another #}"
        tokenizer.save_pretrained(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
        model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("template", "options", "named"),
    [
        (False, {}, "base model"),
        (True, {}, "chat template"),
        (None, {"model": {"quantization": "nf4"}}, "quantization"),
    ],
)
def test_another_base_is_refused_unless_it_is_meant(
    tiny_base: str, pairs_file: str, tmp_path: Path, template: bool | None, options: dict[str, Any], named: str
) -> None:
    run(tiny_base, pairs_file, tmp_path, max_epochs=1)
    base = tiny_base if template is None else other_base(tiny_base, tmp_path / "other", template)
    message = rf"trained with another {named}\. If that is meant, set model\.allow_mismatch=true"
    with pytest.raises(ValueError, match=message):
        run(base, pairs_file, tmp_path / "then", last(tmp_path), max_epochs=2, **dict(options))
    allowed = {"model": {**options.get("model", {}), "allow_mismatch": True}}
    with pytest.warns(UserWarning, match=f"trained with another {named}"):
        _, trainer = run(base, pairs_file, tmp_path / "then", last(tmp_path), max_epochs=2, **allowed)
    assert trainer.global_step == 16


def test_the_same_base_elsewhere_or_in_another_type_is_the_same(
    tiny_base: str, pairs_file: str, tmp_path: Path
) -> None:
    run(tiny_base, pairs_file, tmp_path, max_epochs=1)
    shutil.copytree(tiny_base, tmp_path / "copy")
    _, trainer = run(
        str(tmp_path / "copy"), pairs_file, tmp_path / "then", last(tmp_path), max_epochs=2, precision="bf16-mixed"
    )
    assert trainer.global_step == 16


def test_other_pairs_begin_the_epoch_anew_if_that_is_meant(tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    run(tiny_base, pairs_file, tmp_path, max_steps=6)
    other = {"max_epochs": 1, "data": {"shuffle": False}}
    with pytest.raises(ValueError, match=r"data\.shuffle was True and is now False.* set model\.allow_mismatch=true"):
        run(tiny_base, pairs_file, tmp_path / "then", last(tmp_path), **other)
    allowed = {"model": {"allow_mismatch": True}}
    with pytest.warns(UserWarning, match=r"data\.shuffle was True and is now False.*begins an epoch"):
        seen, _ = run(tiny_base, pairs_file, tmp_path / "then", last(tmp_path), **other, **allowed)
    assert len(set(seen.rows)) == 16


def test_a_checkpoint_of_the_first_format_goes_on(
    tiny_base: str, pairs_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was kept from the version before formats had a number: three of eight batches of the first epoch."""
    path = Path(__file__).with_name("format_1.pt")
    with caplog.at_level(logging.INFO):
        seen, trainer = run(tiny_base, pairs_file, tmp_path, path, max_epochs=1)
    assert "names no base and no tokenizer: they are not compared" in caplog.text
    assert trainer.global_step == 8
    assert len(set(seen.rows)) == 10
    whole, _ = run(tiny_base, pairs_file, tmp_path / "whole", max_epochs=1)
    assert seen.rows == whole.rows[6:]


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_first_format_goes_on_in_other_batches(
    tiny_base: str, pairs_file: str, tmp_path: Path, batch_size: int
) -> None:
    path = Path(__file__).with_name("format_1.pt")
    with pytest.warns(UserWarning, match="goes on after 6 pairs"):
        seen, _ = run(tiny_base, pairs_file, tmp_path, path, max_epochs=1, data={"batch_size": batch_size})
    whole, _ = run(tiny_base, pairs_file, tmp_path / "whole", max_epochs=1)
    assert seen.rows == whole.rows[6 : 6 + 10 // batch_size * batch_size]


def test_a_checkpoint_of_a_later_format_is_refused(tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    run(tiny_base, pairs_file, tmp_path, max_steps=1)
    checkpoint = torch.load(last(tmp_path), weights_only=True)
    checkpoint["lit_dpo"]["version"] = 99
    torch.save(checkpoint, tmp_path / "later.ckpt")
    with pytest.raises(ValueError, match=r"the format 99, of a later lit_dpo.*Update lit_dpo"):
        run(tiny_base, pairs_file, tmp_path / "then", tmp_path / "later.ckpt", max_epochs=1)

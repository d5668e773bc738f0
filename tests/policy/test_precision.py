"""bitsandbytes and datasets are needed only where something is quantized, or rows are read."""

import subprocess
import sys

import pytest
import torch

from lit_dpo.policy import precision
from lit_dpo.policy.precision import dtype_for, quantization_for
from tests.closeness import LAYER, assert_same, rounding
from tests.conftest import REPOSITORY
from tests.tiny import random_batch, tiny_policy

WITHOUT = """
import sys
sys.modules["bitsandbytes"] = None
from lightning.pytorch import Trainer
from lit_dpo import DPOModule, PreferenceDataModule
model = DPOModule({base!r}, quantization={quantization!r})
assert "datasets" not in sys.modules, "imported before rows are read"
data = PreferenceDataModule({pairs!r}, val_size=4, batch_size=4)
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, **quiet).fit(model, data)
print("trained")
"""


def run(code: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)


@pytest.mark.ci
@pytest.mark.slow
def test_without_quantization_no_bitsandbytes_is_needed(tiny_base: str, pairs_file: str) -> None:
    ran = run(WITHOUT.format(base=tiny_base, pairs=pairs_file, quantization=None))
    assert "trained" in ran.stdout, ran.stderr


def test_quantization_without_bitsandbytes_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install bitsandbytes\), or set model\.quantization=null"):
        quantization_for("nf4", torch.float32)
    assert quantization_for(None, torch.float32) is None


def test_whether_the_cpu_multiplies_bfloat16_can_be_asked() -> None:
    """torch has no public function for it: this fails when the private one is gone."""
    assert precision._cpu_multiplies_bfloat16() in (True, False)


def test_half_precisions_are_refused() -> None:
    assert dtype_for("32-true") == torch.float32
    with pytest.raises(ValueError, match=r"trainer\.precision=16-true is not supported"):
        dtype_for("16-true")


def test_hidden_states_between_layers_are_float32_under_float16(tiny_base: str) -> None:
    policy = tiny_policy(tiny_base, dtype=torch.float16)
    hidden: list[torch.dtype] = []
    for layer in policy.model.get_base_model().model.layers:  # type: ignore[union-attr]
        layer.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0].dtype))
    batch = random_batch([(5, 7, 3)])
    with torch.autocast("cpu", torch.float16):
        half = policy.logps(batch).chosen
    assert hidden == [torch.float32, torch.float32]
    assert_same(half, tiny_policy(tiny_base).logps(batch).chosen, rounding(2 * LAYER, torch.float16))

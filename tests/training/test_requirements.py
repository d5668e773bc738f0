"""What would train wrongly without a word is refused by name."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from lit_dpo.training.requirements import check_trainer
from tests.test_module import data, fit, module

pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches",
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:You're using the WeightAveraging callback",
    "ignore:.*StochasticWeightAveraging",
)


class OwnDDP(DDPStrategy):
    """A strategy of somebody's own."""


@pytest.mark.parametrize(
    ("kind", "accepted"),
    [
        (SingleDeviceStrategy, True),
        (DDPStrategy, True),
        (OwnDDP, True),
        (ModelParallelStrategy, False),
        (FSDPStrategy, False),
        (DeepSpeedStrategy, False),
    ],
)
def test_strategies_that_were_not_tested_are_refused(kind: type, accepted: bool) -> None:
    trainer: Any = SimpleNamespace(strategy=kind.__new__(kind), callbacks=[])
    if accepted:
        check_trainer(trainer, quantized=True)
        return
    with pytest.raises(ValueError, match=rf"trainer\.strategy {kind.__name__} is not supported.*trainer\.strategy=ddp"):
        check_trainer(trainer, quantized=True)


def test_a_run_with_another_strategy_does_not_start(tiny_base: str, pairs_file: str) -> None:
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    try:
        with pytest.raises(ValueError, match="ModelParallelStrategy is not supported"):
            fit(module(tiny_base), data(pairs_file), strategy=strategy, devices=1)
    finally:
        torch.distributed.destroy_process_group()  # which the strategy made


@pytest.mark.parametrize("callback", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)])
def test_averages_of_packed_weights_are_refused(tiny_base: str, pairs_file: str, callback: Any) -> None:
    with pytest.raises(ValueError, match=rf"{type(callback).__name__} averages all weights.*callbacks\.AdapterAverage"):
        fit(module(tiny_base, quantization="nf4"), data(pairs_file), callbacks=[callback])


def test_averages_of_plain_weights_are_taken(tiny_base: str, pairs_file: str) -> None:
    fit(module(tiny_base), data(pairs_file), callbacks=[EMAWeightAveraging()], limit_train_batches=1)

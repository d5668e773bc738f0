import pytest
import torch

from lit_dpo.metrics import PreferenceMetrics
from lit_dpo.objectives import PairLogps, Rewards


def parts(chosen: list[float], rejected: list[float]) -> tuple[torch.Tensor, Rewards, PairLogps]:
    c, r = torch.tensor(chosen), torch.tensor(rejected)
    lengths = torch.ones_like(c)
    return c * 2, Rewards(c, r), PairLogps(c * 10, r * 10, lengths, lengths)


def test_batches_of_unequal_size_weigh_each_pair_the_same() -> None:
    chosen, rejected = [1.0, 2.0, -1.0, 0.5, 3.0], [0.0, 3.0, -2.0, 0.5, 1.0]
    metrics = PreferenceMetrics()
    metrics.update(*parts(chosen[:1], rejected[:1]))
    metrics.update(*parts(chosen[1:], rejected[1:]))
    values = {name: value.item() for name, value in metrics.compute().items()}
    assert values["loss"] == pytest.approx(2.2)
    assert values["rewards/margins"] == pytest.approx((1 - 1 + 1 + 0 + 2) / 5)
    assert values["rewards/accuracies"] == pytest.approx(3.5 / 5), "a tie counts half"
    assert values["logps/chosen"] == pytest.approx(11.0)


def test_totals_do_not_lose_small_terms() -> None:
    metrics = PreferenceMetrics()
    metrics.update(*parts([1e8], [0.0]))
    for _ in range(100):
        metrics.update(*parts([1.0], [0.0]))
    assert metrics.compute()["rewards/chosen"].item() == pytest.approx((1e8 + 100) / 101, rel=1e-14)

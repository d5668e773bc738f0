import pytest
import torch

from lit_dpo.objectives import PairLogps, Rewards, Sigmoid
from lit_dpo.training.metrics import PreferenceMetrics
from tests.objectives.examples import from_tokens


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


def by_tokens(*responses: list[float]) -> PairLogps:
    """Log-probs of pairs, chosen and rejected in turn, token by token."""
    tokens = torch.tensor([value for response in responses for value in response])
    return from_tokens(tokens, [len(response) for response in responses])


POLICY = by_tokens([-1.0, -3.0], [-2.0], [-1.0], [-4.0, -2.0, -3.0])
REFERENCE = by_tokens([-2.0, -3.0], [-2.5], [-0.5], [-4.0, -2.0, -1.0])


def test_what_tells_a_collapse_is_by_the_token_and_against_the_reference() -> None:
    metrics = PreferenceMetrics()
    objective = Sigmoid(0.5)
    metrics.update(objective(POLICY, REFERENCE), objective.rewards(POLICY, REFERENCE), POLICY, REFERENCE)
    values = {name: value.item() for name, value in metrics.compute().items()}
    assert values["logps/chosen_per_token"] == pytest.approx((-2 - 1) / 2)
    assert values["logps/rejected_per_token"] == pytest.approx((-2 - 3) / 2)
    assert (values["lengths/chosen"], values["lengths/rejected"]) == (1.5, 2.0)
    assert values["displacement/chosen"] == pytest.approx((1 / 2 - 0.5) / 2)
    assert values["displacement/rejected"] == pytest.approx((0.5 - 2 / 3) / 2)
    assert values["kl"] == pytest.approx((1 + 0.25 + 0.25 + 4) / 2 / 7), "½(Δ log p)², over 7 tokens"
    margins = [0.5 * (1 - 0.5), 0.5 * (-0.5 + 2)]
    assert values["rewards/margins"] == pytest.approx(sum(margins) / 2)
    assert values["rewards/negative_margins"] == 0.0
    assert values["rewards/margins_q50"] == pytest.approx(sum(margins) / 2)
    assert values["rewards/margins_q10"] == pytest.approx(margins[0] + 0.1 * (margins[1] - margins[0]))
    assert values["rewards/chosen_q90"] == pytest.approx(-0.25 + 0.9 * 0.75)


def test_without_a_reference_nothing_is_said_of_one() -> None:
    metrics = PreferenceMetrics()
    metrics.update(*parts([1.0], [2.0]))
    assert not {name for name in metrics.compute() if name == "kl" or name.startswith("displacement")}
    assert metrics.compute()["rewards/negative_margins"] == 1.0


def test_quantiles_are_of_all_pairs_whatever_the_batches() -> None:
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0)).tolist()
    metrics = PreferenceMetrics()
    for start, end in ((0, 1), (1, 500), (500, 1001)):
        metrics.update(*parts(values[start:end], [0.0] * (end - start)))
    found = metrics.compute()
    for name in ("chosen", "margins"):
        for share in (0.1, 0.5, 0.9):
            expected = torch.tensor(values).double().quantile(share).item()
            assert found[f"rewards/{name}_q{100 * share:.0f}"].item() == pytest.approx(expected, abs=1e-12)

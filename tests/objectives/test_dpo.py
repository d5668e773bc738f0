import math

import pytest
import torch

from lit_dpo.objectives import PairLogps, Sigmoid


def pair_logps(chosen: list[float], rejected: list[float]) -> PairLogps:
    lengths = torch.ones(len(chosen), dtype=torch.long)
    return PairLogps(
        torch.tensor(chosen, dtype=torch.float64, requires_grad=True),
        torch.tensor(rejected, dtype=torch.float64, requires_grad=True),
        lengths,
        lengths,
    )


POLICY = ([-10.0, -20.0, -700.0, -5.0], [-12.0, -18.0, -100.0, -900.0])
REFERENCE = ([-11.0, -19.0, -600.0, -5.0], [-11.0, -19.0, -200.0, -5.0])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_value_is_the_papers_equation_7(beta: float, label_smoothing: float) -> None:
    losses = Sigmoid(beta, label_smoothing)(pair_logps(*POLICY), pair_logps(*REFERENCE))
    for index, loss in enumerate(losses.tolist()):
        margin = beta * ((POLICY[0][index] - REFERENCE[0][index]) - (POLICY[1][index] - REFERENCE[1][index]))
        expected = (1 - label_smoothing) * math.log1p(math.exp(-margin)) if margin > -600 else -margin
        expected += label_smoothing * math.log1p(math.exp(margin))
        assert loss == pytest.approx(expected, rel=1e-12)


def test_gradient_is_the_papers() -> None:
    beta = 0.3
    policy, reference = pair_logps([-10.0, -3.0], [-9.0, -8.0]), pair_logps([-11.0, -4.0], [-9.5, -6.0])
    Sigmoid(beta)(policy, reference).sum().backward()
    margins = beta * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))
    weight = beta * torch.sigmoid(-margins)  # the paper, section 4: what the DPO update does
    torch.testing.assert_close(policy.chosen.grad, -weight.detach())
    torch.testing.assert_close(policy.rejected.grad, weight.detach())


def test_no_difference_costs_ln_2() -> None:
    same = pair_logps([-10.0], [-12.0])
    assert Sigmoid(0.1)(same, same).item() == pytest.approx(math.log(2), abs=1e-15)


def test_rewards_are_beta_times_the_log_ratio() -> None:
    rewards = Sigmoid(0.5).rewards(pair_logps([-10.0], [-12.0]), pair_logps([-11.0], [-11.0]))
    assert (rewards.chosen.item(), rewards.rejected.item(), rewards.margins.item()) == (0.5, -0.5, 1.0)


@pytest.mark.parametrize(
    "arguments", [{"beta": 0.0}, {"beta": -1.0}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}]
)
def test_parameters_outside_their_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"objective.{next(iter(arguments))}"):
        Sigmoid(**arguments)

"""Values of each objective against the equations of its paper, with Python's own mathematics, pair by pair."""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_dpo import objectives as ours
from tests.objectives.examples import LENGTHS, extreme_tokens, from_tokens, random_tokens


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigma(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def log_odds(mean: float) -> float:
    return mean - math.log(-math.expm1(min(mean, -1e-6)))


def smoothed(x: float, epsilon: float) -> float:
    return -(1 - epsilon) * log_sigma(x) - epsilon * log_sigma(-x)


def average(pair: Any) -> float:
    """Difference h of the log-ratios per token."""
    return float(pair.chosen / pair.num_chosen - pair.rejected / pair.num_rejected)


# A pair has log-ratios `chosen` and `rejected`, the policy's own `log_chosen` and `log_rejected`, and token numbers.
FORMS: dict[str, tuple[ours.Objective, Callable[[Any], float]]] = {
    "Sigmoid": (ours.Sigmoid(0.3), lambda p: -log_sigma(0.3 * p.h)),
    "cDPO": (ours.Sigmoid(0.3, 0.1), lambda p: smoothed(0.3 * p.h, 0.1)),
    "Robust": (ours.Robust(0.3, 0.1), lambda p: (-0.9 * log_sigma(0.3 * p.h) + 0.1 * log_sigma(-0.3 * p.h)) / 0.8),
    "SigmoidNorm": (ours.SigmoidNorm(5.0, 0.1), lambda p: smoothed(5.0 * average(p), 0.1)),
    "Hinge": (ours.Hinge(0.3), lambda p: max(0.0, 1 - 0.3 * p.h)),
    "IPO": (ours.IPO(0.3), lambda p: (average(p) - 1 / 0.6) ** 2),
    "EXOPair": (
        ours.EXOPair(0.3, 0.1),
        lambda p: (
            sigma(0.3 * p.h) * (log_sigma(0.3 * p.h) - math.log(0.9))
            + sigma(-0.3 * p.h) * (log_sigma(-0.3 * p.h) - math.log(0.1))
        ),
    ),
    "DiscoPOP": (
        ours.DiscoPOP(0.05, 0.05),
        lambda p: -sigma(-p.h) * log_sigma(0.05 * p.h) + sigma(p.h) * math.exp(-0.05 * p.h),
    ),
    "NCAPair": (
        ours.NCAPair(0.3),
        lambda p: -log_sigma(0.3 * p.chosen) - (log_sigma(-0.3 * p.chosen) + log_sigma(-0.3 * p.rejected)) / 2,
    ),
    "BCOPair": (ours.BCOPair(0.3), lambda p: -log_sigma(0.3 * p.chosen) - log_sigma(-0.3 * p.rejected)),
    "SPPOHard": (ours.SPPOHard(0.3), lambda p: (p.chosen - 1 / 0.6) ** 2 + (p.rejected + 1 / 0.6) ** 2),
    "APOZero": (ours.APOZero(0.3), lambda p: 1 - sigma(0.3 * p.chosen) + sigma(0.3 * p.rejected)),
    "APODown": (ours.APODown(0.3), lambda p: sigma(0.3 * p.chosen) + 1 - sigma(0.3 * p.h)),
    "ReverseKL": (ours.Sigmoid(0.3, divergence=ours.ReverseKL()), lambda p: -log_sigma(0.3 * p.h)),
    "ForwardKL": (
        ours.Sigmoid(0.3, divergence=ours.ForwardKL()),
        lambda p: -log_sigma(0.3 * (math.exp(-p.rejected) - math.exp(-p.chosen))),
    ),
    "JensenShannon": (
        ours.Hinge(0.3, divergence=ours.JensenShannon()),
        lambda p: max(0.0, 1 - 0.3 * (log_sigma(p.chosen) - log_sigma(p.rejected))),
    ),
    "AlphaDivergence": (
        ours.Sigmoid(0.3, divergence=ours.AlphaDivergence(0.3)),
        lambda p: -log_sigma(math.exp(-0.3 * p.rejected) - math.exp(-0.3 * p.chosen)),
    ),
    "SFT": (ours.SFT(), lambda p: -p.log_chosen / p.num_chosen),
    "SimPO": (
        ours.SimPO(2.0, 0.7),
        lambda p: -log_sigma(2 * p.log_chosen / p.num_chosen - 2 * p.log_rejected / p.num_rejected - 0.7),
    ),
    "ORPO": (
        ours.ORPO(0.2),
        lambda p: (
            -p.log_chosen / p.num_chosen
            - 0.2 * log_sigma(log_odds(p.log_chosen / p.num_chosen) - log_odds(p.log_rejected / p.num_rejected))
        ),
    ),
    "CPO": (
        ours.CPO(0.3, 0.5, 0.1),
        lambda p: smoothed(0.3 * (p.log_chosen - p.log_rejected), 0.1) - 0.5 * p.log_chosen / p.num_chosen,
    ),
    "ODPO": (ours.ODPO(0.3, 0.5), lambda p: -log_sigma(0.3 * p.h - 0.5 * math.log(p.better))),
    "ODPO linear": (ours.ODPO(0.3, 0.5, "linear"), lambda p: -log_sigma(0.3 * p.h - 0.5 * p.better)),
    "ScoreWeighted": (
        ours.ScoreWeighted(ours.Hinge(0.3), 0.5),
        lambda p: 0.5 * p.better * max(0.0, 1 - 0.3 * p.h),
    ),
    "RPO": (ours.RPO(0.3, 0.7), lambda p: -log_sigma(0.3 * p.h) - 0.7 * p.log_chosen / p.num_chosen),
    "MPO": (
        ours.Mixture(),
        lambda p: (
            -0.8 * log_sigma(0.1 * p.h)
            - 0.2 * (log_sigma(0.1 * p.chosen) + log_sigma(-0.1 * p.rejected))
            - p.log_chosen / p.num_chosen
        ),
    ),
}
SCORES = (8.0, 3.0, 7.5, 7.0, 10.0, 1.0, 5.0, 4.0, 9.0, 2.5)


def by_hand(policy: torch.Tensor, reference: torch.Tensor) -> list[Any]:
    """What the equations ask for, of each pair."""
    pairs = []
    sums = [[float(part.sum()) for part in tokens.split(list(LENGTHS))] for tokens in (policy, reference)]
    for chosen in range(0, len(LENGTHS), 2):
        pair = SimpleNamespace(
            log_chosen=sums[0][chosen],
            log_rejected=sums[0][chosen + 1],
            chosen=sums[0][chosen] - sums[1][chosen],
            rejected=sums[0][chosen + 1] - sums[1][chosen + 1],
            num_chosen=LENGTHS[chosen],
            num_rejected=LENGTHS[chosen + 1],
            better=SCORES[chosen] - SCORES[chosen + 1],
        )
        pair.h = pair.chosen - pair.rejected
        pairs.append(pair)
    return pairs


UNBOUNDED = ("ForwardKL", "AlphaDivergence")  # exponentials, which at the extreme pass the range of any number
EXAMPLES = [(name, kind) for name in FORMS for kind in ("random", "far", "extreme")]


@pytest.mark.parametrize(
    ("name", "example"), [one for one in EXAMPLES if one[0] not in UNBOUNDED or one[1] != "extreme"]
)
def test_value_is_the_papers(name: str, example: str) -> None:
    objective, equation = FORMS[name]
    tokens = {
        "random": (random_tokens(10), random_tokens(11)),
        "far": (random_tokens(12, 6.0), random_tokens(13, 6.0)),
        "extreme": extreme_tokens(),
    }
    policy, reference = tokens[example]
    losses = objective(from_tokens(policy, LENGTHS, scores=SCORES), from_tokens(reference, LENGTHS, scores=SCORES))
    expected = [equation(pair) for pair in by_hand(policy, reference)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_every_objective_is_here_or_below() -> None:
    below = {"AOT", "AOTUnpaired", "PlackettLuce", "WPO", "LDDPO", "Mixture"}
    assert {type(objective).__name__ for objective, _ in FORMS.values()} | below == {
        name
        for name in ours.__all__
        if issubclass(getattr(ours, name), ours.Objective)
        and name not in ("Objective", "LogRatioObjective", "MarginObjective")
    }


def test_gradient_of_dpo_is_the_papers() -> None:
    beta = 0.3
    tokens = random_tokens(1).requires_grad_()
    policy, reference = from_tokens(tokens, LENGTHS), from_tokens(random_tokens(2), LENGTHS)
    policy.chosen.retain_grad()
    policy.rejected.retain_grad()
    ours.Sigmoid(beta)(policy, reference).sum().backward()
    rewards = ours.Sigmoid(beta).rewards(policy, reference)
    weight = (beta * torch.sigmoid(-rewards.margins)).detach()  # the paper, section 4: what the DPO update does
    torch.testing.assert_close(policy.chosen.grad, -weight)
    torch.testing.assert_close(policy.rejected.grad, weight)


def test_no_difference_costs_ln_2() -> None:
    same = from_tokens(random_tokens(1), LENGTHS)
    for objective in (ours.Sigmoid(), ours.SigmoidNorm(), ours.PlackettLuce(), ours.AOT()):
        assert objective(same, same).tolist() == pytest.approx([math.log(2)] * 5, abs=1e-15)


def test_optimal_transport_compares_quantiles() -> None:
    policy, reference = random_tokens(1, 4.0), random_tokens(2, 4.0)
    pairs = by_hand(policy, reference)
    losses = ours.AOT(0.3, 0.1)(from_tokens(policy, LENGTHS), from_tokens(reference, LENGTHS))
    own = sorted(pair.log_chosen - pair.log_rejected for pair in pairs)
    of_reference = sorted(pair.log_chosen - pair.log_rejected - pair.h for pair in pairs)
    expected = [smoothed(0.3 * (a - b), 0.1) for a, b in zip(own, of_reference, strict=True)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)

    losses = ours.AOTUnpaired(0.3)(from_tokens(policy, LENGTHS), from_tokens(reference, LENGTHS))
    good, bad = sorted(pair.chosen for pair in pairs), sorted(pair.rejected for pair in pairs)
    assert losses.tolist() == pytest.approx(
        [-log_sigma(0.3 * (a - b)) for a, b in zip(good, bad, strict=True)], rel=1e-12
    )


LISTS = (4, 2, 3)  # responses of three rows, of LISTED tokens each
LISTED = (3, 5, 4, 2, 1, 6, 7, 7, 2)


def test_plackett_luce_is_the_chance_of_the_ranking() -> None:
    beta = 0.3
    policy, reference = random_tokens(1, 3.0, LISTED), random_tokens(2, 3.0, LISTED)
    losses = ours.PlackettLuce(beta)(
        from_tokens(policy, LISTED, counts=LISTS), from_tokens(reference, LISTED, counts=LISTS)
    )
    ratios = [float(part.sum()) for part in (policy - reference).split(list(LISTED))]
    start = 0
    for count, loss in zip(LISTS, losses.tolist(), strict=True):
        strengths = [math.exp(beta * ratio) for ratio in ratios[start : start + count]]
        start += count

        def chance(order: tuple[int, ...], strengths: list[float] = strengths) -> float:
            left = [strengths[index] for index in order]
            return math.prod(left[place] / sum(left[place:]) for place in range(len(left)))

        assert loss == pytest.approx(-math.log(chance(tuple(range(count)))), rel=1e-12)
        everything = sum(chance(order) for order in itertools.permutations(range(count)))
        assert everything == pytest.approx(1), "the equation that this is held against is a distribution"


def test_plackett_luce_of_two_is_dpo() -> None:
    policy, reference = from_tokens(random_tokens(1), LENGTHS), from_tokens(random_tokens(2), LENGTHS)
    torch.testing.assert_close(ours.PlackettLuce(0.3)(policy, reference), ours.Sigmoid(0.3)(policy, reference))
    without = [logps._replace(responses=None) for logps in (policy, reference)]
    torch.testing.assert_close(ours.PlackettLuce(0.3)(*without), ours.Sigmoid(0.3)(policy, reference))


def test_accuracy_of_a_list_is_the_share_of_its_pairs() -> None:
    tokens = torch.tensor([-1.0, -3.0, -2.0, -5.0], dtype=torch.float64)  # of six pairs one is ordered wrongly
    policy = from_tokens(tokens, (1, 1, 1, 1), counts=(4,))
    reference = from_tokens(torch.zeros(4, dtype=torch.float64), (1, 1, 1, 1), counts=(4,))
    rewards = ours.PlackettLuce(1.0).rewards(policy, reference)
    assert rewards.accuracies.item() == pytest.approx(5 / 6)
    assert rewards.margins.item() == 4.0, "best less worst"
    assert ours.PlackettLuce(1.0).rewards(policy, policy).accuracies.item() == 0.5


def test_length_desensitization_weighs_what_is_longer() -> None:
    policy, reference = random_tokens(1), random_tokens(2)

    def weighed(tokens: torch.Tensor) -> list[float]:
        sums = []
        for index, part in enumerate(tokens.split(list(LENGTHS))):
            shared = min(LENGTHS[index], LENGTHS[index ^ 1])
            sums.append(sum(value * (1 if place < shared else 0.3) for place, value in enumerate(part.tolist())))
        return sums

    own, theirs = weighed(policy), weighed(reference)
    losses = ours.LDDPO(0.3, ours.Sigmoid(0.5))(from_tokens(policy, LENGTHS), from_tokens(reference, LENGTHS))
    expected = [-log_sigma(0.5 * (own[i] - theirs[i] - own[i + 1] + theirs[i + 1])) for i in range(0, len(LENGTHS), 2)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    for inside in (ours.PlackettLuce(0.5), ours.Sigmoid(0.5)):
        mixed = ours.LDDPO(0.3, ours.Mixture([inside, ours.Sigmoid()], [1.0, 0.0]))
        assert mixed(from_tokens(policy, LENGTHS), from_tokens(reference, LENGTHS)).tolist() == pytest.approx(expected)
    for alpha, same in ((1.0, True), (0.0, False)):
        logps = from_tokens(policy, LENGTHS), from_tokens(reference, LENGTHS)
        equal = torch.allclose(ours.LDDPO(alpha)(*logps), ours.Sigmoid()(*logps))
        assert equal == same


def test_wpo_weighs_pairs_by_how_likely_the_policy_finds_them() -> None:
    tokens = random_tokens(1).requires_grad_()
    squares, reference = random_tokens(3), from_tokens(random_tokens(2), LENGTHS)
    policy = from_tokens(tokens, LENGTHS, log_sum_squares=squares)
    aligned = (tokens.detach() - squares).split(list(LENGTHS))
    weights = [math.exp(aligned[i].mean() + aligned[i + 1].mean()) for i in range(0, len(LENGTHS), 2)]
    inner = ours.Sigmoid(0.3)(policy, reference)
    losses = ours.WPO(ours.Sigmoid(0.3))(policy, reference)
    assert losses.tolist() == pytest.approx([w * loss for w, loss in zip(weights, inner.tolist(), strict=True)])
    (gradient,) = torch.autograd.grad(losses.sum(), tokens, retain_graph=True)
    (expected,) = torch.autograd.grad((inner * inner.new_tensor(weights)).sum(), tokens)
    torch.testing.assert_close(gradient, expected, msg="the weights have no gradient")


def test_bcos_shift_is_the_mean_reward_of_the_steps_before() -> None:
    objective = ours.BCOPair(0.3)
    reference = from_tokens(random_tokens(0), LENGTHS)
    seen: list[float] = []
    for step in range(3):
        for part in range(2):  # two batches a step: δ moves at its end
            policy = from_tokens(random_tokens(1 + 2 * step + part).requires_grad_(), LENGTHS)
            rewards = objective.rewards(policy, reference)
            delta = sum(seen) / max(1, len(seen))
            expected = [
                -log_sigma(c - delta) - log_sigma(delta - r)
                for c, r in zip(rewards.chosen.tolist(), rewards.rejected.tolist(), strict=True)
            ]
            assert objective(policy, reference).tolist() == pytest.approx(expected, rel=1e-12)
            evaluated = from_tokens(random_tokens(50), LENGTHS)
            objective(evaluated, reference)  # no gradient: does not move it
        seen += [
            reward
            for part in range(2)
            for values in objective.rewards(from_tokens(random_tokens(1 + 2 * step + part), LENGTHS), reference)[:2]
            for reward in values.tolist()
        ]
        objective.end_step()
        assert float(objective.delta) == pytest.approx(sum(seen) / len(seen), rel=1e-12)
    before = objective.delta
    objective(from_tokens(random_tokens(9).requires_grad_(), LENGTHS), reference)
    objective.end_step(kept=False)
    assert objective.delta == before, "a step that was not taken is forgotten"
    assert objective.state_dict().keys() == {"seen"}

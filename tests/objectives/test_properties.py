"""What all objectives have in common, or theory says of some: gradients, monotony, ties, ranges, refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_dpo import objectives as ours
from tests.objectives.examples import LENGTHS, extreme_tokens, from_tokens, random_tokens

SCORES = (8.0, 3.0, 7.5, 7.0, 10.0, 1.0, 5.0, 4.0, 9.0, 2.5)
ABSTRACT = ("Objective", "LogRatioObjective", "MarginObjective")
NAMES = [name for name in ours.__all__ if issubclass(getattr(ours, name), ours.Objective) and name not in ABSTRACT]
DIVERGENCES = [ours.ForwardKL(), ours.JensenShannon(), ours.AlphaDivergence()]
OBJECTIVES = [
    *(getattr(ours, name)() for name in NAMES),
    *(ours.Sigmoid(divergence=divergence) for divergence in DIVERGENCES),
    *(ours.IPO(divergence=divergence) for divergence in DIVERGENCES),
    ours.Sigmoid(label_smoothing=0.1),
    ours.BCOPair(shift="none"),
    ours.SFT("token"),
    ours.ODPO(scale="linear"),
    ours.WPO(ours.LDDPO(objective=ours.IPO())),
]


def losses(objective: ours.Objective, tokens: Tensor, reference: Tensor) -> Tensor:
    squares = torch.full_like(reference, -1.0)
    policy = from_tokens(tokens, LENGTHS, log_sum_squares=squares, scores=SCORES)
    loss: Tensor = objective(policy, from_tokens(reference, LENGTHS, scores=SCORES))
    return loss


# But for WPO, whose weights have no gradient: test_closed_forms holds it against the equation.
@pytest.mark.parametrize("objective", [one for one in OBJECTIVES if not isinstance(one, ours.WPO)], ids=repr)
def test_gradients_are_finite_differences(objective: ours.Objective) -> None:
    tokens = random_tokens(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses(objective, x, random_tokens(2)), tokens, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_nothing_extreme_gives_more_than_numbers(objective: ours.Objective, dtype: torch.dtype) -> None:
    exponential = isinstance(getattr(objective, "divergence", None), ours.ForwardKL | ours.AlphaDivergence)
    overflows = dtype == torch.float32 and isinstance(objective, ours.IPO) and exponential
    policy, reference = extreme_tokens()
    for tokens, other in ((policy, reference), (reference, policy), (0 * policy, reference), (policy, policy)):
        given = tokens.to(dtype).requires_grad_()
        loss = losses(objective, given, other.to(dtype))
        (gradient,) = torch.autograd.grad(loss.sum(), given)
        assert loss.isfinite().all() or overflows, "the square of exp(80): such a step is not trained on"
        assert gradient.isfinite().all()
        assert loss.dtype == dtype


MONOTONE = [
    *(ours.Sigmoid(divergence=divergence) for divergence in [None, *DIVERGENCES]),
    ours.Robust(),
    ours.SigmoidNorm(),
    ours.Hinge(),
    ours.BCOPair(),
    ours.APOZero(),
    ours.SimPO(),
    ours.ORPO(),
    ours.CPO(),
    ours.ODPO(),
    ours.ScoreWeighted(),
    ours.PlackettLuce(),
    ours.RPO(),
    ours.Mixture(),
    ours.LDDPO(),
]


@pytest.mark.parametrize("objective", MONOTONE, ids=repr)
def test_a_larger_margin_never_costs_more(objective: ours.Objective) -> None:
    previous = None
    for shift in torch.linspace(-4, 0.9, 40):
        signs = torch.cat([torch.full((n,), 1.0 - 2 * (i % 2)) for i, n in enumerate(LENGTHS)]).double()
        tokens = random_tokens(1) - 1 + shift * signs
        loss = losses(objective, tokens, random_tokens(2) - 1)
        if previous is not None:
            assert (loss <= previous + 1e-12).all()
        previous = loss


def test_where_theory_sets_a_target_the_loss_is_least_there() -> None:
    """IPO: h = 1/(2τ). EXO: σ(m) = 1 - ε. SPPO: log-ratios ±1/(2β)."""

    def value(objective: ours.Objective, ratio: float) -> float:
        zero = ours.PairLogps.from_sums([0.0], [0.0])
        return float(objective(ours.PairLogps.from_sums([ratio], [-ratio]), zero))

    for objective, best in (
        (ours.IPO(0.1), 2.5),
        (ours.SPPOHard(0.1), 5.0),
        (ours.EXOPair(0.1, 0.2), math.log(0.8 / 0.2) / 0.2),
    ):
        assert value(objective, best) == pytest.approx(0.0, abs=1e-6)
        assert value(objective, best - 0.5) > 1e-5
        assert value(objective, best + 0.5) > 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_ties_count_half(objective: ours.Objective) -> None:
    even = ours.PairLogps.from_sums([-4.0, -6.0], [-4.0, -6.0], lengths=(2, 2))
    rewards = objective.rewards(even, even)
    assert rewards.accuracies.tolist() == [0.5, 0.5]
    assert rewards.margins.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_rewards_prefer_what_became_likelier(objective: ours.Objective) -> None:
    policy, reference = (
        ours.PairLogps.from_sums([-4.0], [-9.0], lengths=(2, 2)),
        ours.PairLogps.from_sums([-6.0], [-6.0]),
    )
    reference = ours.PairLogps.from_sums([-6.0], [-6.0], lengths=(2, 2))
    assert objective.rewards(policy, reference).accuracies.item() == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_those_without_a_reference_do_not_look_at_one(name: str) -> None:
    objective = getattr(ours, name)()
    tokens = random_tokens(1)
    same = torch.equal(losses(objective, tokens, random_tokens(2)), losses(objective, tokens, random_tokens(3)))
    assert same == (not objective.uses_reference)


@pytest.mark.parametrize("name", NAMES)
def test_pairs_of_a_batch_do_not_touch_one_another(name: str) -> None:
    objective = getattr(ours, name)()
    tokens, reference = random_tokens(1, 5.0), random_tokens(2, 5.0)
    whole = losses(objective, tokens, reference)
    alone, start = [], 0
    for index in range(0, len(LENGTHS), 2):
        lengths = LENGTHS[index : index + 2]
        part = slice(start, start + sum(lengths))
        start = part.stop
        squares = torch.full_like(tokens[part], -1.0)
        options: dict[str, Any] = {"scores": SCORES[index : index + 2]}
        policy = from_tokens(tokens[part], lengths, log_sum_squares=squares, **options)
        alone.append(objective(policy, from_tokens(reference[part], lengths, **options)))
    assert torch.allclose(whole, torch.cat(alone)) == objective.pairwise


OUTSIDE = [
    *((name, {"beta": 0.0}) for name in NAMES if name not in "IPO SFT ORPO Mixture WPO LDDPO ScoreWeighted".split()),
    ("Sigmoid", {"beta": -1.0}),
    ("Sigmoid", {"beta": math.nan}),
    ("Sigmoid", {"beta": math.inf}),
    ("Mixture", {"weights": []}),
    ("Sigmoid", {"label_smoothing": 0.5}),
    ("Sigmoid", {"label_smoothing": -0.1}),
    ("Robust", {"label_smoothing": 0.5}),
    ("SigmoidNorm", {"label_smoothing": 0.5}),
    ("AOT", {"label_smoothing": 0.5}),
    ("EXOPair", {"label_smoothing": 0.0}),
    ("IPO", {"tau": 0.0}),
    ("DiscoPOP", {"tau": 0.0}),
    ("BCOPair", {"shift": "moving"}),
    ("SFT", {"average": "batch"}),
    ("SimPO", {"gamma": -1.0}),
    ("ORPO", {"weight": 0.0}),
    ("CPO", {"alpha": -1.0}),
    ("RPO", {"alpha": -1.0}),
    ("LDDPO", {"alpha": 1.1}),
    ("ODPO", {"alpha": 0.0}),
    ("ODPO", {"scale": "square"}),
    ("ScoreWeighted", {"scale": 0.0}),
]


@pytest.mark.parametrize(("name", "arguments"), OUTSIDE, ids=str)
def test_parameters_outside_their_range_are_refused(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"objective.{next(iter(arguments))}"):
        getattr(ours, name)(**arguments)


def test_the_range_of_an_alpha_divergence() -> None:
    for alpha in (0.0, 1.0):
        with pytest.raises(ValueError, match="objective.divergence.alpha"):
            ours.AlphaDivergence(alpha)


def test_alpha_divergences_lie_between_reverse_and_forward_kl() -> None:
    log_ratios = torch.linspace(-2, 2, 9, dtype=torch.float64)
    near_reverse, near_forward = ours.AlphaDivergence(1e-7)(log_ratios), ours.AlphaDivergence(1 - 1e-9)(log_ratios)
    torch.testing.assert_close(near_reverse, ours.ReverseKL()(log_ratios), atol=1e-6, rtol=0)
    torch.testing.assert_close(near_forward, ours.ForwardKL()(log_ratios), atol=1e-6, rtol=0)


def test_combinations_without_a_meaning_are_refused_saying_why() -> None:
    for wrapper in (ours.WPO, ours.ScoreWeighted):
        for sorts in (ours.AOT(), ours.AOTUnpaired(), ours.SFT("token"), ours.Mixture([ours.Sigmoid(), ours.AOT()])):
            with pytest.raises(ValueError, match="do not belong to single pairs"):
                wrapper(sorts)
        with pytest.raises(ValueError, match="not for ranked lists"):
            wrapper(ours.PlackettLuce())
    for weighs in (ours.WPO(), ours.ScoreWeighted(ours.WPO()), ours.Mixture([ours.WPO()])):
        with pytest.raises(ValueError, match="Wrap LDDPO in WPO instead"):
            ours.LDDPO(objective=weighs)
    with pytest.raises(ValueError, match="supports pairs only"):
        ours.LDDPO(objective=ours.PlackettLuce())
    three = from_tokens(random_tokens(1, lengths=(2, 3, 1)), (2, 3, 1), counts=(3,))
    with pytest.raises(ValueError, match="LDDPO supports pairs only"):
        ours.LDDPO()(three, three)
    with pytest.raises(ValueError, match=r"weights has 1 numbers for 2 objectives"):
        ours.Mixture([ours.Sigmoid(), ours.SFT()], [1.0])
    with pytest.raises(ValueError, match=r"objective.weights must lie in"):
        ours.Mixture([ours.Sigmoid()], [-1.0])


def test_a_mixture_asks_for_what_its_parts_ask() -> None:
    mixture = ours.Mixture([ours.SimPO(), ours.SFT()])
    assert (mixture.uses_reference, mixture.uses_statistics, mixture.uses_scores) == (False, False, False)
    mixture = ours.Mixture([ours.WPO(), ours.ODPO()], [1.0, 0.5])
    assert (mixture.uses_reference, mixture.uses_statistics, mixture.uses_scores) == (True, True, True)
    assert ours.Mixture([ours.PlackettLuce()]).ranks_lists
    assert not ours.Mixture([ours.PlackettLuce(), ours.Sigmoid()]).ranks_lists


def test_what_is_missing_is_named() -> None:
    sums = ours.PairLogps.from_sums([-4.0], [-9.0])._replace(responses=None)
    for objective, message in (
        (ours.WPO(), "statistics"),
        (ours.LDDPO(), "per token"),
        (ours.ODPO(), "scores"),
    ):
        with pytest.raises(ValueError, match=message):
            objective(sums, sums)

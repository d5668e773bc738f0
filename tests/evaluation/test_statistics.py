"""Intervals cover, depend on prompts and not on pairs, and length alone gets 0.5 when lengths are controlled."""

import numpy as np
import pytest

from lit_dpo.evaluation.held_out import ACCURACY, CONTROLLED, LONGER, compared, held_out_metrics
from lit_dpo.evaluation.statistics import Resampling, ratio, sums_by_prompt, wilson
from lit_dpo.evaluation.table import PairTable
from lit_dpo.evaluation.text import comparison_text, held_out_text

MEAN = {"mean": ratio(0, 1)}
QUICK = Resampling(num_resamples=1000)


def sums(values: np.ndarray, prompts: np.ndarray | None = None) -> np.ndarray:
    both = np.stack([values, np.ones(len(values))], axis=1)
    return sums_by_prompt(both, np.arange(len(values)) if prompts is None else prompts)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    found = QUICK.estimate(sums(values), MEAN)["mean"]
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)
    assert found == QUICK.estimate(sums(values), MEAN)["mean"], "the seed determines the draws"


def test_pairs_of_the_same_prompt_tell_nothing_new() -> None:
    values = np.random.default_rng(0).normal(size=50)
    once = QUICK.estimate(sums(values), MEAN)["mean"]
    fourfold = QUICK.estimate(sums(np.repeat(values, 4), np.repeat(np.arange(50), 4)), MEAN)["mean"]
    assert fourfold == pytest.approx(once)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator, covered = np.random.default_rng(1), 0
    for seed in range(200):
        found = Resampling(200, 0.9, seed).estimate(sums(generator.normal(size=60)), MEAN)["mean"]
        covered += found.low <= 0 <= found.high
    assert 0.83 <= covered / 200 <= 0.95


def test_one_prompt_has_no_interval() -> None:
    found = QUICK.estimate(sums(np.array([1.0, 2.0]), np.array([0, 0])), MEAN)["mean"]
    assert found.value == 1.5
    assert np.isnan(found.low)


def test_the_p_value_is_that_of_chance() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=80)
    same = QUICK.compare(sums(values), sums(values), MEAN["mean"])
    assert (same.difference.value, same.p_value) == (0.0, 1.0)
    better = QUICK.compare(sums(values + 0.5), sums(values + generator.normal(size=80) * 0.2), MEAN["mean"])
    assert better.p_value < 0.01
    assert better.difference.low > 0
    null = [
        Resampling(100, seed=seed).compare(
            sums(generator.normal(size=30)), sums(generator.normal(size=30)), MEAN["mean"]
        )
        for seed in range(150)
    ]
    assert 0.01 <= np.mean([one.p_value <= 0.1 for one in null]) <= 0.19


def test_wilson() -> None:
    assert wilson(0.0, 10, 0.95) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(0.5, 100, 0.95) == pytest.approx((0.4038, 0.5962), abs=1e-4)


@pytest.mark.parametrize("wrong", [{"num_resamples": 10}, {"level": 1.0}])
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"intervals\.num_resamples is at least 100"):
        Resampling(**wrong)  # type: ignore[arg-type]


def table(accuracy: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, **more: tuple[str, ...]) -> PairTable:
    values = {"loss": 1 - accuracy, ACCURACY: accuracy, "rewards/margins": accuracy - 0.5}
    values |= {"lengths/chosen": chosen, "lengths/rejected": rejected}
    ones = dict.fromkeys(values, np.ones(len(accuracy)))
    scores = np.where(np.arange(len(accuracy)) % 2, 1.0, np.nan)
    options = {"groups": (), "sources": (), **more}
    return PairTable(values, ones, np.arange(len(accuracy)), scores, **options)


def test_what_prefers_by_length_alone_gets_one_half() -> None:
    generator = np.random.default_rng(0)
    rejected = generator.integers(5, 50, 300).astype(float)
    chosen = rejected + np.where(generator.random(300) < 0.8, 7, -3)  # the longer one wins in 80 % of the pairs
    found = held_out_metrics(table((chosen > rejected).astype(float), chosen, rejected), QUICK)
    metrics = found.total.metrics
    assert metrics[ACCURACY].value == metrics[LONGER].value == pytest.approx(0.8, abs=0.05)
    assert metrics[CONTROLLED].value == pytest.approx(0.5)
    said = held_out_text(found)
    assert "is above chance (0.5)" in said
    assert "cannot be told from that of preferring the longer response" in said
    assert "what was learned may be length alone" in said


def test_pairs_whose_lengths_decide_all_are_told() -> None:
    said = held_out_text(held_out_metrics(table(np.ones(30), np.full(30, 3.0), np.full(30, 9.0)), QUICK))
    assert "cannot be told from that of preferring the shorter response (1.000)" in said
    assert "Lengths cannot be controlled: in every pair the chosen response is the shorter one." in said
    assert "nan" not in said


def test_an_accuracy_that_may_be_chance_is_told_to_be() -> None:
    accuracy = np.array([1.0] * 51 + [0.0] * 39)  # 0.567 of 90 pairs
    found = held_out_metrics(table(accuracy, np.full(90, 9.0), np.full(90, 9.0)), QUICK)
    assert "The accuracy 0.567 cannot be told from chance (0.5) with 90 prompts." in held_out_text(found)


def test_groups_and_pairs_that_all_agree() -> None:
    groups = tuple("ab"[number % 2] for number in range(20))
    found = held_out_metrics(table(np.ones(20), np.full(20, 9.0), np.full(20, 3.0), groups=groups), QUICK)
    named = {(group.kind, group.name): group for group in found.groups}
    assert named["group", "a"].num_pairs == named["group", "b"].num_pairs == 10
    assert named["score margin", "1"].num_pairs == 10
    assert named["length, chosen / rejected", "above 2"].num_pairs == 20
    low, high = named["group", "a"].metrics[ACCURACY][1:]
    assert (round(low, 2), high) == (0.72, pytest.approx(1.0)), "a bootstrap of equal values would claim no error"
    assert len(found.to_dict()["groups"]) == len(found.groups)


def test_what_cannot_be_compared_has_no_p_value() -> None:
    longer = table(np.ones(30), np.full(30, 9.0), np.full(30, 3.0))
    found = compared(longer, longer, QUICK)
    assert np.isnan(found[CONTROLLED].p_value)
    row = next(line for line in comparison_text("a", "b", found, 0.95).splitlines() if "lengths controlled" in line)
    assert row.split()[-4:] == ["-", "-", "-", "-"]


def test_two_models() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 50, (2, 200)).astype(float)
    first, second = (generator.random(200) < share for share in (0.9, 0.6))
    tables = [table(one.astype(float), *lengths) for one in (first, second)]
    found = compared(*tables, QUICK)
    assert found[ACCURACY].p_value < 0.01
    assert "is more than chance (p < 0.001)" in comparison_text("a", "b", found, 0.95)
    with pytest.raises(ValueError, match="not measured on the same pairs"):
        compared(tables[0], table(np.ones(3), np.ones(3), np.ones(3)), QUICK)

"""Preference objectives: pure functions of tensors, one family of the literature a file. Imports torch alone."""

from lit_dpo.objectives.base import Objective, PairLogps, Rewards, TokenStatistics
from lit_dpo.objectives.dpo import Sigmoid

__all__ = ["Objective", "PairLogps", "Rewards", "Sigmoid", "TokenStatistics"]

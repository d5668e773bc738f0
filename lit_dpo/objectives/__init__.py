"""Preference objectives as functions of log-probs: one file per family in the literature. Imports only torch."""

from lit_dpo.objectives.anchored import APODown, APOZero, BCOPair, NCAPair, SPPOHard
from lit_dpo.objectives.base import (
    LogRatioObjective,
    Objective,
    PairLogps,
    Responses,
    Rewards,
    TokenStatistics,
)
from lit_dpo.objectives.composed import LDDPO, RPO, WPO, Mixture
from lit_dpo.objectives.divergences import AlphaDivergence, Divergence, ForwardKL, JensenShannon, ReverseKL
from lit_dpo.objectives.dpo import MarginObjective, Robust, Sigmoid, SigmoidNorm
from lit_dpo.objectives.lists import PlackettLuce
from lit_dpo.objectives.margins import IPO, DiscoPOP, EXOPair, Hinge
from lit_dpo.objectives.reference_free import CPO, ORPO, SFT, SimPO
from lit_dpo.objectives.scored import ODPO, ScoreWeighted
from lit_dpo.objectives.transport import AOT, AOTUnpaired

__all__ = [
    "AOT",
    "CPO",
    "IPO",
    "LDDPO",
    "ODPO",
    "ORPO",
    "RPO",
    "SFT",
    "WPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "AlphaDivergence",
    "BCOPair",
    "DiscoPOP",
    "Divergence",
    "EXOPair",
    "ForwardKL",
    "Hinge",
    "JensenShannon",
    "LogRatioObjective",
    "MarginObjective",
    "Mixture",
    "NCAPair",
    "Objective",
    "PairLogps",
    "PlackettLuce",
    "Responses",
    "ReverseKL",
    "Rewards",
    "Robust",
    "SPPOHard",
    "ScoreWeighted",
    "Sigmoid",
    "SigmoidNorm",
    "SimPO",
    "TokenStatistics",
]

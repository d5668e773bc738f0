"""Each objective that TRL has too: its settings there, and the same here."""

from dataclasses import dataclass, field
from typing import Any

import torch

from lit_dpo import objectives as ours


@dataclass
class Case:
    """One objective on both sides.

    Attributes:
        objective: Ours.
        settings: Attributes of the trainer, as its constructor would set them.
        trainer: ``dpo``, ``cpo`` or ``orpo``.
        dtype: The widest type that TRL computes it in.
        tolerance: How near the two must be, relatively.
    """

    objective: ours.Objective
    settings: dict[str, Any] = field(default_factory=dict)
    trainer: str = "dpo"
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10


def dpo(objective: ours.Objective, loss_type: str | list[str], beta: float = 0.1, **settings: Any) -> Case:
    """A case of the DPOTrainer."""
    types = [loss_type] if isinstance(loss_type, str) else loss_type
    case = Case(objective, {"loss_types": types, "beta": beta, **settings})
    if settings.get("f_divergence_type") == "alpha_divergence":
        case.dtype, case.tolerance = torch.float32, 2e-5
    if loss_type == "exo_pair":
        case.tolerance = 1e-6  # TRL keeps the logarithm of ε in float32
    return case


def cases() -> dict[str, Case]:
    """Fresh objectives by name."""
    smoothed = {"label_smoothing": 0.2}
    forward, js = {"f_divergence_type": "forward_kl"}, {"f_divergence_type": "js_divergence"}
    alpha = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}
    return {
        "sigmoid": dpo(ours.Sigmoid(0.1), "sigmoid"),
        "sigmoid_forward_kl": dpo(ours.Sigmoid(0.1, divergence=ours.ForwardKL()), "sigmoid", **forward),
        "sigmoid_js": dpo(ours.Sigmoid(0.3, divergence=ours.JensenShannon()), "sigmoid", 0.3, **js),
        "sigmoid_alpha": dpo(ours.Sigmoid(0.1, divergence=ours.AlphaDivergence(0.7)), "sigmoid", **alpha),
        "robust": dpo(ours.Robust(0.1, 0.2), "robust", **smoothed),
        "hinge": dpo(ours.Hinge(0.2), "hinge", 0.2),
        "hinge_js": dpo(ours.Hinge(0.2, divergence=ours.JensenShannon()), "hinge", 0.2, **js),
        "ipo": dpo(ours.IPO(0.1), "ipo"),
        "ipo_js": dpo(ours.IPO(0.1, divergence=ours.JensenShannon()), "ipo", **js),
        "exo_pair": dpo(ours.EXOPair(0.1, 0.2), "exo_pair", **smoothed),
        "nca_pair": dpo(ours.NCAPair(0.1), "nca_pair"),
        "bco_pair": dpo(ours.BCOPair(0.1, shift="none"), "bco_pair"),
        "sppo_hard": dpo(ours.SPPOHard(0.05), "sppo_hard", 0.05),
        "aot": dpo(ours.AOT(0.1, 0.2), "aot", **smoothed),
        "aot_unpaired": dpo(ours.AOTUnpaired(0.1, 0.2), "aot_unpaired", **smoothed),
        "apo_zero": dpo(ours.APOZero(0.1), "apo_zero"),
        "apo_down": dpo(ours.APODown(0.1), "apo_down"),
        "discopop": dpo(ours.DiscoPOP(0.05, 0.05), "discopop", 0.05),
        "sigmoid_norm": dpo(ours.SigmoidNorm(5.0), "sigmoid_norm", 5.0),
        "sft": dpo(ours.SFT(average="token"), "sft"),
        "ld": dpo(ours.LDDPO(0.3), "sigmoid", ld_alpha=0.3),
        "ld_ipo": dpo(ours.LDDPO(0.3, ours.IPO(0.1)), "ipo", ld_alpha=0.3),
        "wpo": dpo(ours.WPO(), "sigmoid", use_weighting=True),
        "wpo_ipo": dpo(ours.WPO(ours.IPO(0.1)), "ipo", use_weighting=True),
        "wpo_ld": dpo(ours.WPO(ours.LDDPO(0.3)), "sigmoid", ld_alpha=0.3, use_weighting=True),
        "mpo": dpo(
            ours.Mixture([ours.Sigmoid(), ours.BCOPair(0.1, shift="none"), ours.SFT("token")], [0.8, 0.2, 1.0]),
            ["sigmoid", "bco_pair", "sft"],
            loss_weights=[0.8, 0.2, 1.0],
        ),
        "rpo": dpo(
            ours.Mixture([ours.Sigmoid(), ours.SFT("token")], [1.0, 0.5]), ["sigmoid", "sft"], loss_weights=[1.0, 0.5]
        ),
        "cpo": Case(ours.CPO(0.1, 0.0, 0.2), {"loss_type": "sigmoid", "beta": 0.1, **smoothed}, "cpo"),
        "simpo": Case(
            ours.SimPO(2.0, 1.0, 0.2), {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, **smoothed}, "cpo"
        ),
        "orpo": Case(ours.ORPO(0.1), {"beta": 0.1}, "orpo", torch.float32, 2e-5),
    }

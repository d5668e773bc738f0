"""The callbacks that ``DPOModule`` adds to every Trainer, in their order."""

from lightning.pytorch import Callback

from lit_dpo.reference.precompute import ReferencePass
from lit_dpo.training.agreement import Together
from lit_dpo.training.fingerprint import Fingerprint
from lit_dpo.training.finite import FiniteSteps, OnNonfinite
from lit_dpo.training.logging import LoggedMeans
from lit_dpo.training.memory import LongestBatch
from lit_dpo.training.resume import ExactResume
from lit_dpo.training.sharded import KeepInStep


def own_callbacks(on_nonfinite: OnNonfinite) -> list[Callback]:
    """The callbacks, for the module's setting of steps that are not finite."""
    checks = [Together(), Fingerprint(), FiniteSteps(on_nonfinite)]
    return [ReferencePass(), LongestBatch(), *checks, ExactResume(), KeepInStep(), LoggedMeans()]

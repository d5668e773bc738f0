"""CollapseGuard: warns when the policy moves too far from the reference, and names the pairs where it does."""

from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_dpo.training.ranks import gather_objects
from lit_dpo.training.step import OptimizerStep, PairNumbers, name_pairs


class CollapseGuard(Callback):
    """Warns, or stops the run, when a known failure of preference optimization appears.

    After each optimizer step it checks ``train/displacement/chosen`` and ``train/kl``, over the pairs of all ranks. It
    warns when a value exceeds its limit, and again only after the value was back below the limit. Losses that are not
    finite are handled by ``model.on_nonfinite``, even without a guard. A guard with ``stop`` also ends a run that would
    skip such a step.

    Args:
        max_drop: How far the chosen responses' log-probs may fall below the reference's, in nats per token; null for no
            limit.
        max_kl: Limit of the KL divergence from the reference, in nats per token, estimated on the responses of the
            pairs; null for no limit.
        action: ``warn`` only, or also ``stop`` the run after the step. A stopped run ends like any other, with
            evaluation, checkpoint and adapter.

    Raises:
        ValueError: If a limit is not positive.

    References:
        Razin et al. 2024, arXiv:2410.08847 (likelihood displacement).
    """

    def __init__(
        self, max_drop: float | None = 0.5, max_kl: float | None = None, action: Literal["warn", "stop"] = "warn"
    ) -> None:
        for name, value in {"max_drop": max_drop, "max_kl": max_kl}.items():
            if value is not None and not value > 0:
                raise ValueError(f"guard.{name} must be positive, or null for no limit, not {value}.")
        self.max_drop, self.max_kl, self.action = max_drop, max_kl, action
        self._passed: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Says that the limits are not checked if there is no reference."""
        self._passed.clear()
        if (self.max_drop or self.max_kl) and not pl_module.reference.exists:
            rank_zero_info("CollapseGuard: there is no reference, so max_drop and max_kl are not checked.")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Checks an optimizer step when it is complete."""
        step = pl_module.step
        if not step.is_complete(trainer):
            return
        if not step.finite:
            trainer.should_stop |= self.action == "stop"
        elif pl_module.reference.exists and (self.max_drop or self.max_kl):
            self._check(trainer, step)

    def _check(self, trainer: Trainer, step: OptimizerStep) -> None:
        drop, kl = -step.means["displacement/chosen"], step.means["kl"]
        if self._passes(drop, self.max_drop, "max_drop"):
            self._report(
                trainer,
                f"the chosen responses are {drop:.3g} nats per token less likely than under the reference "
                f"(max_drop={self.max_drop:g})",
                sorted(
                    (pair for pair in step.pairs() if -pair.displacement > (self.max_drop or 0)),
                    key=lambda pair: pair.displacement,
                ),
                "This is likelihood displacement: lower the learning rate, raise β, or add a term for the chosen "
                "response (RPO).",
            )
        if self._passes(kl, self.max_kl, "max_kl"):
            self._report(
                trainer,
                f"the KL divergence from the reference is {kl:.3g} nats per token (max_kl={self.max_kl:g})",
                sorted((pair for pair in step.pairs() if pair.kl > (self.max_kl or 0)), key=lambda pair: -pair.kl),
                "Lower the learning rate, train fewer steps, or raise β.",
            )

    def _passes(self, value: float, limit: float | None, name: str) -> bool:
        """Whether the value exceeds the limit now, but did not at the step before."""
        if limit is None or not value > limit:
            self._passed.discard(name)
            return False
        news = name not in self._passed
        self._passed.add(name)
        return news

    def _report(self, trainer: Trainer, what: str, pairs: list[PairNumbers], remedy: str) -> None:
        """Warns, naming the pairs of all ranks, and stops the run for ``action="stop"``."""
        everywhere = [pair for rank in gather_objects(trainer, pairs) for pair in rank]
        stops = " The run stops." if self.action == "stop" else ""
        rank_zero_warn(f"Step {trainer.global_step}: {what}: {name_pairs(everywhere)}. {remedy}{stops}")
        trainer.should_stop |= self.action == "stop"

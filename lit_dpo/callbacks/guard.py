"""CollapseGuard: notices when the policy leaves the reference too far behind, and says which pairs did it."""

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_dpo.step import PairNumbers, name_pairs, of_all_ranks


class CollapseGuard(Callback):
    """Warns, or stops the run, when the known failures of preference optimization show themselves.

    At each optimizer step, over all its pairs on all ranks, it looks at what is logged as
    ``train/displacement/chosen`` and ``train/kl``. It warns when a limit is passed, and again only after the number had
    come back. A loss that is not finite is never trained on, and told of, whether there is a guard or not
    (``model.on_nonfinite``); with ``stop`` the guard ends a run that would skip the step.

    Args:
        max_drop: By how much the chosen responses' log-probs may fall below the reference's, in nats a token; null for
            no limit.
        max_kl: Budget of the KL divergence from the reference, estimated at the pairs' responses, in nats a token; null
            for no limit.
        action: ``warn``, or ``stop`` the run after the step, with a checkpoint, an evaluation and the adapter as ever.

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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what cannot be watched."""
        self._passed.clear()
        if (self.max_drop or self.max_kl) and not getattr(pl_module, "has_reference", False):
            rank_zero_info("CollapseGuard: without a reference only losses that are not finite are noticed.")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the step that has just been made."""
        module: Any = pl_module
        if trainer.fit_loop._should_accumulate():
            return
        if module.failed_step:
            trainer.should_stop |= self.action == "stop"
        elif module.has_reference and (self.max_drop or self.max_kl):
            self._look(trainer, [pair for observation in module.observations for pair in observation.pairs()])

    def _look(self, trainer: Trainer, pairs: list[PairNumbers]) -> None:
        drop = sum(-pair.displacement for pair in pairs)
        kl = sum(pair.kl * pair.num_tokens for pair in pairs)
        totals = torch.tensor([drop, len(pairs), kl, sum(pair.num_tokens for pair in pairs)])
        totals = totals.to(trainer.strategy.root_device)  # where the processes can talk to one another
        drop, number, kl, tokens = trainer.strategy.reduce(totals, reduce_op="sum").tolist()
        drop, kl = drop / number, kl / tokens
        if self._passes(drop, self.max_drop, "max_drop"):
            self._tell(
                trainer,
                f"the chosen responses are {drop:.3g} nats a token less likely than under the reference "
                f"(max_drop={self.max_drop:g})",
                sorted(
                    (pair for pair in pairs if -pair.displacement > (self.max_drop or 0)),
                    key=lambda pair: pair.displacement,
                ),
                "This is likelihood displacement: lower the learning rate, raise β, or add a term for the chosen "
                "response (RPO).",
            )
        if self._passes(kl, self.max_kl, "max_kl"):
            self._tell(
                trainer,
                f"the KL divergence from the reference is {kl:.3g} nats a token (max_kl={self.max_kl:g})",
                sorted((pair for pair in pairs if pair.kl > (self.max_kl or 0)), key=lambda pair: -pair.kl),
                "Lower the learning rate, train fewer steps, or raise β.",
            )

    def _passes(self, value: float, limit: float | None, name: str) -> bool:
        """Whether a limit is passed for the first time, or again."""
        if limit is None or not value > limit:
            self._passed.discard(name)
            return False
        news = name not in self._passed
        self._passed.add(name)
        return news

    def _tell(self, trainer: Trainer, what: str, pairs: list[PairNumbers], remedy: str) -> None:
        """Warns, naming the pairs of all ranks, and stops if asked to."""
        everywhere = [pair for rank in of_all_ranks(trainer, pairs) for pair in rank]
        stops = " The run stops." if self.action == "stop" else ""
        rank_zero_warn(f"Step {trainer.global_step}: {what}: {name_pairs(everywhere)}. {remedy}{stops}")
        trainer.should_stop |= self.action == "stop"

"""DPOModule, the ``LightningModule``: first the algorithm, then policy and reference, then Lightning's hooks."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_dpo.base.tokenizer import load_tokenizer
from lit_dpo.data.batch import PairBatch
from lit_dpo.objectives import Objective, PairLogps, Sigmoid
from lit_dpo.policy.adapters import choose_lora
from lit_dpo.policy.execution import Switch, compilation_pays
from lit_dpo.policy.loading import load_policy
from lit_dpo.policy.policy import Layout, Policy
from lit_dpo.policy.precision import Quantization, describe, dtype_for, quantization_for
from lit_dpo.reference import AnotherModel, MovingReference, Reference
from lit_dpo.reference.choice import ReferenceChoice, check_choice, open_reference
from lit_dpo.reference.precompute import shows_progress
from lit_dpo.training.accumulation import window_weight
from lit_dpo.training.checkpoint import fitting_weights, keep_trained, move_weights
from lit_dpo.training.finite import OnNonfinite
from lit_dpo.training.hyperparameters import plain_hyperparameters, trust_overrides
from lit_dpo.training.metrics import PreferenceMetrics
from lit_dpo.training.own_callbacks import own_callbacks
from lit_dpo.training.requirements import Placement, check_data, checked_placement
from lit_dpo.training.schedule import LRSchedule, build_optimizer, warmup_scheduler
from lit_dpo.training.step import BatchRecord, OptimizerStep


class DPOModule(LightningModule):
    """Direct Preference Optimization of a language model: quantized with LoRA adapters, or all of its weights.

    Args:
        base: The model to align: hub id, local folder, GGUF file, or ``package:NAME`` for an installed Python package.
        objective: The preference loss. The default is ``Sigmoid``, the loss of the DPO paper, with β = 0.1.
        quantization: ``nf4`` (4 bits, as in QLoRA), a ``BitsAndBytesConfig`` of transformers, or null for none.
        lora: PEFT's ``LoraConfig``. ``auto`` is rank 16 on all linear layers but the head; null trains all weights.
        adapter: Folder or hub id of an adapter to continue training. A frozen copy of it is then the reference.
        optimizer: Any torch optimizer. The default is AdamW with learning rate 5e-5 and no weight decay.
        lr_scheduler: Learning-rate schedule after warm-up, by its name in transformers.
        warmup: Share of the optimizer steps in which the learning rate rises from 0, in [0, 1).
        reference: ``cached`` computes the initial policy's log-probs of each pair once and keeps them on disk, for all
            epochs and runs. ``live`` computes them at every step; use it if each pair is seen once. ``none`` uses no
            reference. ``AnotherModel`` and ``MovingReference`` are chosen by class path. ``auto`` is ``cached`` if the
            objective uses a reference, else ``none``.
        gradient_checkpointing: Recompute activations in the backward pass. This takes less memory and more time, and
            changes no result. ``auto`` recomputes only for batches that would not fit into memory otherwise.
        compile: Compile the layers. Compilation takes half a minute, makes steps faster and changes only the rounding.
            ``auto`` compiles on a CPU with a C++ compiler, for runs of 500 batches or more.
        on_nonfinite: What to do if a loss or gradient is not finite: ``stop`` the run, or ``skip`` the optimizer step.
            Both write a file that reproduces the step. Under ``16-mixed``, overflowing gradients are left to the
            GradScaler as long as its scale is at least 1.
        token_metrics: Also log ``entropy`` and ``mean_token_accuracy``. They need more passes over the vocabulary.
        layout: ``flat`` computes each prompt once, without padding. ``padded`` uses one row per response. ``auto`` is
            ``flat`` if the model gives the same log-probs in both layouts, else ``padded``.
        allow_mismatch: Whether a run may resume from a checkpoint of another base, quantization, tokenizer or data.
        gguf_file: Name of a GGUF file inside a hub repository.
        revision: Revision of the hub repository.
        trust_remote_code: Whether to run model code that comes with the repository. A checkpoint never sets it.

    Raises:
        ValueError: If arguments contradict each other.

    References:
        Rafailov et al. 2023, arXiv:2305.18290 (DPO); Dettmers et al. 2023, arXiv:2305.14314 (QLoRA).
    """

    repository: dict[str, Any]
    policy: Policy  # set by configure_model

    def __init__(
        self,
        base: str,
        objective: Objective | None = None,
        quantization: Quantization = "nf4",
        lora: LoraConfig | Literal["auto"] | None = "auto",
        adapter: str | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-5, weight_decay=0.0),
        lr_scheduler: LRSchedule = "linear",
        warmup: float = 0.1,
        reference: Literal["auto", "cached", "live", "none"] | AnotherModel | MovingReference = "auto",
        gradient_checkpointing: Switch = "auto",
        compile: Switch = "auto",  # noqa: A002
        on_nonfinite: OnNonfinite = "stop",
        token_metrics: bool = False,
        layout: Layout = "auto",
        allow_mismatch: bool = False,
        gguf_file: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise ValueError(f"model.warmup is a share of the steps, in [0, 1), not {warmup}.")
        self.base = base
        self.repository = {"gguf_file": gguf_file, "revision": revision, "trust_remote_code": trust_remote_code}
        self.objective = Sigmoid() if objective is None else objective
        self.quantization, self.adapter = quantization, adapter
        self.lora = choose_lora(lora, adapter, quantized=quantization is not None)
        self.optimizer, self.lr_scheduler, self.warmup = optimizer, lr_scheduler, warmup
        self.reference_choice: ReferenceChoice = reference
        check_choice(reference, self.objective, moves=self.lora is not None)
        self.layout, self.gradient_checkpointing, self.compilation = layout, gradient_checkpointing, compile
        self.on_nonfinite, self.token_metrics, self.allow_mismatch = on_nonfinite, token_metrics, allow_mismatch
        self.train_metrics, self.eval_metrics = PreferenceMetrics(), PreferenceMetrics()
        self.step = OptimizerStep()  # the step in progress
        self.lr: float | None = None  # set by Lightning's Tuner.lr_find, for all parameters
        self.strict_loading = False  # a checkpoint has no base weights; load_state_dict checks the keys
        self.save_hyperparameters(plain_hyperparameters(self, quantization))

    # --- the algorithm ---------------------------------------------------------------------------------------------

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """The mean loss of the batch's pairs."""
        reference = self.reference.logps(batch)
        policy = self.policy.logps(batch)
        losses = self.objective(policy, reference)
        self.record(self.train_metrics, batch, losses, policy, reference)
        return losses.mean() * window_weight(self.trainer, batch_idx)

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Adds a batch to the held-out metrics."""
        policy, reference = self.policy.logps(batch), self.reference.logps(batch)
        self.record(self.eval_metrics, batch, self.objective(policy, reference), policy, reference)

    test_step = validation_step

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[dict[str, Any]]:
        """The implicit rewards of each pair, with its source and row."""
        policy, reference = self.policy.logps(batch), self.reference.logps(batch)
        chosen, rejected, _ = self.objective.rewards(policy, reference)
        pairs = zip(batch.origins, chosen.tolist(), rejected.tolist(), strict=True)
        names = ("source", "row", "reward_chosen", "reward_rejected", "margin")
        return [dict(zip(names, (*origin, c, r, c - r), strict=True)) for origin, c, r in pairs]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Builds the optimizer of what trains, and a learning-rate schedule with warm-up over the whole run."""
        optimizer = build_optimizer(self.optimizer, self.parameters(), self.lr)
        scheduler = warmup_scheduler(optimizer, self.lr_scheduler, self.warmup, self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def record(
        self, metrics: PreferenceMetrics, batch: PairBatch, losses: Tensor, policy: PairLogps, reference: PairLogps
    ) -> None:
        """Adds a batch to the metrics and, in training, to the optimizer step in progress."""
        against = reference if self.reference.exists else None
        metrics.update(losses, self.objective.rewards(policy, reference), policy, against, batch.groups)
        done = BatchRecord(batch, losses.detach(), policy.detach(), against)
        self.step.add(done, trains=metrics is self.train_metrics)

    # --- policy and reference --------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Loads the policy on this rank's device, once."""
        vars(self).pop("reference", None)  # another Trainer may compute in another precision
        placement = checked_placement(self._trainer, quantized=self.quantization is not None)
        if "policy" not in self._modules:
            self.build_policy(placement)

    def build_policy(self, placement: Placement) -> None:
        """Loads base and adapters."""
        dtype = self._matmul_dtype = placement.dtype
        quantization = quantization_for(self.quantization, dtype)
        model = load_policy(
            self.base,
            quantization=quantization,
            lora=self.lora,
            adapter=self.adapter,
            moving=isinstance(self.reference_choice, MovingReference),
            progress_bar=shows_progress(self._trainer),
            **placement._asdict(),
            **self.repository,
        )
        statistics = self.token_metrics or self.objective.uses_statistics
        self.policy = Policy(model, self.layout, self.gradient_checkpointing, statistics)
        rank_zero_info(f"Policy: {self.base}, {self.policy.summary()}, base in {describe(quantization, model.dtype)}.")

    @cached_property
    def reference(self) -> Reference:
        """The reference that the policy is compared with."""
        dtype = self._matmul_dtype if self._trainer is None else dtype_for(self.trainer.precision)
        data = getattr(self._trainer, "datamodule", None)
        return open_reference(self.reference_choice, self.policy, self.objective, dtype, lambda: self.tokenizer, data)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return load_tokenizer(self.base, **self.repository)

    @property
    def model(self) -> Any:
        """The PEFT model inside the policy, or the ``FullModel``."""
        return self.policy.model

    # --- Lightning's hooks -----------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks that the module adds to every Trainer."""
        return own_callbacks(self.on_nonfinite)

    def setup(self, stage: str) -> None:
        """Checks that the data has what the objective uses."""
        check_data(self.objective, getattr(self.trainer, "datamodule", None), stage)

    def on_fit_start(self) -> None:
        """Compiles the layers if that saves time."""
        num_batches = self.trainer.estimated_stepping_batches * self.trainer.accumulate_grad_batches
        if compilation_pays(self.compilation, self.model.device, num_batches):
            self.policy.compile_layers()
            vars(self).pop("reference", None)  # compiled layers round differently, so their cache is another

    def on_train_start(self) -> None:
        """Switches to training mode, because neither ``from_pretrained`` nor Lightning does."""
        self.train()
        self.objective.end_step(kept=False)  # discards the unfinished step of an interrupted run

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step. Then the objective updates its running statistics, and a moving reference its weights."""
        super().optimizer_step(*args, **kwargs)
        self.objective.end_step(kept=self.step.taken)
        self.reference.end_step(self.global_step + 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Removes the base weights from the checkpoint."""
        keep_trained(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Moves the checkpoint's weights to the policy's device."""
        move_weights(self, checkpoint)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads the adapters, and running statistics if they fit. Adapters must fit, even with ``strict=False``."""
        keys = super().load_state_dict(fitting_weights(self, state_dict), strict=False, assign=assign)
        keys.missing_keys.clear()  # the base weights, which are loaded already
        return keys

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a module. A repository's code runs only if ``trust_remote_code=True`` is passed to this method."""
        arguments = trust_overrides(checkpoint_path, **kwargs) | kwargs
        return super().load_from_checkpoint(checkpoint_path, *args, **arguments)

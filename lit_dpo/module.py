"""DPOModule, the ``LightningModule``: reads top to bottom like the algorithm."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, get_scheduler

from lit_dpo.base_model import load_tokenizer
from lit_dpo.checkpointing import (
    apply_settings,
    plain_hyperparameters,
    plain_optimizer,
    random_state,
    restore_random_state,
)
from lit_dpo.data.batch import PairBatch
from lit_dpo.metrics import PreferenceMetrics
from lit_dpo.objectives import Objective, PairLogps, Sigmoid
from lit_dpo.policy.execution import Switch, compilation_pays
from lit_dpo.policy.loading import (
    LORA,
    MOVING_ADAPTER,
    Quantization,
    load_policy,
    of_adapter,
    precision_for,
    quantization_for,
)
from lit_dpo.policy.policy import Layout, Policy
from lit_dpo.policy.reference import AnotherModel, InitialPolicy, MovingReference, NoReference, Reference
from lit_dpo.policy.reference_cache import CachedReference
from lit_dpo.reference_pass import ReferencePass
from lit_dpo.step import PAIRS, FiniteSteps, Observation, of_all_ranks

Prediction: TypeAlias = dict[str, Any]
LRCourse: TypeAlias = Literal["linear", "cosine", "constant", "inverse_sqrt", "polynomial"]
# Trainer.precision ──► type of the base weights that are not quantized, and of 4-bit matrix products
PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class DPOModule(LightningModule):
    """Direct Preference Optimization of a quantized language model with LoRA adapters.

    Args:
        base: The model to align: hub id, local folder, GGUF file, or ``package:NAME`` for a package that ships one.
        objective: The preference loss; by default ``Sigmoid``, the DPO of the paper with β 0.1.
        quantization: ``nf4`` for QLoRA's 4 bits with double quantization, transformers' ``BitsAndBytesConfig`` for any
            other, null for none. The type of its matrix products follows ``trainer.precision``.
        lora: PEFT's ``LoraConfig`` of the adapters; by default rank 16 on all linear layers but the head.
        adapter: Folder or hub id of an adapter to go on from; a frozen copy of it is then the reference.
        optimizer: Any torch optimizer.
        lr_scheduler: Course of the learning rate after warm-up, by transformers' names.
        warmup: Share of the optimizer steps over which the learning rate rises from 0.
        reference: ``cached`` computes the initial policy's log-probs of each pair once and keeps them on disk for every
            epoch and run; ``live`` computes them at every step, for pairs that are met once; ``none`` computes none;
            ``AnotherModel`` or ``MovingReference`` by class path. ``auto`` is ``cached`` for an objective that looks
            at a reference, else ``none``; another choice then only feeds the metrics.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time, same numbers;
            ``auto`` does so for batches that would not fit otherwise.
        compile: Compile the layers: less time and memory once it is done, same numbers but for rounding; ``auto`` does
            so on a CPU for runs of 500 batches or more, where there is a C++ compiler.
        on_nonfinite: What happens if a loss or gradient is not finite: ``stop`` the run, or ``skip`` the optimizer
            step. Either way nothing is trained on it, and the step is written to a file that reproduces it. A gradient
            that overflows under ``16-mixed`` is left to the GradScaler, until its scale falls below 1.
        token_metrics: Log ``entropy`` and ``mean_token_accuracy`` too, at the price of more passes over the vocabulary.
        layout: ``flat`` lays each prompt out once without padding; ``padded`` uses separate rows; ``auto`` takes flat
            wherever it gives the model's own log-probs.
        gguf_file: Name of a GGUF file inside a hub repository.
        revision: Revision of the hub repository.
        trust_remote_code: Whether to run model code that comes with the repository.

    Raises:
        ValueError: If arguments contradict one another.

    References:
        Rafailov et al. 2023, arXiv:2305.18290 (DPO); Dettmers et al. 2023, arXiv:2305.14314 (QLoRA).
    """

    policy: Policy  # from configure_model on

    def __init__(
        self,
        base: str,
        objective: Objective | None = None,
        quantization: Quantization = "nf4",
        lora: LoraConfig | None = None,
        adapter: str | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-5, weight_decay=0.0),
        lr_scheduler: LRCourse = "linear",
        warmup: float = 0.1,
        reference: Literal["auto", "cached", "live", "none"] | AnotherModel | MovingReference = "auto",
        gradient_checkpointing: Switch = "auto",
        compile: Switch = "auto",  # noqa: A002
        on_nonfinite: Literal["stop", "skip"] = "stop",
        token_metrics: bool = False,
        layout: Layout = "auto",
        gguf_file: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise ValueError(f"model.warmup is a share of the steps, in [0, 1), not {warmup}.")
        lora = LoraConfig(**LORA) if lora is None else lora
        if adapter is not None and lora.to_dict() != LoraConfig(**LORA).to_dict():
            raise ValueError("model.adapter goes on from an adapter that has its own shape: leave model.lora out.")
        self.base, self.gguf_file, self.revision, self.trust_remote_code = base, gguf_file, revision, trust_remote_code
        self.objective = Sigmoid() if objective is None else objective
        if reference == "none" and self.objective.uses_reference:
            raise ValueError(
                f"model.reference=none: {type(self.objective).__name__} needs a reference. Objectives without one are "
                "SimPO, ORPO, CPO and SFT."
            )
        self.quantization = quantization
        self.lora, self.adapter = lora, adapter
        self.optimizer, self.lr_scheduler, self.warmup = optimizer, lr_scheduler, warmup
        self.reference_choice, self.layout, self.token_metrics = reference, layout, token_metrics
        self.on_nonfinite = on_nonfinite
        self.observations: list[Observation] = []  # the batches of the optimizer step that is being made
        self.kept_step = True  # whether the optimizer took it
        self.failed_step = False  # whether it was not taken because it was not finite
        self.nonfinite_pairs: list[Any] | None = None  # for the checkpoint that reproduces it
        self.gradient_checkpointing, self.compilation = gradient_checkpointing, compile
        self.train_metrics, self.eval_metrics = PreferenceMetrics(), PreferenceMetrics()
        self.strict_loading = False  # a checkpoint holds what trains; load_state_dict checks the keys
        self._random_states: list[Any] | None = None
        self._stored_optimizer: str | None = None
        self.save_hyperparameters(plain_hyperparameters(self, quantization))

    # --- the algorithm ---------------------------------------------------------------------------------------------

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """The mean loss of the batch's pairs."""
        reference = self.reference.logps(batch)
        policy = self.policy.logps(batch)
        losses = self.objective(policy, reference)
        self.observe(self.train_metrics, batch, losses, policy, reference)
        return losses.mean() * self._window_correction(batch_idx)

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Adds the batch to the held-out metrics."""
        reference = self.reference.logps(batch)
        policy = self.policy.logps(batch)
        losses = self.objective(policy, reference)
        self.observe(self.eval_metrics, batch, losses, policy, reference)

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: PairBatch, batch_idx: int) -> list[Prediction]:
        """The implicit rewards of each pair, and where it came from."""
        policy, reference = self.policy.logps(batch), self.reference.logps(batch)
        rewards = self.objective.rewards(policy, reference)
        return [
            {
                "source": source,
                "row": row,
                "reward_chosen": chosen,
                "reward_rejected": rejected,
                "margin": chosen - rejected,
            }
            for (source, row), chosen, rejected in zip(
                batch.origins, rewards.chosen.tolist(), rewards.rejected.tolist(), strict=True
            )
        ]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer of the adapters, with warm-up and a course over all steps of the run."""
        optimizer = self.optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("The learning rate's course needs an end: set trainer.max_epochs or trainer.max_steps.")
        name = "constant_with_warmup" if self.lr_scheduler == "constant" else self.lr_scheduler
        scheduler = get_scheduler(name, optimizer, round(self.warmup * total), int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- building --------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Looks whether the data has what the objective asks for, before anything is computed.

        Raises:
            ValueError: If it has less, or more than the objective would use.
        """
        data = getattr(self.trainer, "datamodule", None)
        name, most = type(self.objective).__name__, getattr(data, "max_responses", None)
        if most is not None and most > 2 and not self.objective.ranks_lists:
            raise ValueError(
                f"data.max_responses={most}: {name} compares two responses, and the others would be computed in vain. "
                "Use PlackettLuce, or leave it at 2."
            )
        if most == 2 and self.objective.ranks_lists:
            rank_zero_warn(f"{name} sees two responses of each row: set data.max_responses if the rows have more.")
        if self.objective.uses_scores and stage != "predict":
            for pairs in (getattr(data, "train_pairs", None), getattr(data, "val_pairs", None)):
                if pairs is not None:
                    pairs.require_scores(name)

    def configure_model(self) -> None:
        """Loads the policy on this process's device, once."""
        vars(self).pop("reference", None)  # another Trainer may compute in another precision
        if "policy" in self._modules:
            return
        if self._trainer is None:  # load_from_checkpoint, or a script that only generates
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self.build_policy(PRECISIONS[precision_for(device)], device)
            return
        precision, device = self.trainer.precision, self.trainer.strategy.root_device
        if precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision={precision} is not supported: half '-true' precisions corrupt 4-bit weights and "
                f"train the adapters in half precision. Use one of {', '.join(PRECISIONS)}."
            )
        self.build_policy(PRECISIONS[precision], device)

    def build_policy(self, dtype: torch.dtype, device: torch.device) -> None:
        """Loads base and adapters, with base weights and matrix products in ``dtype``."""
        quantization = quantization_for(self.quantization, dtype)
        model = load_policy(
            self.base,
            quantization=quantization,
            lora=self.lora,
            adapter=self.adapter,
            dtype=dtype,
            device=device,
            moving=isinstance(self.reference_choice, MovingReference),
            gguf_file=self.gguf_file,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )
        statistics = self.token_metrics or self.objective.uses_statistics
        self.policy = Policy(model, self.layout, self.gradient_checkpointing, statistics)
        self._product_type = dtype
        trainable, total = model.get_nb_trainable_parameters()
        weights, layout = _type_name(quantization, dtype), "flat" if self.policy.flat else "padded"
        rank_zero_info(
            f"Policy: {self.base}, {trainable / 1e6:.1f} M of {total / 1e6:.1f} M parameters train, "
            f"base in {weights}, {layout} layout."
        )

    def on_fit_start(self) -> None:
        """Compiles the layers if the run is long enough to win by it, before the reference uses them."""
        num_batches = self.trainer.estimated_stepping_batches * self.trainer.accumulate_grad_batches
        if compilation_pays(self.compilation, self.model.device, num_batches):
            self.policy.compile_layers()
            vars(self).pop("reference", None)

    @cached_property
    def reference(self) -> Reference:
        """What the policy is held against."""
        choice = self.reference_choice
        if choice == "none" or (choice == "auto" and not self.objective.uses_reference):
            return NoReference()
        if isinstance(choice, MovingReference):
            choice.policy = self.policy
            return choice
        dtype = self._product_type if self._trainer is None else PRECISIONS[self.trainer.precision]
        initial, cached = InitialPolicy(self.policy), choice != "live"
        if isinstance(choice, AnotherModel):
            initial, cached = choice.open(self.tokenizer, dtype, self.model.device), choice.cached
        return CachedReference.of(initial, dtype) if cached else initial

    @property
    def has_reference(self) -> bool:
        """Whether there are log-probs to hold the policy's against."""
        return not isinstance(self.reference, NoReference)

    def configure_callbacks(self) -> list[Callback]:
        """Lets the reference compute the log-probs of the pairs ahead, and watches over the optimizer's steps."""
        return [ReferencePass(), FiniteSteps(self.on_nonfinite)]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return load_tokenizer(
            self.base, gguf_file=self.gguf_file, revision=self.revision, trust_remote_code=self.trust_remote_code
        )

    @property
    def model(self) -> PeftModel:
        """The PEFT model inside the policy."""
        return self.policy.model

    def _window_correction(self, batch_idx: int) -> float:
        """Lightning divides each loss by accumulate_grad_batches A, in a last window of n < A batches too: A / n."""
        accumulate, num_batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        if num_batches == float("inf"):
            return 1.0
        last_window = int(num_batches) % accumulate
        return accumulate / last_window if batch_idx >= num_batches - last_window else 1.0

    # --- the optimizer step ----------------------------------------------------------------------------------------

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step, and tells those that keep running numbers."""
        super().optimizer_step(*args, **kwargs)
        self.objective.end_step(kept=self.kept_step)
        self.reference.end_step(self.global_step + 1)

    # --- logging ---------------------------------------------------------------------------------------------------

    def observe(
        self, metrics: PreferenceMetrics, batch: PairBatch, losses: Tensor, policy: PairLogps, reference: PairLogps
    ) -> None:
        """Adds a batch to the metrics, and in training to what the step is made of."""
        rewards = self.objective.rewards(policy, reference)
        against = reference if self.has_reference else None
        metrics.update(losses, rewards, policy, against)
        if metrics is self.train_metrics:
            self.observations.append(Observation(batch, losses.detach(), policy.detach(), against))

    def on_train_batch_end(self, outputs: Any, batch: PairBatch, batch_idx: int) -> None:
        """Logs the mean over the pairs of an optimizer step, on all ranks."""
        if not self.trainer.fit_loop._should_accumulate():
            self._log_means("train", self.train_metrics)
            self.observations.clear()

    def on_validation_epoch_end(self) -> None:
        """Logs the means over all held-out pairs; those before the first step too."""
        values = self._log_means("val", self.eval_metrics)
        complete = self.trainer.num_sanity_val_batches == self.trainer.num_val_batches
        if self.trainer.sanity_checking and complete:
            for logger in self.loggers:  # Lightning throws away what a sanity check logs
                logger.log_metrics(values, step=self.global_step)

    def on_test_epoch_end(self) -> None:
        """Logs the means over all test pairs."""
        self._log_means("test", self.eval_metrics)

    def _log_means(self, stage: str, metrics: PreferenceMetrics) -> dict[str, float]:
        values = {f"{stage}/{name}": value.item() for name, value in metrics.compute().items()}
        metrics.reset()
        shown = {key: values.pop(key) for key in (f"{stage}/loss", f"{stage}/rewards/accuracies")}
        distributed = stage != "train"  # the values agree on all ranks; Lightning wants to be told
        self.log_dict(shown, prog_bar=True, sync_dist=distributed, batch_size=1)
        self.log_dict(values, sync_dist=distributed, batch_size=1)
        return {**shown, **values}

    # --- checkpoints: only what trains, and the state of the random generators -------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the adapters alone: the base is the hub's, and a 4-bit state could not be loaded back."""
        names = self._kept_names()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in names}
        checkpoint["random_states"] = of_all_ranks(self.trainer, random_state())
        if self.nonfinite_pairs is not None:
            checkpoint[PAIRS] = self.nonfinite_pairs
        if self.trainer.optimizers:
            checkpoint["hyper_parameters"]["optimizer"] = plain_optimizer(self.trainer.optimizers[0])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the state of the random generators for ``on_train_start``."""
        self._random_states = checkpoint.get("random_states")
        self._stored_optimizer = checkpoint.get("hyper_parameters", {}).get("optimizer", {}).get("class_path")
        if self._trainer is None:  # Lightning then moves the module to where the checkpoint's tensors are
            device = self.model.device
            checkpoint["state_dict"] = {name: value.to(device) for name, value in checkpoint["state_dict"].items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what trains, the base being there already, and running numbers, if they fit.

        Raises:
            ValueError: If the weights are not those of these very adapters, whatever ``strict``.
        """
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        found, expected = set(state_dict), self._kept_names()
        fitting = {name for name in found & expected if state_dict[name].shape == own[name].shape}
        running = {
            name for name in found | expected if name.startswith("objective.") or of_adapter(name, MOVING_ADAPTER)
        }
        differing = (found | expected) - fitting
        if differing - running:
            raise ValueError(
                f"The checkpoint holds {len(found - running)} weights; {len(fitting - running)} of them fit the "
                f"{len(expected - running)} of this model ({sorted(differing - running)[0]} does not). Was its "
                "model.lora another?"
            )
        if differing:
            rank_zero_warn(
                f"The checkpoint is of another model.objective or model.reference: {sorted(differing)[0]} and what "
                "else it kept of them is left out, and starts anew here."
            )
        super().load_state_dict(
            {name: value for name, value in state_dict.items() if name in fitting}, strict=False, assign=assign
        )
        return _IncompatibleKeys([], [])

    def on_train_start(self) -> None:
        """Goes on from a checkpoint with its random generators, but with this run's optimizer settings."""
        self.train()
        self.observations.clear()  # of a run that was broken off
        self.train_metrics.reset()
        self.objective.end_step(kept=False)
        if self._random_states is None:
            return
        if self.global_rank < len(self._random_states):
            restore_random_state(self._random_states[self.global_rank])
        self._random_states = None
        for optimizer, config in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True):
            own = plain_optimizer(optimizer)["class_path"]
            if own != self._stored_optimizer:
                rank_zero_warn(f"The checkpoint's optimizer was {self._stored_optimizer}: {own} starts afresh.")
                optimizer.state.clear()
            apply_settings(optimizer, config.scheduler)

    def _kept_names(self) -> set[str]:
        """Of a checkpoint: adapters in training, the copy that follows them, the objective's running numbers."""
        kept = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        kept |= {name for name, _ in self.named_parameters() if of_adapter(name, MOVING_ADAPTER)}
        return kept | {f"objective.{name}" for name in self.objective.state_dict()}


def _type_name(quantization: BitsAndBytesConfig | None, dtype: torch.dtype) -> str:
    if quantization is None:
        return str(dtype).removeprefix("torch.")
    return str(quantization.bnb_4bit_quant_type) if quantization.load_in_4bit else "int8"

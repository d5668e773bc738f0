"""What the policy is held against: itself as it was at the start, another model, a copy that follows it, or nothing."""

import gc
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_dpo.base_model import load_tokenizer
from lit_dpo.data.batch import PairBatch
from lit_dpo.objectives import PairLogps
from lit_dpo.policy.loading import (
    LORA,
    MOVING_ADAPTER,
    REFERENCE_ADAPTER,
    Quantization,
    followed,
    load_policy,
    of_adapter,
    quantization_for,
)
from lit_dpo.policy.policy import Policy

FORMAT_VERSION = 1  # raise it when the same pair and model give other numbers, or are stored in another way


class Reference(ABC):
    """Anything that gives the log-probs that a policy is held against."""

    @abstractmethod
    def logps(self, batch: PairBatch) -> PairLogps:
        """Log-probs of P pairs, without gradients."""

    def end_step(self, step: int) -> None:  # noqa: B027
        """Called after each optimizer step, counted from 1, for references that move."""


class NoReference(Reference):
    """No reference: zeros, which cost nothing, for objectives that do not look at them."""

    def logps(self, batch: PairBatch) -> PairLogps:
        """Zeros."""
        return batch.sum_responses(torch.zeros(len(batch.targets), device=batch.targets.device))


class InitialPolicy(Reference):
    """The policy as it was before training: adapters off, or the frozen copy of the adapter that training began with.

    Args:
        policy: The policy in training.
    """

    policy: Policy

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def release(self) -> None:
        """Gives back memory that is not needed once all log-probs are on disk: none, the policy being in training."""

    def logps(self, batch: PairBatch) -> PairLogps:
        """Log-probs of P pairs, without gradients."""
        return batch.sum_responses(self.token_logps(batch))

    def token_logps(self, batch: PairBatch) -> Tensor:
        """Log-prob of each response token, (R,), in nats."""
        with self.policy.initial():
            return self.policy.token_logps(batch).logps

    def identity(self, dtype: torch.dtype) -> str:
        """A digest of all that its log-probs depend on besides the token ids, with matrix products in ``dtype``."""
        model = self.policy.model
        settings = {
            "version": FORMAT_VERSION,
            "products": str(dtype),
            "kernels": [self.policy.flat, self.policy.compiled, torch.__version__, _processor(model.device)],
            "config": {
                name: value
                for name, value in model.get_base_model().config.to_dict().items()
                if not name.startswith("_") and name not in ("transformers_version", "use_cache")
            },
            "adapter": {
                name: value
                for name, value in model.peft_config[REFERENCE_ADAPTER].to_dict().items()
                if "path" not in name and name != "revision"
            }
            if REFERENCE_ADAPTER in model.peft_config
            else None,
        }
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=_plain).encode(), digest_size=16)
        for name, tensor in sorted(model.state_dict().items()):
            if not of_adapter(name, "default"):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


class OtherPolicy(InitialPolicy):
    """Another model than the one in training, loaded when it is needed.

    Args:
        load: Loads it, frozen.
    """

    def __init__(self, load: Callable[[], Policy]) -> None:
        self._load = load

    @cached_property
    def policy(self) -> Policy:  # type: ignore[override]
        """The model."""
        return self._load()

    def release(self) -> None:
        """Gives its memory back; if there are other pairs to come, it is loaded again."""
        vars(self).pop("policy", None)
        gc.collect()  # its layers and their functions hold one another
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class MovingReference(Reference):
    """TR-DPO: a copy of the adapters that follows those in training.

    Every τ optimizer steps θ_ref ← α·θ + (1 - α)·θ_ref. A soft update is α < 1 at every step, a hard one α = 1 every so
    many steps. θ are the adapters' matrices A and B: mixed so, their product differs from the mixture of products BA by
    α(1 - α)(B - B_ref)(A - A_ref), which is of second order, and nothing for hard updates. It is kept in checkpoints.
    Held-out numbers are against it too, so they are not comparable along a run.

    Args:
        alpha: Share of the policy in the mixture, in (0, 1].
        tau: Optimizer steps between two updates.
        cached: Must be false: the log-probs change with each update.

    Raises:
        ValueError: If an argument is outside its range.

    References:
        Gorbatovski et al. 2024, arXiv:2404.09656, Section 3, with its α 0.6 for soft updates; τ is 512 for hard ones.
    """

    policy: Policy

    def __init__(self, alpha: float = 0.6, tau: int = 1, cached: bool = False) -> None:
        if cached:
            raise ValueError(
                "model.reference.cached: a moving reference cannot be cached, as its log-probs change with each update."
            )
        if not 0 < alpha <= 1:
            raise ValueError(f"model.reference.alpha must lie in (0, 1], not {alpha}.")
        if tau < 1:
            raise ValueError(f"model.reference.tau must be at least 1, not {tau}.")
        self.alpha, self.tau, self.cached = alpha, tau, cached

    def logps(self, batch: PairBatch) -> PairLogps:
        """Log-probs of P pairs, without gradients."""
        with self.policy.frozen(MOVING_ADAPTER):
            return batch.sum_responses(self.policy.token_logps(batch).logps)

    @torch.no_grad()
    def end_step(self, step: int) -> None:
        """Moves the copy, if it is time."""
        if step % self.tau:
            return
        parameters = dict(self.policy.model.named_parameters())
        for name, parameter in parameters.items():
            if of_adapter(name, MOVING_ADAPTER):
                parameter.lerp_(parameters[followed(name)], self.alpha)


class AnotherModel:
    """Another model as the reference, with its own quantization, computed live or once and kept on disk.

    Its vocabulary must be that of the policy, for both are asked about the same token ids.

    Args:
        base: Hub id, local folder, GGUF file or ``package:NAME``.
        quantization: ``nf4``, transformers' ``BitsAndBytesConfig``, or null for none.
        adapter: Folder or hub id of an adapter to put on it.
        cached: Whether to compute its log-probs once and keep them on disk; its memory is then given back.
        gguf_file: Name of a GGUF file inside a hub repository.
        revision: Revision of the hub repository.
        trust_remote_code: Whether to run model code that comes with the repository.
    """

    def __init__(
        self,
        base: str,
        quantization: Quantization = "nf4",
        adapter: str | None = None,
        cached: bool = True,
        gguf_file: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.base, self.quantization, self.adapter, self.cached = base, quantization, adapter, cached
        self.gguf_file, self.revision, self.trust_remote_code = gguf_file, revision, trust_remote_code

    def open(self, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device) -> OtherPolicy:
        """The model, with base weights and matrix products in ``dtype``.

        Args:
            tokenizer: The policy's, to compare vocabularies.
            dtype: Type of the base weights that are not quantized, and of 4-bit matrix products.
            device: Where it will be loaded.

        Raises:
            ValueError: If it is not there, or the vocabularies differ.
        """
        source: dict[str, Any] = {
            "gguf_file": self.gguf_file,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }
        try:
            own = load_tokenizer(self.base, chat=False, **source)
        except (OSError, ValueError) as error:
            raise ValueError(str(error).replace("model.", "model.reference.", 1)) from error
        if own.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"model.reference.base={self.base} has another vocabulary than the policy: the same token ids would "
                "mean other words. Use a reference of the same family."
            )

        def load() -> Policy:
            model = load_policy(
                self.base,
                quantization=quantization_for(self.quantization, dtype),
                lora=LoraConfig(**{**LORA, "r": 1}),  # the policy's machinery wants adapters; these stay off
                adapter=self.adapter,
                dtype=dtype,
                device=device,
                **source,
            )
            return Policy(model.requires_grad_(False), recompute=False)

        return OtherPolicy(load)


def _processor(device: torch.device) -> str:
    """What the kernels run on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def _plain(value: Any) -> Any:
    """What JSON has no word for: sets, in an order, and names of everything else."""
    return sorted(value) if isinstance(value, set) else str(value)

"""Another model as the reference."""

import gc
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from lit_dpo.base.tokenizer import load_tokenizer
from lit_dpo.policy.adapters import LORA
from lit_dpo.policy.loading import load_policy
from lit_dpo.policy.policy import Policy
from lit_dpo.policy.precision import Quantization, quantization_for
from lit_dpo.reference.initial import InitialPolicy


class OtherPolicy(InitialPolicy):
    """A model other than the one in training, loaded at the first use.

    Args:
        load: Function that loads the model, frozen.
    """

    def __init__(self, load: Callable[[], Policy]) -> None:
        self._load = load

    @cached_property
    def policy(self) -> Policy:  # type: ignore[override]
        """The model, loaded at the first access."""
        return self._load()

    def release(self) -> None:
        """Frees the model. The next use loads it again."""
        vars(self).pop("policy", None)
        gc.collect()  # the layers and their replaced forwards form reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class AnotherModel:
    """Another model as the reference, with its own quantization. Its log-probs are cached on disk or computed live.

    It must have the policy's vocabulary, because both read the same token ids.

    Args:
        base: The reference model: hub id, local folder, GGUF file, or ``package:NAME`` for an installed Python package.
        quantization: ``nf4`` (4 bits, as in QLoRA), a ``BitsAndBytesConfig`` of transformers, or null for none.
        adapter: Folder or hub id of an adapter for the reference model.
        cached: Whether to compute the log-probs once, keep them on disk, and then free the model.
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
        """The reference, with base weights and matrix products in ``dtype``. Its first use loads the model.

        Args:
            tokenizer: The policy's tokenizer, to compare vocabularies.
            dtype: Type of the base weights that are not quantized, and of 4-bit matrix products.
            device: Device to load the model to.

        Raises:
            ValueError: If the tokenizer of ``base`` cannot be loaded, or the vocabularies differ.
        """
        source: dict[str, Any] = {
            "gguf_file": self.gguf_file,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }
        try:
            own = load_tokenizer(self.base, **source)
        except (OSError, ValueError) as error:
            raise ValueError(str(error).replace("model.", "model.reference.", 1)) from error
        if own.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"model.reference.base={self.base} has another vocabulary than the policy: the same token ids would "
                "mean other tokens. Use a reference of the same family."
            )

        def load() -> Policy:
            model = load_policy(
                self.base,
                quantization=quantization_for(self.quantization, dtype),
                lora=LoraConfig(**{**LORA, "r": 1}),  # Policy needs a PEFT model; these adapters stay off
                adapter=self.adapter,
                dtype=dtype,
                device=device,
                **source,
            )
            return Policy(model.requires_grad_(False), recompute=False)

        return OtherPolicy(load)

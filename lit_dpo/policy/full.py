"""A model of which all weights train, in the form in which ``Policy`` takes a model with adapters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

BYTES = 16  # of a trained weight: the weight, its gradient and AdamW's two moments, in float32


class FullModel(nn.Module):
    """A language model without adapters, all of whose weights train.

    With "adapters off" it has its initial weights. They are read from the base's files when they are first needed, and
    stay in memory, as a second copy, until ``forget_initial``.

    Args:
        base: The model, in float32.
        load_initial: Reads the initial weights, by name, to a device.
    """

    def __init__(self, base: Any, load_initial: Callable[[torch.device], dict[str, Tensor]]) -> None:
        super().__init__()
        self.base = base.requires_grad_(True)
        self.peft_config: dict[str, Any] = {}
        self._load_initial = load_initial
        self._initial: dict[str, Tensor] | None = None
        self.whole_digest: Any = None  # of the initial weights; see ``sharding.weights_digest``
        self.whole_base_digest: Any = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.base.device
        return device

    def __getattr__(self, name: str) -> Any:
        """Attributes of the language model: ``config``, ``generate`` and others."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The language model's forward."""
        return self.base(*args, **kwargs)

    def get_base_model(self) -> Any:
        """The language model."""
        return self.base

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The numbers of trained and of all parameters."""
        numbers = [parameter.numel() for parameter in self.base.parameters()]
        return sum(numbers), sum(numbers)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model has its initial weights. Nothing is copied: the tensors change places."""
        if self._initial is None:
            self._initial = self._load_initial(self.device)
        parameters = dict(self.base.named_parameters())
        self._check(parameters)
        torch.clear_autocast_cache()  # it knows a parameter, and not which weights it has
        trained = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self._initial[name]
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = trained[name]
            torch.clear_autocast_cache()

    def _check(self, parameters: dict[str, nn.Parameter]) -> None:
        """Checks that what was read has the shapes of the model.

        Raises:
            ValueError: If not: the files have changed since.
        """
        assert self._initial is not None
        for name, parameter in parameters.items():
            if name not in self._initial or self._initial[name].shape != parameter.shape:
                raise ValueError(f"model.base: its files have changed since this run began ({name}).")

    def forget_initial(self) -> None:
        """Frees the initial weights. The next use reads them again."""
        self._initial = None

    def save(self, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Writes model, tokenizer and chat template, as transformers loads them.

        Args:
            tokenizer: The tokenizer.
            folder: Folder to write to.
            dtype: Type of the weights; by default bfloat16.
        """
        dtype = dtype or torch.bfloat16
        copies: dict[int, Tensor] = {}  # on the CPU; tied weights stay one
        for tensor in self.base.state_dict().values():
            if tensor.data_ptr() not in copies:
                copies[tensor.data_ptr()] = tensor.to("cpu", dtype if tensor.is_floating_point() else None)
        state = {name: copies[tensor.data_ptr()] for name, tensor in self.base.state_dict().items()}
        config = self.base.config
        kept, cached = config.dtype, config.use_cache
        try:
            self.base.save_pretrained(str(folder), state_dict=state)
            config.dtype, config.use_cache = dtype, True  # save_pretrained has written what holds in training
            config.save_pretrained(str(folder))
        finally:
            config.dtype, config.use_cache = kept, cached
        tokenizer.save_pretrained(str(folder))

"""How the layers run: recomputed in the backward pass if memory is short, compiled if it saves time.

Recomputation changes no result. Compilation changes only the rounding.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psutil
import torch
from peft import PeftModel
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_dpo.policy.full import FullModel
from lit_dpo.policy.lora import gated_product

Switch: TypeAlias = bool | Literal["auto"]
USABLE = 0.7  # share of the free memory that activations may take; the measurement below misses some of them
PAYS_AFTER = 500  # batches; with a small model, about 200 batches save the time that compilation takes


class Recomputation:
    """Decides, batch by batch, whether layers keep their activations or recompute them in the backward pass.

    Args:
        model: The model.
        mode: True recomputes always, False never, and ``auto`` if a batch's activations would not fit into free memory.
    """

    def __init__(self, model: PeftModel | FullModel, mode: Switch) -> None:
        self.mode, self._model = mode, model
        self.layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._bytes_per_token: float | None = None
        if mode is True or (mode == "auto" and self.layers):
            base = model.get_base_model()
            name = "activation_checkpointing_enable"  # transformers 5.23 renamed gradient_checkpointing_enable
            enable = getattr(base, name if hasattr(base, name) else "gradient_checkpointing_enable")
            enable({"use_reentrant": False})
        if mode == "auto":
            self._switch(False)

    def prepare(self, num_tokens: int, device: torch.device, probe: Callable[[], int]) -> None:
        """In mode ``auto``, switches recomputation on or off for a batch.

        Args:
            num_tokens: Number of tokens in the batch.
            device: Device of the batch.
            probe: Runs a small forward pass with gradients and returns its number of tokens. Called once.
        """
        if self.mode != "auto" or not self.layers:
            return
        if self._bytes_per_token is None:
            self._switch(False)
            kept: dict[int, int] = {}
            weights = {parameter.untyped_storage().data_ptr() for parameter in self._trained()}

            def note(tensor: Tensor) -> Tensor:
                is_weight = isinstance(tensor, torch.nn.Parameter) or tensor.untyped_storage().data_ptr() in weights
                if not is_weight:
                    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            cuda = [device] if device.type == "cuda" else []
            with torch.random.fork_rng(cuda), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                tokens = probe()  # must not change the random state, or a resumed run would differ
            self._bytes_per_token = sum(kept.values()) / tokens
        gradients = sum(parameter.nbytes for parameter in self._trained() if parameter.grad is None)
        self._switch(self._bytes_per_token * num_tokens > USABLE * (_free_memory(device) - gradients))

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def _switch(self, on: bool) -> None:
        for layer in self.layers:
            layer.gradient_checkpointing = on


def compilation_pays(mode: Switch, device: torch.device, num_batches: float) -> bool:
    """Whether to compile. ``auto`` compiles on a CPU with a C++ compiler, in a run that is long enough."""
    if mode != "auto":
        return mode
    return device.type == "cpu" and can_compile_on_cpu() and num_batches >= PAYS_AFTER


def can_compile_on_cpu() -> bool:
    """Whether there is a C++ compiler, and vector instructions: without them inductor's C++ code does not build."""
    return shutil.which("g++") is not None and torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def compile_layers(model: PeftModel | FullModel) -> None:
    """Compiles the layers for batches of any length. Fuses elementwise operations, not products and attention."""
    # Rounds where eager execution rounds. Otherwise a forward pass with gradients would differ from one without, and in
    # bfloat16 the policy would not equal the reference at the start.
    options: dict[str, Any] = {"dynamic": True, "options": {"emulate_precision_casts": True}}
    product = torch.compile(gated_product, **options)
    for module in model.modules():
        if hasattr(module, "gated_product"):
            module.gated_product = product
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(**options)


def _free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate."""
    if device.type != "cuda":
        free = psutil.virtual_memory().available
        limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
        if limit.exists() and limit.read_text().strip() != "max":  # in a container
            free = min(free, int(limit.read_text()) - int(used.read_text()))
        return int(free) // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))

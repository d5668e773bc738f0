"""Base product and low-rank update of a LoRA layer in one autograd function, in place of PEFT's chain of them.

PEFT clones the base's output, then multiplies, scales and adds: five tensors the size of the output, each kept or
copied. Here the update is added into the base's product by the matrix multiplication itself, and all that is kept for
the backward is the input and its r numbers a token. The layers stay PEFT's own: what this does not cover goes its way.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear


def fuse_adapters(model: PeftModel) -> None:
    """Makes every LoRA layer on a plain or 4-bit linear layer compute itself in one function."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and type(module.get_base_layer()) in (nn.Linear, bnb.nn.Linear4bit):
            module.forward = partial(_forward, module, module.forward)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _forward(layer: Any, original: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a LoRA layer: fused if it is a plain one with at most one adapter at work, else PEFT's."""
    adapters = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    if args or kwargs or layer.merged or len(adapters) > 1 or (adapters and not _is_plain(layer, adapters[0])):
        return original(x, *args, **kwargs)
    base = layer.get_base_layer()
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x = x.to(dtype)
    bias = None if base.bias is None else base.bias.to(dtype)
    if not adapters:
        return _FrozenLinear.apply(x, base.weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    name = adapters[0]
    down, up = layer.lora_A[name].weight.to(dtype), layer.lora_B[name].weight.to(dtype)
    return _LoraLinear.apply(x, base.weight, bias, down, up, layer.scaling[name])  # type: ignore[no-any-return, no-untyped-call]


def _is_plain(layer: Any, name: str) -> bool:
    """Whether an adapter is W + scale·B·A, neither a variant (DoRA, …) nor with dropout at work."""
    dropout = layer.lora_dropout[name]
    idle = isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0
    return idle and name not in layer.lora_variant and layer.lora_B[name].bias is None


def _dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A base weight, (out, in), dequantized if need be."""
    if isinstance(weight, bnb.nn.Params4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    return weight.to(dtype)


class _FrozenLinear(torch.autograd.Function):
    """xWᵀ + b for a frozen W, which is dequantized anew in the backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return linear(x, _dense(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = outputs
        return gradient @ _dense(ctx.weight, gradient.dtype), None, None


class _LoraLinear(torch.autograd.Function):
    """xWᵀ + b + s·(xAᵀ)Bᵀ, with gradients in x, A (r, in) and B (out, r)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        output = linear(rows, _dense(weight, x.dtype), bias)
        low = rows @ down.t()  # (T, r)
        output.addmm_(low, up.t(), alpha=scale)
        ctx.save_for_backward(rows, low, down, up)
        ctx.weight, ctx.scale = weight, scale
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor, None]:
        rows, low, down, up = ctx.saved_tensors
        gradient = outputs[0].reshape(-1, outputs[0].shape[-1])
        low_gradient = (gradient @ up).mul_(ctx.scale)  # (T, r)
        x_gradient = torch.addmm(gradient @ _dense(ctx.weight, gradient.dtype), low_gradient, down)
        up_gradient = (gradient.t() @ low).mul_(ctx.scale)
        return (
            x_gradient.view(*outputs[0].shape[:-1], -1),
            None,
            None,
            low_gradient.t() @ rows,
            up_gradient,
            None,
        )

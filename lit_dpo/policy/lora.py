"""Base product and low-rank update of a LoRA layer in one autograd function, in place of PEFT's chain of them.

PEFT clones the base's output, then multiplies, scales and adds: five tensors the size of the output, each kept or
copied. Here the update is added into the base's product by the matrix multiplication itself, and all that is kept for
the backward is the input and its r numbers a token; of a gated feed-forward layer, act(gate)·up is computed anew in the
backward instead of being kept. The layers stay PEFT's own: what this does not cover goes its way.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

Product: TypeAlias = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


def fuse_adapters(model: PeftModel) -> None:
    """Makes every LoRA layer on a plain or 4-bit linear layer, and every gated layer of three, one function each."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and type(module.get_base_layer()) in (nn.Linear, bnb.nn.Linear4bit):
            module.forward = partial(_forward, module, module.forward)
    for module in model.modules():
        if is_gated(module):
            module.gated_product = gated_product
            module.forward = partial(_gated_forward, module, module.forward)


def gated_product(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """The hidden layer of a gated feed-forward layer (GLU; Shazeer 2020, arXiv:2002.05202)."""
    return activation(gate) * up


@torch.no_grad()
def is_gated(module: nn.Module) -> bool:
    """Whether a module is down(act(gate(x))·up(x)), which is asked of its names and then of its numbers."""
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if not all(hasattr(module, name) for name in names) or not isinstance(module.down_proj, LoraLayer):
        return False
    layer: Any = module
    base = layer.down_proj.get_base_layer()
    if type(base) not in (nn.Linear, bnb.nn.Linear4bit):
        return False
    dtype = layer.down_proj.lora_A["default"].weight.dtype if type(base) is not nn.Linear else base.weight.dtype
    x = torch.linspace(-1, 1, 2 * layer.up_proj.in_features, device=base.weight.device, dtype=dtype).view(1, 2, -1)
    expected = layer.down_proj(gated_product(layer.act_fn, layer.gate_proj(x), layer.up_proj(x)))
    return torch.equal(layer(x), expected)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _forward(layer: Any, original: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a LoRA layer: fused if it is a plain one with at most one adapter at work, else PEFT's."""
    adapters, dtype = _adapters(layer), _product_type(x)
    if args or kwargs or not _is_plain(layer, adapters, dtype):
        return original(x, *args, **kwargs)
    x = x.to(dtype)
    if not adapters:
        return _FrozenLinear.apply(x, *_base(layer, x.dtype))  # type: ignore[no-any-return, no-untyped-call]
    parameters = *_base(layer, x.dtype), *_update(layer, adapters[0], x.dtype)
    return _LoraLinear.apply(x, *parameters)  # type: ignore[no-any-return, no-untyped-call]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _gated_forward(layer: Any, original: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The forward of a gated feed-forward layer: fused if its last layer is."""
    if not torch.is_grad_enabled() or not isinstance(layer.down_proj, LoraLayer):  # adapters can be unloaded
        return original(x)
    adapters, dtype = _adapters(layer.down_proj), _product_type(x)
    if not adapters or not _is_plain(layer.down_proj, adapters, dtype):
        return original(x)
    gate, up = layer.gate_proj(x).to(dtype), layer.up_proj(x).to(dtype)
    parameters = *_base(layer.down_proj, dtype), *_update(layer.down_proj, adapters[0], dtype)
    product = partial(layer.gated_product, layer.act_fn)
    return _GatedLoraLinear.apply(gate, up, product, *parameters)  # type: ignore[no-any-return, no-untyped-call]


def _adapters(layer: Any) -> list[str]:
    """Names of the adapters at work in a layer."""
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]


def _is_plain(layer: Any, adapters: list[str], dtype: torch.dtype) -> bool:
    """Whether a layer is W + scale·B·A, neither merged nor a variant (DoRA, …) nor with dropout at work.

    W is frozen, and if it is quantized, its products are of the type that the others are of.
    """
    base = layer.get_base_layer()
    if base.weight.requires_grad or getattr(base, "compute_dtype", None) not in (None, dtype):
        return False
    for name in adapters:
        dropout = layer.lora_dropout[name]
        idle = isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0
        if not idle or name in layer.lora_variant or layer.lora_B[name].bias is not None:
            return False
    return not layer.merged and len(adapters) <= 1


def _product_type(x: Tensor) -> torch.dtype:
    """The type that matrix products of x are computed in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _base(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight, perhaps quantized, and bias of the layer under the adapters."""
    base = layer.get_base_layer()
    return base.weight, None if base.bias is None else base.bias.to(dtype)


def _update(layer: Any, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """A (r, in), B (out, r) and the scale of an adapter."""
    return layer.lora_A[name].weight.to(dtype), layer.lora_B[name].weight.to(dtype), layer.scaling[name]


def _dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A base weight, (out, in), dequantized if need be."""
    if isinstance(weight, bnb.nn.Params4bit):
        weight = dequantize_4bit(weight.data, weight.quant_state)
    return weight.to(dtype)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """xWᵀ + bias + s·(xAᵀ)Bᵀ, (…, out), and xAᵀ, (T, r)."""
    output = linear(x, _dense(weight, x.dtype), bias)
    low = x.reshape(-1, x.shape[-1]) @ a.t()
    output.view(-1, output.shape[-1]).addmm_(low, b.t(), alpha=scale)
    return output, low


def _gradients(
    gradient: Tensor, x: Tensor, low: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in x, A and B, given that in the output."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    low_gradient = (rows @ b).mul_(scale)  # (T, r)
    x_gradient = rows @ _dense(weight, rows.dtype)
    x_gradient.addmm_(low_gradient, a)
    return x_gradient.view(x.shape), low_gradient.t() @ x.reshape(-1, x.shape[-1]), (rows.t() @ low).mul_(scale)


class _FrozenLinear(torch.autograd.Function):
    """xWᵀ + bias for a frozen W, which is dequantized anew in the backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return linear(x, _dense(weight, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = outputs
        return gradient @ _dense(ctx.weight, gradient.dtype), None, None


class _LoraLinear(torch.autograd.Function):
    """xWᵀ + bias + s·(xAᵀ)Bᵀ, keeping x and xAᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        output, low = _apply(x, weight, bias, a, b, scale)
        ctx.save_for_backward(x, low, a, b)
        ctx.weight, ctx.scale = weight, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor, None]:
        x, low, a, b = ctx.saved_tensors
        in_x, in_a, in_b = _gradients(outputs[0], x, low, ctx.weight, a, b, ctx.scale)
        return in_x, None, None, in_a, in_b, None


class _GatedLoraLinear(torch.autograd.Function):
    """The same of x = product(gate, up), keeping gate and up, from which x comes anew in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        product: Callable[[Tensor, Tensor], Tensor],
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        output, low = _apply(product(gate, up), weight, bias, a, b, scale)
        ctx.save_for_backward(gate, up, low, a, b)
        ctx.product, ctx.weight, ctx.scale = product, weight, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None, Tensor, Tensor, None]:
        gate, up, low, a, b = ctx.saved_tensors
        with torch.enable_grad():
            gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
            x = ctx.product(gate, up)
        in_x, in_a, in_b = _gradients(outputs[0], x.detach(), low, ctx.weight, a, b, ctx.scale)
        in_gate, in_up = torch.autograd.grad(x, (gate, up), in_x)
        return in_gate, in_up, None, None, None, in_a, in_b, None

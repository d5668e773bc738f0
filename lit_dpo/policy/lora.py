"""A LoRA layer's base product and low-rank update as one autograd function.

PEFT runs them as a chain of functions: it clones the base's output, multiplies, scales and adds. That makes five
tensors of the output's size. Here a matrix multiplication adds the update in place. For the backward pass only the
input and r low-rank numbers per token are kept. In a gated feed-forward layer the backward pass recomputes act(gate)·up
instead of keeping it. The layers remain PEFT's. Cases that the fused functions do not support run PEFT's own forward.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lit_dpo.policy.adapters import TRAINED_ADAPTER
from lit_dpo.policy.precision import is_linear4bit, matmul_dtype

Product: TypeAlias = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


def fuse_adapters(model: PeftModel) -> None:
    """Replaces the forward of LoRA layers on plain or 4-bit linear layers, and of gated feed-forward layers."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and _is_covered(module.get_base_layer()):
            _replace_forward(module, _forward)
    for module in model.modules():
        if is_gated(module):
            module.gated_product = gated_product
            _replace_forward(module, _gated_forward)


def _replace_forward(module: Any, forward: Callable[..., Tensor]) -> None:
    """Makes ``forward(module, original, x, …)`` the forward of one layer.

    PEFT has no public way to change the arithmetic of a layer that it made. Its ``LoraConfig._register_custom_module``
    replaces the whole layer class instead, and is experimental.
    """
    module.forward = partial(forward, module, module.forward)


def _is_covered(base: nn.Module) -> bool:
    """Whether the fused functions can multiply by the weights of this layer."""
    return type(base) is nn.Linear or is_linear4bit(base)


def gated_product(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """The hidden activations of a gated feed-forward layer (GLU; Shazeer 2020, arXiv:2002.05202)."""
    return activation(gate) * up


@torch.no_grad()
def is_gated(module: nn.Module) -> bool:
    """Whether a module computes down(act(gate(x))·up(x)). Checks the names of its parts and one output."""
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if not all(hasattr(module, name) for name in names) or not isinstance(module.down_proj, LoraLayer):
        return False
    layer: Any = module
    base = layer.down_proj.get_base_layer()
    if not _is_covered(base):
        return False
    dtype = layer.down_proj.lora_A[TRAINED_ADAPTER].weight.dtype if type(base) is not nn.Linear else base.weight.dtype
    x = torch.linspace(-1, 1, 2 * layer.up_proj.in_features, device=base.weight.device, dtype=dtype).view(1, 2, -1)
    expected = layer.down_proj(gated_product(layer.act_fn, layer.gate_proj(x), layer.up_proj(x)))
    return torch.equal(layer(x), expected)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _forward(layer: Any, original: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a LoRA layer: fused for plain LoRA with at most one active adapter, else PEFT's own."""
    adapters, dtype = _adapters(layer), matmul_dtype(x)
    # For one token on a GPU, bitsandbytes multiplies by packed 4-bit weights instead of dequantizing all of them.
    one_token = x.is_cuda and x.numel() == x.shape[-1] and not torch.is_grad_enabled()
    if args or kwargs or one_token or not _is_plain(layer, adapters, dtype):
        return original(x, *args, **kwargs)
    x = x.to(dtype)
    if not adapters:
        return _FrozenLinear.apply(x, *_base(layer, x.dtype))  # type: ignore[no-any-return, no-untyped-call]
    parameters = *_base(layer, x.dtype), *_update(layer, adapters[0])
    return _LoraLinear.apply(x, *parameters)  # type: ignore[no-any-return, no-untyped-call]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _gated_forward(layer: Any, original: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The forward of a gated feed-forward layer: fused if its down projection can be fused."""
    if not torch.is_grad_enabled() or not isinstance(layer.down_proj, LoraLayer):  # PEFT can unload adapters
        return original(x)
    adapters, dtype = _adapters(layer.down_proj), matmul_dtype(x)
    if not adapters or not _is_plain(layer.down_proj, adapters, dtype):
        return original(x)
    gate, up = layer.gate_proj(x).to(dtype), layer.up_proj(x).to(dtype)
    parameters = *_base(layer.down_proj, dtype), *_update(layer.down_proj, adapters[0])
    product = partial(layer.gated_product, layer.act_fn)
    return _GatedLoraLinear.apply(gate, up, product, *parameters)  # type: ignore[no-any-return, no-untyped-call]


def _adapters(layer: Any) -> list[str]:
    """Names of a layer's active adapters."""
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]


def _is_plain(layer: Any, adapters: list[str], dtype: torch.dtype) -> bool:
    """Whether a layer computes W + scale·B·A with a frozen W: not merged, no variant such as DoRA, no active dropout.

    If W is quantized, its products must have type ``dtype``, like the other matrix products.
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


def _base(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight (quantized or not) and bias of the base layer."""
    base = layer.get_base_layer()
    if getattr(base, "quant_state", None) is not None:
        base.weight.quant_state = base.quant_state  # FSDP2 gathers a sharded weight into a parameter without it
    return base.weight, None if base.bias is None else base.bias.to(dtype)


def _update(layer: Any, name: str) -> tuple[Tensor, Tensor, float]:
    """A (r, in), B (out, r) and the scale of an adapter."""
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def _dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A base weight, (out, in), dequantized if it is quantized."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, state)
    return weight.to(dtype)


def _apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """xWᵀ + bias + s·(xAᵀ)Bᵀ, (…, out). Also xAᵀ, (T, r), and A and B in the type of x, for the backward pass."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    output = linear(x, _dense(weight, x.dtype), bias)
    low = x.reshape(-1, x.shape[-1]) @ a.t()
    output.view(-1, output.shape[-1]).addmm_(low, b.t(), alpha=scale)
    return output, (low, a, b)


def _gradients(
    gradient: Tensor, x: Tensor, low: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, A and B, given the gradient with respect to the output."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    low_gradient = (rows @ b).mul_(scale)  # (T, r)
    x_gradient = rows @ _dense(weight, rows.dtype)
    x_gradient.addmm_(low_gradient, a)
    return x_gradient.view(x.shape), low_gradient.t() @ x.reshape(-1, x.shape[-1]), (rows.t() @ low).mul_(scale)


class _FrozenLinear(torch.autograd.Function):
    """xWᵀ + bias for a frozen W. The backward pass dequantizes W again instead of keeping it."""

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
    """xWᵀ + bias + s·(xAᵀ)Bᵀ. Keeps x and xAᵀ for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        output, kept = _apply(x, weight, bias, a, b, scale)
        ctx.save_for_backward(x, *kept)
        ctx.weight, ctx.scale, ctx.dtype = weight, scale, a.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor, None]:
        x, low, a, b = ctx.saved_tensors
        in_x, in_a, in_b = _gradients(outputs[0], x, low, ctx.weight, a, b, ctx.scale)
        return in_x, None, None, in_a.to(ctx.dtype), in_b.to(ctx.dtype), None


class _GatedLoraLinear(torch.autograd.Function):
    """``_LoraLinear`` for x = product(gate, up). Keeps gate and up. The backward pass recomputes x from them."""

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
        output, kept = _apply(product(gate, up), weight, bias, a, b, scale)
        ctx.save_for_backward(gate, up, *kept)
        ctx.product, ctx.weight, ctx.scale, ctx.dtype = product, weight, scale, a.dtype
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
        return in_gate, in_up, None, None, None, in_a.to(ctx.dtype), in_b.to(ctx.dtype), None

"""Hidden states ──► log-probabilities of given tokens, without ever holding the logits.

A chunk of tokens at a time, and with a frozen head the gradient in the hidden state is computed in the same pass: it
depends on nothing that comes later but one factor a token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK = 256  # tokens whose logits exist at one time


def token_logps(hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """Log-probability of each target under softmax(head(hidden)).

    Args:
        hidden: Hidden states at the positions that predict, (R, d).
        targets: Ids of the predicted tokens, (R,).
        head: The language-model head, d → V.

    Returns:
        (R,) in nats, float32 (float64 for float64 input).
    """
    if type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        bias = None if head.bias is None else head.bias.to(dtype)
        logps: Tensor = _FrozenHeadLogps.apply(  # type: ignore[no-untyped-call]
            hidden.to(dtype), head.weight.to(dtype), bias, targets
        )
        return logps
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([checkpoint(_head_logps, head, h, t, use_reentrant=False) for h, t in chunks])


def gather_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-softmax of logits (..., V) at targets (...), in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)


def _head_logps(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """The plain way, for a head that trains: differentiable in its weight too."""
    return gather_logps(head(hidden), targets)


class _FrozenHeadLogps(torch.autograd.Function):
    """With z = Wh + b and p = softmax(z): log p_t and its gradient in h, W_t - pᵀW, in one pass over the vocabulary."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        logps, gradients = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
                logits = nn.functional.linear(h, weight, bias)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                normalizer = logits.logsumexp(-1, keepdim=True)
                logps.append((logits.gather(-1, t[:, None]) - normalizer)[:, 0])
                if needs_gradient:
                    probabilities = logits.sub_(normalizer).exp_().to(weight.dtype)
                    gradients.append(weight[t] - probabilities @ weight)
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (outputs[0][:, None] * gradient).to(gradient.dtype), None, None, None

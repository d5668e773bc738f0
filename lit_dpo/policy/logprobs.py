"""Hidden states ──► log-probabilities of given tokens, without ever holding the logits.

A chunk of tokens at a time, and with a frozen head the gradient in the hidden state is computed in the same pass: it
depends on nothing that comes later but one factor a token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lit_dpo.objectives import TokenStatistics

CHUNK = 256  # tokens whose logits exist at one time


class TokenLogps(NamedTuple):
    """Log-probabilities of R tokens, and, if asked for, what their distributions were like."""

    logps: Tensor  # (R,) nats
    statistics: TokenStatistics | None


def token_logps(hidden: Tensor, targets: Tensor, head: nn.Module, statistics: bool = False) -> TokenLogps:
    """Log-probability of each target under softmax(head(hidden)).

    Args:
        hidden: Hidden states at the positions that predict, (R, d).
        targets: Ids of the predicted tokens, (R,).
        head: The language-model head, d → V.
        statistics: Whether to give entropy and the like, at the price of more passes over the vocabulary.

    Returns:
        In nats, float32 (float64 for float64 input).
    """
    if type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        bias = None if head.bias is None else head.bias.to(dtype)
        arguments = (hidden.to(dtype), head.weight.to(dtype), bias, targets, statistics)
        return _named(*_FrozenHeadLogps.apply(*arguments))  # type: ignore[no-untyped-call]
    parts = [
        checkpoint(lambda h, t: gather_logps(head(h), t, statistics), h, t, use_reentrant=False)
        for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return _named(torch.cat([part.logps for part in parts]), *_joined([part.statistics or () for part in parts]))


def gather_logps(logits: Tensor, targets: Tensor, statistics: bool = False) -> TokenLogps:
    """The same from logits (R, V), in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps = logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    return TokenLogps(logps, _statistics(logits.detach().log_softmax(-1), targets) if statistics else None)


def _statistics(log_probabilities: Tensor, targets: Tensor) -> TokenStatistics:
    """From log p of every word, (R, V)."""
    return TokenStatistics(
        entropy=-(log_probabilities.exp() * log_probabilities).sum(-1),
        top1=(log_probabilities.argmax(-1) == targets).to(log_probabilities.dtype),
        log_sum_squares=(2 * log_probabilities).logsumexp(-1),
    )


def _joined(parts: list[Any]) -> list[Tensor]:
    """Tensors of the same kind from each part, one after the other."""
    return [torch.cat(kind) for kind in zip(*parts, strict=True)]


def _named(logps: Tensor, *statistics: Tensor) -> TokenLogps:
    return TokenLogps(logps, TokenStatistics(*statistics) if statistics else None)


class _FrozenHeadLogps(torch.autograd.Function):
    """With z = Wh + b and p = softmax(z): log p_t and its gradient in h, (e_t - p)ᵀW, in one pass over the words."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, statistics: bool
    ) -> tuple[Tensor, ...]:
        needs_gradient = ctx.needs_input_grad[0]
        logps, gradients, extras = [], [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
                logits = nn.functional.linear(h, weight, bias)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                logits.sub_(logits.logsumexp(-1, keepdim=True))
                logps.append(logits.gather(-1, t[:, None])[:, 0])
                if statistics:
                    extras.append(_statistics(logits, t))
                if needs_gradient:
                    # p - 1 before it is rounded to half precision: of a likely token it is small
                    excess = logits.exp_()
                    excess[torch.arange(len(t), device=t.device), t] -= 1
                    gradients.append(-(excess.to(weight.dtype) @ weight))
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        joined = _joined(extras)
        ctx.mark_non_differentiable(*joined)
        return torch.cat(logps), *joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (outputs[0][:, None] * gradient).to(gradient.dtype), None, None, None, None

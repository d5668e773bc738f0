"""Hidden states ──► log-probabilities of given tokens, without storing the logits of all tokens.

Tokens are processed in chunks. If the head is frozen, the forward pass also computes the gradient of each log-prob with
respect to the hidden state. The backward pass then only multiplies it by one factor per token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lit_dpo.objectives import TokenStatistics
from lit_dpo.policy.precision import matmul_dtype

CHUNK = 256  # tokens per chunk; only one chunk's logits are in memory at a time


class TokenLogps(NamedTuple):
    """Log-probabilities of R tokens and, if requested, statistics of the distribution at each token."""

    logps: Tensor  # (R,) nats
    statistics: TokenStatistics | None


def token_logps(hidden: Tensor, targets: Tensor, head: nn.Module, statistics: bool = False) -> TokenLogps:
    """Log-probability of each target under softmax(head(hidden)).

    Args:
        hidden: Hidden states at the positions that predict the targets, (R, d).
        targets: Ids of the predicted tokens, (R,).
        head: The language-model head, d → V.
        statistics: Whether to compute entropy and other statistics, which takes more passes over the vocabulary.

    Returns:
        Log-probs in nats, float32 (float64 for float64 input), with the statistics if requested.
    """
    if type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
        dtype = matmul_dtype(hidden)
        bias = None if head.bias is None else head.bias.to(dtype)
        arguments = (hidden.to(dtype), head.weight.to(dtype), bias, targets, statistics)
        return _named(*_FrozenHeadLogps.apply(*arguments))  # type: ignore[no-untyped-call]
    parts = [
        checkpoint(lambda h, t: gather_logps(head(h), t, statistics), h, t, use_reentrant=False)
        for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return _named(torch.cat([part.logps for part in parts]), *_joined([part.statistics or () for part in parts]))


def gather_logps(logits: Tensor, targets: Tensor, statistics: bool = False) -> TokenLogps:
    """The same as ``token_logps``, from logits (R, V). Computes in float32 or a wider type."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps = logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    return TokenLogps(logps, _statistics(logits.detach().log_softmax(-1), targets) if statistics else None)


def _statistics(log_probabilities: Tensor, targets: Tensor) -> TokenStatistics:
    """Statistics of R distributions, from the log-probs of the whole vocabulary, (R, V)."""
    return TokenStatistics(
        entropy=-(log_probabilities.exp() * log_probabilities).sum(-1),
        top1=(log_probabilities.argmax(-1) == targets).to(log_probabilities.dtype),
        log_sum_squares=(2 * log_probabilities).logsumexp(-1),
    )


def _joined(parts: list[Any]) -> list[Tensor]:
    """Concatenates the tensors of the same kind from all parts."""
    return [torch.cat(kind) for kind in zip(*parts, strict=True)]


def _named(logps: Tensor, *statistics: Tensor) -> TokenLogps:
    return TokenLogps(logps, TokenStatistics(*statistics) if statistics else None)


class _FrozenHeadLogps(torch.autograd.Function):
    """log p_t for p = softmax(Wh + b), and its gradient with respect to h, (e_t - p)ᵀW, in one pass."""

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
                    # Subtract 1 before rounding to half precision: for a likely token, p - 1 is small.
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

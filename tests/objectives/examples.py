"""Log-probs of pairs, token by token, to try objectives on: random ones, and such as no run should ever see."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_dpo.objectives import PairLogps, Responses, TokenStatistics

Lists = Sequence[Sequence[float]]  # token log-probs of each response, chosen and rejected in turn
LENGTHS = (3, 5, 4, 2, 1, 6, 7, 7, 2, 3)


def from_tokens(
    tokens: Tensor,
    lengths: Sequence[int],
    *,
    counts: Sequence[int] | None = None,
    log_sum_squares: Tensor | None = None,
    scores: Sequence[float] | None = None,
) -> PairLogps:
    """Log-probs of pairs (or lists, with ``counts``) whose tokens, (R,), may carry a gradient."""
    counts = tuple(counts or (2,) * (len(lengths) // 2))
    known = torch.tensor(scores, dtype=tokens.dtype) if scores else torch.full((len(lengths),), torch.nan)
    statistics = None
    if log_sum_squares is not None:
        statistics = TokenStatistics(torch.zeros_like(tokens), torch.zeros_like(tokens), log_sum_squares)
    responses = Responses(tokens, tuple(lengths), counts, known, statistics)
    return PairLogps(
        *responses.best_and_worst(responses.sum(tokens)), *responses.best_and_worst(torch.tensor(lengths)), responses
    )


def random_tokens(seed: int, scale: float = 1.0, lengths: Sequence[int] = LENGTHS) -> Tensor:
    """Negative numbers for tokens of responses of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(sum(lengths), generator=generator, dtype=torch.float64) - 1e-3


def extreme_tokens() -> tuple[Tensor, Tensor]:
    """Policy and reference that are hundreds of nats apart, in all four directions, and not at all."""
    generator = torch.Generator().manual_seed(7)
    policy, reference = [], []
    for index, length in enumerate(LENGTHS):
        near, far = (0.5 + torch.rand(2, length, generator=generator, dtype=torch.float64)).unbind()
        far = far * 900 / length
        flipped = index in (1, 2, 4, 5)
        policy.append(far if flipped else near)
        reference.append(near if flipped or index >= 8 else far)
    return -torch.cat(policy), -torch.cat(reference)


def examples() -> dict[str, dict[str, Any]]:
    """By name, token log-probs of policy and reference, and the policy's log Σ p²."""
    extreme_policy, extreme_reference = extreme_tokens()
    tokens = {
        "random": (random_tokens(0), random_tokens(1)),
        "far": (random_tokens(2, 8.0), random_tokens(3, 8.0)),
        "extreme": (extreme_policy, extreme_reference),
    }
    return {
        name: {
            "lengths": list(LENGTHS),
            "policy": policy.tolist(),
            "reference": reference.tolist(),
            "log_sum_squares": random_tokens(4, 2.0).tolist(),
        }
        for name, (policy, reference) in tokens.items()
    }

"""Whether two ways of computing the same thing give the same, but for rounding.

A tensor counts as a whole: the norm of the difference against the norm of what is expected. An element by itself tells
nothing, since what is left where large terms cancel carries the rounding of those terms, which depends on the order
that a processor's kernels sum them in.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Tensor | Mapping[str, Tensor] | Iterable[Tensor]


def rounding(steps: int, dtype: torch.dtype = torch.float32) -> float:
    """How far apart, relatively, rounding alone may put two results of so many steps, each of which rounds once.

    The errors add like the steps of a random walk (Higham and Mary 2019, doi:10.1137/18M1226312): five times its
    standard deviation.
    """
    return 5 * torch.finfo(dtype).eps * math.sqrt(steps)


# Of a layer, forward or backward, in float32: seven products, whose sums are made in blocks of some ten terms, and some
# thirty steps element by element.
LAYER = 100
TINY = rounding(2 * 2 * LAYER)  # forward and backward of the two layers of the tiny models
SMOLLM2 = rounding(2 * 30 * LAYER)  # of the thirty of the embedded model

# Of the first loss: it changes by β/2 = 0.05 a nat, and the log-probs of two responses of some 60 nats are off by what
# 13 products round by, as over the tokens most of it evens out.
LOSS = 0.05 * 2 * 60 * rounding(2 * 6 + 1)


def assert_same(found: Tensors, expected: Tensors, tolerance: float) -> None:
    """Asserts that each tensor differs from the expected one by no more than the tolerance, relatively, in its norm."""
    ours, theirs = _named(found), _named(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        error, norm = (ours[name].double() - value.double()).norm().item(), value.double().norm().item()
        assert error <= tolerance * norm, f"{name}: off by {error:.1e} of {norm:.1e}, more than {tolerance:.1e} of it"


def _named(tensors: Tensors) -> Mapping[str, Tensor]:
    if isinstance(tensors, Tensor):
        return {"tensor": tensors.detach()}
    if isinstance(tensors, Mapping):
        return {name: value.detach() for name, value in tensors.items()}
    return {f"tensor {index}": value.detach() for index, value in enumerate(tensors)}

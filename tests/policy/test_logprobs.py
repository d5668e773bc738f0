import math

import pytest
import torch
from torch import nn

from lit_dpo.policy import logprobs
from lit_dpo.policy.logprobs import token_logps
from tests.closeness import assert_same, rounding

HALF = rounding(1, torch.bfloat16)  # one product, summed in float32 and rounded once


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK", 3)


def problem(
    bias: bool, trainable: bool, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    torch.manual_seed(0)
    head = nn.Linear(5, 11, bias=bias).to(dtype).requires_grad_(trainable)
    return torch.randn(7, 5, dtype=dtype, requires_grad=True), torch.randint(0, 11, (7,)), head


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_a_slow_loop(bias: bool, trainable: bool) -> None:
    hidden, targets, head = problem(bias, trainable)
    for row, logp in enumerate(token_logps(hidden, targets, head).logps.tolist()):
        logits = [
            sum(w * h for w, h in zip(weights, hidden[row].tolist(), strict=True))
            + (head.bias[index].item() if bias else 0)
            for index, weights in enumerate(head.weight.tolist())
        ]
        normalizer = math.log(sum(math.exp(logit) for logit in logits))
        assert logp == pytest.approx(logits[int(targets[row])] - normalizer, abs=1e-12)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradient_equals_finite_differences(bias: bool, trainable: bool) -> None:
    hidden, targets, head = problem(bias, trainable)
    assert torch.autograd.gradcheck(lambda h: token_logps(h, targets, head).logps, (hidden,))


def test_a_trainable_head_gets_its_gradient() -> None:
    hidden, targets, head = problem(bias=True, trainable=True)
    token_logps(hidden, targets, head).logps.sum().backward()
    expected = torch.autograd.grad(
        torch.log_softmax(head(hidden), -1).gather(1, targets[:, None]).sum(), list(head.parameters())
    )
    torch.testing.assert_close([head.weight.grad, head.bias.grad], list(expected))


def test_half_precision_is_summed_in_float32() -> None:
    hidden, targets, head = problem(bias=False, trainable=False, dtype=torch.bfloat16)
    logps = token_logps(hidden, targets, head).logps
    assert logps.dtype == torch.float32
    logps.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    exact = torch.log_softmax(head.double()(hidden.double()), -1).gather(1, targets[:, None])[:, 0]
    assert_same(logps, exact, HALF)


def test_autocast_chooses_the_type_of_the_products() -> None:
    hidden, targets, head = problem(bias=False, trainable=False, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = token_logps(hidden, targets, head).logps
    assert half.dtype == torch.float32
    full = token_logps(hidden, targets, head).logps
    assert not torch.equal(half, full)
    assert_same(half, full, HALF)


def test_nothing_is_kept_without_gradients() -> None:
    hidden, targets, head = problem(bias=False, trainable=False)
    with torch.no_grad():
        assert token_logps(hidden, targets, head).logps.grad_fn is None


@pytest.mark.parametrize("scale", [1.0, 3.0, 8.0])
def test_the_gradient_of_likely_tokens_survives_half_precision(scale: float) -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, 500, bias=False).to(torch.bfloat16).requires_grad_(False)
    targets = torch.arange(20)
    hidden = (head.weight[targets] * scale * 3).detach().requires_grad_()
    logits = head(hidden.detach()).double()  # rounded as the products are
    excess = logits.softmax(-1) - nn.functional.one_hot(targets, 500)
    expected = -(excess @ head.weight.double())
    token_logps(hidden, targets, head).logps.sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad - expected).norm() < 0.02 * expected.norm()

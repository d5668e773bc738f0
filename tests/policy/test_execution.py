"""Recomputing activations and compiling layers change time and memory, and numbers by no more than rounding."""

import warnings

import pytest
import torch

from lit_dpo.policy import execution
from lit_dpo.policy.execution import can_compile_on_cpu, compilation_pays
from lit_dpo.policy.policy import Policy
from tests.closeness import TINY, assert_same
from tests.tiny import random_batch, tiny_policy

BATCHES = [random_batch(sizes) for sizes in ([(5, 7, 3), (2, 3, 4)], [(9, 30, 12)], [(3, 4, 5), (6, 7, 8), (9, 1, 1)])]


def losses_and_gradients(policy: Policy) -> list[torch.Tensor]:
    found = []
    for batch in BATCHES:
        policy.zero_grad()
        logps = policy.logps(batch)
        (logps.chosen.sum() - 0.5 * logps.rejected.sum()).backward()
        found += [logps.chosen.detach(), *(p.grad.clone() for p in policy.parameters() if p.grad is not None)]
    return found


@pytest.mark.parametrize(("free", "recomputes"), [(2**40, False), (2**10, True)])
def test_activations_are_recomputed_when_they_would_not_fit(
    tiny_base: str, monkeypatch: pytest.MonkeyPatch, free: int, recomputes: bool
) -> None:
    monkeypatch.setattr(execution, "_free_memory", lambda device: free)
    policy, plain = tiny_policy(tiny_base, recompute="auto"), tiny_policy(tiny_base, recompute=False)
    for found, expected in zip(losses_and_gradients(policy), losses_and_gradients(plain), strict=True):
        assert torch.equal(found, expected)
    assert [layer.gradient_checkpointing for layer in policy.recomputation.layers] == [recomputes] * 2


def test_the_measure_of_activations_counts_what_is_kept(tiny_base: str) -> None:
    policy = tiny_policy(tiny_base, recompute="auto")
    policy.logps(BATCHES[0])
    measured = policy.recomputation._bytes_per_token
    assert measured is not None
    # two layers of width 32 in float32, feed-forward width 64: some tens of vectors of the width a layer
    assert 2 * 5 * 32 * 4 < measured < 2 * 60 * 32 * 4


def test_when_compiling_pays() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert compilation_pays(True, cuda, 1)
    assert not compilation_pays(False, cpu, 10**6)
    assert not compilation_pays("auto", cpu, 100)
    assert not compilation_pays("auto", cuda, 10**6)
    assert compilation_pays("auto", cpu, 10**6) == can_compile_on_cpu()


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.skipif(not can_compile_on_cpu(), reason="there is no C++ compiler, or no vector instructions")
def test_compiled_layers_give_the_same_for_batches_of_any_length(tiny_base: str) -> None:
    plain, compiled = tiny_policy(tiny_base), tiny_policy(tiny_base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler
        torch._dynamo.reset()
        compiled.compile_layers()
        found = losses_and_gradients(compiled)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found_again = losses_and_gradients(compiled)
        losses_and_gradients(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "compiled anew for another length"
    for one, again, expected in zip(found, found_again, losses_and_gradients(plain), strict=True):
        assert_same(one, expected, TINY)
        assert torch.equal(one, again)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(compiled.logps(BATCHES[0]).chosen, found[0]), "the reference rounds as training does"

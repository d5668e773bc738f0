"""The benchmark's own arithmetic."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lit_dpo.data.tokenization import TokenizedPair
from tests.benchmarks.bases import ARCHITECTURES
from tests.benchmarks.floor import Shape, matmul_rate
from tests.benchmarks.throughput import ratios


def test_the_floor_counts_every_product_of_the_model(tiny_base: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    shape = Shape.of(AutoConfig.from_pretrained(tiny_base))
    linear = [
        module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name
    ]
    assert shape.trunk_parameters == sum(module.weight.numel() for module in linear)
    assert shape.head == (model.lm_head.in_features, model.lm_head.out_features)
    trunk, head = shape.trunk_parameters, shape.head[0] * shape.head[1]
    pair = TokenizedPair([1] * 5, [2] * 3, [3] * 4)
    assert shape.flops([pair]) == 2 * (2 * trunk * 12 + 2 * head * 7)
    assert shape.flops([pair], checkpointing=True) == shape.flops([pair]) + 2 * trunk * 12
    assert matmul_rate(shape, torch.float32, torch.device("cpu"), tokens=64, repeats=1) > 0


def test_published_sizes() -> None:
    # parameters of layers and head as the model cards count them, in billions
    for name, billions in {"qwen2.5-0.5b": 0.49, "qwen2.5-7b": 7.1, "llama-3.1-8b": 7.5, "mistral-7b": 7.1}.items():
        shape = Shape.of(ARCHITECTURES[name])
        assert (shape.trunk_parameters + shape.head[0] * shape.head[1]) / 1e9 == pytest.approx(billions, rel=0.01)


def test_ratios_are_ours_over_theirs() -> None:
    def run(speed: float, memory: float, floor: float) -> dict[str, float]:
        return {
            "pairs_per_second": speed,
            "pairs_per_second_cold": speed / 2,
            "peak_memory_gb": memory,
            "floor_flops_per_second": floor,
        }

    runs = {
        "probe": [{"matmul_flops_per_second": 200.0}],
        "lit_dpo": [run(10, 4, 100), run(12, 4, 120), run(11, 4, 110)],
        "trl_defaults": [run(2, 10, 20)],
        "trl_best": [run(4, 11, 40)],
    }
    assert ratios(runs) == {
        "fraction_of_floor": 0.55,
        "ratio_vs_trl_defaults": 5.5,
        "ratio_vs_trl_best": 2.75,
        "ratio_cold_epoch": 2.75,
        "memory_ratio": 0.4,
        "trl_fraction_of_floor": 0.1,
    }

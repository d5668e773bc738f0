"""Memory that runs out is told at once, with the batch and what would fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_dpo.cli.errors import line_for
from lit_dpo.data.batch import PairBatch
from lit_dpo.policy.policy import Policy
from lit_dpo.training.memory import LongestBatch, longest_batch
from tests.test_module import Losses, data, fit, module
from tests.tiny import WORDS, write_jsonl

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
]


@pytest.fixture
def long_pairs(tmp_path: Path) -> str:
    """16 pairs to train on, one of them longer than the others by far."""
    rows = [
        {"prompt": f"{' '.join(WORDS)} {n}?", "chosen": f"rain {n}", "rejected": " ".join(WORDS * (9 if n == 7 else 1))}
        for n in range(20)
    ]
    return write_jsonl(tmp_path / "long.jsonl", rows)


class Limit:
    """A memory of so many tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
        self.tried: list[int] = []
        logps = Policy.logps

        def limited(policy: Policy, batch: PairBatch) -> Any:
            if torch.is_grad_enabled():
                self.tried.append(len(batch.input_ids))
                if len(batch.input_ids) > tokens:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
            return logps(policy, batch)

        monkeypatch.setattr(Policy, "logps", limited)


def test_the_longest_batch_is_tried_first(tiny_base: str, long_pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LongestBatch, "devices", ("cpu",))
    limit = Limit(monkeypatch, 10**6)
    fit(module(tiny_base), data(long_pairs), max_epochs=3)
    assert limit.tried[0] == max(limit.tried)
    assert len(limit.tried) == 1 + 3 * 4


def test_no_batch_that_the_run_does_not_take_is_tried(
    tiny_base: str, long_pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LongestBatch, "devices", ("cpu",))
    limit = Limit(monkeypatch, 10**6)
    fit(module(tiny_base), data(long_pairs, shuffle=False), max_steps=1)
    assert limit.tried[0] == limit.tried[1]
    assert len(limit.tried) == 2


def test_the_trial_changes_nothing(tiny_base: str, pairs_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not where dropout draws, and an objective keeps running numbers."""
    from peft import LoraConfig

    from lit_dpo.objectives import BCOPair

    lora = LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    seen = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(LongestBatch, "devices", devices)
        losses = Losses()
        fit(module(tiny_base, lora=lora, objective=BCOPair()), data(pairs_file), callbacks=[losses])
        seen.append(losses.values)
    assert seen[0] == seen[1]


def test_what_would_fit_is_told(tiny_base: str, long_pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LongestBatch, "devices", ("cpu",))
    Limit(monkeypatch, 250)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(module(tiny_base), data(long_pairs))
    line = line_for(caught.value)
    assert "The longest batch of this run does not fit into memory: 4 pairs of " in line
    assert "long.jsonl row 7)" in line
    assert "of these pairs would fit. Lower data.batch_size" in line


def test_a_batch_that_fails_later_is_named(tiny_base: str, long_pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Limit(monkeypatch, 250)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"The batch in training does not fit .*long\.jsonl row 7\)\. Lower"
    ):
        fit(module(tiny_base), data(long_pairs))


def test_each_rank_takes_its_share(tiny_base: str, long_pairs: str) -> None:
    from types import SimpleNamespace

    from lit_dpo.data.sampler import PairSampler

    class Pairs(list[int]):
        def num_tokens(self, indices: Any) -> list[int]:
            return [self[index] for index in indices]

    pairs = Pairs([5, 1, 90, 2, 3, 4, 80, 7])
    shares = []
    for rank in range(2):
        sampler = PairSampler(pairs, batch_size=2, num_replicas=2, rank=rank, shuffle=False)
        loader = SimpleNamespace(sampler=sampler)
        length = {"max_epochs": 1, "max_steps": -1, "num_training_batches": 2, "accumulate_grad_batches": 1}
        trainer: Any = SimpleNamespace(train_dataloader=loader, current_epoch=0, global_step=0, **length)
        shares.append(longest_batch(trainer))
    assert sorted(shares[0] + shares[1]) == [0, 1, 2, 3]
    assert shares[0] == [2, 1]

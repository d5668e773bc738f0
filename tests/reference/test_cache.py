"""The reference cache: the live reference's numbers, computed once, never stale, and whole after every interruption."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.tokenization import TokenizedPair
from lit_dpo.policy.precision import NF4
from lit_dpo.reference import InitialPolicy
from lit_dpo.reference import cache as reference_cache
from lit_dpo.reference.cache import CachedReference
from tests.closeness import TINY, assert_same
from tests.tiny import random_pairs, tiny_policy

SIZES = [(5, 7, 3), (1, 1, 1), (40, 20, 33), (3, 60, 2), (17, 5, 5), (2, 2, 2), (64, 1, 9), (8, 31, 30)]


class ListedPairs:
    """Pairs as the cache wants them."""

    def __init__(self, pairs: Sequence[TokenizedPair]) -> None:
        self.pairs = pairs

    def pair(self, index: int) -> TokenizedPair:
        return self.pairs[index]

    def keys(self, indices: Sequence[int]) -> list[bytes]:
        return [self.pairs[index].key for index in indices]

    def num_tokens(self, indices: Sequence[int]) -> list[int]:
        return [self.pairs[index].num_tokens for index in indices]


PAIRS = ListedPairs(random_pairs(SIZES))
ALL = range(len(SIZES))


class Counting(InitialPolicy):
    """Counts the pairs that it computes, and is interrupted after so many batches."""

    computed, batches, stop_after = 0, 0, 10**9

    def token_logps(self, batch: PairBatch) -> torch.Tensor:
        if self.batches == self.stop_after:
            raise KeyboardInterrupt
        self.batches += 1
        self.computed += len(batch)
        return super().token_logps(batch)


@pytest.fixture
def initial(tiny_base: str) -> Counting:
    return Counting(tiny_policy(tiny_base))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_cache, "BATCH_TOKENS", 100)


def assert_live(cache: CachedReference, initial: InitialPolicy) -> None:
    """Held against the live reference, in other batches than the cache was filled in."""
    for indices in ([0, 1, 2, 3], [4, 5, 6, 7], [7, 0], [2]):
        batch = PairBatch.from_pairs([PAIRS.pair(index) for index in indices])
        cached, live = cache.logps(batch), initial.logps(batch)
        # Matrix products of another size may round in another way.
        assert_same(cached[:2], live[:2], TINY)
        assert torch.equal(cached.chosen_lengths, live.chosen_lengths)


def test_cached_equals_live(initial: Counting, tmp_path: Path) -> None:
    cache = CachedReference(initial, tmp_path)
    assert cache.fill(PAIRS, ALL) == len(SIZES)
    assert initial.batches > 3
    before = initial.computed
    again = CachedReference(initial, tmp_path)
    assert again.fill(PAIRS, ALL) == 0
    assert len(again) == len(SIZES)
    assert initial.computed == before
    assert_live(again, InitialPolicy(initial.policy))


def test_unforeseen_pairs_are_computed_once_and_kept(initial: Counting, tmp_path: Path) -> None:
    cache = CachedReference(initial, tmp_path)
    batch = PairBatch.from_pairs([PAIRS.pair(0), PAIRS.pair(1)])
    first = cache.logps(batch)
    assert torch.equal(first.chosen, cache.logps(batch).chosen)
    assert initial.computed == 2
    cache.save()
    assert torch.equal(first.chosen, CachedReference(initial, tmp_path).logps(batch).chosen)
    assert initial.computed == 2


def test_an_interrupted_pass_goes_on_where_it_was(initial: Counting, tmp_path: Path) -> None:
    initial.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        CachedReference(initial, tmp_path).fill(PAIRS, ALL)
    done, initial.stop_after = initial.computed, 10**9
    assert 0 < done < len(SIZES)
    cache = CachedReference(initial, tmp_path)
    assert cache.fill(PAIRS, ALL) == len(SIZES) - done
    assert_live(cache, InitialPolicy(initial.policy))


@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage"])
def test_a_damaged_file_is_noticed_and_computed_again(initial: Counting, tmp_path: Path, damage: str) -> None:
    CachedReference(initial, tmp_path).fill(PAIRS, ALL)
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes({"cut": content[: len(content) // 2], "flipped": content, "garbage": b"{}"}[damage])
    (tmp_path / ".half-written").write_bytes(content[:10])
    with pytest.warns(UserWarning, match="is damaged"):
        cache = CachedReference(initial, tmp_path)
    assert len(cache) == 0
    assert cache.fill(PAIRS, ALL) == len(SIZES)
    assert_live(cache, InitialPolicy(initial.policy))


def test_a_process_that_comes_late_sees_what_the_others_left(initial: Counting, tmp_path: Path) -> None:
    late = CachedReference(initial, tmp_path)
    assert CachedReference(initial, tmp_path).fill(PAIRS, ALL) == len(SIZES)
    assert late.fill(PAIRS, ALL) == 0


def test_what_cannot_be_read_is_left_where_it_is(
    initial: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CachedReference(initial, tmp_path).fill(PAIRS, ALL)

    def refused(path: Path) -> bytes:
        raise PermissionError("not yours")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refused)
        with pytest.warns(UserWarning, match="cannot be read"):
            unread = CachedReference(initial, tmp_path)
    assert len(unread) == 0
    assert len(CachedReference(initial, tmp_path)) == len(SIZES)


def test_processes_share_the_work(tiny_base: str, tmp_path: Path) -> None:
    initials = [InitialPolicy(tiny_policy(tiny_base)) for _ in range(3)]
    caches = [CachedReference(initial, tmp_path) for initial in initials]
    barrier = Barrier(3)

    def fill(rank: int) -> int:
        return caches[rank].fill(PAIRS, ALL, shares=[(rank, 3)], barrier=barrier.wait)

    with ThreadPoolExecutor(3) as threads:
        computed = list(threads.map(fill, range(3)))
    assert all(computed)
    assert sum(computed) == len(SIZES)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    for cache, initial in zip(caches, initials, strict=True):
        assert len(cache) == len(SIZES)
        assert_live(cache, initial)


def test_what_changes_a_number_changes_the_address(tiny_base: str, tmp_path: Path) -> None:
    def address(change: Any = None, dtype: torch.dtype = torch.float32, **options: Any) -> str:
        policy = tiny_policy(tiny_base, **options)
        if change is not None:
            change(policy)
        return InitialPolicy(policy).identity(dtype)

    def another_weight(policy: Any) -> None:
        next(p for name, p in policy.named_parameters() if "norm" in name).data[3] += 1e-6

    def trained(policy: Any) -> None:
        for name, parameter in policy.named_parameters():
            if ".default." in name:
                parameter.data += 1

    def another_position(policy: Any) -> None:
        policy.model.get_base_model().config.rope_parameters["rope_theta"] *= 2

    tiny_policy(tiny_base).model.save_pretrained(str(tmp_path / "adapter"))
    plain = address()
    assert plain == address() == address(trained), "the adapters in training are no part of the reference"
    others = [
        address(another_weight),
        address(another_position),
        address(dtype=torch.bfloat16),
        address(quantization=BitsAndBytesConfig(**NF4)),
        address(quantization=BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)),
        address(adapter=str(tmp_path / "adapter"), lora=None),
        address(layout="padded"),
    ]
    assert len({plain, *others}) == 8


def test_the_key_of_a_pair_tells_where_its_parts_end() -> None:
    pairs = [([1, 2], [3], [4]), ([1], [2, 3], [4]), ([1, 2], [4], [3]), ([1, 2], [3], [5])]
    assert len({TokenizedPair(*parts).key for parts in pairs}) == 4
    assert TokenizedPair([1], [2], [3], "a", 1).key == TokenizedPair([1], [2], [3], "b", 2).key

import pytest

from lit_dpo.data.sampler import EvalSampler, PairSampler, share

PAIRS = range(23)


def epoch(sampler: PairSampler, number: int) -> list[list[int]]:
    sampler.set_epoch(number)
    return list(sampler)


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    first, again = (PairSampler(PAIRS, batch_size=4, seed=7) for _ in range(2))
    assert epoch(first, 3) == epoch(again, 3)
    assert epoch(first, 3) != epoch(first, 4)
    assert epoch(first, 3) != epoch(PairSampler(PAIRS, batch_size=4, seed=8), 3)


def test_no_pair_comes_twice_and_each_batch_is_full() -> None:
    batches = epoch(PairSampler(PAIRS, batch_size=4), 0)
    assert [len(batch) for batch in batches] == [4] * 5
    assert len({pair for batch in batches for pair in batch}) == 20


def test_two_ranks_train_on_what_one_process_with_twice_the_batch_trains_on() -> None:
    alone = epoch(PairSampler(PAIRS, batch_size=4), 1)
    ranks = [epoch(PairSampler(PAIRS, batch_size=2, num_replicas=2, rank=rank), 1) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == alone


def test_a_resumed_epoch_goes_on_where_it_was_and_the_next_one_is_whole() -> None:
    sampler = PairSampler(PAIRS, batch_size=4)
    whole, following = epoch(sampler, 2), epoch(sampler, 3)
    sampler.resume_at = (2, 12)
    assert epoch(sampler, 2) == whole[3:]
    assert epoch(sampler, 3) == following
    assert len(sampler) == 5, "the length is that of a whole epoch"
    assert (sampler.first_batch(2), sampler.first_batch(3)) == (3, 0)


@pytest.mark.parametrize(("batch_size", "replicas", "first", "left"), [(2, 1, 6, 5), (3, 2, 2, 1), (8, 1, 1, 1)])
def test_an_epoch_goes_on_with_the_pairs_not_yet_seen_in_other_batches(
    batch_size: int, replicas: int, first: int, left: int
) -> None:
    whole = PairSampler(PAIRS, batch_size=4).order(2).tolist()
    ranks = [PairSampler(PAIRS, batch_size=batch_size, num_replicas=replicas, rank=rank) for rank in range(replicas)]
    for sampler in ranks:
        sampler.resume_at = (2, 12)
        assert sampler.first_batch(2) == first
    seen = [
        pair for batches in zip(*(epoch(sampler, 2) for sampler in ranks), strict=True) for b in batches for pair in b
    ]
    assert seen == whole[12 : 12 + left * batch_size * replicas]


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fill one batch of data.batch_size=12 on 2 process"):
        PairSampler(PAIRS, batch_size=12, num_replicas=2)


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_evaluation_sees_each_pair_once_over_all_ranks(num_replicas: int) -> None:
    ranks = [EvalSampler(PAIRS, batch_size=4, num_replicas=num_replicas, rank=rank) for rank in range(num_replicas)]
    assert sorted(pair for rank in ranks for batch in rank for pair in batch) == list(PAIRS)
    assert all(len(list(rank)) == len(rank) for rank in ranks)


def test_fewer_pairs_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="too few for 2 processes"):
        EvalSampler(range(1), batch_size=1, num_replicas=2)


class Sized:
    """Pairs of known sizes."""

    sizes = tuple((7 * index) % 50 + 3 for index in range(24))

    def __len__(self) -> int:
        return len(self.sizes)

    def num_tokens(self, indices: list[int]) -> list[int]:
        return [self.sizes[index] for index in indices]


def test_ranks_get_as_many_tokens_each() -> None:
    pairs = Sized()
    alone = epoch(PairSampler(pairs, batch_size=8), 1)
    ranks = [epoch(PairSampler(pairs, batch_size=4, num_replicas=2, rank=rank), 1) for rank in range(2)]
    for whole, first, second in zip(alone, *ranks, strict=True):
        assert sorted(first + second) == sorted(whole)
        assert len(first) == len(second) == 4
        assert abs(sum(pairs.num_tokens(first)) - sum(pairs.num_tokens(second))) <= 10


def test_shares_are_of_as_many_pairs() -> None:
    shares = share([4, 5, 6, 7, 8, 9], [100, 1, 1, 1, 1, 1], num_shares=3)
    assert [len(part) for part in shares] == [2, 2, 2]
    assert sorted(pair for part in shares for pair in part) == [4, 5, 6, 7, 8, 9]

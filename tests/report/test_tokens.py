"""The token view: texts of tokens, shares of rewards."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_dpo.base.tokenizer import token_texts
from lit_dpo.data.batch import PairBatch
from lit_dpo.data.tokenization import TokenizedPair
from lit_dpo.objectives import Objective, Sigmoid, SimPO
from lit_dpo.report.evidence import TokenCollector
from lit_dpo.report.tokens import TokenView, pair_tokens, token_view
from lit_dpo.training.step import BatchRecord
from tests.tiny import tiny_tokenizer


def test_texts_of_tokens_join_to_the_whole_text() -> None:
    tokenizer = tiny_tokenizer()
    text = "the cat ünd 😀 sat\non a mat"
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == text
    assert len(texts) == len(ids)
    smile = next(place for place, one in enumerate(texts) if "😀" in one)
    assert texts[smile - 3 : smile] == ["", "", ""], "four bytes, of which the last one has the character"


def test_blanks_before_words_are_kept() -> None:
    """Tokenizers of SentencePiece's kind drop the blank of the first word that they decode."""
    words = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "s": 2}, unk_token="s"))  # type: ignore[call-arg]
    words.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    words.decoder = decoders.Metaspace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokenizer.decode([1]) == "cat"
    assert token_texts(tokenizer, [1, 2, 0], before=[0]) == [" cat", "s", " the"]


def test_text_that_is_no_unicode_does_not_hide_what_follows() -> None:
    tokenizer = tiny_tokenizer()
    half = tokenizer("ü")["input_ids"][:1]
    texts = token_texts(tokenizer, [*half * 12, *tokenizer("cat sat")["input_ids"]])
    assert "cat sat" in "".join(texts)


def record(pairs: list[TokenizedPair], reference: bool = True) -> BatchRecord:
    batch = PairBatch.from_pairs(pairs)
    generator = torch.Generator().manual_seed(0)
    policy, other = (-3 * torch.rand(len(batch.targets), generator=generator) for _ in range(2))
    return BatchRecord(
        batch,
        torch.zeros(len(pairs)),
        batch.sum_responses(policy),
        batch.sum_responses(other) if reference else None,
    )


PAIRS = [
    TokenizedPair([1, 2, 3], [4, 5, 6, 7], [8, 9], "a", 0),
    TokenizedPair([1, 2], [4, 5], [6, 7, 8], "a", 7, runs=((1, 1), (1, 1, 1))),
    TokenizedPair([1], [2, 3], [6], "b", 2, between=([4, 5],)),
]


@pytest.mark.parametrize(("objective", "reference"), [(Sigmoid(beta=0.3), True), (SimPO(beta=2.0), False)])
def test_shares_add_up_to_the_rewards(objective: Objective, reference: bool) -> None:
    found = record(PAIRS[:2], reference)
    against = found.reference or found.policy._replace(chosen=torch.zeros(2), rejected=torch.zeros(2))
    rewards = objective.rewards(found.policy, against)
    for place, tokens in enumerate(pair_tokens(found, objective, [0, 1])):
        view = token_view(tokens, tiny_tokenizer())
        for side, reward in ((view.chosen, rewards.chosen), (view.rejected, rewards.rejected)):
            assert sum(one or 0.0 for one in side.rewards) == pytest.approx(float(reward[place]), abs=1e-4)
            assert side.reward == pytest.approx(float(reward[place]))
            assert all(one is None for one in side.reference) != reference
        assert view.margin == pytest.approx(float(rewards.margins[place]))
        assert TokenView.from_dict(view.to_dict()) == view


def test_with_a_reference_the_share_is_beta_times_the_log_ratio() -> None:
    view = token_view(pair_tokens(record(PAIRS[:1]), Sigmoid(beta=0.3), [0])[0], tiny_tokenizer())
    for policy, reference, reward in zip(view.chosen.policy, view.chosen.reference, view.chosen.rewards, strict=True):
        assert reward == pytest.approx(0.3 * (policy - reference), abs=1e-5)  # type: ignore[operator]


def test_tokens_that_are_not_trained_have_no_numbers() -> None:
    view = token_view(pair_tokens(record(PAIRS), Sigmoid(), [1])[0], tiny_tokenizer())
    assert [one is None for one in view.chosen.policy] == [False, True]
    assert [one is None for one in view.rejected.rewards] == [False, True, False]


def test_of_a_ranked_list_the_best_and_the_worst_response_are_shown() -> None:
    found = record(PAIRS)
    tokens = pair_tokens(found, Sigmoid(), [2])[0]
    assert [len(one) for one in tokens.policy] == [2, 1]
    assert found.policy.responses is not None
    assert tokens.policy[1][0] == pytest.approx(float(found.policy.responses.token_logps[-1]))


def test_without_a_reference_nothing_has_moved() -> None:
    assert token_view(pair_tokens(record(PAIRS[:1], False), SimPO(), [0])[0], tiny_tokenizer()).moved is None


class OneRank:
    is_global_zero, world_size = True, 1


def test_the_collector_keeps_the_best_the_worst_and_the_most_changed_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_dpo.report.evidence.gather_objects", lambda trainer, value: [value])
    collector, every = TokenCollector(2), []
    for seed in range(6):
        pairs = [TokenizedPair([1], [2 + seed, 3], [4, 5, 6], "a", 2 * seed + n) for n in range(2)]
        batch = PairBatch.from_pairs(pairs)
        generator = torch.Generator().manual_seed(seed)
        policy, other = (batch.sum_responses(-torch.rand(10, generator=generator)) for _ in range(2))
        one = BatchRecord(batch, torch.zeros(2), policy, other)
        module: Any = SimpleNamespace(step=SimpleNamespace(latest=one), objective=Sigmoid())
        collector.add(module)
        every += pair_tokens(one, Sigmoid(), [0, 1])
    views = collector.finish(OneRank(), tiny_tokenizer())  # type: ignore[arg-type]
    by_margin = sorted(every, key=lambda one: -one.margin)
    assert {v.row for v in views if "best" in v.why} == {one.pair.row for one in by_margin[:2]}
    assert {v.row for v in views if "worst" in v.why} == {one.pair.row for one in by_margin[-2:]}
    by_change = sorted(every, key=lambda one: -one.moved)
    assert {v.row for v in views if "most changed" in v.why} == {one.pair.row for one in by_change[:2]}

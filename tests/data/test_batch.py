import torch

from lit_dpo.data.batch import PairBatch, Segment
from lit_dpo.data.tokenization import TokenizedPair

BATCH = PairBatch.from_pairs(
    [TokenizedPair([1, 2, 3], [4, 5], [6], "file", 7), TokenizedPair([8], [9], [10, 11, 12], "file", 9)]
)


def test_the_row_holds_each_prompt_once_and_no_padding() -> None:
    assert BATCH.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    assert BATCH.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 3]
    assert BATCH.segments == (Segment(3, (2, 1)), Segment(1, (1, 3)))
    assert BATCH.origins == (("file", 7), ("file", 9))
    assert len(BATCH) == 2


def test_each_response_token_is_predicted_by_the_token_before_it_in_its_conversation() -> None:
    assert BATCH.targets.tolist() == [4, 5, 6, 9, 10, 11, 12]
    assert BATCH.input_ids[BATCH.predictors].tolist() == [3, 4, 3, 8, 8, 10, 11]
    assert BATCH.response_lengths == (2, 1, 1, 3)


def test_padded_rows_hold_the_same_conversations() -> None:
    rows = BATCH.padded(pad_token_id=99)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 6, 99], [8, 9, 99, 99, 99], [8, 10, 11, 12, 99]]
    assert rows.attention_mask.sum(1).tolist() == [5, 4, 2, 4]
    assert rows.input_ids[rows.response_mask].tolist() == BATCH.targets.tolist()


def test_padding_is_masked_by_position_not_by_id() -> None:
    rows = PairBatch.from_pairs([TokenizedPair([1], [2, 0], [3])]).padded(pad_token_id=0)
    assert rows.input_ids[rows.response_mask].tolist() == [2, 0, 3], "a response may end in the padding token"


def test_moving_a_batch_moves_its_tensors_and_keeps_the_rest() -> None:
    moved = BATCH.to("meta")
    assert moved.input_ids.device == moved.predictors.device == torch.device("meta")
    assert moved.segments is BATCH.segments

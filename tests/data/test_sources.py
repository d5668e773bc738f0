import json
from pathlib import Path

import pytest
from datasets import Dataset

from lit_dpo.data.sources import EVAL_SPLITS, TRAIN_SPLITS, SplitNotFoundError, load_rows
from tests.tiny import made_up_rows, write_jsonl

ROWS = [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(4)]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_files_of_every_kind_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pairs.{suffix}"
    data = Dataset.from_list(ROWS)
    if suffix == "jsonl":
        write_jsonl(path, ROWS)
    elif suffix == "json":
        path.write_text(json.dumps(ROWS))
    elif suffix == "csv":
        data.to_csv(str(path))
    else:
        data.to_parquet(str(path))
    rows, place = load_rows(str(path), None, TRAIN_SPLITS)
    assert rows.to_list() == ROWS
    assert place == str(path)


def test_a_folders_files_are_its_splits(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Dataset.from_list(ROWS[:2]).to_parquet(str(tmp_path / "data/train_prefs-00000-of-00002.parquet"))
    Dataset.from_list(ROWS[2:3]).to_parquet(str(tmp_path / "data/train_prefs-00001-of-00002.parquet"))
    write_jsonl(tmp_path / "test_prefs.jsonl", ROWS[3:])
    assert load_rows(str(tmp_path), None, TRAIN_SPLITS)[0].to_list() == ROWS[:3]
    rows, place = load_rows(str(tmp_path), None, EVAL_SPLITS)
    assert rows.to_list() == ROWS[3:]
    assert place == f"{tmp_path} [test_prefs]"


def test_a_saved_data_set_and_one_in_memory_are_read(tmp_path: Path) -> None:
    data = Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "saved"))
    assert load_rows(str(tmp_path / "saved"), None, TRAIN_SPLITS)[0].to_list() == ROWS
    assert load_rows(data, None, TRAIN_SPLITS)[0] is data


def test_the_shipped_pairs_are_there_and_do_not_overlap() -> None:
    train, _ = load_rows("package:lit_dpo/data/examples", None, TRAIN_SPLITS)
    test, _ = load_rows("package:lit_dpo/data/examples", None, EVAL_SPLITS)
    assert len(train) >= 240
    assert len(test) >= 60
    assert not {row["prompt"].lower() for row in train} & {row["prompt"].lower() for row in test}
    columns = {"prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen", "score_rejected"}
    assert set(train.column_names) == set(test.column_names) == columns


def test_a_missing_split_names_those_that_are_there(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(SplitNotFoundError, match="does not have split 'test_prefs', only train"):
        load_rows(path, "test_prefs", TRAIN_SPLITS)


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/missing/folder", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=source):
        load_rows(source, None, TRAIN_SPLITS)


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no Python package 'no_such_package'"):
        load_rows("package:no_such_package", None, TRAIN_SPLITS)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(made_up_rows(1)[0]) + '\n{"prompt": "half')
    with pytest.raises(ValueError, match=r"broken.jsonl cannot be read"):
        load_rows(str(path), None, TRAIN_SPLITS)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("hello")
    with pytest.raises(ValueError, match="'.txt' cannot be read"):
        load_rows(str(path), None, TRAIN_SPLITS)

import csv
import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset

from lit_dpo.data.sources import EVAL_SPLITS, TRAIN_SPLITS, SplitNotFoundError, load_rows
from tests.tiny import write_jsonl

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
    with gzip.open(tmp_path / "v1.5-extra.jsonl.gz", "wt") as file:
        file.write(json.dumps(ROWS[0]))
    assert load_rows(str(tmp_path), "v1.5-extra", TRAIN_SPLITS)[0].to_list() == ROWS[:1]
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


LINE = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            f'{LINE}\n\n{{"prompt": "half',
            r"a\.jsonl, line 3, is not JSON: Unterminated string.* at char",
        ),
        ("a.jsonl", f'{LINE}\n["p", "c", "r"]\n', r"a\.jsonl, line 2, is no object"),
        ("a.jsonl", f'{LINE}\n{{"prompt": "\\ud800"}}\n', r"a\.jsonl, line 2, holds bytes or half of a surrogate pair"),
        ("a.jsonl", "", r"a\.jsonl cannot be read: the file is empty"),
        ("a.json", '{"train": [{"prompt": "p"}], "test": [{"prompt": "p"}]}', "several lists of rows: train, test"),
        ("a.json", '[{"prompt": "p"', r"a\.json cannot be read"),
        ("a.csv", "", r"a\.csv cannot be read"),
        ("a.csv", "prompt,chosen,rejected\na,b,c,d\ne,f,g\n", r"a\.csv cannot be read: its first row has 4 fields"),
        ("a.json", '{\n "data": [\n', r"a\.json cannot be read"),
        ("a.jsonl.gz", "no gzip", r"a\.jsonl\.gz cannot be read"),
        ("a.parquet", "no parquet", r"a\.parquet cannot be read"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name), None, TRAIN_SPLITS)


def test_texts_of_a_csv_stay_texts_whatever_its_separator(tmp_path: Path) -> None:
    rows = [{"prompt": "Is there; a fee?", "chosen": "N/A", "rejected": "null, or 5"}, {**ROWS[0], "rejected": "None"}]
    for suffix, separator in (("csv", ","), ("csv", ";"), ("tsv", "\t"), ("csv", "|")):
        path = tmp_path / f"{ord(separator)}.{suffix}"
        with path.open("w", encoding="utf-8-sig", newline="") as file:  # with a byte-order mark, as Excel writes it
            writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
        assert load_rows(str(path), None, TRAIN_SPLITS)[0].to_list() == rows
    empty = tmp_path / "empty.csv"
    empty.write_text("prompt,chosen,rejected\nq,,b\n")
    assert load_rows(str(empty), None, TRAIN_SPLITS)[0].to_list() == [{"prompt": "q", "chosen": None, "rejected": "b"}]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "csv.gz", "json.gz"])
def test_compressed_files_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pairs.{suffix}"
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        if suffix.startswith("jsonl"):
            file.writelines(json.dumps(row) + "\n" for row in ROWS)
        elif suffix.startswith("json"):
            json.dump({"version": 1, "data": ROWS}, file)
        else:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    assert load_rows(str(path), None, TRAIN_SPLITS)[0].to_list() == ROWS


def test_rows_under_a_key_of_a_json_object_are_found(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    for content in ({"version": "1", "data": ROWS}, {"rows": ROWS, "tags": ["a"]}):
        path.write_text(json.dumps(content, indent=2))
        assert load_rows(str(path), None, TRAIN_SPLITS)[0].to_list() == ROWS
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))  # lines under the name of a document
    assert load_rows(str(path), None, TRAIN_SPLITS)[0].to_list() == ROWS


def test_patterns_and_addresses_name_files(tmp_path: Path) -> None:
    for number, row in enumerate(ROWS):
        write_jsonl(tmp_path / f"part-{number}.jsonl", [row])
    (tmp_path / "notes.md").touch()
    for source in (
        f"{tmp_path}/part-*.jsonl",
        f"{tmp_path}/**/*",
        f"file://{tmp_path}/part-*.jsonl",
        f"file://{tmp_path}",
    ):
        assert load_rows(source, None, TRAIN_SPLITS)[0].to_list() == ROWS, source
    assert load_rows(f"file://{tmp_path}/part-2.jsonl", None, TRAIN_SPLITS)[0].to_list() == ROWS[2:3]
    for source in (f"{tmp_path}/none-*.jsonl", f"file://{tmp_path}/none-*.jsonl", f"file://{tmp_path}/none.jsonl"):
        with pytest.raises(FileNotFoundError, match="no file of a known kind"):
            load_rows(source, None, TRAIN_SPLITS)
    with pytest.raises(ValueError, match=r"nowhere://x"):
        load_rows("nowhere://x/y.jsonl", None, TRAIN_SPLITS)
    write_jsonl(tmp_path / "part-9.json", ROWS)
    Dataset.from_list(ROWS).to_csv(str(tmp_path / "part-9.csv"))
    with pytest.raises(ValueError, match="files of several kinds"):
        load_rows(f"{tmp_path}/part-9*", None, TRAIN_SPLITS)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("hello")
    with pytest.raises(ValueError, match="'.txt' cannot be read"):
        load_rows(str(path), None, TRAIN_SPLITS)

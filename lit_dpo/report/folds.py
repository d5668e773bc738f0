"""Training pairs and the settings of a run ──► for each pair, its margin under models that never saw its prompt.

The pairs are parted into folds. For each fold, adapters train on the other folds from the same start, and the margins
of the fold are measured a few times on the way (cross-fitting: Northcutt et al. 2021, arXiv:1911.00068, section 4). All
folds share one base in memory and one cache of reference log-probs.
"""

import importlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tqdm.auto import tqdm

from lit_dpo.data.pairs import PairDataset
from lit_dpo.datamodule import PreferenceDataModule
from lit_dpo.evaluation.table import TableCollector
from lit_dpo.evaluation.trained import Trained
from lit_dpo.policy.precision import precision_for
from lit_dpo.reference import MovingReference
from lit_dpo.training.position import EpochPosition

OF_TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
KNOWN_OPTIMIZERS = ("torch.optim", "bitsandbytes.optim")  # only these are imported because a checkpoint says so


@dataclass(frozen=True)
class CrossFit:
    """How margins are cross-fitted.

    Args:
        folds: Number of folds; each pair is measured by a model that trained on the others.
        epochs: Epochs of each model.
        checks: How often a fold is measured in each epoch.
        seed: Seed of the folds and of the training.

    Raises:
        ValueError: If an argument is outside its range.
    """

    folds: int = 3
    epochs: int = 1
    checks: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.folds < 2 or self.epochs < 1 or self.checks < 1:
            raise ValueError("fit.folds is at least 2, fit.epochs and fit.checks are at least 1.")


class Margins(NamedTuple):
    """Implicit margins of P pairs at C times."""

    values: np.ndarray  # (P, C) reward of the chosen response minus that of the rejected one
    trusted: np.ndarray  # (T, F) mean margins of the held-out pairs over the same times, under each fold's model
    trusted_prompts: np.ndarray  # (T,) number of each one's prompt


class FoldData(PreferenceDataModule):
    """Pairs that are there already, in place of a source.

    Args:
        train: Pairs to train on.
        val: Pairs to measure.
        arguments: The other arguments of ``PreferenceDataModule``.
    """

    def __init__(self, train: PairDataset, val: PairDataset, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.train_pairs, self.val_pairs = train, val

    def prepare_data(self) -> None:
        """Does nothing: the pairs are prepared."""

    def setup(self, stage: str) -> None:
        """Begins at the first pair."""
        assert isinstance(self.train_pairs, PairDataset)
        self.position = EpochPosition(self.train_pairs, self.batch_size, self.seed, self.shuffle, self._ranks())


class _Measure(Callback):
    """Gives each fold the same start, keeps the margins of each evaluation, and moves a progress bar."""

    def __init__(self, bar: Any, start: dict[str, torch.Tensor]) -> None:
        self.margins: list[np.ndarray] = []
        self.prompts: np.ndarray | None = None
        self._bar, self._start, self._collector = bar, start, TableCollector()

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first fold keeps the weights that it starts with, and the others begin with them too."""
        state = pl_module.objective.state_dict(prefix="objective.")  # type: ignore[union-attr]
        trained = {name: one for name, one in pl_module.named_parameters() if one.requires_grad}
        for name, weight in {**trained, **state}.items():
            if isinstance(weight, torch.Tensor) and name in self._start:
                weight.copy_(self._start[name])
            elif isinstance(weight, torch.Tensor):
                self._start[name] = weight.detach().clone()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._bar.update()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._collector.start()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collector.add(pl_module, batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pairs = trainer.datamodule.val_pairs  # type: ignore[attr-defined]
        table = self._collector.finish(trainer, pairs)
        assert table is not None
        self.margins.append(table.values["rewards/margins"])
        self.prompts = table.prompts


def fold_numbers(pairs: PairDataset, number: int, seed: int) -> np.ndarray:
    """The fold of each pair, (P,). Pairs of the same prompt are in the same fold.

    Raises:
        ValueError: If there are fewer prompts than folds.
    """
    _, prompts = np.unique(pairs.digests("prompt_key"), return_inverse=True)
    if prompts.max() + 1 < number:
        raise ValueError(f"{prompts.max() + 1} different prompts cannot be parted into fit.folds={number}.")
    order = np.random.default_rng(seed).permutation(prompts.max() + 1)
    return np.asarray((order % number)[prompts])


def cross_fitted(
    trained: Trained,
    train: PairDataset,
    held_out: PairDataset | None,
    how: CrossFit,
    *,
    progress_bar: bool = True,
) -> Margins:
    """Margins of all training pairs, each under a model that did not train on its prompt.

    Args:
        trained: The run whose base, adapters, objective, optimizer and data are taken; its weights are not.
        train: Its training pairs.
        held_out: Pairs with labels to trust, which each model is measured on too; None for none.
        how: Folds and epochs.
        progress_bar: Whether to show a progress bar.

    Raises:
        ValueError: If a fold has too few pairs for a batch, or the reference moves with the policy.
    """
    module = trained.module
    if isinstance(module.reference_choice, MovingReference):
        raise ValueError("model.reference=MovingReference has no margin that stays the same. Train with cached.")
    module.optimizer = stored_optimizer(trained.arguments.get("optimizer"))
    arguments = {key: value for key, value in trained.data.items() if not key.startswith("_")}
    arguments |= {"tokenizer": trained.tokenizer, "seed": how.seed}
    settings = trainer_settings(trained)
    numbers = fold_numbers(train, how.folds, how.seed)
    start: dict[str, torch.Tensor] = {}
    values = np.full((len(train), how.epochs * how.checks), np.nan)
    of_trusted, prompts = [], np.zeros(0, np.int64)
    batches = [int((numbers != fold).sum()) // int(arguments.get("batch_size") or 8) for fold in range(how.folds)]
    if min(batches) < how.checks:
        raise ValueError(
            f"A fold leaves {min(batches)} batches of {arguments.get('batch_size')} pairs to train on, fewer than "
            f"fit.checks={how.checks}. Give more pairs, or set fit.checks or fit.folds lower."
        )
    began = time.monotonic()
    with tqdm(total=how.epochs * sum(batches), desc="Cross-fitting", unit="batch", disable=not progress_bar) as bar:
        for fold in range(how.folds):
            inside = numbers == fold
            measured = train.select(inside)
            val = measured if held_out is None else PairDataset.concatenate([measured, held_out])
            data = FoldData(train.select(~inside), val, **arguments)
            measure = _Measure(bar, start)
            torch.manual_seed(how.seed)
            with _quiet():
                trainer = Trainer(
                    max_epochs=how.epochs,
                    val_check_interval=1 / how.checks,
                    num_sanity_val_steps=0,
                    devices=1,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    callbacks=[measure],
                    **settings,
                )
                trainer.fit(module, data)
            kept = measure.margins[-values.shape[1] :]
            values[inside] = np.stack([margins[: len(measured)] for margins in kept], axis=1)
            if held_out is not None:
                of_trusted.append(np.mean([margins[len(measured) :] for margins in kept], axis=0))
                assert measure.prompts is not None
                prompts = measure.prompts[len(measured) :]
    rank_zero_info(f"Cross-fitted {len(train)} pairs in {how.folds} folds, {time.monotonic() - began:.0f} s.")
    return Margins(values, np.stack(of_trusted, axis=1) if of_trusted else np.zeros((0, how.folds)), prompts)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within this context Lightning tells nothing of its Trainer, which would break the progress bar's line."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def stored_optimizer(stored: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """What builds the optimizer of a checkpoint. Only classes of torch and bitsandbytes are imported.

    Args:
        stored: Its class path and settings.

    Raises:
        ValueError: If the class is another's, or there is none.
    """
    path = str((stored or {}).get("class_path", "unknown"))
    module, _, name = path.rpartition(".")
    known = f"{module}.".startswith(tuple(f"{known}." for known in KNOWN_OPTIMIZERS))
    kind = getattr(importlib.import_module(module), name, None) if known else None
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ValueError(
            f"The checkpoint's optimizer is {path}: only those of {' and '.join(KNOWN_OPTIMIZERS)} are built "
            "from a checkpoint. Train with one of them, such as torch.optim.AdamW."
        )
    settings = dict(stored.get("init_args") or {})
    return lambda parameters: kind(parameters, **settings)


def trainer_settings(trained: Trained) -> dict[str, Any]:
    """The Trainer's settings of a run that its steps depend on, and the device and precision of this machine."""
    settings: dict[str, Any] = {}
    if trained.run is None:
        rank_zero_warn(f"The folder of {trained.path} has no config.yaml: the Trainer's settings are the defaults.")
    else:
        config = yaml.safe_load((trained.run / "config.yaml").read_text(encoding="utf-8")) or {}
        settings = config.get("trainer") or {}
    cpu = settings.get("accelerator") == "cpu" or not torch.cuda.is_available()
    found = {name: settings[name] for name in OF_TRAINER if settings.get(name) is not None}
    device = torch.device("cpu" if cpu else "cuda")
    return {**found, "accelerator": "cpu" if cpu else "gpu", "precision": precision_for(device)}

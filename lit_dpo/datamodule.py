"""PreferenceDataModule, the ``LightningDataModule``: loads preference pairs and gives each rank its batches."""

import signal
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lit_dpo.base.tokenizer import load_tokenizer
from lit_dpo.data.batch import PairBatch
from lit_dpo.data.preparation import PairDataset, prepare_pairs
from lit_dpo.data.sampler import EvalSampler, PairSampler
from lit_dpo.data.sources import EVAL_SPLITS, TRAIN_SPLITS, Rows, SplitNotFoundError, load_rows
from lit_dpo.data.tokenization import Overlong, Truncation
from lit_dpo.files.console import library_bars


class PreferenceDataModule(LightningDataModule):
    """Preference pairs for training and for evaluation, tokenized once and cached.

    Rows may hold message lists that repeat the prompt (UltraFeedback binarized), plain strings, a conversational
    ``prompt``, ``chosen`` and ``rejected``, or a ranked list of responses (the original UltraFeedback). Pairs that are
    empty, identical or too long are left out and reported.

    Args:
        source: Training data: a hub id; a JSONL, JSON, Parquet or CSV file; a folder of such files;
            ``package:NAME/FOLDER``; or a ``datasets.Dataset``.
        split: Split to train on; by default ``train_prefs`` if it exists, else ``train``.
        val_source: Source of the held-out pairs; by default the same as ``source``.
        val_split: Split of the held-out pairs; by default the first that exists of ``test_prefs``, ``validation`` and
            ``test``.
        val_size: Number of pairs to hold out from the training split, or their share if below 1. ``seed`` determines
            which. Pairs with the same prompt stay together. Excludes ``val_source`` and ``val_split``.
        max_length: Maximum number of tokens of the prompt and one response together; ``null`` sets no limit.
        max_prompt_length: Maximum number of tokens of a prompt. A longer prompt keeps its end.
        max_response_length: Maximum number of tokens of a response. A longer response keeps its beginning.
        overlong: What to do with a pair that is too long: ``truncate`` cuts it, ``drop`` leaves it out.
        max_responses: Maximum number of responses to take from a row with a ranked list: the best, the worst and, for
            objectives that rank lists, others evenly spaced by rank. Batch sizes then count lists.
        batch_size: Number of pairs in a training batch of one process.
        eval_batch_size: Number of pairs in an evaluation batch of one process; by default ``batch_size``.
        num_workers: Number of processes that load batches in advance; 0 loads them in the training process.
        num_proc: Number of processes that tokenize; by default only the training process.
        shuffle: Whether to train in a new random order in each epoch.
        seed: Seed of the training order and of the choice of held-out pairs by ``val_size``.
        tokenizer: Tokenizer, or name of a base model that has one; by default the tokenizer of the trained model.

    Raises:
        ValueError: If an argument is outside its range, or if arguments contradict one another.
    """

    def __init__(
        self,
        source: str | Rows = "HuggingFaceH4/ultrafeedback_binarized",
        split: str | None = None,
        val_source: str | Rows | None = None,
        val_split: str | None = None,
        val_size: float | None = None,
        max_length: int | None = 1024,
        max_prompt_length: int | None = None,
        max_response_length: int | None = None,
        overlong: Overlong = "truncate",
        max_responses: int = 2,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        num_proc: int | None = None,
        shuffle: bool = True,
        seed: int = 42,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        if val_size is not None and (val_source is not None or val_split is not None):
            raise ValueError("data.val_size takes pairs from the training split: it excludes val_source and val_split.")
        if val_size is not None and val_size <= 0:
            raise ValueError(f"data.val_size must be positive, not {val_size}.")
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
            raise ValueError("data.batch_size and data.eval_batch_size must be at least 1.")
        if max_responses < 2:
            raise ValueError(f"data.max_responses must be at least 2, not {max_responses}.")
        self.truncation = Truncation(max_length, max_prompt_length, max_response_length, overlong)
        self.source, self.split = source, split
        self.val_source, self.val_split, self.val_size = val_source, val_split, val_size
        self.max_responses = max_responses
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.num_proc = num_workers, num_proc
        self.shuffle, self.seed = shuffle, seed
        self.tokenizer = tokenizer
        self.train_pairs: PairDataset | None = None
        self.val_pairs: PairDataset | None = None
        self._resume_at = (-1, 0)
        self._stored_order: dict[str, int | bool] | None = None
        # Save plain values only: a checkpoint with other objects cannot be loaded with weights_only=True.
        names = ("source", "val_source", "tokenizer")
        self.save_hyperparameters(ignore=[n for n in names if not isinstance(getattr(self, n), str | None)])

    def prepare_data(self) -> None:
        """Downloads and tokenizes on one process per node. The other processes then read from the cache."""
        for line in self._load(trains=self.trainer is None or self.trainer.state.fn == "fit"):
            rank_zero_info(line)

    def setup(self, stage: str) -> None:
        """Loads the tokenized pairs from the cache."""
        if (self.val_pairs is None and stage != "fit") or (stage == "fit" and self.train_pairs is None):
            self._load(trains=stage == "fit")

    def train_dataloader(self) -> DataLoader[PairBatch]:
        """Batches of ``batch_size`` pairs, in the order given by (seed, epoch). Resumes where a checkpoint stopped."""
        assert self.train_pairs is not None
        if getattr(self.trainer, "overfit_batches", 0):
            raise ValueError(
                "trainer.overfit_batches would replace the sampler. To see the same batches again and again, set "
                "trainer.limit_train_batches and data.shuffle=false."
            )
        if self._stored_order is not None and self._stored_order != self._order():
            differing = ", ".join(
                f"{key} was {value} and is now {self._order()[key]}"
                for key, value in self._stored_order.items()
                if value != self._order()[key]
            )
            raise ValueError(f"The checkpoint's position in the training data does not fit this run: {differing}.")
        sampler = PairSampler(
            self.train_pairs, batch_size=self.batch_size, shuffle=self.shuffle, seed=self.seed, **self._ranks()
        )
        sampler.resume_at = self._resume_at
        return self._loader(self.train_pairs, sampler)

    def val_dataloader(self) -> DataLoader[PairBatch]:
        """Batches that contain every held-out pair once."""
        assert self.val_pairs is not None
        sampler = EvalSampler(self.val_pairs, batch_size=self.eval_batch_size, **self._ranks())
        return self._loader(self.val_pairs, sampler)

    def test_dataloader(self) -> DataLoader[PairBatch]:
        """The held-out pairs, as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[PairBatch]:
        """The held-out pairs, as for validation."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data: the epoch, and the number of its batches already trained on."""
        assert self.trainer is not None
        loop: Any = self.trainer.fit_loop
        epochs = loop.epoch_progress.current
        finished = epochs.processed == epochs.started  # then the batch count is still that of the previous epoch
        batches = 0 if finished else loop.epoch_loop.batch_progress.current.processed
        return {**self._order(), "epoch": epochs.processed, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets the position in the training data to resume from."""
        self._stored_order = {key: value for key, value in state_dict.items() if key not in ("epoch", "batches")}
        self._resume_at = (state_dict["epoch"], state_dict["batches"])

    def _order(self) -> dict[str, int | bool]:
        """Everything that the order of the training pairs depends on, by name."""
        assert self.train_pairs is not None
        return {
            "number of pairs": len(self.train_pairs),
            "pairs in a batch over all processes": self.batch_size * self._ranks()["num_replicas"],
            "data.seed": self.seed,
            "data.shuffle": self.shuffle,
        }

    def _load(self, trains: bool) -> list[str]:
        """Loads the held-out pairs and, with ``trains``, the training pairs. Returns a report, one line per reason."""
        tokenizer = self._tokenizer()
        report: list[str] = []
        if trains or self.val_size is not None:
            rows, place = self._rows(self.source, self.split, TRAIN_SPLITS)
            self.train_pairs, report = self._prepare(rows, place, tokenizer)
        if self.val_size is not None:
            assert self.train_pairs is not None
            self.train_pairs, self.val_pairs = self.train_pairs.split_off(self.val_size, self.seed)
            return report
        # A separate val_source may be a single file, with only the split "train": then all of it is held out.
        names = EVAL_SPLITS if self.val_source is None else (*EVAL_SPLITS, "train")
        try:
            rows, place = self._rows(self.val_source or self.source, self.val_split, names)
        except SplitNotFoundError as error:
            if self._skips_evaluation():
                return [*report, f"No held-out pairs: {error} None are needed, because trainer.limit_val_batches=0."]
            raise ValueError(
                f"No held-out pairs: {error} Set data.val_source, data.val_split or data.val_size. To train without "
                "them, set trainer.limit_val_batches=0."
            ) from error
        self.val_pairs, more = self._prepare(rows, place, tokenizer)
        return report + more

    def _skips_evaluation(self) -> bool:
        """Whether this is a fit without evaluation."""
        trainer = self.trainer
        return trainer is not None and trainer.state.fn == "fit" and trainer.limit_val_batches == 0

    def _prepare(self, rows: Rows, place: str, tokenizer: PreTrainedTokenizerBase) -> tuple[PairDataset, list[str]]:
        options = (tokenizer, self.truncation, self.num_proc, self.max_responses)
        return prepare_pairs(rows, place, *options, progress_bar=self._shows_progress())

    def _rows(self, source: str | Rows, split: str | None, defaults: tuple[str, ...]) -> tuple[Rows, str]:
        with library_bars(self._shows_progress(), "datasets"):
            return load_rows(source, split, defaults)

    def _shows_progress(self) -> bool:
        return self.trainer is None or self.trainer.progress_bar_callback is not None

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if isinstance(self.tokenizer, str):
            self.tokenizer = load_tokenizer(self.tokenizer)
        if self.tokenizer is not None:
            return self.tokenizer
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        if module is None or not hasattr(module, "tokenizer"):
            raise ValueError("Set data.tokenizer to the base model's name: there is no DPOModule to take it from.")
        tokenizer: PreTrainedTokenizerBase = module.tokenizer
        return tokenizer

    def _ranks(self) -> dict[str, int]:
        trainer = self.trainer
        if trainer is None:
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": trainer.world_size, "rank": trainer.global_rank}

    def _loader(self, pairs: PairDataset, sampler: PairSampler | EvalSampler) -> DataLoader[PairBatch]:
        # The sampler yields whole batches and the data set collates them: batch_size=None disables PyTorch's batching.
        return DataLoader(
            pairs,
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=_ignore_interrupts if self.num_workers else None,
            persistent_workers=self.num_workers > 0,
            # Each iterator draws a seed. Drawn from the global generator, it would change the dropout of a resumed run.
            generator=torch.Generator().manual_seed(self.seed),
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )


def _ignore_interrupts(worker: int) -> None:
    """Ignores Ctrl-C in a worker. The training process handles it and still needs its workers to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

"""PreferenceDataModule, the ``LightningDataModule``: loads preference pairs and gives each rank its batches."""

from dataclasses import asdict
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lit_dpo.base.tokenizer import load_tokenizer
from lit_dpo.data.batch import PairBatch
from lit_dpo.data.filters import Filters
from lit_dpo.data.formats import MultiTurn, Reader
from lit_dpo.data.loader import batch_loader
from lit_dpo.data.loading import PairLoading, template_text
from lit_dpo.data.mixture import Sources, is_plain, sources_of
from lit_dpo.data.pairs import PairDataset
from lit_dpo.data.preparation import OnBadRow
from lit_dpo.data.sampler import EvalSampler
from lit_dpo.data.stream import PairStream
from lit_dpo.data.tokenization import Overlong, Truncation
from lit_dpo.training.position import EpochPosition, Position, State, StreamPosition, fitted_position


class PreferenceDataModule(LightningDataModule):
    """Preference pairs for training and for evaluation, tokenized once and cached.

    Rows may have any format of ``lit_dpo.data.formats``. Pairs that are empty, identical or too long are left out and
    reported, and so are columns that are not read.

    Args:
        source: Training data: a hub id; a JSONL, JSON, Parquet, Arrow, CSV or TSV file, perhaps compressed; a pattern
            of file names; an address such as ``s3://…``; a folder of such files; ``package:NAME/FOLDER``; a
            ``datasets.Dataset``; or a list of these, whose entries may be dicts:
            ``[{source: a.jsonl, name: ours, weight: 2}, b.jsonl]``.
        split: Split to train on; by default ``train_prefs`` if it exists, else ``train``.
        subset: Subset (configuration) of a data set on the hub.
        revision: Revision of a data set on the hub.
        val_source: Source of the held-out pairs, or a list, each measured by its name; by default ``source``.
        val_split: Split of the held-out pairs; by default the first that exists of ``test_prefs``, ``validation`` and
            ``test``.
        val_size: Number of pairs to hold out from the training split, or their share if below 1. ``seed`` determines
            which. Pairs with the same prompt stay together. Excludes ``val_source`` and ``val_split``.
        columns: Names of columns, from the name that a format knows to the name in the data:
            ``{prompt: question_text, chosen: winner, rejected: loser}``.
        ignore: Columns to leave out although they could change what is trained, such as ``image`` or ``weight``.
        system: System message of every prompt, instead of one in the data. An empty text removes it; null leaves it.
        multi_turn: What to do with responses of several messages: ``drop`` leaves the row out, ``answers`` trains on
            the assistant's messages in them.
        chat_template: Chat template, as text or as the name of its file; by default that of the tokenizer.
        chat_template_kwargs: Arguments to the chat template. A row's own ``chat_template_kwargs`` win over them.
        pretemplated: Whether prompts and responses are rendered texts already, to be taken as they are.
        keep_thinking: Whether to put back the thinking that a template removes from an answer.
        date: The date that a template writes, as ``2026-01-31``; by default today.
        group_by: Column whose values group the held-out pairs in the report of ``test``, such as ``subset``.
        on_bad_row: What to do with a row that cannot be read or that the template rejects: ``stop``, or ``drop`` it and
            count it.
        filters: What to leave out besides: ties, duplicates, contradictions, prompts that are also held out, and more.
        max_length: Maximum number of tokens of the prompt and one response together; ``null`` sets no limit.
        max_prompt_length: Maximum number of tokens of a prompt. A longer prompt keeps its end.
        max_response_length: Maximum number of tokens of a response. A longer response keeps its beginning.
        overlong: What to do with a pair that is too long: ``truncate`` cuts it, ``drop`` leaves it out.
        max_responses: Maximum number of responses to take from a row with a ranked list: the best, the worst and, for
            objectives that rank lists, others evenly spaced by rank. Batch sizes then count lists.
        batch_size: Number of pairs in a training batch of one process.
        eval_batch_size: Number of pairs in an evaluation batch of one process; by default ``batch_size``.
        streaming: Whether training pairs are read and tokenized on the way, without end, instead of being prepared on
            disk. Held-out pairs need a source or split of their own.
        shuffle_buffer: Number of rows, of each process, among which a stream draws the next one.
        num_workers: Number of processes that load batches in advance; 0 loads them in the training process.
        num_proc: Number of processes that tokenize; by default one for each CPU core, if there are many rows.
        shuffle: Whether to train in a new random order in each epoch.
        seed: Seed of the training order and of the choice of held-out pairs by ``val_size``.
        tokenizer: Tokenizer, or name of a base model that has one; by default the tokenizer of the trained model.

    Raises:
        ValueError: If an argument is outside its range, or if arguments contradict one another.
    """

    def __init__(
        self,
        source: Sources = "HuggingFaceH4/ultrafeedback_binarized",
        split: str | None = None,
        subset: str | None = None,
        revision: str | None = None,
        val_source: Sources | None = None,
        val_split: str | None = None,
        val_size: float | None = None,
        columns: dict[str, str] | None = None,
        ignore: list[str] | None = None,
        system: str | None = None,
        multi_turn: MultiTurn = "drop",
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        pretemplated: bool = False,
        keep_thinking: bool = False,
        date: str | None = None,
        group_by: str | None = None,
        on_bad_row: OnBadRow = "stop",
        filters: Filters = Filters(),  # noqa: B008  it is frozen
        max_length: int | None = 1024,
        max_prompt_length: int | None = None,
        max_response_length: int | None = None,
        overlong: Overlong = "truncate",
        max_responses: int = 2,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        num_workers: int = 0,
        num_proc: int | None = None,
        shuffle: bool = True,
        seed: int = 42,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1) or num_workers < 0:
            raise ValueError("data.batch_size and data.eval_batch_size are at least 1, data.num_workers is at least 0.")
        self.loading = PairLoading(
            sources_of(source, "source", split=split, subset=subset, revision=revision),
            None if val_source is None else sources_of(val_source, "val_source"),
            *(val_split, val_size, seed),
            Truncation(max_length, max_prompt_length, max_response_length, overlong),
            Reader(columns or {}, tuple(ignore or ()), system, max_responses, multi_turn, pretemplated, group_by),
            Filters(**filters) if isinstance(filters, dict) else filters,  # a checkpoint holds a dict
            *(on_bad_row, num_proc, (shuffle_buffer if shuffle else 1) if streaming else None),
            {"kwargs": chat_template_kwargs or {}, "pretemplated": pretemplated}
            | {"keep_thinking": keep_thinking, "date": date},
        )
        self.chat_template = chat_template = None if chat_template is None else template_text(chat_template)
        self.max_responses, self.streaming = max_responses, streaming
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.shuffle, self.seed, self.tokenizer = num_workers, shuffle, seed, tokenizer
        self.train_pairs: PairDataset | PairStream | None = None
        self.val_pairs: PairDataset | None = None
        self.position: Position | None = None
        self._stored: State | None = None  # a checkpoint's position
        # Save plain values only: a checkpoint with other objects cannot be loaded with weights_only=True.
        filters = asdict(self.loading.filters)  # type: ignore[assignment]
        objects = {"source": source, "val_source": val_source, "tokenizer": tokenizer}
        ignored = [name for name, value in objects.items() if not is_plain(value)]
        self.save_hyperparameters(ignore=ignored, logger=False)  # model and data have both a revision

    def prepare_data(self) -> None:
        """Downloads and tokenizes on one process per node. The other processes then read from the cache."""
        self._load(trains=self.trainer is None or self.trainer.state.fn == "fit")
        for line in self.loaded.report:
            rank_zero_info(line)

    def setup(self, stage: str) -> None:
        """Loads the tokenized pairs from the cache."""
        if (self.val_pairs is None and stage != "fit") or (stage == "fit" and self.train_pairs is None):
            self._load(trains=stage == "fit")

    def train_dataloader(self) -> DataLoader[PairBatch]:
        """Batches of ``batch_size`` pairs, in the order given by (seed, epoch). Resumes where a checkpoint stopped."""
        assert self.position is not None
        self.position.batch_size = self.batch_size  # Tuner.scale_batch_size changes it
        return self.position.loader(self.trainer, self.resumed_position(), **self._loading_options())

    def val_dataloader(self) -> DataLoader[PairBatch]:
        """Batches that contain every held-out pair once."""
        assert self.val_pairs is not None
        sampler = EvalSampler(self.val_pairs, batch_size=self.eval_batch_size, **self._ranks())
        return batch_loader(self.val_pairs, sampler, seed=self.seed, **self._loading_options())

    def test_dataloader(self) -> DataLoader[PairBatch]:
        """The held-out pairs, as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[PairBatch]:
        """The held-out pairs, as for validation."""
        return self.val_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Notes how far the training is in a stream."""
        if self.position is not None:
            self.position.note(batch)
        return batch

    def teardown(self, stage: str) -> None:
        """Tells what came of the rows of a stream. A later run does not resume from this one's checkpoint."""
        self._stored = None
        for line in self.position.report() if self.position is not None else ():
            rank_zero_info(line)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data, and all that its order depends on. Collective for a stream."""
        assert self.position is not None
        assert self.trainer is not None
        return {**self.position.order, **self.position.state(self.trainer)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets the position in the training data to resume from."""
        self._stored = state_dict

    def resumed_position(self) -> State | None:
        """The checkpoint's position as this run takes it; None without a checkpoint."""
        self._stored = fitted_position(self.position, self._stored, self.trainer)
        return self._stored

    def _load(self, trains: bool) -> None:
        """Loads the held-out pairs and, with ``trains``, the training pairs."""
        trainer = self.trainer
        evaluates = trainer is None or trainer.state.fn != "fit" or trainer.limit_val_batches != 0
        shows_progress = trainer is None or trainer.progress_bar_callback is not None
        loaded = self.loaded = self.loading.load(
            self.load_tokenizer(), trains=trains, evaluates=evaluates, progress_bar=shows_progress
        )
        self.val_pairs = loaded.val or self.val_pairs
        self.train_pairs = loaded.stream or loaded.train or self.train_pairs
        order = (self.batch_size, self.seed)
        if loaded.stream is not None:
            self.position = StreamPosition(loaded.stream, *order, self._ranks(), self.num_workers)
        elif loaded.train is not None:
            repeats = getattr(trainer, "overfit_batches", 0) > 0  # the same batches in each epoch
            self.position = EpochPosition(loaded.train, *order, self.shuffle and not repeats, self._ranks())

    def load_tokenizer(self, default: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer, with ``chat_template``. The module uses the same object for its samples and its adapter.

        Args:
            default: Tokenizer to use if ``tokenizer`` is not set; by default that of the module in training.

        Raises:
            ValueError: If there is none.
        """
        if isinstance(self.tokenizer, str):
            self.tokenizer = load_tokenizer(self.tokenizer)
        tokenizer: Any = self.tokenizer or default
        if tokenizer is None:
            tokenizer = getattr(self.trainer and self.trainer.lightning_module, "tokenizer", None)
        if tokenizer is None:
            raise ValueError("Set data.tokenizer to the base model's name: there is no DPOModule to take it from.")
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return tokenizer  # type: ignore[no-any-return]

    def _ranks(self) -> dict[str, int]:
        trainer = self.trainer
        if trainer is None:
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": trainer.world_size, "rank": trainer.global_rank}

    def _loading_options(self) -> dict[str, Any]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {"num_workers": self.num_workers, "pin_memory": on_gpu}

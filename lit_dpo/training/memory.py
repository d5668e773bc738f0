"""Memory: the longest batch of a run is tried before its first step, and an error names what would fit."""

import itertools
import traceback
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.sampler import PairSampler, share
from lit_dpo.reference.precompute import batches_ahead
from lit_dpo.training.checkpoint import trained_parameters

MOST_EPOCHS = 20  # whose batches are looked at


class LongestBatch(Callback):
    """Tries the longest batch before the first step on a GPU, so that memory runs out at once or never.

    ``DPOModule`` adds this callback itself. The trial leaves weights, metrics and random states as they were.

    Attributes:
        devices: Types of devices on which it tries. A CPU swaps memory or ends the process, so a trial tells nothing.
    """

    devices = ("cuda",)

    def __init__(self) -> None:
        self._batch: PairBatch | None = None  # in progress

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Tries the batch.

        Raises:
            torch.OutOfMemoryError: If it does not fit. The message names the batch, and what fits.
        """
        device = trainer.strategy.root_device
        indices = longest_batch(trainer) if device.type in self.devices else []
        if not indices:
            return
        pairs: Any = trainer.train_dataloader.dataset  # type: ignore[union-attr]
        batch = pairs[indices].to(device)
        failed = None
        try:
            _try(trainer, pl_module, batch)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold what the pass had computed
            failed = str(error)
        if failed is not None:
            # Other processes would not take part in more passes.
            fits = _what_fits(trainer, pl_module, pairs, indices) if trainer.world_size == 1 else None
            raise torch.OutOfMemoryError(f"The longest batch of this run {_told(batch, fits)}\n{failed}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keeps the batch, to name it."""
        self._batch = batch

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The batch is done."""
        self._batch = None

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Names the batch in an error about memory."""
        if is_out_of_memory(exception) and isinstance(self._batch, PairBatch):
            exception.args = (f"The batch in training {_told(self._batch)}\n{exception}",)
            self._batch = None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error comes from memory that is used up, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def longest_batch(trainer: Trainer) -> list[int]:
    """Indices of this rank's pairs in the batch of most tokens; none if the batches are not known in advance."""
    sampler: Any = getattr(trainer.train_dataloader, "sampler", None)
    if not isinstance(sampler, PairSampler) or not hasattr(sampler.dataset, "num_tokens"):
        return []
    dataset: Any = sampler.dataset
    tokens = torch.tensor(dataset.num_tokens(range(len(dataset))))
    longest: list[int] = []
    most = -1
    for batches in itertools.islice(batches_ahead(trainer, sampler), MOST_EPOCHS):
        if not len(batches):
            continue
        totals = tokens[batches].sum(1)
        if int(totals.max()) > most:
            most, longest = int(totals.max()), batches[int(totals.argmax())].tolist()
    if sampler.num_replicas > 1:
        return share(longest, tokens[longest].tolist(), sampler.num_replicas)[sampler.rank]
    return longest


def _try(trainer: Trainer, module: Any, batch: PairBatch) -> None:
    """A forward and backward pass whose gradients are thrown away."""
    device = batch.input_ids.device
    trained = list(trained_parameters(module).values())
    state = {name: value.clone() for name, value in module.objective.state_dict().items()}
    moments = _room_for_moments(trainer, trained)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        with trainer.precision_plugin.forward_context():
            loss = module.objective(module.policy.logps(batch), module.reference.logps(batch)).mean()
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, trained, allow_unused=True)  # not DDP's hooks
    del loss, gradients, moments
    module.objective.load_state_dict(state)
    module.objective.end_step(kept=False)


def _room_for_moments(trainer: Trainer, trained: list[torch.nn.Parameter]) -> list[Tensor]:
    """Tensors as large as the moments that an Adam allocates at its first step."""
    kinds = [type(optimizer).__name__.lower() for optimizer in trainer.optimizers if not optimizer.state]
    needed = any("adam" in kind and "8bit" not in kind for kind in kinds)
    return [torch.empty_like(parameter) for parameter in trained for _ in range(2)] if needed else []


def _what_fits(trainer: Trainer, module: Any, pairs: Any, indices: list[int]) -> int:
    """The number of these pairs that fit, found by halving; 0 if not even one does."""
    number = len(indices) // 2
    while number:
        torch.cuda.empty_cache()
        try:
            _try(trainer, module, pairs[indices[:number]].to(trainer.strategy.root_device))
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
            number //= 2
        else:
            return number
    return 0


def _told(batch: PairBatch, fits: int | None = None) -> str:
    """The rest of a sentence: that a batch does not fit, how many of its pairs do if this was tried, and what to do."""
    lengths = [segment.num_tokens for segment in batch.segments]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    source, row = batch.origins[longest]
    pairs = f"{len(lengths)} pair{'s'[: len(lengths) > 1]}"
    found = "" if fits is None else f" {fits or 'None'} of these pairs would fit."
    return (
        f"does not fit into memory: {pairs} of {sum(lengths):,} tokens, the longest with {lengths[longest]:,} "
        f"({source} row {row}).{found} Lower data.batch_size (and raise trainer.accumulate_grad_batches by as much), "
        "lower data.max_length, or set model.gradient_checkpointing=true."
    )

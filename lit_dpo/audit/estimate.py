"""A configuration ──► what training takes on a device, whether it fits, and what to change if not."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import psutil
import torch

from lit_dpo.audit.cost import CARDS, SHARE, USABLE, PairTokens, operations
from lit_dpo.audit.memory import (
    CPU_PROCESS,
    WORKSPACE,
    Batch,
    Kind,
    Memory,
    ModelSize,
    model_size,
    reference_memory,
    training_memory,
)
from lit_dpo.audit.run import is_cached
from lit_dpo.datamodule import PreferenceDataModule
from lit_dpo.module import DPOModule
from lit_dpo.policy.precision import precision_for

DeviceName: TypeAlias = Literal["t4", "l4", "a10", "a100", "h100", "h200", "mps", "cpu"]
CACHED_PAIR = 24  # bytes of the reference cache, besides 4 for a response token
COLUMNS = 260  # bytes of a tokenized pair on disk, besides 4 for a token


@dataclass(frozen=True)
class Place:
    """Where a run would compute."""

    name: str
    room: float  # bytes that a run may take
    rate: float | None  # operations a second that a run reaches; None if it is not known
    precision: str
    kind: Kind
    process: float  # bytes that are taken without a model


@dataclass(frozen=True)
class Run:
    """How long a run is."""

    epochs: float
    steps: int
    batches: int  # in a step


@dataclass(frozen=True)
class Needs:
    """What training takes on one device."""

    place: Place
    size: ModelSize
    quantized: bool
    batch: Batch  # the longest one
    batch_size: int
    run: Run
    pairs: int
    tokens: int  # of an epoch, each prompt once
    memory: Memory  # without recomputation
    recomputed: Memory
    reference: float  # bytes of the pass before training; 0 without one
    disk: float  # bytes of the caches
    operations: float  # of the whole run
    fitting_batch: int  # largest batch size that fits, with recomputation; 0 if none does

    def peak(self, recompute: bool) -> float:
        """Bytes at the peak of the run."""
        return max((self.recomputed if recompute else self.memory).total, self.reference)

    @property
    def fits(self) -> bool:
        """Whether it fits, with recomputation if need be."""
        return self.peak(True) <= self.place.room

    @property
    def recomputes(self) -> bool:
        """Whether it fits with recomputation only."""
        return self.peak(False) > self.place.room

    @property
    def hours(self) -> float | None:
        """Hours of the run; None if the device's rate is not known."""
        return None if self.place.rate is None else self.operations / self.place.rate / 3600

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = asdict(self) | {"batch": self.batch._asdict(), "fits": self.fits, "hours": self.hours}
        return plain | {"peak": self.peak(self.recomputes), "recomputes": self.recomputes}


def place_of(device: DeviceName, precision: str | None = None, memory_gb: float | None = None) -> Place:
    """The device of a name. For ``cpu`` and ``mps``, that of this machine.

    Args:
        device: Its name.
        precision: ``trainer.precision``; by default what suits the device.
        memory_gb: Its memory, if it is another than the usual.
    """
    room = None if memory_gb is None else memory_gb * 1e9
    if device in CARDS:
        card = CARDS[device]
        room = USABLE * (card.memory * 1e9 if room is None else room)
        rate = SHARE * card.rate * 1e12
        return Place(card.name, room, rate, precision or card.precision, "cuda", WORKSPACE)
    own, process = float(psutil.virtual_memory().total), float(psutil.Process().memory_info().rss) + CPU_PROCESS
    if device == "mps":  # its memory is the machine's, of which it may take three quarters
        there = torch.backends.mps.is_available()
        measured = measured_rate(torch.device("mps"), torch.float32) if there else None
        name = "this machine's Apple GPU" if there else "an Apple GPU"
        return Place(name, 0.75 * own if room is None else room, measured, precision or "32-true", "mps", process)
    precision = precision or precision_for(torch.device("cpu"))
    measured = measured_rate(torch.device("cpu"), torch.bfloat16 if precision == "bf16-mixed" else torch.float32)
    room = 0.9 * own if room is None else room
    return Place("this machine's CPU", room, measured, precision, "cpu", process)


def measured_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations a second that training reaches, from products of two matrices. Half the time goes to other work."""
    a = torch.randn(512, 1024).to(device, dtype)
    b = torch.randn(1024, 1024).to(device, dtype)
    a @ b
    start, number = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        float((a @ b)[0, 0])  # waits for a GPU
        number += 1
    return 0.5 * number * 2 * 512 * 1024 * 1024 / (time.perf_counter() - start)


def estimate(
    model: DPOModule,
    data: PreferenceDataModule,
    place: Place,
    *,
    epochs: int | None = 1,
    steps: int = -1,
    accumulate: int = 1,
    limit: float | None = None,
    progress_bar: bool = True,
) -> Needs:
    """What training takes on a device. The data is read and tokenized; no weights are loaded.

    Args:
        model: The model that would be trained.
        data: Its data.
        place: The device.
        epochs: ``trainer.max_epochs``.
        steps: ``trainer.max_steps``; -1 for no limit.
        accumulate: ``trainer.accumulate_grad_batches``.
        limit: ``trainer.limit_train_batches``: a number of batches or, if it is no integer, a share of them.
        progress_bar: Whether to show progress bars.

    Raises:
        ValueError: If the data is a stream, or has no pairs.
        OSError: If a source, a tokenizer or the model's configuration cannot be loaded.
    """
    if data.streaming:
        raise ValueError("estimate reads all rows at once: leave data.streaming out, or give a part of the source.")
    loading = data.loading
    asked = loading.val_sources is not None or loading.val_split is not None
    loaded = loading.load(data.load_tokenizer(model.tokenizer), trains=True, evaluates=asked, progress_bar=progress_bar)
    assert loaded.train is not None
    size = model_size(model.base, model.lora, **model.repository)
    train = PairTokens.of(loaded.train)
    every = [train] if loaded.val is None else [train, PairTokens.of(loaded.val)]
    batches = len(train.tokens) // data.batch_size
    whole = batches
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    per_epoch = max(1, batches // accumulate)
    taken = steps if steps >= 0 else per_epoch * (epochs or 1000)
    taken = min(taken, per_epoch * epochs) if epochs is not None and epochs >= 0 else taken
    run = Run(taken * accumulate / max(whole, 1), taken, accumulate)
    quantized = model.quantization is not None and not size.all_train
    wide = 2 if place.precision.endswith("mixed") else 4
    cached, tokens = is_cached(model), int(train.tokens.sum())
    of_pass = sum(int(one.tokens.sum()) for one in every) if cached else 0

    def memory(batch_size: int, recompute: bool) -> Memory:
        return training_memory(
            size,
            train.longest(batch_size),
            quantized=quantized,
            precision=place.precision,
            recompute=recompute,
            process=place.process,
            kind=place.kind,
        )

    kept, recomputed = memory(data.batch_size, False), memory(data.batch_size, True)
    reference = kept.before_training + reference_memory(size, of_pass, wide) if cached else 0.0
    fitting = data.batch_size
    while fitting and max(memory(fitting, True).total, reference) > place.room:
        fitting //= 2
    recomputes = kept.total > place.room
    total = operations(size, tokens * run.epochs, recompute=recomputes) + 2.0 * size.linear * of_pass
    pairs = sum(len(one.tokens) for one in every)
    responses = sum(int(one.responses.sum()) for one in every)
    disk = COLUMNS * pairs + 4.0 * sum(int(one.tokens.sum()) for one in every)
    disk += (CACHED_PAIR * pairs + 4.0 * responses) * cached
    return Needs(
        place=place,
        size=size,
        quantized=quantized,
        batch=train.longest(data.batch_size),
        batch_size=data.batch_size,
        run=run,
        pairs=len(train.tokens),
        tokens=tokens,
        memory=kept,
        recomputed=recomputed,
        reference=reference,
        disk=disk,
        operations=total,
        fitting_batch=fitting,
    )


def estimate_text(needs: Needs) -> str:
    """An estimate for the terminal."""
    size, place = needs.size, needs.place
    share = size.trained / (size.total + (0 if size.all_train else size.trained))
    lines = [
        f"{'parameters':<28}{size.total / 1e6:,.1f} M, of which {size.trained / 1e6:,.1f} M train ({share:.1%})",
        f"{'training pairs':<28}{needs.pairs:,}, with {needs.tokens:,} tokens, each prompt once",
        f"{'longest batch':<28}{needs.batch.tokens:,} tokens in {needs.batch_size} pairs",
        f"{'run':<28}{needs.run.steps:,} steps, {needs.run.epochs:.3g} epochs",
        "",
        f"Memory on {place.name} in {place.precision}, GB",
        f"{'':<28}{'recomputed':>12}{'kept':>12}",
    ]
    for name in vars(needs.memory):
        values = (getattr(one, name) / 1e9 for one in (needs.recomputed, needs.memory))
        lines.append(f"  {name.replace('_', ' '):<26}" + "".join(f"{value:>12.2f}" for value in values))
    lines.append(f"{'peak of a step':<28}{needs.recomputed.total / 1e9:>12.2f}{needs.memory.total / 1e9:>12.2f}")
    if needs.reference:
        lines.append(f"{'peak of the reference pass':<28}{needs.reference / 1e9:>12.2f}")
    lines += ["", f"{'caches on disk':<28}{needs.disk / 1e6:,.1f} MB"]
    lines.append(f"{'operations':<28}{needs.operations:.2e}")
    lines.append(f"{'least time':<28}{_time(needs.hours)}")
    return "\n".join([*lines, "", *_verdict(needs)])


def _verdict(needs: Needs) -> Iterator[str]:
    room = needs.place.room / 1e9
    if needs.fits and not needs.recomputes:
        yield f"It fits: {needs.peak(False) / 1e9:.1f} of {room:.1f} GB. Nothing needs to be recomputed."
        return
    if needs.fits:
        yield (
            f"It fits with recomputation: {needs.peak(True) / 1e9:.1f} of {room:.1f} GB (kept: "
            f"{needs.peak(False) / 1e9:.1f}). model.gradient_checkpointing=auto recomputes the batches that need it."
        )
        return
    yield f"It does not fit: {needs.peak(True) / 1e9:.1f} GB, of which {room:.1f} GB are there."
    if needs.fitting_batch:
        number = needs.batch_size // needs.fitting_batch * needs.run.batches
        yield (
            f"  data.batch_size={needs.fitting_batch}, trainer.accumulate_grad_batches={number} fits. The steps are "
            "the same."
        )
    if not needs.quantized:
        yield "  model.quantization=nf4 (with adapters) keeps the base in 4 bits."
    yield "  A lower data.max_length cuts the longest pairs."
    smaller = [card.name for card in CARDS.values() if needs.peak(True) <= USABLE * card.memory * 1e9]
    if smaller and needs.place.kind == "cuda":
        yield f"  It fits on {', '.join(smaller)}."


def _time(hours: float | None) -> str:
    if hours is None:
        return "not known: the device is not here"
    if hours * 3600 < 120:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.1f} h"

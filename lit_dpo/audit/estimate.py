"""A configuration ──► what training takes on a device, whether it fits, and what to change if not."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import psutil
import torch

from lit_dpo.audit.cost import CARDS, SHARE, USABLE, PairTokens, operations
from lit_dpo.audit.memory import (
    CPU_PROCESS,
    HALF,
    WORKSPACE,
    Batch,
    Kind,
    Memory,
    ModelSize,
    base_bytes,
    model_size,
    reference_memory,
    training_memory,
)
from lit_dpo.audit.run import is_cached
from lit_dpo.datamodule import PreferenceDataModule
from lit_dpo.module import DPOModule
from lit_dpo.policy.execution import Switch
from lit_dpo.policy.precision import PRECISIONS, precision_for
from lit_dpo.reference import AnotherModel

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
class Length:
    """How long the Trainer trains, by its settings."""

    epochs: int | None = 1  # max_epochs
    steps: int = -1  # max_steps
    accumulate: int = 1  # accumulate_grad_batches
    limit: float | None = None  # limit_train_batches: a number of batches or, if it is no integer, a share of them
    processes: int = 1
    split: bool = False  # whether the frozen weights are split over them

    def of(self, batches: int) -> "Run":
        """The run over an epoch of so many batches.

        Raises:
            ValueError: If it has no end.
        """
        taken = batches
        if self.limit is not None:
            taken = min(batches, self.limit) if isinstance(self.limit, int) else int(batches * self.limit)
        per_epoch = max(1, math.ceil(taken / self.accumulate))  # the last step of an epoch may have fewer batches
        endless = self.epochs is None or self.epochs < 0
        if endless and self.steps < 0 and self.epochs is not None:
            raise ValueError("The run has no end: set trainer.max_epochs or trainer.max_steps to estimate it.")
        most = per_epoch * (1000 if self.epochs is None else self.epochs)  # Lightning ends after 1000
        steps = self.steps if endless and self.steps >= 0 else most if self.steps < 0 else min(self.steps, most)
        return Run(steps / per_epoch * taken / max(batches, 1), steps, self.accumulate)


@dataclass(frozen=True)
class Run:
    """How long a run is."""

    epochs: float  # of the data, which a limit may cut
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
    processes: int
    pairs: int
    tokens: int  # of an epoch, each prompt once
    memory: Memory  # without recomputation
    recomputed: Memory
    choice: Switch  # model.gradient_checkpointing
    reference: float  # bytes of the pass before training; 0 without one
    disk: float  # bytes of the caches
    operations: float  # of the whole run
    fitting_batch: int  # largest batch size that fits, with recomputation; 0 if none does

    def peak(self, recompute: bool) -> float:
        """Bytes at the peak of the run."""
        return max((self.recomputed if recompute else self.memory).total, self.reference)

    @property
    def fits(self) -> bool:
        """Whether it fits, with recomputation if need be and if the configuration allows it."""
        return self.peak(self.choice is not False) <= self.place.room

    @property
    def recomputes(self) -> bool:
        """Whether the longest batches are recomputed."""
        return self.choice is True or (self.choice == "auto" and self.peak(False) > self.place.room)

    @property
    def hours(self) -> float | None:
        """Hours of the run; None if the device's rate is not known."""
        return None if self.place.rate is None else self.operations / self.place.rate / self.processes / 3600

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

    Raises:
        ValueError: If the precision is unknown, or the device does not have it.
    """
    room = None if memory_gb is None else memory_gb * 1e9
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"The precision is {', '.join(PRECISIONS)}, not {precision}.")
    if device in CARDS:
        card = CARDS[device]
        if device == "t4" and precision == "bf16-mixed":
            raise ValueError("A T4 does not multiply bfloat16. Leave the precision out, or give 16-mixed or 32-true.")
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
    length: Length = Length(),
    *,
    progress_bar: bool = True,
) -> Needs:
    """What training takes on a device. The data is read and tokenized; no weights are loaded.

    Args:
        model: The model that would be trained.
        data: Its data.
        place: The device; with several processes, that of each.
        length: How long the Trainer trains.
        progress_bar: Whether to show progress bars.

    Raises:
        ValueError: If the data is a stream, or has no pairs, or if the run has no end.
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
    weights = np.array([part.weight for part in loaded.train.parts])[loaded.train.part_numbers()]
    tokens = float((train.tokens * weights).sum())
    run = length.of(int(weights.sum()) // (data.batch_size * length.processes))
    quantized = model.quantization is not None and not size.all_train
    wide = 2 if place.precision in HALF else 4
    cached = is_cached(model)
    of_pass = sum(int(one.tokens.sum()) for one in every) if cached else 0
    other = _other_model(model, wide)

    def memory(batch_size: int, recompute: bool) -> Memory:
        found = training_memory(
            size,
            train.longest(batch_size),
            quantized=quantized,
            precision=place.precision,
            recompute=recompute,
            process=place.process,
            kind=place.kind,
        )
        parts = length.processes if length.split else 1
        found = replace(found, weights=found.weights / parts, quantization_state=found.quantization_state / parts)
        return found if cached else replace(found, reference_model=other)

    never = model.gradient_checkpointing is False
    kept, recomputed = memory(data.batch_size, False), memory(data.batch_size, True)
    reference = kept.before_training + other + reference_memory(size, of_pass, wide) if cached else 0.0
    fitting = data.batch_size
    while fitting and max(memory(fitting, not never).total, reference) > place.room:
        fitting //= 2
    recomputes = model.gradient_checkpointing is True or (kept.total > place.room and not never)
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
        processes=length.processes,
        pairs=len(train.tokens),
        tokens=round(tokens),
        memory=kept,
        recomputed=recomputed,
        choice=model.gradient_checkpointing,
        reference=reference,
        disk=disk,
        operations=total,
        fitting_batch=fitting,
    )


def _other_model(model: DPOModule, wide: int) -> float:
    """Bytes of another model as the reference; 0 without one."""
    choice = model.reference_choice
    if not isinstance(choice, AnotherModel):
        return 0.0
    where = {name: getattr(choice, name) for name in ("gguf_file", "revision", "trust_remote_code")}
    return base_bytes(model_size(choice.base, None, **where), choice.quantization is not None, wide)


def estimate_text(needs: Needs) -> str:
    """An estimate for the terminal."""
    size, place = needs.size, needs.place
    total = size.total + (0 if size.all_train else size.trained)
    share = size.trained / total
    lines = [
        f"{'parameters':<28}{total / 1e6:,.1f} M, of which {size.trained / 1e6:,.1f} M train ({share:.1%})",
        f"{'training pairs':<28}{needs.pairs:,}, with {needs.tokens:,} tokens, each prompt once",
        f"{'longest batch':<28}{needs.batch.tokens:,} tokens in {needs.batch_size} pairs",
        f"{'run':<28}{needs.run.steps:,} steps, {needs.run.epochs:.3g} epochs",
        "",
        f"Memory on {place.name} in {place.precision}, GB",
        f"{'  activations are':<28}{'recomputed':>12}{'kept':>12}",
    ]
    for name in vars(needs.memory):
        if name == "reference_model" and not needs.memory.reference_model:
            continue
        values = (getattr(one, name) / 1e9 for one in (needs.recomputed, needs.memory))
        lines.append(f"  {name.replace('_', ' '):<26}" + "".join(f"{value:>12.2f}" for value in values))
    lines.append(f"{'peak of a step':<28}{needs.recomputed.total / 1e9:>12.2f}{needs.memory.total / 1e9:>12.2f}")
    if needs.reference:
        lines.append(f"{'peak of the reference pass':<28}{needs.reference / 1e9:>12.2f}")
    lines += ["", f"{'caches on disk':<28}{needs.disk / 1e6:,.1f} MB"]
    if needs.processes > 1:
        lines.append(f"{'processes':<28}{needs.processes}, of which each takes that memory")
    lines.append(f"{'operations':<28}{needs.operations:.2e}")
    lines.append(f"{'time, at least' if place.kind == 'cuda' else 'time, roughly':<28}{_time(needs.hours)}")
    return "\n".join([*lines, "", *_verdict(needs)])


def _verdict(needs: Needs) -> Iterator[str]:
    room, peak = needs.place.room / 1e9, needs.peak(needs.recomputes) / 1e9
    if needs.fits and not needs.recomputes:
        yield f"It fits: {peak:.1f} of {room:.1f} GB. Nothing needs to be recomputed."
        return
    if needs.fits:
        yield (
            f"It fits with recomputation: {peak:.1f} of {room:.1f} GB (kept: {needs.peak(False) / 1e9:.1f}). "
            "model.gradient_checkpointing=auto recomputes the batches that need it."
        )
        return
    yield f"It does not fit: {peak:.1f} GB, of which {room:.1f} GB are there."
    if needs.choice is False:
        yield f"  model.gradient_checkpointing=auto takes {needs.peak(True) / 1e9:.1f} GB."
    if needs.fitting_batch:
        number = math.ceil(needs.batch_size / needs.fitting_batch) * needs.run.batches
        yield f"  data.batch_size={needs.fitting_batch}, with trainer.accumulate_grad_batches={number}, fits."
    if not needs.quantized:
        yield "  model.quantization=nf4 (with adapters) keeps the base in 4 bits."
    yield "  A lower data.max_length cuts the longest pairs."
    others = [card.name for card in CARDS.values() if needs.peak(True) <= USABLE * card.memory * 1e9]
    if others and needs.place.kind == "cuda":
        yield f"  It fits on {', '.join(others)}."


def _time(hours: float | None) -> str:
    if hours is None:
        return "not known: the device is not here"
    if hours * 3600 < 120:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:.1f} h"

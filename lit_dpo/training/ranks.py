"""Collectives over Python objects."""

from typing import Any

import torch
from lightning.pytorch import Trainer


def gather_objects(trainer: Trainer, value: Any) -> list[Any]:
    """The values of all ranks, in the order of the ranks. Collective: every rank must call it."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values

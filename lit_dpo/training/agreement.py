"""Keeps the processes of a run together: they train the same weights, and none outlives the one that started it."""

import os
import sys
import threading
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lit_dpo.training.checkpoint import trained_parameters
from lit_dpo.training.ranks import gather_objects
from lit_dpo.training.step import OptimizerStep

PART = 5 * 2**20  # numbers of a parameter that are summed up at once
CLOSE = 1e-4  # relative. All take the same gradients, so only the rounding of their optimizer steps can differ


class Together(Callback):
    """Compares the trained weights of all processes, after 1, 2, 4, 8, … optimizer steps and at the end of each epoch.

    ``DPOModule`` adds this callback itself. A strategy that does not reduce gradients trains another model on each
    process, and nothing else would show it. A process also ends when the one that started it has died: it would
    otherwise wait for it until the time-out of the process group, ten minutes with NCCL.
    """

    def __init__(self) -> None:
        self._step = OptimizerStep()
        self._over = threading.Event()  # this process has done its part

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Begins to watch the process that started this one."""
        external = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.local_rank > 0 and external is not None and not external.creates_processes_externally:
            self._over.clear()
            threading.Thread(target=_end_with, args=(os.getppid(), self._over), daemon=True).start()

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Waits until all processes have done their part, such as writing predictions."""
        trainer.strategy.barrier("teardown")
        self._over.set()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Notes that a batch begins."""
        self._step.start_batch(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compares the weights after 1, 2, 4, 8, … optimizer steps."""
        if self._step.is_complete(trainer) and trainer.global_step.bit_count() == 1:
            check_weights(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Compares the weights."""
        check_weights(trainer, pl_module)


def check_weights(trainer: Trainer, module: torch.nn.Module) -> None:
    """Compares the trained weights of all processes. Collective: every rank must call it.

    Raises:
        RuntimeError: If they differ by more than rounding.
    """
    if trainer.world_size == 1:
        return
    trained = trained_parameters(module)
    ranks = gather_objects(trainer, torch.stack([_summary(parameter) for parameter in trained.values()]).cpu())
    for rank, other in enumerate(ranks):
        differing = ((other - ranks[0]).abs() > CLOSE * ranks[0][:, 1:]).any(1).nonzero()[:, 0].tolist()
        if differing:
            raise RuntimeError(
                f"After {trainer.global_step} optimizer steps, processes 0 and {rank} train different weights: "
                f"{len(differing)} of {len(trained)} differ, such as {list(trained)[differing[0]]}. The gradients are "
                f"not reduced by {type(trainer.strategy).__name__}. Use trainer.strategy=ddp."
            )


def _end_with(parent: int, over: threading.Event) -> None:
    """Ends this process as soon as another is its parent, unless its part is over."""
    while os.getppid() == parent:
        if over.wait(1):
            return
    sys.stderr.write(f"Process {os.getpid()} ends, because the process that started it has ended.\n")
    os._exit(1)


@torch.no_grad()
def _summary(parameter: Tensor) -> Tensor:
    """A projection of a parameter on a fixed direction, and how large it is for random values, (2,) in float64.

    Norms alone would not tell: after one step of Adam on zeros they are equal, whatever the gradients were.
    """
    # In parts, because whole embeddings in float64 would take gigabytes. The direction's period divides their size.
    total = torch.zeros(3, dtype=torch.float64, device=parameter.device)
    for part in parameter.detach().flatten().split(PART):
        values = part.double()
        direction = (torch.arange(len(values), device=values.device) * 7 % 5 - 2).double()
        total += torch.stack([values @ direction, values @ values, direction @ direction])
    size = (total[1] * total[2]).sqrt() / parameter.numel() ** 0.5
    return torch.stack([total[0], size])

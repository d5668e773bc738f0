"""The strategy ``sharded``: DDP for the adapters, and a frozen base whose weights are split over the GPUs of a node."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from lit_dpo.policy.sharding import is_part, sharded_names
from lit_dpo.training.ranks import gather_objects


class ShardedBaseStrategy(DDPStrategy):
    """DDP whose frozen base is split over the processes of a node, by its name ``sharded``.

    The gradients of the adapters are reduced as under ``ddp``, and checkpoints are the same files. Use it if the base
    does not fit on one GPU: each process then holds its part of the base, and one whole layer at a time.
    """

    _mesh: DeviceMesh | None = None

    @property
    def mesh(self) -> DeviceMesh:
        """The processes of this node, which share one base."""
        if self._mesh is None:
            shape = (self.num_nodes, self.num_processes)
            nodes = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("nodes", "shard"))
            self._mesh = nodes["shard"]
        return self._mesh

    def setup(self, trainer: Trainer) -> None:
        """Leaves the parts of the base out of what DDP makes the same on all processes, and out of checkpoints."""
        module: Any = self.model
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sharded_names(module))
        module.register_state_dict_post_hook(_drop_parts)
        super().setup(trainer)


def _drop_parts(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Removes parts of the base from a state dict. Checkpoints hold no base weights, whole or not."""
    for name in [name for name, value in state_dict.items() if is_part(value)]:
        del state_dict[name]


for _name, _start in {"sharded": "popen", "sharded_fork": "fork"}.items():
    if _name not in StrategyRegistry.available_strategies():
        StrategyRegistry.register(
            _name,
            ShardedBaseStrategy,
            description="DDP whose frozen base is split over the GPUs of a node",
            start_method=_start,
        )


class KeepInStep(Callback):
    """Lets each process take part in all forward passes of an evaluation if the base is split over the processes.

    Some processes have fewer batches than others. ``DPOModule`` adds this callback itself.
    """

    def __init__(self) -> None:
        self._behind = 0  # batches that another process has and this one does not

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Counts the batches."""
        limits = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._count(trainer, pl_module, limits)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Counts the batches."""
        self._count(trainer, pl_module, trainer.num_test_batches)

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Counts the batches."""
        self._count(trainer, pl_module, trainer.num_predict_batches)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Makes up for the batches that this process does not have."""
        self._catch_up(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Makes up for the batches that this process does not have."""
        self._catch_up(pl_module)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Makes up for the batches that this process does not have."""
        self._catch_up(pl_module)

    def _count(self, trainer: Trainer, module: Any, limits: Any) -> None:
        if module.policy.sharded:
            own = int(sum(limits))
            self._behind = max(gather_objects(trainer, own)) - own

    def _catch_up(self, module: Any) -> None:
        live = getattr(module.reference, "policy", None) is module.policy  # the reference computes with the same base
        module.policy.keep_in_step(self._behind * (2 if live else 1))
        self._behind = 0

"""ParameterSummary: Lightning's table of modules, with 4-bit weights counted as what they stand for."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary.model_summary import LayerSummary
from lightning.pytorch.utilities.model_summary.model_summary import ModelSummary as Table
from torch import nn


class ParameterSummary(ModelSummary):
    """Lightning's ``ModelSummary``, with the right numbers for a quantized base.

    Lightning counts packed codes: a 4-bit weight as half a parameter, and its size in megabytes as if it were not
    quantized. On the command line, ``--trainer.enable_model_summary true`` shows this table.
    """

    def _summary(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        return _Table(pl_module, max_depth=self._max_depth)


class _Layer(LayerSummary):
    @property
    def num_parameters(self) -> int:
        return count(self._module)


class _Table(Table):
    def summarize(self) -> dict[str, LayerSummary]:
        rows = super().summarize()
        for row in rows.values():
            row.__class__ = _Layer
        return rows

    @property
    def total_parameters(self) -> int:
        return count(self._model)

    @property
    def model_size(self) -> float:
        return sum(p.numel() * p.element_size() for p in self._model.parameters()) / 1e6


def count(module: nn.Module) -> int:
    """Number of parameters of a module. Tied weights count once."""
    sizes: dict[int, int] = {}
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            state: Any = getattr(layer, "quant_state", None)
            packed = state is not None and parameter is getattr(layer, "weight", None)
            sizes[id(parameter)] = state.shape.numel() if packed else parameter.numel()
    return sum(sizes.values())

"""A data module and a model's settings ──► an audit."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_dpo.audit.cost import Cost, PairTokens, cost_of
from lit_dpo.audit.facts import SourceFacts, TemplateFacts, facts_of, template_facts
from lit_dpo.audit.memory import model_size
from lit_dpo.audit.page import as_page
from lit_dpo.audit.text import as_text
from lit_dpo.audit.verdicts import Verdict, unreadable, verdicts
from lit_dpo.data.filters import Filters
from lit_dpo.data.loading import Loaded
from lit_dpo.datamodule import PreferenceDataModule
from lit_dpo.files.atomic import atomic_write
from lit_dpo.module import DPOModule
from lit_dpo.reference import AnotherModel


@dataclass(frozen=True)
class Audit:
    """What was found in a data set."""

    verdicts: list[Verdict]  # worst first
    sources: list[SourceFacts]
    template: TemplateFacts | None  # None if no pair could be read
    cost: Cost | None  # None without a model

    @property
    def failed(self) -> bool:
        """Whether a verdict is an error."""
        return any(verdict.severity == "error" for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``audit.json`` has them."""
        return {
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "sources": [source.as_dict() for source in self.sources],
            "template": None if self.template is None else asdict(self.template),
            "cost": None if self.cost is None else asdict(self.cost),
        }

    def as_text(self, color: bool = False, bars: bool = True) -> str:
        """The audit as text for a terminal.

        Args:
            color: Whether to use a terminal's colours.
            bars: Whether to draw histograms with block characters.
        """
        return as_text(self.verdicts, self.sources, self.template, self.cost, color=color, bars=bars)

    def save(self, folder: str | Path) -> list[Path]:
        """Writes ``audit.json`` and ``audit.html`` into a folder. Returns their paths."""
        texts = {
            "audit.json": json.dumps(self.as_dict(), ensure_ascii=False, indent=2) + "\n",
            "audit.html": as_page(self.verdicts, self.sources, self.template, self.cost),
        }
        paths = []
        for name, text in texts.items():
            paths.append(Path(folder) / name)
            with atomic_write(paths[-1]) as path:
                path.write_text(text, encoding="utf-8", errors="backslashreplace")
        return paths


def audit_data(data: PreferenceDataModule, model: DPOModule | None = None, progress_bar: bool = True) -> Audit:
    """Reads the data as training would, and judges it. No weights are loaded.

    A row that would stop training is left out instead, and gives a verdict.

    Args:
        data: The data. Without ``model`` it must have a tokenizer.
        model: The model that would be trained, for its tokenizer and the cost.
        progress_bar: Whether to show progress bars.

    Raises:
        ValueError: If no pair at all can be read.
        OSError: If a source, a tokenizer or the model's configuration cannot be loaded.
    """
    tokenizer = data.load_tokenizer(None if model is None else model.tokenizer)
    loading, first = data.loading, None
    if data.streaming:
        raise ValueError("audit reads all rows at once: leave data.streaming out, or audit a part of the source.")
    # Without held-out pairs fit would stop. Here this gives a verdict, unless they were asked for.
    asked = loading.val_sources is not None or loading.val_split is not None
    try:
        loaded = loading.load(tokenizer, trains=True, evaluates=asked, progress_bar=progress_bar)
    except ValueError as error:
        first = unreadable(" ".join(str(error).split()))
        loaded = replace(loading, on_bad_row="drop").load(
            tokenizer, trains=True, evaluates=False, progress_bar=progress_bar
        )
    found = audit_of(loaded, tokenizer, loading.filters)
    every = [first, *found.verdicts] if first else found.verdicts
    return replace(found, verdicts=every, cost=_cost(loaded, data, model))


def audit_of(loaded: Loaded, tokenizer: PreTrainedTokenizerBase, filters: Filters) -> Audit:
    """The audit of data that is loaded, without the cost.

    Args:
        loaded: The data, with training pairs.
        tokenizer: Its tokenizer.
        filters: What is left out.
    """
    sources = facts_of(loaded)
    assert loaded.train is not None
    template = template_facts(loaded.train, tokenizer)
    return Audit(verdicts(sources, template, filters), sources, template, None)


def is_cached(model: DPOModule) -> bool:
    """Whether a pass before training fills the reference cache."""
    choice = model.reference_choice
    if isinstance(choice, AnotherModel):
        return choice.cached
    return choice == "cached" or (choice == "auto" and model.objective.uses_reference)


def _cost(loaded: Loaded, data: PreferenceDataModule, model: DPOModule | None) -> Cost | None:
    if model is None or loaded.train is None:
        return None
    size = model_size(model.base, model.lora, **model.repository)
    weights = np.array([part.weight for part in loaded.train.parts])[loaded.train.part_numbers()]
    return cost_of(
        size,
        PairTokens.of(loaded.train),
        weights,
        batch_size=data.batch_size,
        quantized=model.quantization is not None,
        reference=is_cached(model),
    )

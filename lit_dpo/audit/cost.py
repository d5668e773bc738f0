"""Pairs and a model's configuration ──► estimates of tokens, operations, memory and time."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lit_dpo.audit.memory import WORKSPACE, Batch, ModelSize, reference_memory, training_memory
from lit_dpo.data.pairs import PairDataset


class Card(NamedTuple):
    """A GPU, as its maker tells."""

    name: str
    memory: float  # GB
    rate: float  # products in half precision, in 10¹² operations a second
    precision: str


CARDS = {
    "t4": Card("T4", 16, 65, "16-mixed"),  # it has no bfloat16
    "l4": Card("L4", 24, 121, "bf16-mixed"),
    "a10": Card("A10", 24, 125, "bf16-mixed"),
    "a100": Card("A100", 80, 312, "bf16-mixed"),
    "h100": Card("H100", 80, 989, "bf16-mixed"),
    "h200": Card("H200", 141, 989, "bf16-mixed"),
}
SHARE = 0.4  # of that rate. A 7B at batch 8 reached 0.47 on an H100 (tests/benchmarks); small models reach far less
USABLE = 0.93  # of a card's memory: the rest is the driver's, and lost between blocks


@dataclass(frozen=True)
class PairTokens:
    """Numbers of tokens of P pairs, (P,) each."""

    tokens: np.ndarray  # prompt and responses together
    prompts: np.ndarray
    responses: np.ndarray

    @classmethod
    def of(cls, pairs: PairDataset) -> "PairTokens":
        """The numbers of a data set, whose tokens are not read."""
        tokens = np.array(pairs.num_tokens(range(len(pairs))), np.int64)
        prompts = pairs.prompt_lengths()
        return cls(tokens, prompts, tokens - prompts)

    def longest(self, batch_size: int) -> Batch:
        """The batch of the longest pairs. No batch of a shuffled epoch is longer."""
        places = np.argsort(self.tokens)[-batch_size:]
        return Batch(*(int(one[places].sum()) for one in (self.tokens, self.prompts, self.responses)))


@dataclass(frozen=True)
class Cost:
    """Estimates for one run."""

    tokens: int  # of an epoch, each prompt once
    operations: float  # of an epoch, without the reference
    reference_operations: float  # once
    memory: float  # bytes on the card, for the longest batch, with recomputation
    memory_without_recomputation: float
    hours: dict[str, float]  # of an epoch and the reference pass, by card on which it fits


def operations(size: ModelSize, num_tokens: float, *, recompute: bool = False) -> float:
    """Operations of training on some tokens once: products alone, without attention.

    A frozen weight costs a product in the forward pass and one for the gradient of its input; a trained one costs
    another, for its own gradient. Recomputation costs one more forward pass.
    """
    return (2 + size.all_train + recompute) * 2.0 * size.linear * num_tokens


def cost_of(
    size: ModelSize,
    pairs: PairTokens,
    weights: np.ndarray | float = 1.0,
    *,
    batch_size: int,
    quantized: bool,
    reference: bool,
) -> Cost:
    """Estimates the cost of training on some pairs, on a GPU in half precision.

    Args:
        size: The model.
        pairs: Tokens of each training pair.
        weights: How often an epoch sees each pair, (P,).
        batch_size: Pairs in a batch.
        quantized: Whether the linear layers are in 4 bits.
        reference: Whether a reference is computed once.
    """
    tokens = round(float((pairs.tokens * weights).sum()))
    every = int(pairs.tokens.sum())
    once = 2.0 * size.linear * every if reference else 0.0
    batch = pairs.longest(batch_size)
    memory, without = (
        peak(size, batch, every if reference else 0, quantized, "bf16-mixed", recompute) for recompute in (True, False)
    )
    hours = {
        card.name: (operations(size, tokens, recompute=without > USABLE * card.memory * 1e9) + once)
        / (card.rate * 1e12 * SHARE)
        / 3600
        for card in CARDS.values()
        if memory < USABLE * card.memory * 1e9
    }
    return Cost(tokens, operations(size, tokens), once, memory, without, hours)


def peak(
    size: ModelSize, batch: Batch, reference_tokens: int, quantized: bool, precision: str, recompute: bool
) -> float:
    """Bytes at the peak of a run on a GPU: of a training step, or of the pass before it.

    Args:
        size: The model.
        batch: The longest batch.
        reference_tokens: Tokens of the pass that fills the reference cache; 0 for none.
        quantized: Whether the linear layers are in 4 bits.
        precision: ``trainer.precision``.
        recompute: Whether layers recompute their activations.
    """
    step = training_memory(
        size,
        batch,
        quantized=quantized,
        precision=precision,
        recompute=recompute,
        process=WORKSPACE,
        kind="cuda",
    )
    before = step.before_training + reference_memory(size, reference_tokens, 2)
    return max(step.total, before if reference_tokens else 0.0)

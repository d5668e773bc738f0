"""What every objective takes and gives: log-probabilities in, implicit rewards and a loss per pair out."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn


class TokenStatistics(NamedTuple):
    """What a policy's distribution p was like at each of R response tokens, without gradients."""

    entropy: Tensor  # (R,) nats
    top1: Tensor  # (R,) 1 where the token was the most likely one, else 0
    log_sum_squares: Tensor  # (R,) log Σ p²


class Responses(NamedTuple):
    """All S responses of P pairs (or ranked lists) and their R tokens: pairs in order, in each from best to worst."""

    token_logps: Tensor  # (R,) nats
    lengths: tuple[int, ...]  # tokens of each response, S of them
    counts: tuple[int, ...]  # responses of each pair, two, or of each list, P of them
    scores: Tensor  # (S,) the data's own score of each response, NaN where it has none
    statistics: TokenStatistics | None = None  # if asked for

    def sum(self, values: Tensor) -> Tensor:
        """Sums of something told of each token, (R,), by response, (S,)."""
        # Summed one by one: index_add would sum in another order each time on CUDA.
        return torch.stack([part.sum() for part in values.split(self.lengths)])

    def best_and_worst(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of something told of each response, (S,), what belongs to the best and to the worst one, (P,) each."""
        if sum(self.counts) == 2 * len(self.counts):
            return values[0::2], values[1::2]
        lists = values.split(self.counts)
        return torch.stack([part[0] for part in lists]), torch.stack([part[-1] for part in lists])


class PairLogps(NamedTuple):
    """Log-probabilities of the responses of P pairs, in nats."""

    chosen: Tensor  # (P,) summed over response tokens
    rejected: Tensor  # (P,) of a ranked list the worst response
    chosen_lengths: Tensor  # (P,) response tokens
    rejected_lengths: Tensor  # (P,)
    responses: Responses | None = None  # token by token, for what asks for more than sums

    @classmethod
    def from_sums(
        cls,
        chosen: Sequence[float],
        rejected: Sequence[float],
        *,
        lengths: tuple[int, int] = (1, 1),
        scores: tuple[float, float] = (float("nan"), float("nan")),
    ) -> "PairLogps":
        """Made by hand, to try an objective: each sum spread evenly over as many tokens.

        Args:
            chosen: Log-probability of each chosen response, P of them.
            rejected: Of each rejected response.
            lengths: Tokens of every chosen and of every rejected response.
            scores: The data's own score of every chosen and of every rejected response.
        """
        sums = torch.tensor([chosen, rejected]).T.flatten()
        repeats = torch.tensor(lengths * len(chosen))
        responses = Responses(
            (sums / repeats).repeat_interleave(repeats),
            lengths * len(chosen),
            (2,) * len(chosen),
            torch.tensor(scores * len(chosen)),
        )
        return cls(*responses.best_and_worst(sums), *responses.best_and_worst(repeats), responses)

    def detach(self) -> "PairLogps":
        """The same without gradients."""
        responses = self.responses
        if responses is not None:
            responses = responses._replace(token_logps=responses.token_logps.detach())
        return self._replace(chosen=self.chosen.detach(), rejected=self.rejected.detach(), responses=responses)


class Rewards(NamedTuple):
    """Implicit rewards of the responses of P pairs."""

    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)
    ordered: Tensor | None = None  # (P,) of a ranked list the share of its pairs that the rewards order rightly

    @property
    def margins(self) -> Tensor:
        """Reward of the chosen response less that of the rejected one, (P,)."""
        return self.chosen - self.rejected

    @property
    def accuracies(self) -> Tensor:
        """1 where the chosen response has the higher reward, a half where both have the same, else 0, (P,)."""
        return wins(self.margins) if self.ordered is None else self.ordered


def wins(margins: Tensor) -> Tensor:
    """1 for a positive margin, a half for none, 0 for a negative one."""
    return torch.where(margins == 0, 0.5, (margins > 0).to(margins.dtype))


class Objective(nn.Module, ABC):
    """A preference loss: a function of the policy's and the reference's log-probs.

    Parameters of a subclass are plain values (or other objectives), kept under their own names. What it asks for beyond
    sums of log-probs, and what it can do, it says by these class attributes:

    Attributes:
        uses_reference: Whether it looks at the reference; if not, none is computed.
        uses_statistics: Whether it looks at ``Responses.statistics`` of the policy.
        uses_scores: Whether it looks at ``Responses.scores``.
        ranks_lists: Whether it takes ranked lists of more than two responses.
        pairwise: Whether the loss of a pair depends on that pair alone.
    """

    uses_reference = True
    uses_statistics = False
    uses_scores = False
    ranks_lists = False
    pairwise = True

    if TYPE_CHECKING:  # nn.Module's own tells nothing of types

        def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor: ...  # noqa: D102

    @abstractmethod
    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """The implicit rewards of each pair."""

    @abstractmethod
    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""

    def end_step(self, kept: bool = True) -> None:
        """Called on all processes at the end of each optimizer step, by objectives that keep running numbers.

        Args:
            kept: Whether the step was taken; if not, what was seen in it is forgotten.
        """

    def extra_repr(self) -> str:
        """The plain parameters, for ``repr``."""
        names = inspect.signature(type(self).__init__).parameters
        plain = {name: vars(self)[name] for name in names if name in vars(self)}
        return ", ".join(f"{name}={value!r}" for name, value in plain.items())


class LogRatioObjective(Objective):
    """An objective whose implicit rewards are β·log(π/π_ref).

    Args:
        beta: Strength of the pull towards the reference; positive.

    Raises:
        ValueError: If ``beta`` is not positive.
    """

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = positive("beta", beta)

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """The implicit rewards β·log(π/π_ref), without the prompt's partition function, which cancels in the margin.

        References:
            Rafailov et al. 2023, arXiv:2305.18290, Eq. 5.
        """
        return Rewards(
            self.beta * (policy.chosen - reference.chosen),
            self.beta * (policy.rejected - reference.rejected),
        )


def positive(name: str, value: float) -> float:
    """A parameter that must be positive."""
    if not 0 < value < float("inf"):
        raise ValueError(f"objective.{name} must be positive and finite, not {value}.")
    return value


def within(name: str, value: float, low: float, high: float, bounds: str = "[)") -> float:
    """A parameter that must lie in an interval, open at ``(`` and ``)``."""
    above = value > low or (value == low and bounds[0] == "[")
    below = value < high or (value == high and bounds[1] == "]")
    if not (above and below):
        raise ValueError(f"objective.{name} must lie in {bounds[0]}{low}, {high}{bounds[1]}, not {value}.")
    return value

"""The interface of every objective: log-probabilities in, implicit rewards and one loss per pair out."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn


class TokenStatistics(NamedTuple):
    """Statistics of the policy's distribution p at each of R response tokens, without gradients."""

    entropy: Tensor  # (R,) nats
    top1: Tensor  # (R,) 1 where the token is the most likely one, else 0
    log_sum_squares: Tensor  # (R,) log Σ p²


class Responses(NamedTuple):
    """All S responses of P pairs (or ranked lists), with R tokens in total: pair by pair, best response first."""

    token_logps: Tensor  # (R,) nats
    lengths: tuple[int, ...]  # number of tokens of each response, S entries
    counts: tuple[int, ...]  # number of responses of each pair (two) or ranked list, P entries
    scores: Tensor  # (S,) score of each response in the data, NaN where the data has none
    statistics: TokenStatistics | None = None  # only if requested

    def sum(self, values: Tensor) -> Tensor:
        """Sums one value per token, (R,), over each response, (S,)."""
        # One sum per response: on CUDA, index_add would add in a different order each time.
        return torch.stack([part.sum() for part in values.split(self.lengths)])

    def best_and_worst(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """From one value per response, (S,), picks those of the best and the worst response of each pair, (P,) each."""
        if sum(self.counts) == 2 * len(self.counts):
            return values[0::2], values[1::2]
        lists = values.split(self.counts)
        return torch.stack([part[0] for part in lists]), torch.stack([part[-1] for part in lists])


class PairLogps(NamedTuple):
    """Log-probabilities of the responses of P pairs, in nats."""

    chosen: Tensor  # (P,) summed over response tokens
    rejected: Tensor  # (P,) likewise; for a ranked list, the worst response
    chosen_lengths: Tensor  # (P,) number of response tokens
    rejected_lengths: Tensor  # (P,)
    responses: Responses | None = None  # values per token, for objectives that need more than sums

    @classmethod
    def from_sums(
        cls,
        chosen: Sequence[float],
        rejected: Sequence[float],
        *,
        lengths: tuple[int, int] = (1, 1),
        scores: tuple[float, float] = (float("nan"), float("nan")),
    ) -> "PairLogps":
        """Builds log-probs by hand, to try an objective. Each sum is spread evenly over the tokens of its response.

        Args:
            chosen: Log-probability of each chosen response, P entries.
            rejected: Log-probability of each rejected response, P entries.
            lengths: Number of tokens of every chosen and of every rejected response.
            scores: Score of every chosen and of every rejected response, as the data would give them.
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
        """The same log-probs without gradients."""
        responses = self.responses
        if responses is not None:
            responses = responses._replace(token_logps=responses.token_logps.detach())
        return self._replace(chosen=self.chosen.detach(), rejected=self.rejected.detach(), responses=responses)


class Rewards(NamedTuple):
    """Implicit rewards of the responses of P pairs."""

    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)
    ordered: Tensor | None = None  # (P,) ranked lists: share of pairs that the rewards order correctly

    @property
    def margins(self) -> Tensor:
        """Reward of the chosen response minus that of the rejected one, (P,)."""
        return self.chosen - self.rejected

    @property
    def accuracies(self) -> Tensor:
        """1 where the chosen response has the higher reward, 0.5 where both are equal, else 0, (P,).

        For a ranked list it is ``ordered``.
        """
        return wins(self.margins) if self.ordered is None else self.ordered


def wins(margins: Tensor) -> Tensor:
    """1 for a positive margin, 0.5 for a zero margin, 0 for a negative one."""
    return torch.where(margins == 0, 0.5, (margins > 0).to(margins.dtype))


class Objective(nn.Module, ABC):
    """A preference loss: a function of the policy's and the reference's log-probs.

    Constructor arguments of a subclass are plain values or other objectives. The subclass stores each as an attribute
    of the same name. The attributes below declare what it needs besides sums of log-probs, and what it supports.

    Attributes:
        uses_reference: Whether it reads the reference's log-probs. If not, they are not computed.
        uses_statistics: Whether it reads ``Responses.statistics`` of the policy.
        uses_scores: Whether it reads ``Responses.scores``.
        ranks_lists: Whether it accepts ranked lists of more than two responses.
        pairwise: Whether the loss of a pair depends on that pair alone.
    """

    uses_reference = True
    uses_statistics = False
    uses_scores = False
    ranks_lists = False
    pairwise = True

    if TYPE_CHECKING:  # nn.Module.__call__ has no types

        def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor: ...  # noqa: D102

    @abstractmethod
    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """The implicit rewards of each pair."""

    @abstractmethod
    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""

    def end_step(self, kept: bool = True) -> None:
        """Ends an optimizer step. Objectives with running statistics update them here; all processes call it.

        Args:
            kept: Whether the optimizer step was applied. If not, the statistics collected during it are discarded.
        """

    def extra_repr(self) -> str:
        """The constructor arguments that are plain values, for ``repr``."""
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
        """The implicit rewards β·log(π/π_ref).

        The term of the prompt's partition function is left out: it cancels in the margin.

        References:
            Rafailov et al. 2023, arXiv:2305.18290, Eq. 5.
        """
        return Rewards(
            self.beta * (policy.chosen - reference.chosen),
            self.beta * (policy.rejected - reference.rejected),
        )


def positive(name: str, value: float) -> float:
    """Returns ``value`` if it is positive and finite.

    Raises:
        ValueError: If it is not; the message names the parameter.
    """
    if not 0 < value < float("inf"):
        raise ValueError(f"objective.{name} must be positive and finite, not {value}.")
    return value


def within(name: str, value: float, low: float, high: float, bounds: str = "[)") -> float:
    """Returns ``value`` if it lies between ``low`` and ``high``.

    In ``bounds``, a square bracket includes the end and a parenthesis excludes it.

    Raises:
        ValueError: If it does not; the message names the parameter.
    """
    above = value > low or (value == low and bounds[0] == "[")
    below = value < high or (value == high and bounds[1] == "]")
    if not (above and below):
        raise ValueError(f"objective.{name} must lie in {bounds[0]}{low}, {high}{bounds[1]}, not {value}.")
    return value

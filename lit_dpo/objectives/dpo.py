"""Direct Preference Optimization: logistic losses on the margin of implicit rewards."""

from abc import abstractmethod

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.objectives.base import LogRatioObjective, PairLogps, Rewards, within
from lit_dpo.objectives.divergences import Divergence, ReverseKL


def logistic(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The logistic loss -log σ(m) of each margin m, if labels are flipped with probability ``label_smoothing``."""
    if label_smoothing == 0:
        return -logsigmoid(margins)
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


class MarginObjective(LogRatioObjective):
    """An objective that depends only on the margin of implicit rewards. A subclass defines ``loss``.

    Args:
        beta: Strength of the pull towards the reference; positive.
        divergence: Divergence that keeps the policy close to the reference; by default the reverse KL divergence, as in
            DPO.

    Raises:
        ValueError: If a parameter is outside its range.
    """

    def __init__(self, beta: float = 0.1, divergence: Divergence | None = None) -> None:
        super().__init__(beta)
        self.divergence = ReverseKL() if divergence is None else divergence

    @abstractmethod
    def loss(self, margins: Tensor) -> Tensor:
        """The loss of each margin, (P,)."""

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """The implicit rewards β·f'(π/π_ref), up to a constant that cancels in the margin.

        References:
            Wang et al. 2023, arXiv:2309.16240 (f-DPO).
        """
        return Rewards(
            self.beta * self.divergence(policy.chosen - reference.chosen),
            self.beta * self.divergence(policy.rejected - reference.rejected),
        )

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        return self.loss(self.rewards(policy, reference).margins)


class Sigmoid(MarginObjective):
    """DPO: logistic loss on the difference of implicit rewards.

    Args:
        beta: Strength of the pull towards the reference; positive.
        label_smoothing: Probability that a label is flipped, in [0, 0.5).
        divergence: Divergence that keeps the policy close to the reference; by default the reverse KL divergence.

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; label smoothing (conservative DPO): Mitchell 2023.

    Example:
        >>> policy, reference = PairLogps.from_sums([-10.0], [-12.0]), PairLogps.from_sums([-11.0], [-11.0])
        >>> Sigmoid(beta=0.5)(policy, reference)  # log(1 + exp(-0.5 * 2))
        tensor([0.3133])
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, divergence: Divergence | None = None) -> None:
        super().__init__(beta, divergence)
        self.label_smoothing = within("label_smoothing", label_smoothing, 0, 0.5)

    def loss(self, margins: Tensor) -> Tensor:
        """The loss of each margin, (P,)."""
        return logistic(margins, self.label_smoothing)


class Robust(MarginObjective):
    """Provably robust DPO: an unbiased estimate of DPO's loss when labels are flipped with a known probability.

    Unlike that of ``Sigmoid`` with label smoothing, this loss is negative for pairs with a large positive margin.

    Args:
        beta: Strength of the pull towards the reference; positive.
        label_smoothing: Probability ε that a label is flipped, in [0, 0.5).
        divergence: Divergence that keeps the policy close to the reference; by default the reverse KL divergence.

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Ray Chowdhury et al. 2024, arXiv:2403.00409, Section 3.1; default β and ε from Section 6 and Appendix B.

    Example:
        >>> policy, reference = PairLogps.from_sums([-10.0], [-12.0]), PairLogps.from_sums([-11.0], [-11.0])
        >>> Robust(beta=0.5, label_smoothing=0.1)(policy, reference)  # (0.9 * 0.3133 - 0.1 * 1.3133) / 0.8
        tensor([0.1883])
    """

    def __init__(self, beta: float = 0.01, label_smoothing: float = 0.1, divergence: Divergence | None = None) -> None:
        super().__init__(beta, divergence)
        self.label_smoothing = within("label_smoothing", label_smoothing, 0, 0.5)

    def loss(self, margins: Tensor) -> Tensor:
        """The loss of each margin, (P,)."""
        flipped = self.label_smoothing
        return ((1 - flipped) * logistic(margins) - flipped * logistic(-margins)) / (1 - 2 * flipped)


class SigmoidNorm(MarginObjective):
    """Length-normalized DPO: implicit rewards are averaged over the tokens of a response.

    Args:
        beta: Strength of the pull towards the reference; positive. Averages over tokens are small,
            so β is large.
        label_smoothing: Probability that a label is flipped, in [0, 0.5).
        divergence: Divergence that keeps the policy close to the reference; by default the reverse KL divergence.

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Lambert et al. 2024, arXiv:2411.15124 (Tülu 3); default β from the paper.

    Example:
        >>> policy = PairLogps.from_sums([-10.0], [-12.0], lengths=(4, 2))
        >>> SigmoidNorm(beta=2.0)(policy, PairLogps.from_sums([-11.0], [-11.0]))  # log(1 + exp(-2 * (1/4 + 1/2)))
        tensor([0.2014])
    """

    def __init__(self, beta: float = 5.0, label_smoothing: float = 0.0, divergence: Divergence | None = None) -> None:
        super().__init__(beta, divergence)
        self.label_smoothing = within("label_smoothing", label_smoothing, 0, 0.5)

    def rewards(self, policy: PairLogps, reference: PairLogps) -> Rewards:
        """The implicit rewards β·f'(π/π_ref) / |y|."""
        whole = super().rewards(policy, reference)
        return Rewards(whole.chosen / policy.chosen_lengths, whole.rejected / policy.rejected_lengths)

    def loss(self, margins: Tensor) -> Tensor:
        """The loss of each margin, (P,)."""
        return logistic(margins, self.label_smoothing)

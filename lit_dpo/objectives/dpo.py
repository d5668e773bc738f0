"""Direct Preference Optimization, the logistic loss on the margin of implicit rewards."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_dpo.objectives.base import Objective, PairLogps


class Sigmoid(Objective):
    """DPO: logistic loss on the difference of implicit rewards.

    Args:
        beta: Strength of the pull towards the reference; positive.
        label_smoothing: Probability that a label is flipped, in [0, 0.5).

    Raises:
        ValueError: If a parameter is outside its range.

    References:
        Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; label smoothing (conservative DPO): Mitchell 2023.

    Example:
        >>> import torch
        >>> from lit_dpo.objectives import PairLogps
        >>> lengths = torch.tensor([4])
        >>> policy = PairLogps(torch.tensor([-10.0]), torch.tensor([-12.0]), lengths, lengths)
        >>> reference = PairLogps(torch.tensor([-11.0]), torch.tensor([-11.0]), lengths, lengths)
        >>> Sigmoid(beta=0.5)(policy, reference)  # log(1 + exp(-0.5 * 2))
        tensor([0.3133])
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__(beta)
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"objective.label_smoothing must lie in [0, 0.5), not {label_smoothing}.")
        self.label_smoothing = label_smoothing

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """The loss of each pair, (P,)."""
        margins = self.rewards(policy, reference).margins
        return -(1 - self.label_smoothing) * logsigmoid(margins) - self.label_smoothing * logsigmoid(-margins)

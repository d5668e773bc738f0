"""Where reference log-probs come from: the initial policy, which the adapters left untouched."""

import hashlib

from lit_dpo.data.batch import PairBatch
from lit_dpo.objectives import PairLogps
from lit_dpo.policy.policy import Policy


class InitialPolicy:
    """The policy as it was before training: adapters off, or the frozen copy of the adapter that training began with.

    Args:
        policy: The policy in training.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._remembered: dict[bytes, PairLogps] = {}

    def logps(self, batch: PairBatch) -> PairLogps:
        """Log-probs of P pairs, without gradients."""
        with self.policy.initial():
            return self.policy.logps(batch)

    def remembered_logps(self, batch: PairBatch) -> PairLogps:
        """The same, computed once for each batch of the same pairs in the same order: for evaluation, run after run."""
        digest = hashlib.blake2b(repr(batch.segments).encode(), digest_size=16)
        digest.update(batch.input_ids.cpu().numpy().tobytes())
        key = digest.digest()
        if key not in self._remembered:
            self._remembered[key] = PairLogps(*(part.cpu() for part in self.logps(batch)))
        device = batch.input_ids.device
        return PairLogps(*(part.to(device) for part in self._remembered[key]))

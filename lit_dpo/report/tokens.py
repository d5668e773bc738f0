"""A pair's log-probs per token ──► which words the preference was learned from.

The reward of a response is the sum of β·(log π - log π_ref) over its tokens, so each token has a share of it. Read as
the advantage of a step, the share says how much better the policy finds this token than the reference does (Rafailov
et al. 2024, arXiv:2404.12358, section 4).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_dpo.base.tokenizer import token_texts
from lit_dpo.data.tokenization import TokenizedPair
from lit_dpo.files.secrets import shorten_paths
from lit_dpo.objectives import Objective, Rewards
from lit_dpo.training.step import BatchRecord


class PairTokens(NamedTuple):
    """What was measured at each response token of one pair."""

    pair: TokenizedPair
    policy: tuple[np.ndarray, np.ndarray]  # log-probs of the trained tokens of chosen and rejected, in nats
    reference: tuple[np.ndarray, np.ndarray] | None  # the same of the reference; None without one
    rewards: tuple[float, float]  # implicit rewards of chosen and rejected

    @property
    def margin(self) -> float:
        """Reward of the chosen response minus that of the rejected one."""
        return self.rewards[0] - self.rewards[1]

    @property
    def moved(self) -> float | None:
        """Mean of ½(log π - log π_ref)² over the tokens of both responses: how far the policy has moved, in nats.

        None without a reference.
        """
        if self.reference is None:
            return None
        ratios = np.concatenate(self.log_ratios())
        return float(np.square(ratios).mean() / 2) if len(ratios) else 0.0

    def log_ratios(self) -> tuple[np.ndarray, np.ndarray]:
        """Log π - log π_ref of the trained tokens of chosen and rejected; log π without a reference."""
        if self.reference is None:
            return self.policy
        return self.policy[0] - self.reference[0], self.policy[1] - self.reference[1]


@dataclass(frozen=True)
class ResponseView:
    """A response, token by token. Of a token that is not trained, the numbers are None."""

    tokens: list[str]
    policy: list[float | None]  # log-probs, in nats
    reference: list[float | None]  # all None without a reference
    rewards: list[float | None]  # shares of the response's implicit reward
    reward: float


@dataclass(frozen=True)
class TokenView:
    """A pair, token by token."""

    source: str
    row: int  # -1 for a pair of one's own
    why: list[str]  # why it is shown: best, worst, most changed
    margin: float
    moved: float | None  # nats per token; None without a reference
    prompt: str
    chosen: ResponseView
    rejected: ResponseView

    @property
    def name(self) -> str:
        """Where the pair comes from, in words."""
        return self.source if self.row < 0 else f"{self.source}, row {self.row}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def without_folders(self) -> "TokenView":
        """The same with a source without folders of this machine, for a page that is handed on."""
        return replace(self, source=str(shorten_paths(self.source)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TokenView":
        """The inverse of ``to_dict``."""
        chosen, rejected = (ResponseView(**values[name]) for name in ("chosen", "rejected"))
        return cls(**{**values, "chosen": chosen, "rejected": rejected})


def rewards_of(record: BatchRecord, objective: Objective) -> Rewards:
    """The implicit rewards of a batch, also without a reference."""
    policy = record.policy
    nothing = policy._replace(chosen=policy.chosen * 0, rejected=policy.rejected * 0)
    return objective.rewards(policy, nothing if record.reference is None else record.reference)


def pair_tokens(record: BatchRecord, objective: Objective, places: Sequence[int]) -> list[PairTokens]:
    """What was measured at the tokens of some pairs of a batch. Of a ranked list, the best and the worst response.

    Args:
        record: The batch, with its log-probs.
        objective: The objective, which defines rewards.
        places: The pairs' places in the batch.
    """
    if not places:
        return []
    policy, reference, rewards = record.policy, record.reference, rewards_of(record, objective)
    chosen, rejected = rewards.chosen.tolist(), rewards.rejected.tolist()
    assert policy.responses is not None
    values = [policy.responses.token_logps.float().cpu().numpy()]
    if reference is not None and reference.responses is not None:
        values.append(reference.responses.token_logps.float().cpu().numpy())
    batch = record.batch.to("cpu")  # at once, not part by part
    lengths, pairs, start, found = batch.response_lengths, batch.pairs(), 0, []
    stops = np.cumsum([0, *lengths])
    for place, segment in enumerate(record.batch.segments):
        end = start + len(segment.responses)
        if place in places:
            sides = [(stops[one], stops[one + 1]) for one in (start, end - 1)]
            logps = [(row[slice(*sides[0])].copy(), row[slice(*sides[1])].copy()) for row in values]
            of_reference = logps[1] if len(logps) > 1 else None
            found.append(PairTokens(pairs[place], logps[0], of_reference, (chosen[place], rejected[place])))
        start = end
    return found


def token_view(tokens: PairTokens, tokenizer: PreTrainedTokenizerBase, why: Sequence[str] = ()) -> TokenView:
    """A pair with the text of each token and its share of the reward.

    Args:
        tokens: What was measured.
        tokenizer: The tokenizer.
        why: Why the pair is shown.
    """
    pair, ratios = tokens.pair, tokens.log_ratios()
    views = []
    for side, place in ((0, 0), (1, -1)):
        ids = (pair.chosen, pair.rejected)[side]
        runs = pair.runs[place] if pair.runs else (len(ids),)
        trained = np.array([number % 2 == 0 for number, run in enumerate(runs) for _ in range(run)], bool)
        reward = tokens.rewards[side]
        # β for rewards that are β·log(π/π_ref); in general, each token has its proportion of the response's reward.
        total = float(ratios[side].sum(dtype=np.float64))
        scale = reward / total if abs(total) > 1e-12 else 0.0
        reference = None if tokens.reference is None else tokens.reference[side]
        views.append(
            ResponseView(
                token_texts(tokenizer, ids, pair.prompt),
                _spread(tokens.policy[side], trained),
                _spread(reference, trained),
                _spread(scale * ratios[side], trained),
                reward,
            )
        )
    prompt = str(tokenizer.decode(pair.prompt, clean_up_tokenization_spaces=False))
    return TokenView(pair.source, pair.row, list(why), tokens.margin, tokens.moved, prompt, *views)


def _spread(values: np.ndarray | None, trained: np.ndarray) -> list[float | None]:
    """One number for each token, from those of the trained ones; None for the others."""
    given = iter([] if values is None else values.astype(np.float64).round(6).tolist())
    return [next(given, None) if one else None for one in trained]

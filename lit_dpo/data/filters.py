"""Which pairs are left out although they could be trained on. Each filter is counted in the report."""

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from lit_dpo.data.formats import PreferencePair

Action: TypeAlias = Literal["keep", "drop"]
TIED = "the scores of both responses are equal"
AGAINST = "the rejected response has the higher score"
DUPLICATE, CONTRADICTORY, LEAKED = "duplicate of another pair", "contradicts another pair", "prompt also held out"
NEAR_DUPLICATE, NEARLY_LEAKED = "near duplicate of another pair", "prompt nearly the same as one held out"


@dataclass(frozen=True)
class Filters:
    """What to leave out. What a filter finds and does not leave out is counted too.

    Args:
        ties: Pairs whose responses have equal scores.
        min_margin: Pairs whose scores differ by less than this are left out; 0 leaves out none.
        duplicates: Pairs with the same prompt and the same responses, in the same order, as an earlier pair.
        contradictions: Pairs with the same prompt and responses as another pair, in the other order. Both are left out.
        near_duplicates: Least similarity, in (0, 1], of pairs that repeat an earlier pair with few words changed; such
            pairs are left out. ``leaks`` then finds prompts that are so similar, too. 0.7 is a usual value; null looks
            for none.
        leaks: Training pairs whose prompt is also among the held-out pairs.
        exclude: Regular expression. Pairs with a match in the prompt or in a response are left out; null excludes none.

    Raises:
        ValueError: If ``min_margin`` is negative, or if ``exclude`` is no regular expression.
    """

    ties: Action = "keep"
    min_margin: float = 0.0
    duplicates: Action = "keep"
    contradictions: Action = "keep"
    near_duplicates: float | None = None
    leaks: Action = "drop"
    exclude: str | None = None

    def __post_init__(self) -> None:
        if not self.min_margin >= 0:
            raise ValueError(f"data.filters.min_margin must not be negative, but is {self.min_margin}.")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise ValueError(f"data.filters.near_duplicates must be in (0, 1], but is {self.near_duplicates}.")
        try:
            re.compile(self.exclude or "")
        except re.error as error:
            raise ValueError(f"data.filters.exclude={self.exclude!r} is no regular expression: {error}.") from error

    @property
    def of_row_settings(self) -> list[str | float | None]:
        """The settings that ``of_row`` depends on."""
        return [self.ties, self.min_margin, self.exclude]

    def of_row(self, pair: PreferencePair) -> tuple[str | None, list[str]]:
        """The reason to leave out a pair by itself, or None, and what is to be told about it if it is kept."""
        if self.exclude is not None:
            turns = (*pair.prompt, *(turn for response in pair.responses for turn in response))
            if any(re.search(self.exclude, str(turn["content"])) for turn in turns):
                return f"matches data.filters.exclude={self.exclude}", []
        if not pair.scores:
            return None, []
        margin = pair.scores[0] - pair.scores[-1]
        if margin == 0 and self.ties == "drop":
            return "tied scores", []
        if self.min_margin > 0 and margin < self.min_margin:
            return f"score margin below {self.min_margin:g}", []
        notes = [TIED] if margin == 0 else [AGAINST] if margin < 0 else []
        return None, notes

    def of_set(self, keys: "np.ndarray", swapped: "np.ndarray") -> dict[str, tuple[Action, "np.ndarray"]]:
        """What pairs show only beside one another: for each finding, what to do, and which pairs, (P,) bool.

        Args:
            keys: Digest of each pair, (P,).
            swapped: Digest of each pair with its responses in the other order, (P,).
        """
        _, first = np.unique(keys, return_index=True)
        duplicate = np.ones(len(keys), bool)
        duplicate[first] = False
        return {
            CONTRADICTORY: (self.contradictions, np.isin(keys, swapped)),
            DUPLICATE: (self.duplicates, duplicate),
        }

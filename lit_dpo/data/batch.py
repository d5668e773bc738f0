"""TokenizedPairs ──► PairBatch: one flat row of tokens without padding, with each prompt stored once.

For each pair the row holds prompt, chosen and rejected response. For a ranked list it holds the prompt and all
responses from best to worst. Positions of every response continue from the end of the prompt, so each response is at
the same distance from the prompt as in a row of its own::

    token     p0 p1 p2 | c0 c1 c2 c3 | r0 r1 | p0 p1 | ...
    position   0  1  2 |  3  4  5  6 |  3  4 |  0  1 | ...
    predicts         ╰──► c0 and r0       (the prompt's last token predicts the first token of both)
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lit_dpo.data.tokenization import TokenizedPair
from lit_dpo.objectives import PairLogps, Responses, TokenStatistics


class Segment(NamedTuple):
    """Numbers of tokens of the parts of one pair, or of one ranked list, in the flat row."""

    prompt: int
    responses: tuple[int, ...]  # from best to worst; two for a pair
    runs: tuple[tuple[int, ...], ...] = ()  # of each response, tokens that are trained and that are not, in turns

    @property
    def trained(self) -> tuple[int, ...]:
        """Number of trained tokens of each response."""
        return tuple(sum(run[::2]) for run in self.runs) if self.runs else self.responses

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all parts."""
        return self.prompt + sum(self.responses)


class PaddedRows(NamedTuple):
    """A batch as S separate rows of N tokens, one per response (chosen, rejected, …), padded on the right."""

    input_ids: Tensor  # (S, N)
    attention_mask: Tensor  # (S, N) 1 on tokens, 0 on padding
    response_mask: Tensor  # (S, N) True on trained tokens


@dataclass(frozen=True)
class PairBatch:
    """P pairs with S responses as one row of T tokens. R of these are the trained tokens of responses.

    Attributes:
        input_ids: Token ids, (T,).
        position_ids: Position of each token in its own conversation, (T,).
        predictors: For each trained token, the index in the row of the token that predicts it, (R,). Pairs are in
            order; within a pair, responses go from best to worst.
        targets: Id of each trained token, (R,), in the same order.
        lengths: Number of trained tokens of each response, (S,), in the same order.
        scores: Score of each response in the data, (S,); NaN where the data has none.
        segments: Lengths of the parts of each pair, P entries.
        origins: Source and row number of each pair, P entries.
        keys: Digest of each pair's token ids, P entries.
        groups: Number of each pair's source among those of its data set, P entries.
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    lengths: Tensor
    scores: Tensor
    segments: tuple[Segment, ...]
    origins: tuple[tuple[str, int], ...]
    keys: tuple[bytes, ...]
    groups: tuple[int, ...] = ()

    @classmethod
    def from_pairs(cls, pairs: Sequence[TokenizedPair]) -> Self:
        """Builds the flat row of P pairs, in the given order."""
        ids: list[int] = []
        positions: list[int] = []
        predictors: list[int] = []
        targets: list[int] = []
        for pair in pairs:
            num_prompt = len(pair.prompt)
            last_prompt = len(ids) + num_prompt - 1
            ids += pair.prompt
            positions += range(num_prompt)
            for number, response in enumerate(pair.responses):
                start = len(ids)
                before = [last_prompt, *range(start, start + len(response) - 1)]
                trained = _trained(pair.runs[number]) if pair.runs else None
                predictors += before if trained is None else itertools.compress(before, trained)
                targets += response if trained is None else itertools.compress(response, trained)
                ids += response
                positions += range(num_prompt, num_prompt + len(response))
        segments = tuple(Segment(len(pair.prompt), tuple(map(len, pair.responses)), pair.runs) for pair in pairs)
        return cls(
            input_ids=torch.tensor(ids),
            position_ids=torch.tensor(positions),
            predictors=torch.tensor(predictors),
            targets=torch.tensor(targets),
            lengths=torch.tensor([length for segment in segments for length in segment.trained]),
            scores=torch.tensor([score for pair in pairs for score in pair.scores or [math.nan] * len(pair.responses)]),
            segments=segments,
            origins=tuple((pair.source, pair.row) for pair in pairs),
            keys=tuple(pair.key for pair in pairs),
            groups=tuple(pair.group for pair in pairs),
        )

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.segments)

    @property
    def response_lengths(self) -> tuple[int, ...]:
        """Number of trained tokens of each response, S entries, in the order of ``targets``."""
        return tuple(length for segment in self.segments for length in segment.trained)

    def pairs(self) -> list[TokenizedPair]:
        """Rebuilds the pairs from the flat row."""
        found, start, response = [], 0, 0
        for segment, (source, row) in zip(self.segments, self.origins, strict=True):
            parts = self.input_ids[start : start + segment.num_tokens].split((segment.prompt, *segment.responses))
            prompt, chosen, *between, rejected = (part.tolist() for part in parts)
            scores = self.scores[response : response + len(segment.responses)]
            known = () if scores.isnan().any() else tuple(scores.tolist())
            found.append(TokenizedPair(prompt, chosen, rejected, source, row, tuple(between), known, segment.runs))
            start, response = start + segment.num_tokens, response + len(segment.responses)
        return found

    def sum_responses(self, logps: Tensor, statistics: TokenStatistics | None = None) -> PairLogps:
        """Sums the log-probs of trained tokens, (R,), over each response."""
        counts = tuple(len(segment.responses) for segment in self.segments)
        responses = Responses(logps, self.response_lengths, counts, self.scores, statistics)
        sums = responses.best_and_worst(responses.sum(logps))
        return PairLogps(*sums, *responses.best_and_worst(self.lengths), responses)

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device. From page-locked memory, the host does not wait for the copies to a GPU."""
        pinned = self.input_ids.is_pinned()
        return self._map(lambda tensor: tensor.to(device, non_blocking=pinned))

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory; called by the DataLoader."""
        return self._map(Tensor.pin_memory)

    def padded(self, pad_token_id: int = 0) -> PaddedRows:
        """The same pairs as separate padded rows, for architectures that do not support the flat row."""
        rows: list[Tensor] = []
        masks: list[Tensor] = []
        start = 0
        for segment in self.segments:
            tokens = self.input_ids[start : start + segment.num_tokens]
            prompt, *responses = tokens.split((segment.prompt, *segment.responses))
            for number, response in enumerate(responses):
                rows.append(torch.cat([prompt, response]))
                trained = _trained(segment.runs[number]) if segment.runs else [True] * len(response)
                masks.append(torch.tensor([False] * len(prompt) + trained, device=tokens.device))
            start += len(tokens)

        def pad(parts: list[Tensor], value: int) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

        ones = [torch.ones_like(row) for row in rows]
        return PaddedRows(pad(rows, pad_token_id), pad(ones, 0), pad(masks, 0))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            input_ids=function(self.input_ids),
            position_ids=function(self.position_ids),
            predictors=function(self.predictors),
            targets=function(self.targets),
            lengths=function(self.lengths),
            scores=function(self.scores),
        )


def _trained(runs: Sequence[int]) -> list[bool]:
    """Whether each token of a response is trained, from the lengths of trained and untrained runs, in turns."""
    return [number % 2 == 0 for number, run in enumerate(runs) for _ in range(run)]

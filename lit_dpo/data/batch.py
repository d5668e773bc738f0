"""TokenizedPairs ──► PairBatch: one flat row of tokens, no padding, each prompt once.

For each pair the row holds prompt, chosen, rejected. Positions restart after the prompt, so a response sees the prompt
at the same distance as if it stood alone::

    token     p0 p1 p2 | c0 c1 c2 c3 | r0 r1 | p0 p1 | ...
    position   0  1  2 |  3  4  5  6 |  3  4 |  0  1 | ...
    predicts         ╰──► c0 and r0       (the prompt's last token predicts the first of both)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from lit_dpo.data.tokenization import TokenizedPair
from lit_dpo.objectives import PairLogps


class Segment(NamedTuple):
    """Lengths, in tokens, of one pair's three parts in the flat row."""

    prompt: int
    chosen: int
    rejected: int


class PaddedRows(NamedTuple):
    """The same pairs as 2·P separate rows (chosen, rejected, chosen, …) of N tokens, padded on the right."""

    input_ids: Tensor  # (2P, N)
    attention_mask: Tensor  # (2P, N) 1 on tokens, 0 on padding
    response_mask: Tensor  # (2P, N) True on response tokens


@dataclass(frozen=True)
class PairBatch:
    """P pairs as one row of T tokens, with R response tokens among them.

    Attributes:
        input_ids: Token ids, (T,).
        position_ids: Position of each token in its own conversation, (T,).
        predictors: For each response token, the index in the row of the token that predicts it, (R,); pairs in order,
            within each the chosen response before the rejected one.
        targets: Id of each response token, (R,).
        segments: Lengths of the parts of each pair, P of them.
        origins: Source and row number of each pair, P of them.
        keys: Digest of each pair's token ids, P of them.
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    segments: tuple[Segment, ...]
    origins: tuple[tuple[str, int], ...]
    keys: tuple[bytes, ...]

    @classmethod
    def from_pairs(cls, pairs: Sequence[TokenizedPair]) -> Self:
        """Lays P pairs out, in their order."""
        ids: list[int] = []
        positions: list[int] = []
        predictors: list[int] = []
        targets: list[int] = []
        for pair in pairs:
            num_prompt = len(pair.prompt)
            last_prompt = len(ids) + num_prompt - 1
            ids += pair.prompt
            positions += range(num_prompt)
            for response in (pair.chosen, pair.rejected):
                start = len(ids)
                predictors += [last_prompt, *range(start, start + len(response) - 1)]
                targets += response
                ids += response
                positions += range(num_prompt, num_prompt + len(response))
        return cls(
            input_ids=torch.tensor(ids),
            position_ids=torch.tensor(positions),
            predictors=torch.tensor(predictors),
            targets=torch.tensor(targets),
            segments=tuple(Segment(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs),
            origins=tuple((pair.source, pair.row) for pair in pairs),
            keys=tuple(pair.key for pair in pairs),
        )

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.segments)

    @property
    def response_lengths(self) -> list[int]:
        """Tokens of each response, in the order of ``targets``, 2·P of them."""
        return [length for segment in self.segments for length in (segment.chosen, segment.rejected)]

    def sum_responses(self, logps: Tensor) -> PairLogps:
        """Sums of the response tokens' log-probs (R,), by response."""
        # Summed one by one: index_add would sum in another order each time on CUDA.
        sums = torch.stack([part.sum() for part in logps.split(self.response_lengths)])
        lengths = torch.tensor(self.response_lengths, device=sums.device)
        return PairLogps(sums[0::2], sums[1::2], lengths[0::2], lengths[1::2])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory; called by the DataLoader."""
        return self._map(Tensor.pin_memory)

    def padded(self, pad_token_id: int = 0) -> PaddedRows:
        """The same pairs as separate padded rows, for architectures that cannot take the flat row."""
        rows: list[Tensor] = []
        masks: list[Tensor] = []
        start = 0
        for prompt, chosen, rejected in self.segments:
            tokens = self.input_ids[start : start + prompt + chosen + rejected]
            for response in (tokens[prompt : prompt + chosen], tokens[prompt + chosen :]):
                rows.append(torch.cat([tokens[:prompt], response]))
                masks.append(torch.arange(len(rows[-1]), device=tokens.device) >= prompt)
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
        )

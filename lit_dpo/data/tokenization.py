"""Rendered texts ──► TokenizedPair: token ids of prompt and responses, and truncation."""

import hashlib
import itertools
from array import array
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lit_dpo.data.encoding import Encoder
from lit_dpo.data.rendering import Rendered

Overlong: TypeAlias = Literal["truncate", "drop"]


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of a pair, or of a ranked list. All responses share the same prompt ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    source: str = ""  # name of the data source, for messages
    row: int = -1  # row number in the source, counted from 0
    between: tuple[list[int], ...] = ()  # ranked list: responses between best and worst, in order
    scores: tuple[float, ...] = ()  # the data's scores, from best to worst; empty if it has none
    # For each response, from best to worst, numbers of tokens that are trained and that are not, in turns, beginning
    # with trained ones. Empty if all tokens of all responses are trained.
    runs: tuple[tuple[int, ...], ...] = ()
    group: int = 0  # number of the source, in a data set of several
    stored_key: bytes = field(default=b"", compare=False, repr=False)  # ``key``, if it is known already

    @property
    def responses(self) -> tuple[list[int], ...]:
        """All responses, from best to worst."""
        return (self.chosen, *self.between, self.rejected)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the prompt and all responses."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def key(self) -> bytes:
        """A 16-byte digest of the token ids. Besides the model, log-probs depend on nothing else."""
        if self.stored_key:
            return self.stored_key
        parts = (self.prompt, *self.responses)
        ids = array("q", [*map(len, parts), *itertools.chain(*parts, *self.runs)])
        return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Truncation:
    """Length limits of a pair, in tokens, and what happens to longer pairs.

    A prompt keeps its *last* ``max_prompt_length`` tokens, because the question is at its end. A response keeps its
    *first* tokens, at most ``max_response_length``, and only as many as fit into ``max_length`` after the prompt. If no
    response token fits, the pair is dropped. With ``overlong="drop"``, every pair that would be cut is dropped.

    Args:
        max_length: Maximum number of tokens of the prompt and one response together; None sets no limit.
        max_prompt_length: Maximum number of tokens of the prompt; None sets no limit.
        max_response_length: Maximum number of tokens of a response; None sets no limit.
        overlong: What to do with a pair that is too long: ``truncate`` cuts it, ``drop`` leaves it out.
    """

    max_length: int | None = 1024
    max_prompt_length: int | None = None
    max_response_length: int | None = None
    overlong: Overlong = "truncate"

    def __post_init__(self) -> None:
        for name in ("max_length", "max_prompt_length", "max_response_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, not {value}.")
        if self.overlong not in ("truncate", "drop"):
            raise ValueError(f"data.overlong must be 'truncate' or 'drop', not {self.overlong!r}.")

    def __call__(self, pair: TokenizedPair) -> TokenizedPair | str:
        """Returns the pair, truncated if necessary, or the reason to leave it out."""
        prompt = pair.prompt if self.max_prompt_length is None else pair.prompt[-self.max_prompt_length :]
        room = [limit for limit in (self.max_response_length,) if limit is not None]
        if self.max_length is not None:
            room.append(self.max_length - len(prompt))
        if room and min(room) < 1:
            return "prompt leaves no room for a response"
        end = min(room, default=None)
        responses = [response[:end] for response in pair.responses]
        if self.overlong == "drop" and (prompt != pair.prompt or responses != list(pair.responses)):
            return "longer than allowed"
        kept = [place for place, response in enumerate(responses) if response not in responses[:place]]
        if len(kept) < 2:
            return "identical after truncation"
        chosen, *between, rejected = (responses[place] for place in kept)
        scores = tuple(pair.scores[place] for place in kept) if pair.scores else ()
        runs = tuple(_cut(pair.runs[place], len(responses[place])) for place in kept) if pair.runs else ()
        return TokenizedPair(prompt, chosen, rejected, pair.source, pair.row, tuple(between), scores, runs, pair.group)


def _cut(runs: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The runs of the first ``length`` tokens."""
    kept = []
    for run in runs:
        kept.append(min(run, length))
        length -= kept[-1]
        if not length:
            break
    return tuple(kept)


def tokenize(rendered: Rendered, encode: Encoder, scores: tuple[float, ...] = ()) -> TokenizedPair:
    """Tokenizes prompt and responses without truncation.

    The response's ids are those that follow the prompt's in the whole conversation. Where a token would straddle the
    boundary, prompt and response are tokenized separately. So all responses share the prompt's ids. The tokenizer's EOS
    token is appended only if the template writes nothing after the answer.

    Args:
        rendered: The texts.
        encode: The tokenizer.
        scores: The data's scores, from best to worst response.
    """
    prompt = encode(rendered.prompt)
    # The ids before the last boundary in the prompt are the same whatever follows.
    tail = rendered.prompt[encode.last_boundary(rendered.prompt) :]
    start = encode(tail)
    eos = encode.tokenizer.eos_token_id
    responses, runs = [], []
    for parts in rendered.responses:
        if len(parts) == 1:
            ids = encode(tail + parts[0].text)
            pieces = [ids[len(start) :] if ids[: len(start)] == start else encode(parts[0].text)]
        else:
            pieces = [encode(part.text) for part in parts]
        if not rendered.ends and eos is not None:
            pieces[-1] = [*pieces[-1], eos]
        responses.append(list(itertools.chain(*pieces)))
        runs.append(_runs([(len(piece), part.trained) for piece, part in zip(pieces, parts, strict=True)]))
    chosen, *between, rejected = responses
    partly = any(len(run) > 1 for run in runs)
    return TokenizedPair(prompt, chosen, rejected, between=tuple(between), scores=scores, runs=tuple(runs) * partly)


def _runs(pieces: list[tuple[int, bool]]) -> tuple[int, ...]:
    """Lengths of trained and untrained runs, in turns, of pieces with a length each."""
    runs = [0]
    for length, trained in pieces:
        if trained != (len(runs) % 2 == 1):
            runs.append(0)
        runs[-1] += length
    return tuple(runs)

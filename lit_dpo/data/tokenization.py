"""PreferencePair ──► TokenizedPair: chat template, boundary between prompt and response, and truncation."""

import hashlib
import itertools
import os.path
from array import array
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lit_dpo.data.formats import PreferencePair

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
        parts = (self.prompt, *self.responses)
        ids = array("q", [*map(len, parts), *itertools.chain(*parts)])
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
        return replace(pair, prompt=prompt, chosen=chosen, rejected=rejected, between=tuple(between), scores=scores)


def tokenize(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase) -> TokenizedPair:
    """Renders prompt and responses with the chat template and tokenizes them without truncation.

    Prompt and whole conversation are tokenized. Nearly always the ids of the conversation begin with those of the
    prompt, and the rest are the ids of the response. Otherwise a token straddles the boundary; then prompt and response
    are tokenized separately. So all responses share the prompt's ids. The tokenizer's EOS token is appended only if the
    template writes nothing after the answer.

    Raises:
        ValueError: If the chat template rejects the messages, or if the rendered conversation does not begin with the
            rendered prompt.
    """

    def render(*answer: dict[str, object], generate: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template([*pair.prompt, *answer], tokenize=False, add_generation_prompt=generate)
        )

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    answers = (pair.chosen, *pair.between, pair.rejected)
    try:
        conversations = [render(answer) for answer in answers]
        generation = render(generate=True)
    except TemplateError as error:
        raise ValueError(f"the chat template rejects the messages: {error}") from error
    # With a generation prompt, a template may open the answer differently (e.g. with a thinking tag). The prompt then
    # is the common prefix of the generation text and all conversations. It must contain the whole last user turn.
    prompt_text = os.path.commonprefix([generation, *conversations])  # noqa: RUF071  texts, not paths
    if prompt_text != generation and not prompt_text.startswith(render()):
        raise ValueError(
            "A conversation rendered by the chat template does not begin with the rendered prompt: "
            f"the prompt ends with {generation[-60:]!r}, the conversation continues differently."
        )
    prompt = encode(prompt_text)
    responses = []
    for text, answer in zip(conversations, answers, strict=True):
        ids = encode(text)
        response = ids[len(prompt) :] if ids[: len(prompt)] == prompt else encode(text[len(prompt_text) :])
        content = answer["content"]
        if isinstance(content, str) and text.rstrip().endswith(content.rstrip()) and tokenizer.eos_token_id is not None:
            response = [*response, tokenizer.eos_token_id]
        responses.append(response)
    chosen, *between, rejected = responses
    return TokenizedPair(prompt, chosen, rejected, between=tuple(between), scores=pair.scores)

"""PreferencePair ──► TokenizedPair: the chat template rendered once, one boundary, one rule of truncation."""

import hashlib
import os.path
from array import array
from dataclasses import dataclass
from typing import Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from lit_dpo.data.pairs import PreferencePair

Overlong: TypeAlias = Literal["truncate", "drop"]


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of a pair. Both responses follow the very same prompt ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    source: str = ""  # where the pair came from, for messages
    row: int = -1  # counted from 0 in the source

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and both responses."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def key(self) -> bytes:
        """A digest of the three parts' token ids, 16 bytes: all that log-probs depend on besides the model."""
        parts = (self.prompt, self.chosen, self.rejected)
        ids = array("q", [*map(len, parts), *self.prompt, *self.chosen, *self.rejected])
        return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Truncation:
    """How long a pair may be, in tokens, and what happens to one that is longer.

    A prompt keeps its *last* ``max_prompt_length`` tokens, the question being at its end. A response keeps its *first*
    tokens, up to ``max_response_length`` and up to what the prompt leaves of ``max_length``. A prompt that leaves no
    room for a single response token drops the pair. With ``overlong="drop"`` every pair that would be cut is dropped.

    Args:
        max_length: Most tokens of prompt and response together.
        max_prompt_length: Most tokens of the prompt.
        max_response_length: Most tokens of a response.
        overlong: Whether to cut what is too long or to drop the pair.
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
        """Applies the rule: the pair, perhaps shorter, or the reason to leave it out."""
        prompt = pair.prompt if self.max_prompt_length is None else pair.prompt[-self.max_prompt_length :]
        room = [limit for limit in (self.max_response_length,) if limit is not None]
        if self.max_length is not None:
            room.append(self.max_length - len(prompt))
        if room and min(room) < 1:
            return "prompt leaves no room for a response"
        end = min(room, default=None)
        cut = TokenizedPair(prompt, pair.chosen[:end], pair.rejected[:end], pair.source, pair.row)
        if self.overlong == "drop" and cut != pair:
            return "longer than allowed"
        if cut.chosen == cut.rejected:
            return "identical after truncation"
        return cut


def tokenize(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase) -> TokenizedPair:
    """Renders prompt and responses with the chat template and tokenizes them, uncut.

    A response's ids are those of the whole conversation after the prompt's ids, where these are its beginning, as
    nearly always. Where a token would straddle the boundary, prompt and response are tokenized apart, so that the
    boundary is a token boundary and both responses share the prompt's ids. The tokenizer's EOS token is appended only
    where the template writes nothing after the answer.

    Raises:
        ValueError: If the chat template does not begin a conversation with its own prompt.
    """

    def render(*answer: dict[str, object], generate: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template([*pair.prompt, *answer], tokenize=False, add_generation_prompt=generate)
        )

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    conversations = [render(pair.chosen), render(pair.rejected)]
    generation = render(generate=True)
    # A template may open the answer differently when it generates (a thinking tag, say): then the prompt ends where
    # prompt and both conversations part, but never before the end of the last user turn.
    prompt_text = os.path.commonprefix([generation, *conversations])  # noqa: RUF071  texts, not paths
    if prompt_text != generation and not prompt_text.startswith(render()):
        raise ValueError(
            "The chat template does not begin a conversation with its own prompt: "
            f"the prompt ends with {generation[-60:]!r}, the conversation goes on otherwise."
        )
    prompt = encode(prompt_text)
    responses = []
    for text, answer in zip(conversations, (pair.chosen, pair.rejected), strict=True):
        ids = encode(text)
        response = ids[len(prompt) :] if ids[: len(prompt)] == prompt else encode(text[len(prompt_text) :])
        content = answer["content"]
        if isinstance(content, str) and text.rstrip().endswith(content.rstrip()) and tokenizer.eos_token_id is not None:
            response = [*response, tokenizer.eos_token_id]
        responses.append(response)
    chosen, rejected = responses
    return TokenizedPair(prompt, chosen, rejected)

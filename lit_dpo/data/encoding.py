"""Text ──► token ids. Words that came before are looked up instead of being encoded again."""

import itertools
import operator
import random
import re
from functools import cache, cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

# Where a text may be cut, from the most places to the fewest. Each is tried with the tokenizer before it is used.
BOUNDARIES = (
    r"(?<=\S)(?=[ \t\r\n])|(?<=[^\W_])(?=[.,!?;:)])",  # before whitespace, and before a mark after a letter
    r"(?<=\S)(?=[ \t\r\n])",  # before any whitespace after a word
    r"(?<=[^\W_])(?=[ \t\r\n])|(?<=\S)(?= \S)",  # the same, but after a mark only before a single space
    r"(?<=\S)(?= \S)",  # before a single space
)
MOST_WORDS = 2**19  # that are kept, about 100 MB
LONGEST_WORD = 32  # that is kept, in characters
# A letter of each kind, digits, marks, and what contractions, paths and code are made of
SIGNS = (*"aBéΔ中1'.,-/(<", "\u0301", "😀", "'s")


class Encoder:
    """Encodes texts, with exactly the ids that the tokenizer gives.

    Most tokenizers never join a word with the space before the next one. Then a text may be cut there, and the ids of
    each word may be kept. Text has few different words, so this takes a fraction of the time. Whether a tokenizer
    allows it is found out once (``boundary``). If it does not, the tokenizer encodes whole texts.

    Args:
        tokenizer: The tokenizer. No special tokens are added.
        keep_words: Whether to keep the ids of words. To find out whether the tokenizer allows it takes about the time
            of a hundred pairs.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, keep_words: bool = True) -> None:
        self.tokenizer, self.keep_words = tokenizer, keep_words
        self.known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """The ids of a text."""
        if self.boundary is None:
            return self._whole(text)
        words = self.boundary.split(text)
        found = list(map(self.known.get, words))
        if None in found:
            found = [self._word(word) if ids is None else ids for word, ids in zip(words, found, strict=True)]
        return list(itertools.chain.from_iterable(found))  # type: ignore[arg-type]

    def last_boundary(self, text: str) -> int:
        """The last place where the text may be cut, whatever follows it; 0 if there is none."""
        if self.boundary is None:
            return 0
        return max((found.end() for found in [self._up_to_last.match(text)] if found), default=0)

    @cached_property
    def boundary(self) -> re.Pattern[str] | None:
        """Matches where texts may be cut for this tokenizer; None if nowhere."""
        if self._backend is None or not self.keep_words:
            return None
        added = self.tokenizer.added_tokens_decoder.values()
        if any(token.lstrip or token.rstrip or token.single_word for token in added):
            return None  # such a token takes the spaces beside it
        decoder = self._backend.decoder
        vocabulary = [token if decoder is None else decoder.decode([token]) for token in self.tokenizer.get_vocab()]
        texts = _probes()
        expected = [self._whole(text) for text in texts]
        for pattern in BOUNDARIES:
            boundary = re.compile(pattern)
            found = (list(itertools.chain(*map(self._word, boundary.split(text)))) for text in texts)
            # A token that reaches across a boundary could be made of parts of two words.
            if not any(map(boundary.search, vocabulary)) and all(map(operator.eq, found, expected)):
                return boundary
        return None

    @cached_property
    def _up_to_last(self) -> re.Pattern[str]:
        assert self.boundary is not None
        return re.compile(f"(?s:.*)(?:{self.boundary.pattern})")

    @cached_property
    def _backend(self) -> Any:
        """The tokenizer in Rust, which takes a text without further ado; None if the tokenizer does more than it."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = bool(getattr(self.tokenizer, "split_special_tokens", False))
            for text in (*_probes()[::100], *map(str, self.tokenizer.all_special_tokens)):
                if backend.encode(text, add_special_tokens=False).ids != self._ids(text):
                    return None  # the tokenizer does more than its backend
        return backend

    def _word(self, word: str) -> list[int]:
        """The ids of a word, which are kept."""
        ids = self.known.get(word) or self._whole(word)
        if len(word) <= LONGEST_WORD and len(self.known) < MOST_WORDS:
            self.known[word] = ids
        return ids

    def _whole(self, text: str) -> list[int]:
        """The ids of a text, from the tokenizer."""
        if self._backend is None:
            return self._ids(text)
        return self._backend.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]


@cache
def _probes() -> list[str]:
    """Texts with all that a tokenizer may tell apart on both sides of a boundary."""
    spaces = [
        *" \t\r\n",
        "  ",
        "\n\n",
        "\n ",
        " \n",
        "\r\n",
        "\t\t",
        "   ",
        "\n\n\n",
        " \n ",
        "\n  ",
        "\u00a0 ",
        " \u3000",
    ]
    texts = [left + middle + right for left in SIGNS for middle in (*spaces, *SIGNS) for right in (*SIGNS, "")]
    draw = random.Random(0)  # noqa: S311
    signs = [*SIGNS, *spaces, *" " * 10]
    return texts + ["".join(draw.choices(signs, k=12)) for _ in range(1000)]

"""Ids of words that are kept are the ids that the tokenizer gives, for every kind of tokenizer."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_dpo.data.encoding import Encoder

WORDS = (
    "It's 3,141.59 o'clock; we'll see... Don't! (Really?) «Très bien» naïve Zoë — 你好,世界。今日は  tabs\tand\r\n"
    "lines\n\n\n- a\n  - b\n    return x[1:]  # ok\n\nمرحبا بكم Привет, мир! ที่นี่ 👩‍👩‍👧 e\u0301te\u0301 \u00a0nbsp "  # noqa: RUF001
    "\u3000wide 12345678 a_b __init__ http://x.y/z?q=1&r=2 "
)
TEXT = Path(__file__).read_text(encoding="utf-8") + 3 * WORDS
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(made: Tokenizer, trainer: type = trainers.BpeTrainer, **options: object) -> PreTrainedTokenizerFast:
    special = ["<|im_start|>", "<|im_end|>", "<unk>"]
    made.train_from_iterator([TEXT], trainer(vocab_size=700, special_tokens=special, show_progress=False, **options))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")


def byte_level(*splits: pre_tokenizers.PreTokenizer, use_regex: bool = False) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    made.decoder = decoders.ByteLevel()
    return trained(made, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def metaspace(scheme: str, model: str = "BPE") -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE() if model == "BPE" else models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    if model == "BPE":
        return trained(made)
    return trained(made, trainers.UnigramTrainer, unk_token="<unk>")


def without_words() -> PreTrainedTokenizerFast:
    """As in Gemma and Llama 2: merges know no words, so tokens may reach across spaces."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Replace("▁", " ")
    return trained(made)


def prepending() -> PreTrainedTokenizerFast:
    """As in older files of Llama 2: each text begins with a space that it does not have."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Replace("▁", " ")
    made.pre_tokenizer = pre_tokenizers.Split(Regex("▁[^▁]*"), "isolated")
    return trained(made)


def word_pieces() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return trained(made, trainers.WordPieceTrainer)


def stripping() -> PreTrainedTokenizerFast:
    """As in Phi-3: a special token takes the spaces after it."""
    tokenizer = byte_level(use_regex=True)
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)])
    return tokenizer


# The kind of tokenizer, and whether its words are kept.
KINDS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], bool]] = {
    "GPT-2": (lambda: byte_level(use_regex=True), True),
    "SmolLM2": (lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True), True),
    "Llama 3": (lambda: byte_level(split(LLAMA3)), True),
    "Qwen": (lambda: byte_level(split(LLAMA3.replace("{1,3}", ""))), True),
    "GPT-4o": (lambda: byte_level(split(O200K)), True),
    "Metaspace, always": (lambda: metaspace("always"), True),
    "Metaspace, first": (lambda: metaspace("first"), True),
    "Unigram": (lambda: metaspace("always", "Unigram"), True),
    "WordPiece": (word_pieces, True),
    "merges across spaces": (without_words, False),
    "a space before each text": (prepending, False),
    "a token that strips": (stripping, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_tokenizer(kind: str) -> None:
    make, keeps = KINDS[kind]
    tokenizer = make()
    encode = Encoder(tokenizer)
    assert (encode.boundary is not None) is keeps, encode.boundary
    draw = random.Random(1)  # noqa: S311
    for number in range(200):
        start = draw.randrange(len(TEXT))
        text = TEXT[start : start + draw.randrange(200)]
        if number % 4 == 0:
            text = "".join(draw.choices([*TEXT, "<|im_start|>", "<|im_end|>", "<|end|>", " ", "\n"], k=60))
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encode(text) == expected, text
        assert encode(text) == expected, "looked up"
        cut = encode.last_boundary(text)
        assert encode(text[:cut]) + encode(text[cut:] + "more, 12 of it") == encode(text + "more, 12 of it"), text


def test_words_are_kept_only_where_it_pays() -> None:
    encode = Encoder(byte_level(use_regex=True), keep_words=False)
    assert encode.boundary is None
    assert encode("two words") == encode.tokenizer("two words")["input_ids"]
    assert not encode.known


def test_the_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_dpo.data.encoding.MOST_WORDS", 3)
    encode = Encoder(byte_level(use_regex=True))
    text = "one two three four five " + "x" * 100
    assert encode(text) == encode.tokenizer(text)["input_ids"]
    assert len(encode.known) <= 3


class Lowering(PreTrainedTokenizerFast):
    """A tokenizer that does more than its backend."""

    def __call__(self, text: str, *args: Any, **options: Any) -> Any:
        return super().__call__(text.lower(), *args, **options)


@pytest.mark.parametrize("keep_words", [True, False])
def test_a_tokenizer_that_does_more_than_its_backend(keep_words: bool) -> None:
    tokenizer = Lowering(tokenizer_object=byte_level(use_regex=True).backend_tokenizer)
    encode = Encoder(tokenizer, keep_words)
    assert encode("A Path IS long") == tokenizer("a path is long")["input_ids"]

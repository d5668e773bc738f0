"""A base model's name ──► its tokenizer, and the text of each of its tokens."""

from collections.abc import Sequence

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_dpo.base.names import BaseModelError, resolve_base


def load_tokenizer(
    base: str,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, with a padding token.

    Args:
        base: Hub id, local folder, GGUF file or ``package:NAME``.
        gguf_file: Name of a GGUF file inside a hub repository.
        revision: Revision of the hub repository.
        trust_remote_code: Whether to run tokenizer code that comes with the repository.

    Raises:
        BaseModelError: If the tokenizer cannot be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            resolve_base(base, gguf_file, revision), revision=revision, trust_remote_code=trust_remote_code
        )
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BaseModelError(base, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that there is a chat template.

    Raises:
        ValueError: If there is none.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, so prompts and responses cannot be told "
            "apart. Use an instruction-tuned model, set data.chat_template to a template or its file, or set "
            "data.pretemplated=true if the texts are rendered already."
        )


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """The text of each token. Joined, the texts are what the tokens say together.

    A token on its own may be half of a character, and some tokenizers drop the blank before a word that begins a text.
    The text of a character of several tokens stands at the last of them; the others have none.

    Args:
        tokenizer: The tokenizer.
        ids: The tokens, (N,).
        before: Tokens before them.
    """
    texts = []
    context = [*before][-4:]
    known, every = len(context), [*context, *ids]
    start = 0
    for end in range(known + 1, len(every) + 1):
        said = str(tokenizer.decode(every[start:end], clean_up_tokenization_spaces=False))
        if said.endswith("\ufffd") and end < len(every) and end - known < 8:  # half of a character
            texts.append("")
            continue
        earlier = str(tokenizer.decode(every[start:known], clean_up_tokenization_spaces=False)) if known > start else ""
        texts.append(said[len(earlier) :])
        start, known = known, end
    return texts

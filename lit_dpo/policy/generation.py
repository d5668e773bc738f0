"""Prompts ──► answers of the initial and of the aligned policy, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from lit_dpo.base.tokenizer import require_chat_template
from lit_dpo.policy.policy import Policy
from lit_dpo.policy.precision import float16_autocast


class Prompt(NamedTuple):
    """A prompt: its text for display, and its token ids up to where the answer begins."""

    text: str
    ids: list[int]
    conversation: str = ""  # all that the tokens say, if it is more than the text and what templates add


class Answer(NamedTuple):
    """An answer to a prompt."""

    text: str
    ids: list[int]  # its tokens, with the one that ends it
    finished: bool  # whether the model ended it; if not, ``max_new_tokens`` cut it

    @property
    def shown(self) -> str:
        """The text, with an ellipsis if it is cut."""
        return self.text if self.finished else f"{self.text} …"


@dataclass(frozen=True)
class Comparison:
    """Two answers to one prompt: before and after alignment."""

    prompt: str
    base: str
    aligned: str


def user_prompt(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    system: str | None = None,
    template_kwargs: dict[str, Any] | None = None,
) -> Prompt:
    """The prompt of one user message.

    Args:
        text: The message.
        tokenizer: The tokenizer, with its chat template.
        system: System message before it.
        template_kwargs: Arguments to the chat template.

    Raises:
        ValueError: If the tokenizer has no chat template.
    """
    require_chat_template(tokenizer)
    turns = [{"role": "system", "content": system}] if system else []
    rendered = tokenizer.apply_chat_template(
        [*turns, {"role": "user", "content": text}],
        tokenize=False,
        add_generation_prompt=True,
        **(template_kwargs or {}),
    )
    return Prompt(text, tokenizer(rendered, add_special_tokens=False)["input_ids"])


def compare(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    batch_size: int = 8,
) -> list[Comparison]:
    """Answers each prompt with the initial and with the aligned policy.

    Args:
        policy: The policy.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        max_new_tokens: Maximum number of tokens of an answer. An answer that is cut ends in an ellipsis.
        temperature: Temperature of sampling; 0 for greedy decoding.
        batch_size: Number of prompts in a batch.
    """
    comparisons = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        ids = [prompt.ids for prompt in chunk]
        with policy.initial():
            base = answers(policy, tokenizer, ids, max_new_tokens, temperature)
        aligned = answers(policy, tokenizer, ids, max_new_tokens, temperature)
        comparisons += [
            Comparison(prompt.text, *(one.shown for one in both))
            for prompt, *both in zip(chunk, base, aligned, strict=True)
        ]
    return comparisons


@torch.no_grad()
def answers(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: TextStreamer | None = None,
) -> list[Answer]:
    """Answers a batch of prompts with the adapter that is active.

    Args:
        policy: The policy.
        tokenizer: Its tokenizer.
        ids: Token ids of the prompts.
        max_new_tokens: Maximum number of tokens of an answer.
        temperature: Temperature of sampling; 0 for greedy decoding.
        streamer: Takes the tokens of a single prompt as they are written.
    """
    was_training = policy.training
    policy.eval()
    try:
        return _answers(policy, tokenizer, ids, max_new_tokens, temperature, streamer)
    finally:
        policy.train(was_training)


def _answers(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float,
    streamer: TextStreamer | None,
) -> list[Answer]:
    width = max(len(prompt) for prompt in ids)
    device = policy.model.device
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in ids], device=device)
    attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in ids], device=device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    ends = policy.model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    ends = sorted({*ends, tokenizer.eos_token_id} - {None})
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=ends, use_cache=True, **sampling
    )
    # compilation does not pay for one token at a time
    with torch.compiler.set_stance("force_eager"), float16_autocast(policy.model):
        outputs = policy.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            streamer=streamer,
            synced_gpus=policy.sharded,  # all processes take part until the last of them has its answers
        )
    found = []
    for tokens in outputs[:, width:].tolist():
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        written = tokens if end is None else tokens[: end + 1]  # what follows pads the batch
        text = str(tokenizer.decode(written, skip_special_tokens=True)).strip()
        found.append(Answer(text, written, end is not None))
    return found


def side_by_side(comparisons: Sequence[Comparison], width: int = 100) -> str:
    """The answers as two columns of text."""
    import textwrap

    column = (width - 3) // 2
    lines = []
    for comparison in comparisons:
        lines += ["", *textwrap.wrap(f"» {comparison.prompt}", width)]
        lines.append(f"{'base':<{column}} │ aligned")
        lines.append("─" * column + "─┼─" + "─" * column)
        left, right = (
            [line for part in text.splitlines() for line in textwrap.wrap(part, column) or [""]]
            for text in (comparison.base, comparison.aligned)
        )
        for row in range(max(len(left), len(right))):
            first = left[row] if row < len(left) else ""
            second = right[row] if row < len(right) else ""
            lines.append(f"{first:<{column}} │ {second}".rstrip())
    return "\n".join(lines)


def markdown(comparisons: Sequence[Comparison]) -> str:
    """The answers as a Markdown document."""
    blocks = ["# Base against aligned answers"]
    for comparison in comparisons:
        blocks.append(f"## {comparison.prompt}")
        for name, text in (("Base", comparison.base), ("Aligned", comparison.aligned)):
            quoted = "\n".join(f"> {line}" for line in text.splitlines() or [""])
            blocks.append(f"**{name}**\n\n{quoted}")
    return "\n\n".join(blocks) + "\n"

"""``python -m lit_dpo chat``: a conversation in the terminal, with the base, the aligned model, or both."""

import sys
from pathlib import Path

import torch

from lit_dpo.evaluation.chat import HELP, Conversation
from lit_dpo.evaluation.trained import TrainedQuantization, find_trained


def chat(
    ckpt_path: str | None = None,
    adapter: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    seed: int = 42,
    pairs: str = "chat_pairs.jsonl",
    base: str | None = None,
    quantization: TrainedQuantization = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Talks to an aligned model, to its base, or to both. Two answers and your choice become a preference pair.

    Args:
        ckpt_path: Checkpoint of a run.
        adapter: Folder or hub id of an exported adapter, instead of a checkpoint.
        system: System message; by default that of the training.
        max_new_tokens: Maximum number of tokens of an answer.
        temperature: Temperature of sampling; 0 for greedy decoding.
        seed: Seed of sampling.
        pairs: File that /save adds preference pairs to, of JSON lines. ``fit`` reads it.
        base: Base of ``adapter``, if it is not where its configuration says.
        quantization: Quantization of the base of ``adapter`` in training; ``auto`` is as its run or its export tells.
        trust_remote_code: Whether to run model code that comes with the base model's repository.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError("--max_new_tokens is at least 1, and --temperature at least 0.")
    trained = find_trained(
        ckpt_path, adapter, base=base, quantization=quantization, trust_remote_code=trust_remote_code
    )
    torch.manual_seed(seed)
    conversation = Conversation(
        trained.load().policy,
        trained.tokenizer,
        _write,
        Path(pairs),
        system=trained.data.get("system") if system is None else system,
        template_kwargs=trained.data.get("chat_template_kwargs"),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    _write(f"{HELP}\n")
    reads = sys.stdin.isatty()
    if reads:
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  arrow keys and history
    while True:
        try:
            line = input("you> ") if reads else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            _write("\n")
            return
        if not line and not reads:
            return
        try:
            if not conversation.say(line):
                return
        except KeyboardInterrupt:  # ends the answer, not the conversation
            _write("\n[stopped]\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

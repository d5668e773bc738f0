"""``python -m lit_dpo generate``: base and aligned answers side by side, from a checkpoint or an adapter."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from lit_dpo.evaluation.prompts import collect_prompts
from lit_dpo.evaluation.trained import TrainedQuantization, find_trained
from lit_dpo.files.console import say
from lit_dpo.policy.generation import Comparison, compare, markdown, side_by_side


def generate(
    ckpt_path: str | None = None,
    adapter: str | None = None,
    prompt: list[str] | str | None = None,
    prompts: str | None = None,
    held_out: int = 0,
    source: str | None = None,
    output: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    batch_size: int = 8,
    base: str | None = None,
    quantization: TrainedQuantization = "auto",
    seed: int = 42,
    trust_remote_code: bool = False,
) -> None:
    """Answers prompts with the base and with the aligned model, side by side.

    Args:
        ckpt_path: Checkpoint of a run. Its model and its held-out data are used.
        adapter: Folder or hub id of an exported adapter, instead of a checkpoint.
        prompt: A prompt, or a list of prompts.
        prompts: File of prompts: one per line, or .jsonl with a ``prompt`` in each line.
        held_out: Number of held-out prompts to answer, from the checkpoint's data or from ``source``.
        source: Data with the held-out prompts, in any form that data.source takes.
        output: File to write instead of printing: .md, .jsonl or .txt.
        max_new_tokens: Maximum number of tokens of an answer.
        temperature: Temperature of sampling; 0 for greedy decoding.
        batch_size: Number of prompts that are answered together.
        base: Base of ``adapter``, if it is not where its configuration says.
        quantization: Quantization of the base of ``adapter`` in training; ``auto`` is as its run or its export tells.
        seed: Seed for sampling.
        trust_remote_code: Whether to run model code that comes with the base model's repository.

    Raises:
        ValueError: If neither or both of checkpoint and adapter are given, or no prompt.
        FileNotFoundError: If a file or folder does not exist.
    """
    if output is not None and Path(output).suffix not in (".md", ".jsonl", ".txt"):
        raise ValueError(f"--output {output}: the name must end in .md, .jsonl or .txt.")

    torch.manual_seed(seed)
    trained = find_trained(
        ckpt_path, adapter, base=base, quantization=quantization, trust_remote_code=trust_remote_code
    )
    questions = collect_prompts(trained, prompt, prompts, held_out, source)
    module, tokenizer = trained.load(), trained.tokenizer
    comparisons = compare(
        module.policy,
        tokenizer,
        questions,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
    )
    if output is None:
        say(side_by_side(comparisons, min(120, shutil.get_terminal_size((100, 24)).columns)))
        return
    formats: dict[str, Callable[[list[Comparison]], str]] = {
        ".md": markdown,
        ".jsonl": lambda rows: "".join(json.dumps(asdict(row)) + "\n" for row in rows),
        ".txt": side_by_side,
    }
    Path(output).write_text(formats[Path(output).suffix](comparisons), encoding="utf-8")
    sys.stderr.write(f"Wrote {len(comparisons)} comparisons to {output}.\n")

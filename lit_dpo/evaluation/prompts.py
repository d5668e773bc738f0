"""Prompts of the command line, of a file and of held-out pairs ──► token ids up to where the answer begins."""

import json
from pathlib import Path

from lit_dpo.evaluation.trained import Trained
from lit_dpo.policy.generation import Prompt, user_prompt


def collect_prompts(
    trained: Trained,
    prompt: list[str] | str | None = None,
    prompts: str | None = None,
    held_out: int = 0,
    source: str | None = None,
) -> list[Prompt]:
    """Prompts for a model, with its chat template and the system message of its training.

    Args:
        trained: The model.
        prompt: A prompt, or a list of prompts.
        prompts: File of prompts: one per line, or .jsonl with a ``prompt`` in each line.
        held_out: Number of held-out prompts, of its training or of ``source``; a prompt of several pairs counts once.
        source: Data with the held-out prompts.

    Raises:
        ValueError: If there is none, or if a line of the file is no prompt.
        FileNotFoundError: If the file does not exist.
    """
    if not (prompt or prompts or held_out):
        raise ValueError("Give prompts: --prompt TEXT, --prompts FILE or --held_out NUMBER.")
    if source is not None and not held_out:
        raise ValueError("--source holds held-out prompts: give their --held_out NUMBER too.")
    texts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if prompts is not None:
        texts += read_prompts(Path(prompts))
    options = {"system": trained.data.get("system"), "template_kwargs": trained.data.get("chat_template_kwargs")}
    found = [user_prompt(text, trained.tokenizer, **options) for text in texts]
    if held_out:
        pairs, tokenizer = trained.held_out(source), trained.tokenizer
        different: dict[tuple[int, ...], Prompt] = {}
        for index in range(len(pairs)):
            text, ids = pairs.prompt(index)
            different.setdefault(tuple(ids), Prompt(text, ids))
        for one in list(different.values())[:held_out]:
            alone = tokenizer.chat_template and user_prompt(one.text, tokenizer, **options).ids == one.ids
            whole = "" if alone else str(tokenizer.decode(one.ids, skip_special_tokens=True)).strip()
            found.append(one._replace(conversation=whole))
    return found


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: one per line, or .jsonl with a ``prompt`` in each line.

    Raises:
        ValueError: If a line of a .jsonl file has no prompt.
        FileNotFoundError: If the file does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"--prompts {path}: there is no such file.")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(str(json.loads(line)["prompt"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object with a 'prompt'.") from error
    return found

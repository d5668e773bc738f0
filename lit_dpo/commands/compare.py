"""``python -m lit_dpo compare``: a local page with two models side by side, and votes."""

from pathlib import Path

from lit_dpo.evaluation.prompts import collect_prompts
from lit_dpo.evaluation.trained import TrainedQuantization, find_checkpoint, find_trained
from lit_dpo.files.console import say
from lit_dpo.report.arena import Arena, Side
from lit_dpo.report.compare_page import build_page, launch

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def compare(
    ckpt_path: str | None = None,
    adapter: str | None = None,
    against: str | None = None,
    blind: bool = True,
    prompts: str | None = None,
    held_out: int = 0,
    source: str | None = None,
    output: str = "compare",
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    seed: int = 42,
    host: str = "127.0.0.1",
    port: int | None = None,
    base: str | None = None,
    quantization: TrainedQuantization = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Opens a page on which two models answer side by side. Votes become preference pairs and a win rate.

    Args:
        ckpt_path: Checkpoint of the model whose win rate is kept.
        adapter: Folder or hub id of an exported adapter, instead of a checkpoint.
        against: Checkpoint or adapter of the other model, which is loaded too; by default the model before training.
        blind: Whether the models change places at random and are named after the vote.
        prompts: File of prompts for a button: one per line, or .jsonl with a ``prompt`` in each line.
        held_out: Number of held-out prompts for the same button, from the checkpoint's data or from ``source``.
        source: Data with the held-out prompts, in any form that data.source takes.
        output: Folder for ``pairs.jsonl``, which ``fit`` reads, and ``votes.jsonl``. Votes that are there count.
        system: System message; by default that of the training.
        max_new_tokens: Maximum number of tokens of an answer; the page changes it.
        temperature: Temperature of sampling; 0 for greedy decoding; the page changes it.
        seed: Seed of sampling and of the places.
        host: Address to listen on. The default is reached from this machine alone; another one by everybody who
            reaches this machine, without a password.
        port: Port; by default the next free one from 7860 on.
        base: Base of ``adapter``, if it is not where its configuration says.
        quantization: Quantization of the base of ``adapter`` in training; ``auto`` is as its run or its export tells.
        trust_remote_code: Whether to run model code that comes with a repository.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError("--max_new_tokens is at least 1, and --temperature at least 0.")
    trained = find_trained(
        ckpt_path, adapter, base=base, quantization=quantization, trust_remote_code=trust_remote_code
    )
    first = Side(str(ckpt_path or adapter), trained)
    if against is None:
        first, second = Side("aligned", trained), Side("base", trained, initial=True)
    elif against.endswith(".ckpt") or Path(against).is_file():
        path = Path(against)
        second = Side(against, find_checkpoint(path, trust_remote_code=trust_remote_code, option="--against"))
    else:
        other = find_trained(None, against, trust_remote_code=trust_remote_code, option="--against")
        second = Side(against, other)
    texts = []
    if prompts is not None or held_out or source is not None:
        found = collect_prompts(trained, None, prompts, held_out, source)
        texts = [one.text for one in found if not one.conversation]
        if len(texts) < len(found):
            say(f"{len(found) - len(texts)} prompts of several turns are left out: the page asks one at a time.")
    arena = Arena(first, second, Path(output), blind=blind, seed=seed)
    system = trained.data.get("system") if system is None else system
    page = build_page(arena, texts, max_new_tokens, temperature, system)
    for side in arena.sides:
        side.trained.load_once()
    address = launch(page, host, port, block=False)
    if host not in LOOPBACK:
        say(f"Warning: everybody who reaches {host} can use this page. There is no password.")
    say(f"Open {address} in a browser. Ctrl-C ends it. Votes go to {output}/.")
    page.block_thread()

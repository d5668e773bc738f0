"""Peak memory of ``fit`` for several sizes of batches and lengths, to hold against ``python -m lit_dpo estimate``.

    python -m tests.benchmarks.memory --batch_sizes 1 4 16 --lengths 256 1024

Prints JSON lines. On a CPU each case is a process of its own, because memory of a process is never given back.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lit_dpo.cli.app import main as lit_dpo
from tests.benchmarks.bases import ARCHITECTURES, EMBEDDED, random_base


def rows_file(folder: Path, length: int) -> str:
    """Pairs of a prompt of a quarter of ``length`` tokens and responses of three eighths each, of one token a word."""
    path = folder / f"pairs_{length}.jsonl"
    words = ("the", "good", "bad")
    numbers = (length // 4, 3 * length // 8, 3 * length // 8)
    with path.open("w", encoding="utf-8") as file:
        for number in range(96):
            prompt, chosen, rejected = (f" {word}" * count for word, count in zip(words, numbers, strict=True))
            file.write(json.dumps({"prompt": f"{number}{prompt}", "chosen": chosen, "rejected": rejected}) + "\n")
    return str(path)


def options(base: str, data: str, batch_size: int, recompute: bool, steps: int = 2) -> list[str]:
    """The options of ``fit`` and of ``estimate``."""
    found = ["--model.base", base, "--data.source", data, "--data.val_size", "8", "--data.batch_size", str(batch_size)]
    found += ["--data.max_length", "null", "--model.gradient_checkpointing", str(recompute).lower()]
    found += ["--model.compile", "false", "--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "1"]
    return [*found, "--trainer.num_sanity_val_steps", "0"]


def measured(base: str, data: str, batch_size: int, recompute: bool, root: Path) -> dict[str, Any]:
    """Peak memory of one ``fit``, in GB."""
    os.chdir(root)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    arguments = [*options(base, data, batch_size, recompute), "--samples.num_prompts", "0", "--report.num_pairs", "0"]
    arguments += ["--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false"]
    lit_dpo(["fit", *arguments, "--run_name", "memory"])
    newest = max(root.glob("runs/memory/version_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    summary = json.loads((newest / "summary.json").read_text(encoding="utf-8"))
    return {"hardware": summary["hardware"], "precision": summary["precision"], "peak_gb": summary["peak_memory_gb"]}


def main() -> None:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=EMBEDDED, help=f"a base, or one of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--recompute", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--one", action="store_true", help="one case, in this process")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = arguments.base
        if base in ARCHITECTURES:
            base = random_base(base, root, EMBEDDED)
        for length in arguments.lengths:
            data = rows_file(root, length)
            for batch_size in arguments.batch_sizes:
                for recompute in map(bool, arguments.recompute):
                    case = {"base": arguments.base, "batch_size": batch_size, "length": length, "recompute": recompute}
                    if torch.cuda.is_available() or arguments.one:
                        print(json.dumps(case | measured(base, data, batch_size, recompute, root)), flush=True)
                        continue
                    command = [sys.executable, "-m", "tests.benchmarks.memory", "--one", "--base", base]
                    command += ["--batch_sizes", str(batch_size), "--lengths", str(length)]
                    command += ["--recompute", str(int(recompute))]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    lines = [line for line in done.stdout.splitlines() if line.startswith('{"base"')]
                    print(lines[-1] if lines else json.dumps(case | {"error": done.stderr[-300:]}), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()

"""Speed and memory against TRL: ``python -m tests.benchmarks.throughput --against trl --data FILE.jsonl``.

Each side runs in a process of its own, in turns, on the same pairs in the same order. Prints JSON lines: one a run,
then one with the ratios, each the median over the rounds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from statistics import median
from typing import Any

import torch

from lit_dpo.files.cache import cache_dir
from tests.benchmarks.bases import ARCHITECTURES, EMBEDDED, random_base
from tests.benchmarks.sides import Task, run_lit_dpo, run_probe, run_trl

SIDES = {
    "probe": run_probe,
    "lit_dpo": run_lit_dpo,
    "trl_defaults": lambda task: run_trl(task, best=False),
    "trl_best": lambda task: run_trl(task, best=True),
}


def main() -> None:
    """Runs all sides in turns, or, as a child of itself, one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=["trl", "none"], default="trl")
    parser.add_argument("--data", required=True, help="JSONL file of preference pairs with message lists")
    parser.add_argument("--pairs", type=int, default=32, help="pairs that are timed in each run")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--base", default=EMBEDDED)
    parser.add_argument(
        "--architecture", choices=sorted(ARCHITECTURES), help="random weights of this shape as the base"
    )
    parser.add_argument("--precision", choices=["bf16-mixed", "16-mixed", "32-true"], default="bf16-mixed")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warmup_batches", type=int, default=3)
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    base = arguments.base
    if arguments.architecture:
        base = random_base(arguments.architecture, cache_dir() / "random")
    task = Task(
        base=base,
        data=arguments.data,
        pairs=arguments.pairs,
        warmup=max(arguments.warmup_batches, 1) * arguments.batch_size,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        precision=arguments.precision,
        gradient_checkpointing=arguments.gradient_checkpointing,
        compile=not torch.cuda.is_available(),
    )
    if arguments.side:
        result = SIDES[arguments.side](task)
        print(json.dumps({"side": arguments.side, **result}))
        return
    task.rows()  # fails early, and fills the caches that both sides share
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number in range(arguments.rounds):
        for side in SIDES if arguments.against == "trl" else ("probe", "lit_dpo"):
            run = {"round": number, **in_own_process(side)}
            runs[side].append(run)
            print(json.dumps(run), flush=True)
    print(json.dumps(ratios(runs)))


def in_own_process(side: str) -> dict[str, Any]:
    """One run of one side, with an empty cache of its own for whatever the run computes."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_DATASETS_CACHE": folder, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "tests.benchmarks.throughput", *sys.argv[1:], "--side", side]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The run of {side} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Ours over TRL's, medians over the rounds."""

    def middle(side: str, key: str) -> float:
        return median(run[key] for run in runs[side])

    ours, rate = middle("lit_dpo", "pairs_per_second"), middle("probe", "matmul_flops_per_second")
    summary = {"fraction_of_floor": middle("lit_dpo", "floor_flops_per_second") / rate}
    if "trl_defaults" in runs:
        defaults, best = middle("trl_defaults", "pairs_per_second"), middle("trl_best", "pairs_per_second")
        summary |= {
            "ratio_vs_trl_defaults": ours / defaults,
            "ratio_vs_trl_best": ours / best,
            "ratio_cold_epoch": middle("lit_dpo", "pairs_per_second_cold") / defaults,
            "memory_ratio": middle("lit_dpo", "peak_memory_gb") / middle("trl_defaults", "peak_memory_gb"),
            "trl_fraction_of_floor": middle("trl_defaults", "floor_flops_per_second") / rate,
        }
    return {name: round(value, 4) for name, value in summary.items()}


if __name__ == "__main__":
    main()

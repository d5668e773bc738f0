"""All that only a GPU shows, in one run of some minutes: ``python -m tests.benchmarks.gpu --data FILE.jsonl``.

Prints JSON lines: the card, the tests with the marker ``gpu``, a profile of a step, speed and memory against TRL, and
the longest response that fits. ``--parts`` chooses among them. ``--tiny`` runs all of it on a CPU, with small models.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig

from lit_dpo.data.batch import PairBatch
from lit_dpo.data.tokenization import TokenizedPair
from lit_dpo.objectives import Sigmoid
from lit_dpo.policy.adapters import LORA
from lit_dpo.policy.loading import load_policy
from lit_dpo.policy.policy import Policy
from lit_dpo.policy.precision import PRECISIONS, quantization_for
from tests.benchmarks.bases import EMBEDDED, random_base
from tests.benchmarks.floor import matmul_rate, synchronize
from tests.benchmarks.sides import Task, fit_lit_dpo, run_lit_dpo, run_trl, shape

PARTS = ("tests", "profile", "speed", "longest")
# architecture, precision, pairs in a batch, recomputation, batches timed, sides
SPEED = [
    ("qwen2.5-7b", "bf16-mixed", 8, True, 3, "lit_dpo trl_best trl_defaults"),
    ("qwen2.5-0.5b", "bf16-mixed", 8, False, 6, "lit_dpo lit_dpo_compiled trl_best trl_defaults"),
    ("qwen2.5-7b", "bf16-mixed", 1, False, 12, "lit_dpo lit_dpo_compiled trl_best trl_defaults"),
    ("qwen2.5-7b", "bf16-mixed", 8, False, 3, "lit_dpo trl_defaults"),
    ("qwen2.5-0.5b", "bf16-mixed", 1, False, 16, "lit_dpo trl_best trl_defaults"),
    ("qwen2.5-7b", "16-mixed", 8, True, 3, "lit_dpo trl_defaults"),
    ("qwen2.5-0.5b", "16-mixed", 8, False, 6, "lit_dpo trl_defaults"),
]
TINY = [("tiny", "32-true", 2, False, 1, "lit_dpo")]


def main() -> None:
    """Runs the parts, in order, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL file of preference pairs with message lists")
    parser.add_argument("--tokenizer", default=EMBEDDED, help="tokenizer of the random models")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--cases", nargs="+", type=int, help="which of the cases of SPEED, by number")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=520, help="no case is begun after this many seconds")
    parser.add_argument("--tiny", action="store_true", help="small models, for a CPU")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not arguments.tiny:
        parser.error("there is no GPU: --tiny runs small models on the CPU.")
    end = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, device, Path(folder), end)
        say("device", name=name_of(device), torch=torch.__version__, triton=torch.version.cuda)
        for part in arguments.parts:
            getattr(bench, part)()


def say(part: str, **values: Any) -> None:
    """Prints one JSON line."""
    plain = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in values.items()}
    print(json.dumps({"part": part, **plain}), flush=True)


def name_of(device: torch.device) -> str:
    """Name of the card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


class Bench:
    """The parts of the run."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device, folder: Path, end: float) -> None:
        self.arguments, self.device, self.folder, self.end = arguments, device, folder, end

    def base(self, architecture: str) -> str:
        """Folder of a random model."""
        return random_base(architecture, self.folder, self.arguments.tokenizer)

    def task(self, architecture: str, precision: str, batch_size: int, recompute: bool, batches: int) -> Task:
        """What both sides do."""
        return Task(
            base=self.base(architecture),
            data=self.arguments.data,
            pairs=batches * batch_size,
            warmup=batches * batch_size,
            batch_size=batch_size,
            max_length=self.arguments.max_length,
            precision=precision,
            gradient_checkpointing=recompute,
            repeat=True,
        )

    def tests(self) -> None:
        """The tests that need a GPU."""
        marker = "not slow and not gpu" if self.arguments.tiny else "gpu"
        where = "tests/benchmarks/test_floor.py" if self.arguments.tiny else "tests"
        # Warnings of other releases of the libraries than the tested ones are no errors here.
        command = [
            sys.executable,
            "-m",
            "pytest",
            where,
            "-m",
            marker,
            "-q",
            "-rf",
            "--tb=short",
            "-o",
            "filterwarnings=",
        ]
        start = time.monotonic()
        done = subprocess.run([*command, "-p", "no:cacheprovider"], capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        if done.returncode:
            print("\n".join(lines[-150:]), flush=True)
        told = [line for line in lines if line.startswith("told:")]
        say("tests", status=done.returncode, result=lines[-1], seconds=time.monotonic() - start, told=told)

    def profile(self) -> None:
        """Where the time of a step goes, and how often the host waits for the GPU."""
        for architecture, batch_size in [("tiny", 2)] if self.arguments.tiny else [("qwen2.5-7b", 8)]:
            precision = "32-true" if self.arguments.tiny else "bf16-mixed"
            watch = Watch(self.device)
            task = self.task(architecture, precision, batch_size, False, 4)
            fit_lit_dpo(task, task.rows(), [watch])
            say("profile", architecture=architecture, batch_size=batch_size, **watch.report())
            release(self.device)

    def speed(self) -> None:
        """Speed and memory of each side, in turns."""
        rates: dict[tuple[str, str], float] = {}
        cases = TINY if self.arguments.tiny else SPEED
        for number in self.arguments.cases or range(len(cases)):
            architecture, precision, batch_size, recompute, batches, sides = cases[number]
            case = {"case": number, "architecture": architecture, "precision": precision, "batch_size": batch_size}
            case["recompute"] = recompute
            results = {}
            for side in sides.split():
                if time.monotonic() > self.end:
                    say("speed", **case, side=side, skipped="the time is over")
                    continue
                task = self.task(architecture, precision, batch_size, recompute, batches)
                if (architecture, precision) not in rates:
                    rates[architecture, precision] = matmul_rate(shape(task), PRECISIONS[precision], self.device)
                start = time.monotonic()
                held = release(self.device)
                try:
                    result = run_side(task, side)
                except torch.OutOfMemoryError:
                    say("speed", **case, side=side, failed="out of memory")
                    continue
                except Exception as error:  # the other cases still count
                    say("speed", **case, side=side, failed=f"{type(error).__name__}: {error}"[:2000])
                    continue
                results[side] = result
                losses = result.pop("losses")
                result["share_of_rate"] = result.pop("floor_flops_per_second") / rates[architecture, precision]
                first, last = losses[0], losses[-1]
                took = time.monotonic() - start
                say("speed", **case, side=side, **result, first=first, last=last, held_before_gb=held, took=took)
            ours = results.get("lit_dpo")
            for side, theirs in results.items():
                if ours and side != "lit_dpo":
                    faster = ours["pairs_per_second"] / theirs["pairs_per_second"]
                    memory = ours["peak_memory_gb"] / theirs["peak_memory_gb"]
                    say("ratio", **case, against=side, speed=faster, memory=memory)

    def longest(self) -> None:
        """The longest responses of one pair that a step fits, and the memory of shorter ones."""
        architecture = "tiny" if self.arguments.tiny else "gemma-3-1b"
        dtype = torch.float32 if self.arguments.tiny else torch.bfloat16
        model = load_policy(
            self.base(architecture),
            quantization=quantization_for("nf4", dtype),
            lora=LoraConfig(**LORA),
            adapter=None,
            dtype=dtype,
            device=self.device,
            progress_bar=False,
        )
        policy = Policy(model, recompute=True)
        say("longest", architecture=architecture, flat=policy.flat)
        lengths = [64, 128] if self.arguments.tiny else [8192, 32768, 65536, 98304, 131072, 163840, 196608, 262144]
        for length in lengths:
            if time.monotonic() > self.end + 20:
                say("longest", length=length, skipped="the time is over")
                break
            try:
                seconds, peak = self.long_step(policy, length, dtype)
            except torch.OutOfMemoryError:
                say("longest", length=length, failed="out of memory")
                break
            say("longest", length=length, seconds=seconds, peak_memory_gb=peak)

    def long_step(self, policy: Policy, length: int, dtype: torch.dtype) -> tuple[float, float]:
        """Seconds and peak memory of one step on one pair with two responses of ``length`` tokens."""
        release(self.device)
        vocabulary = policy.model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(2, vocabulary, (16 + 2 * length,), generator=torch.Generator().manual_seed(0)).tolist()
        pair = TokenizedPair(ids[:16], ids[16 : 16 + length], ids[16 + length :])
        batch = PairBatch.from_pairs([pair]).to(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            logps = policy.logps(batch)
            loss = Sigmoid()(logps, logps.detach()).mean()
        loss.backward()
        synchronize(self.device)
        seconds = time.perf_counter() - start
        policy.zero_grad()
        return seconds, torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0


def run_side(task: Task, side: str) -> dict[str, Any]:
    """One measured run of a side."""
    if side.startswith("lit_dpo"):
        return run_lit_dpo(replace(task, compile=side == "lit_dpo_compiled"))
    return run_trl(task, best=side == "trl_best")


class Watch(Callback):
    """Counts in how many places of a step the host waits for the GPU, then profiles one step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waits: Counter[str] = Counter()
        self.profiler: Any = None
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        """Begins to look at the fourth and at the sixth step."""
        synchronize(self.device)
        if index == 3 and self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
            self._listen()
        if index == 5:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.__enter__()
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Stops looking."""
        if index == 3 and self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            self._stop_listening()
        synchronize(self.device)
        if index == 4:
            self.seconds = time.perf_counter() - self._start
        if index == 5:
            self.profiler.__exit__(None, None, None)

    def _listen(self) -> None:
        import traceback
        import warnings

        self._shown = warnings.showwarning
        warnings.simplefilter("always")

        def note(message: Any, category: Any, *arguments: Any, **options: Any) -> None:
            if "synchroniz" in str(message):
                frames = [f for f in traceback.extract_stack() if "site-packages/torch/" not in f.filename][:-1]
                self.waits[" < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-3:][::-1])] += 1

        warnings.showwarning = note

    def _stop_listening(self) -> None:
        import warnings

        warnings.showwarning = self._shown
        warnings.resetwarnings()

    def report(self) -> dict[str, Any]:
        """Waits by place, and the kernels that take most of the time."""
        events = self.profiler.key_averages()
        on_gpu = self.device.type == "cuda"

        def spent(event: Any) -> float:
            return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

        kernels = [e for e in events if not on_gpu or str(e.device_type).endswith("CUDA")]
        kernels = [e for e in kernels if "#" not in e.key and not e.key.startswith("_")]  # not ranges around kernels
        total = sum(map(spent, kernels))
        top = sorted(kernels, key=spent, reverse=True)[:24]
        return {
            "step_seconds": self.seconds,
            "busy_seconds": total / 1e6,
            "kernels": sum(e.count for e in kernels),
            "waits": dict(self.waits),
            "top": [[e.key[:70], e.count, round(spent(e) / total, 4)] for e in top],
        }


def release(device: torch.device) -> float:
    """Frees what the last run left, and returns how many GB are still held."""
    gc.collect()
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / 1e9


if __name__ == "__main__":
    main()

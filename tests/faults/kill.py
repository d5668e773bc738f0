"""Kills runs at random moments, resumes them, and compares the adapters with those of a run that nothing interrupted.

``python -m tests.faults.kill --kills 50 [--ranks 2] [--seed 0]`` ends with a line such as ``50 kills, 50 identical``.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file

from lit_dpo.cli.app import main as lit_dpo
from tests.tiny import made_up_rows, save_tiny_base, write_jsonl

TINY = ("--model.base", "base", "--model.quantization", "null", "--data.source", "pairs.jsonl", "--data.val_size", "4")
RUN = (
    *("fit", *TINY, "--trainer.accelerator", "cpu", "--trainer.max_epochs", "3", "--data.batch_size", "2"),
    *("--trainer.accumulate_grad_batches", "2", "--trainer.enable_progress_bar", "false", "--data.num_workers", "1"),
    *("--model.lora.lora_dropout", "0.1", "--model.compile", "false", "--samples.num_prompts", "0"),
    *("--last.every_n_steps", "1", "--ckpt_path", "auto"),
)
RANKS = ("--trainer.strategy", "ddp_fork", "--trainer.devices")


def start(name: str, ranks: int) -> int:
    """Starts or resumes a run in a process of its own. Returns its number."""
    process = os.fork()  # all libraries are imported already, so a run takes seconds
    if process:
        return process
    os.setsid()
    warnings.resetwarnings()
    status = 1
    try:
        with Path(f"{name}.log").open("a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            lit_dpo([*RUN, "--run_name", name, *((*RANKS, str(ranks)) if ranks > 1 else ())])
            status = 0
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        os._exit(status)


def finished(process: int, seconds: float) -> bool:
    """Waits so long, then kills the run. Whether it ended by itself before.

    Raises:
        RuntimeError: If the run ended with an error.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError("A run that was not killed ended with an error; see its log.")
            return True
        time.sleep(0.005)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return False


def adapters(name: str) -> dict[str, torch.Tensor]:
    """The adapters that the last version of a run exported."""
    versions = sorted(Path("runs", name).glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
    return load_file(versions[-1] / "adapter" / "adapter_model.safetensors")


def kill(kills: int, ranks: int = 1, seed: int = 0) -> tuple[int, int]:
    """Kills runs that often, in the working folder.

    Returns:
        The number of kills, and of those after which the finished run had the same adapters, to the last bit.
    """
    save_tiny_base(Path("base"))
    write_jsonl(Path("pairs.jsonl"), made_up_rows(20))
    begun = time.monotonic()
    if not finished(start("whole", ranks), 300):
        raise RuntimeError("The run did not end by itself.")
    lasts = time.monotonic() - begun
    expected = adapters("whole")
    draw = random.Random(seed)  # noqa: S311
    done = identical = number = 0
    while done < kills:
        number += 1
        name, own = f"killed{number}", 0
        while True:
            # At most some kills a run, so that runs end even if each kill comes before the first step.
            seconds = draw.uniform(0.1, 1.1) * lasts if done + own < kills and own < 8 else 300.0
            if finished(start(name, ranks), seconds):
                break
            own += 1
        found = adapters(name)
        same = found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
        done, identical = done + own, identical + own * same
        versions = len(list(Path("runs", name).glob("version_*")))
        print(json.dumps({"run": number, "kills": own, "versions": versions, "identical": same}), flush=True)
        shutil.rmtree(Path("runs", name))
    return done, identical


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"LIT_DPO_CACHE": f"{folder}/cache", "HF_DATASETS_CACHE": f"{folder}/datasets"}
        os.chdir(folder)
        try:
            done, identical = kill(arguments.kills, arguments.ranks, arguments.seed)
        except RuntimeError:
            for log in Path().glob("*.log"):
                sys.stderr.write(f"--- {log}\n{log.read_text(encoding='utf-8')[-3000:]}\n")
            raise
        os.chdir("/")
    print(f"{done} kills, {identical} identical")
    sys.exit(done != identical)


if __name__ == "__main__":
    main()

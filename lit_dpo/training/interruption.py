"""Signals that end a run early. Callbacks can tell them from errors."""

import os
import re
import signal
import subprocess
from pathlib import Path

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from lit_dpo.files.atomic import atomic_write

JOBS = Path("runs/.slurm")  # a file for each SLURM job, which names its checkpoint
SIGUSR1 = getattr(signal, "SIGUSR1", None)  # POSIX only
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"} | ({SIGUSR1: "SIGUSR1"} if SIGUSR1 else {})


class Terminated(SystemExit):
    """A signal ended the run after its optimizer step. The process exits with status 128 + number, as is usual.

    Attributes:
        number: Number of the signal.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)
        self.number = number


def is_interruption(exception: BaseException) -> bool:
    """Whether a run was stopped from outside, by Ctrl-C or a signal, and not by an error."""
    return isinstance(exception, KeyboardInterrupt | Terminated)


def is_dead_worker(exception: BaseException) -> bool:
    """Whether a process that loads batches has died, as the system ends one when memory is short."""
    return isinstance(exception, RuntimeError) and "DataLoader worker" in str(exception)


def asks_to_requeue(exception: BaseException) -> bool:
    """Whether SLURM is about to end the job and shall run it again: SIGUSR1, as ``#SBATCH --signal`` sends it."""
    return isinstance(exception, Terminated) and exception.number == SIGUSR1 and SLURMEnvironment.detect()


def note_checkpoint(path: Path) -> None:
    """Notes the checkpoint that a SLURM job would go on from, in a file of the job's number. Not if there is none."""
    job, text = job_number(), str(path.absolute())
    if job is None or not path.exists() or _noted(job) == text:
        return
    JOBS.mkdir(parents=True, exist_ok=True)
    with atomic_write(JOBS / job) as beside:
        beside.write_text(text, encoding="utf-8")


def checkpoint_of_job() -> str | None:
    """The checkpoint that this SLURM job left, if SLURM runs it again; else None."""
    job = job_number()
    return None if job is None or int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0 else _noted(job)


def _noted(job: str) -> str | None:
    return (JOBS / job).read_text(encoding="utf-8") if (JOBS / job).exists() else None


def job_number() -> str | None:
    """The number of this SLURM job, with the task's number in a job array; None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
    return job if SLURMEnvironment.detect() and re.fullmatch(r"\d+(_\d+)?", job) else None


def requeue() -> str:
    """Asks SLURM to run this job again. Returns a line that tells what came of it."""
    if (job := job_number()) is None:
        return "The job is not requeued: SLURM_JOB_ID does not hold the number of a SLURM job."
    try:
        # SLURM puts scontrol on the path, and the job's number was checked.
        command = ["scontrol", "requeue", job]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError as error:
        return f"The job is not requeued: {error}."
    if done.returncode:
        return f"The job is not requeued: scontrol says {done.stderr.strip()!r}."
    return f"SLURM runs job {job} again. It goes on from {_noted(job) or 'the start'}."

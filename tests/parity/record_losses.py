"""Records our own losses to the last bit: ``python -m tests.parity.record_losses``; ``git diff`` shows what changed.

20 optimizer steps of the quickstart and of each objective of the runs that are held against TRL. A refactor leaves
``losses.json`` as it is when both records were made on one processor with one version of torch; across processors and
versions the last digits differ.
"""

import csv
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from lit_dpo.cli.app import main as command_line
from lit_dpo.objectives import IPO, APOZero, Sigmoid
from tests.conftest import REPOSITORY
from tests.parity.record_trl import BETA, STEPS_BATCH_SIZE, STEPS_LOSSES, read_rows
from tests.parity.test_trl import EXAMPLES, our_steps

RECORD = Path(__file__).parent / "losses.json"
STEPS = 20


def quickstart(steps: int) -> list[float]:
    """The loss of each optimizer step of the quickstart, in a folder that is thrown away."""
    arguments = ["fit", "--config", str(REPOSITORY / "configs/quickstart.yaml"), "--trainer.precision", "32-true"]
    arguments += ["--trainer.limit_train_batches", str(steps), "--trainer.limit_val_batches", "0"]
    arguments += ["--samples.num_prompts", "0", "--trainer.enable_progress_bar", "false"]
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            command_line(arguments)
            with Path("runs/quickstart/version_0/metrics.csv").open() as file:
                return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
        finally:
            os.chdir(before)


def main() -> None:
    """Writes the record."""
    torch.set_num_threads(1)  # the number of threads decides how sums are split
    rows = read_rows(EXAMPLES, STEPS * STEPS_BATCH_SIZE)
    objectives = dict(zip(STEPS_LOSSES, (Sigmoid(BETA), IPO(BETA), APOZero(BETA)), strict=True))
    record: dict[str, Any] = {
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "quickstart": quickstart(STEPS),
        **{name: our_steps(rows, objective) for name, objective in objectives.items()},
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""``python -m lit_dpo evaluate``: tasks of lm-evaluation-harness, base against aligned."""

from pathlib import Path

from lit_dpo.evaluation.harness import harness_text, require_harness, run_tasks, write
from lit_dpo.evaluation.statistics import Resampling
from lit_dpo.evaluation.trained import TrainedQuantization, find_trained
from lit_dpo.files.console import say


def evaluate(
    tasks: list[str] | str,
    ckpt_path: str | None = None,
    adapter: str | None = None,
    include_path: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    chat_template: bool = True,
    output: str | None = None,
    intervals: Resampling = Resampling(),  # noqa: B008  it is frozen
    base: str | None = None,
    quantization: TrainedQuantization = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Asks the base and the aligned model the tasks of lm-evaluation-harness, on the adapter as it is.

    Args:
        tasks: Names of tasks or groups, as a list or with commas between them.
        ckpt_path: Checkpoint of a run.
        adapter: Folder or hub id of an exported adapter, instead of a checkpoint.
        include_path: Folder with tasks of one's own, as YAML files.
        limit: Number of documents of each task, or their share if below 1; by default all.
        num_fewshot: Number of examples before each question; by default that of the task.
        batch_size: Number of documents that are asked together.
        chat_template: Whether questions are put as messages, as in training.
        output: File for the table as JSON.
        intervals: How the intervals of differences are computed.
        base: Base of ``adapter``, if it is not where its configuration says.
        quantization: Quantization of the base of ``adapter`` in training; ``auto`` is as its run or its export tells.
        trust_remote_code: Whether to run model code that comes with the base model's repository.
    """
    require_harness()
    trained = find_trained(
        ckpt_path, adapter, base=base, quantization=quantization, trust_remote_code=trust_remote_code
    )
    lines = run_tasks(
        trained.load(),
        trained.tokenizer,
        tasks.split(",") if isinstance(tasks, str) else tasks,
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        chat_template=chat_template,
        template_kwargs=trained.data.get("chat_template_kwargs"),
        system=trained.data.get("system"),
        resampling=intervals,
    )
    say(harness_text(lines, intervals.level))
    if output is not None:
        write(Path(output), lines)
        say(f"\nWrote {output}")

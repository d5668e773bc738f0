"""Tasks of lm-evaluation-harness ──► base against aligned in one table, with the error of the difference.

The harness is an extra: ``pip install 'lit_dpo[evaluate]'``. Both models are asked the same documents, so the error is
that of the paired differences.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lit_dpo.evaluation.statistics import Comparison, Resampling, ratio, sums_by_prompt
from lit_dpo.files.atomic import write_json
from lit_dpo.module import DPOModule


class Line(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str
    number: int  # documents
    result: Comparison  # of aligned and base


def require_harness() -> None:
    """Checks that lm-evaluation-harness is installed.

    Raises:
        ModuleNotFoundError: If it is not.
    """
    if find_spec("lm_eval") is None:
        raise ModuleNotFoundError("evaluate needs lm-evaluation-harness: pip install 'lit_dpo[evaluate]'.")


def run_tasks(
    module: DPOModule,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    chat_template: bool = True,
    template_kwargs: dict[str, Any] | None = None,
    system: str | None = None,
    resampling: Resampling | None = None,
) -> list[Line]:
    """Asks the base and the aligned model the documents of some tasks.

    Args:
        module: The aligned model, loaded.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups.
        include_path: Folder with tasks of one's own, as YAML files.
        limit: Number of documents of each task, or their share if below 1; by default all.
        num_fewshot: Number of examples before each question; by default that of the task.
        batch_size: Number of documents that are asked together.
        chat_template: Whether questions are put as messages, as in training.
        template_kwargs: Arguments to the chat template.
        system: System message.
        resampling: How the intervals of differences are computed.

    Raises:
        ValueError: If a task does not exist.
        ConnectionError: If its data cannot be loaded.
    """
    require_harness()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(f"--tasks: lm-evaluation-harness has no task {unknown[0]!r}. `lm-eval ls tasks` lists them.")
    model = HFLM(
        pretrained=module.model, tokenizer=tokenizer, batch_size=batch_size, chat_template_args=template_kwargs
    )

    def asked() -> dict[str, list[dict[str, Any]]]:
        try:
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=chat_template,
                system_instruction=system,
                bootstrap_iters=0,
            )
        except OSError as error:
            raise ConnectionError(
                f"--tasks: their data cannot be loaded: {' '.join(str(error).split()):.300}"
            ) from error
        assert results is not None
        return dict(results["samples"])

    with module.policy.initial():
        base = asked()
    return compared_samples(base, asked(), resampling or Resampling())


def compared_samples(
    base: dict[str, list[dict[str, Any]]], aligned: dict[str, list[dict[str, Any]]], resampling: Resampling
) -> list[Line]:
    """Paired differences of each metric that is a number of each document. Others are left out with a warning.

    Args:
        base: The harness's samples of the base, by task.
        aligned: The same of the aligned model.
        resampling: How intervals are computed.
    """
    lines = []
    for task, samples in aligned.items():
        others = {(sample["doc_id"], sample.get("filter")): sample for sample in base[task]}
        filters = sorted({str(sample.get("filter")) for sample in samples})
        for name in sorted({metric for sample in samples for metric in sample["metrics"]}):
            for kind in filters:
                pairs = [
                    (sample[name], others[sample["doc_id"], sample.get("filter")][name])
                    for sample in samples
                    if str(sample.get("filter")) == kind and name in sample
                ]
                numbers = [pair for pair in pairs if all(isinstance(one, int | float | np.number) for one in pair)]
                shown = name if kind in ("none", "None") else f"{name} ({kind})"
                if len(numbers) < len(pairs) or not numbers:
                    rank_zero_warn(f"{task}: {shown} is no number of each document, so it is left out.")
                    continue
                values, documents = np.array(numbers, float), np.arange(len(numbers))
                sums = [
                    sums_by_prompt(np.stack([values[:, side], np.ones(len(values))], axis=1), documents)
                    for side in (0, 1)
                ]
                lines.append(Line(task, shown, len(numbers), resampling.compare(sums[0], sums[1], ratio(0, 1))))
    return lines


def harness_text(lines: Sequence[Line], level: float) -> str:
    """The table, for the terminal."""
    width = max([24, *(len(f"{line.task} {line.metric}") for line in lines)]) + 2
    head = f"{'base':>9}{'aligned':>9}{'difference':>12}   {f'{100 * level:g} % interval':<20}p"
    shown = ["", f"{'task and metric':<{width}}{'docs':>7}{head}"]
    for task, metric, number, result in lines:
        low, high = result.difference.low, result.difference.high
        interval = f"[{low:+.3f}, {high:+.3f}]" if low == low else ""
        values = f"{result.second:>9.3f}{result.first:>9.3f}{result.difference.value:>+12.3f}"
        shown.append(f"{f'{task} {metric}':<{width}}{number:>7,}{values}   {interval:<20}{_p(result.p_value)}")
    return "\n".join(shown)


def _p(value: float) -> str:
    return "-" if value != value else f"{value:.3f}"


def write(path: Path, lines: Sequence[Line]) -> None:
    """Writes the table as JSON."""
    rows = [
        {
            "task": line.task,
            "metric": line.metric,
            "documents": line.number,
            "base": line.result.second,
            "aligned": line.result.first,
            "difference": list(line.result.difference),
            "p_value": line.result.p_value,
        }
        for line in lines
    ]
    write_json(path, rows)

"""``python -m lit_dpo suspects``: training pairs whose label the model contradicts."""

from pathlib import Path

from lit_dpo.evaluation.statistics import Resampling
from lit_dpo.evaluation.trained import find_checkpoint
from lit_dpo.files.console import say
from lit_dpo.report.cleaning import SourceRows, read_decisions, write_cleaned
from lit_dpo.report.evidence import read_lines
from lit_dpo.report.folds import CrossFit
from lit_dpo.report.labels import Method, find_suspects, load_training, save_suspects, suspects_text, training_options


def suspects(
    ckpt_path: str,
    method: Method = "cross_fit",
    output: str = "suspects",
    top: int = 200,
    apply: str | None = None,
    fit: CrossFit = CrossFit(),  # noqa: B008  it is frozen
    intervals: Resampling = Resampling(),  # noqa: B008
    trust_remote_code: bool = False,
    progress_bar: bool = True,
) -> None:
    """Ranks the training pairs of a run by how much models contradict their labels, and writes a page to review them.

    Args:
        ckpt_path: Checkpoint of the run. Its base, settings and data are used; ``cross_fit`` trains anew.
        method: ``cross_fit`` measures each pair by a model that did not see its prompt. ``dynamics`` takes the margins
            that the run itself left while it trained, and needs no training.
        output: Folder for ``suspects.jsonl``, ``suspects.html`` and, with ``apply``, ``cleaned.jsonl``.
        top: Number of pairs on the page.
        apply: File of decisions: JSON lines with source, row and action (keep, flip or drop), such as the page saves
            or ``suspects.jsonl`` with other actions. Nothing is ranked then; ``cleaned.jsonl`` is written.
        fit: How margins are cross-fitted.
        intervals: How intervals are computed.
        trust_remote_code: Whether to run model code that comes with the base model's repository.
        progress_bar: Whether to show progress bars.
    """
    if top < 1:
        raise ValueError(f"--top must be at least 1, not {top}.")
    trained = find_checkpoint(Path(ckpt_path), trust_remote_code=trust_remote_code)
    folder = Path(output)
    if apply is not None:
        decisions = read_decisions(Path(apply))
        training = load_training(trained)
        path = folder / "cleaned.jsonl"
        rows = SourceRows(training.loading, training.loaded)
        counts = write_cleaned(training.train, rows, decisions, path)
        say(f"Wrote {path}: {counts['keep']} pairs kept, {counts['flip']} flipped; {counts['drop']} dropped.")
        say(f"Train on it with: {training_options(trained, folder)}")
        return
    decided = folder / "suspects.jsonl"
    if any(line.get("action", "keep") != "keep" for line in read_lines(decided)):
        raise ValueError(f"{decided} holds decisions, which would be lost: --apply it first, or give another --output.")
    found = find_suspects(trained, method, fit, intervals, progress_bar=progress_bar)
    paths = save_suspects(found, folder, top)
    say(suspects_text(found))
    say("")
    for path in paths:
        say(f"Wrote {path}")
    say(f"Review {paths[1]} in a browser. It saves a cleaned set, or decisions for --apply.")
    say(f"Put cleaned.jsonl into {folder}, and train on it with: {training_options(trained, folder)}")

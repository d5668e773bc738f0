"""A run ──► the training pairs whose label it contradicts: a table, JSON lines and a page to review them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from lit_dpo.data.loading import Loaded, PairLoading
from lit_dpo.data.pairs import PairDataset
from lit_dpo.datamodule import PreferenceDataModule
from lit_dpo.evaluation.statistics import Estimate, Resampling
from lit_dpo.evaluation.trained import Trained
from lit_dpo.files.atomic import atomic_write, finite
from lit_dpo.report.cleaning import SourceRows
from lit_dpo.report.evidence import DYNAMICS, FACTS, FOLDER, read_lines, write_lines
from lit_dpo.report.folds import CrossFit, Margins, cross_fitted
from lit_dpo.report.page import review_page
from lit_dpo.report.quantities import histogram
from lit_dpo.report.suspects import FlippedShare, Ranking, flipped_share, rank

Method: TypeAlias = Literal["cross_fit", "dynamics"]
MOST_EMBEDDED = 20_000_000  # characters of pairs that a page carries, to save a cleaned set by itself
SHOWN = 64  # characters of a prompt in the terminal


@dataclass(frozen=True)
class Training:
    """The pairs of a run."""

    loading: PairLoading
    loaded: Loaded
    train: PairDataset
    held_out: PairDataset | None


@dataclass(frozen=True)
class Suspects:
    """Training pairs, ranked by how much a model contradicts their labels."""

    training: Training
    method: Method
    ranking: Ranking
    share: FlippedShare
    level: float
    unmeasured: int  # pairs without a margin, which are ranked last

    def remarks(self) -> list[str]:
        """What is to be known of the ranking, in words."""
        told = []
        if self.unmeasured:
            told.append(f"{self.unmeasured} pairs were not measured: no step came before them, or they were left out.")
        if self.method == "dynamics":
            told.append(
                "Pairs that came early were measured early, when margins are small. cross_fit treats all alike."
            )
        return told

    def lines(self, most: int | None = None) -> list[dict[str, Any]]:
        """The most suspicious pairs, as ``suspects.jsonl`` has them."""
        train, ranking = self.training.train, self.ranking
        rows, origins = SourceRows(self.training.loading, self.training.loaded), train.origins()
        found = []
        for number, place in enumerate(ranking.order[:most].tolist(), 1):
            part, row = origins[place]
            found.append(
                {
                    "rank": number,
                    "source": train.parts[part].source,
                    "row": row,
                    "margin": float(ranking.margins[place]),
                    "spread": float(ranking.spread[place]),
                    "wrong": float(ranking.wrong[place]),
                    "action": "keep",
                    **rows.read(part, row),
                }
            )
        return finite(found)  # type: ignore[no-any-return]


def load_training(trained: Trained) -> Training:
    """The pairs that a model was trained on and those held out, as its checkpoint tells.

    Raises:
        ValueError: If the checkpoint does not tell, or if the pairs were a stream.
    """
    arguments = {key: value for key, value in trained.data.items() if not key.startswith("_")}
    if arguments.get("source") is None:
        raise ValueError("The checkpoint does not tell its data. Train with data.source as a name, a file or a folder.")
    if arguments.get("streaming"):
        raise ValueError("The training pairs were a stream, which is not kept. Give a run without data.streaming.")
    if int(arguments.get("max_responses") or 2) > 2:
        raise ValueError("A ranked list has no label to flip. Give a run on pairs (data.max_responses=2).")
    data = PreferenceDataModule(**{**arguments, "tokenizer": trained.tokenizer})
    loaded = data.loading.load(data.load_tokenizer(), trains=True, evaluates=False, progress_bar=True)
    assert loaded.train is not None
    return Training(data.loading, loaded, loaded.train, loaded.val)


def find_suspects(
    trained: Trained, method: Method, how: CrossFit, resampling: Resampling, *, progress_bar: bool = True
) -> Suspects:
    """Ranks the training pairs of a run by how much a model contradicts their labels.

    Args:
        trained: The run.
        method: ``cross_fit`` trains on the other folds; ``dynamics`` takes the margins that the run itself left.
        how: Folds and epochs, for ``cross_fit``.
        resampling: How intervals are computed.
        progress_bar: Whether to show a progress bar.

    Raises:
        ValueError: If the run left no margins, or its pairs cannot be found.
    """
    training = load_training(trained)
    if method == "cross_fit":
        margins = cross_fitted(trained, training.train, training.held_out, how, progress_bar=progress_bar)
    else:
        margins = recorded(trained, training.train)
    known = np.isfinite(margins.values).any(axis=1)
    if not known.any():
        raise ValueError("No training pair has a margin.")
    few = rank(margins.values[known])
    places = np.flatnonzero(known)
    unmeasured = np.flatnonzero(~known)

    def spread(values: np.ndarray) -> np.ndarray:
        every = np.full(len(known), np.nan)
        every[places] = values
        return every

    # What a run's models say of labels that they have learned tells nothing: only its first epoch counts here.
    columns = margins.values[:, :1] if method == "dynamics" else margins.values
    counted = np.isfinite(columns).any(axis=1)
    prompts = np.unique(training.train.digests("prompt_key")[counted], return_inverse=True)[1]
    share = flipped_share(rank(columns[counted]), prompts, margins.trusted, margins.trusted_prompts, resampling)
    order = np.concatenate([places[few.order], unmeasured])
    ranking = Ranking(order, spread(few.margins), spread(few.spread), spread(few.wrong), few.scale)
    return Suspects(training, method, ranking, share, resampling.level, len(unmeasured))


def recorded(trained: Trained, train: PairDataset) -> Margins:
    """The margins of training pairs that a run left, one an epoch, each before the pair's own step.

    Raises:
        ValueError: If it left none.
    """
    path = None if trained.run is None else trained.run / FOLDER / DYNAMICS
    lines = [] if path is None else read_lines(path)
    if not lines:
        raise ValueError(
            f"--method dynamics: {path or trained.path} tells no margins of training pairs. RunReport writes them at "
            "the end of fit. Take --method cross_fit."
        )
    assert path is not None
    facts = path.parent / FACTS
    begun = json.loads(facts.read_text(encoding="utf-8")).get("margins_from_step") if facts.exists() else 0
    if begun:
        raise ValueError(
            f"--method dynamics: the run went on from step {begun}, so the margins before are not known. Take --method "
            "cross_fit."
        )
    places = {(train.parts[part].source, row): place for place, (part, row) in enumerate(train.origins())}
    values = np.full((len(train), max(len(line["margins"]) for line in lines)), np.nan)
    for line in lines:
        place = places.get((line["source"], line["row"]))
        if place is not None:
            values[place, : len(line["margins"])] = [np.nan if one is None else one for one in line["margins"]]
    values[values == 0] = np.nan  # before the first step, policy and reference are the same: nothing was measured
    return Margins(values, np.zeros((0, 1)), np.zeros(0, np.int64))


def training_options(trained: Trained, folder: Path) -> str:
    """The options with which ``fit`` reads the cleaned set in a folder, and the same held-out pairs as before."""
    data = trained.data
    if data.get("val_size") is not None:
        held_out = str(folder / "held_out.jsonl")
    else:
        held_out = str(data.get("val_source") or data.get("source"))
    split = f" --data.val_split {data['val_split']}" if data.get("val_split") else ""
    return f"--data.source {folder / 'cleaned.jsonl'} --data.val_source {held_out}{split}"


def suspects_text(found: Suspects, most: int = 10) -> str:
    """The estimates and the most suspicious pairs, for the terminal."""
    number, share = len(found.training.train), found.share
    lines = [f"{number:,} training pairs, margins by {found.method.replace('_', '-')}."]
    lines += ["", *share_lines(share, found.level), *found.remarks(), ""]
    lines.append(f"{'rank':>5}  {'margin':>8}  {'spread':>7}  {'wrong':>6}  pair")
    for line in found.lines(most):
        text = line["prompt"] if isinstance(line["prompt"], str) else str(line["prompt"][-1]["content"])
        text = " ".join(text.split())
        text = text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
        values = (line["margin"], line["spread"], line["wrong"])
        if None in values:  # not measured
            continue
        numbers = "{:>+8.3f}  {:>7.3f}  {:>6.0%}".format(*values)
        lines.append(f"{line['rank']:>5}  {numbers}  {Path(line['source']).name}, row {line['row']}: {text}")
    return "\n".join(lines)


def share_lines(share: FlippedShare, level: float) -> list[str]:
    """What is known of the share of wrong labels, in words."""

    def shown(one: Estimate) -> str:
        if one.value != one.value:
            return "not known"
        bounds = "" if one.low != one.low else f" [{one.low:.0%}, {one.high:.0%}]"
        return f"{one.value:.0%}{bounds}"

    lines = [f"The models agree with {shown(share.accuracy)} of the labels ({level:.0%} interval)."]
    if share.trusted_accuracy is not None and share.by_trusted is not None:
        lines.append(
            f"Of the held-out labels they agree with {shown(share.trusted_accuracy)}. If those are right, "
            f"{shown(share.by_trusted)} of the training labels are flipped."
        )
    known = share.by_confidence.value == share.by_confidence.value
    bound = f"is at most about {shown(share.by_confidence)}" if known else "is not known: the model knows too little"
    lines.append(f"By confident learning the share {bound}. The model's own errors count in it.")
    if not share.accuracy.low > 0.5:
        lines.append("The agreement cannot be told from chance, so the ranking tells little.")
    return lines


def save_suspects(found: Suspects, folder: Path, most: int) -> list[Path]:
    """Writes ``suspects.jsonl``, ``suspects.html`` and, if pairs were split off the training, ``held_out.jsonl``.

    Args:
        found: The ranked pairs.
        folder: Where to.
        most: Number of pairs to review on the page.
    """
    training = found.training
    rows, origins = SourceRows(training.loading, training.loaded), training.train.origins()
    names = [part.source for part in training.train.parts]
    lines = found.lines()
    paths = [folder / "suspects.jsonl", folder / "suspects.html"]
    write_lines(paths[0], lines)
    if training.loading.val_size is not None and training.held_out is not None:
        paths.append(folder / "held_out.jsonl")
        write_lines(paths[-1], (rows.read(*origin) for origin in training.held_out.origins()))
    every: list[dict[str, Any]] = []
    size = 0
    for part, number in origins:
        every.append({"source": names[part], "row": number, **rows.read(part, number)})
        size += len(str(every[-1]))
        if size > MOST_EMBEDDED:
            break
    margins = found.ranking.margins[np.isfinite(found.ranking.margins)]
    content = finite(
        {
            "title": "Suspicious labels",
            "charts": [],
            "runs": [{"name": "", "histograms": {"rewards/margins": histogram(None, margins)._asdict()}, "tokens": []}],
            "share": [*share_lines(found.share, found.level), *found.remarks()],
            "num_pairs": len(training.train),
            "suspects": lines[: min(most, len(training.train) - found.unmeasured)],
            "pairs": every if size <= MOST_EMBEDDED else None,
        }
    )
    with atomic_write(paths[1]) as beside:
        beside.write_text(review_page(content), encoding="utf-8", errors="backslashreplace")
    return paths

"""Loaded pairs ──► facts: what was read and left out, lengths, scores, labels, and what the template wrote."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_dpo.base.tokenizer import token_texts
from lit_dpo.data.filters import CONTRADICTORY, DUPLICATE, LEAKED, NEAR_DUPLICATE, NEARLY_LEAKED
from lit_dpo.data.findings import Finding
from lit_dpo.data.loading import Loaded
from lit_dpo.data.pairs import PairDataset, as_digests
from lit_dpo.data.preparation import counts

BINS = 24  # of a histogram
SAMPLE = 1000  # pairs whose special tokens are looked at
ENDING = 3  # last tokens of a response among which EOS may stand: a template may write a line break after it
IDENTICAL = ("identical responses", "no two different responses")
EMPTY = ("empty response", "empty prompt")
# Names of findings in audit.json
SET_FINDINGS = {
    DUPLICATE: "duplicates",
    CONTRADICTORY: "contradictions",
    NEAR_DUPLICATE: "near_duplicates",
    LEAKED: "leaks",
    NEARLY_LEAKED: "near_leaks",
}


@dataclass(frozen=True)
class Distribution:
    """Quantiles of a number over pairs, and a histogram in which every pair stands once."""

    least: float
    median: float
    p95: float
    most: float
    edges: list[float]  # of the bins, one more than counts
    counts: list[int]

    @classmethod
    def of(cls, values: np.ndarray) -> "Distribution | None":
        """The distribution of some values; None if there are none. The last bin holds all above the 99th percentile."""
        if not len(values):
            return None
        low, high = float(values.min()), float(max(np.percentile(values, 99), values.min()))
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
        counted, _ = np.histogram(np.minimum(values, edges[-1]), edges)
        median, p95 = float(np.median(values)), float(np.percentile(values, 95))
        return cls(low, median, p95, float(values.max()), edges.tolist(), counted.tolist())


@dataclass(frozen=True)
class LeftOut:
    """Rows that were left out for one reason."""

    count: int
    row: int  # number of the first
    example: str = ""  # its beginning


@dataclass(frozen=True)
class SourceFacts:
    """What was found in one source. Lengths are in tokens; counts are rows unless they say pairs."""

    source: str
    name: str
    use: str  # "training", "held-out", or "both" where data.val_size parts the pairs
    formats: dict[str, int]
    rows: int
    kept: int
    held_out: int  # pairs of those kept that data.val_size holds out
    left_out: dict[str, LeftOut]
    unread: list[str]  # names of columns
    notes: dict[str, int]
    identical: int
    empty: int
    scored: int
    ties: int
    against: int  # rows whose rejected response has the higher score
    margins: Distribution | None
    prompts: int  # different ones, of kept pairs
    most_common_prompt: int  # kept pairs that have it
    longer_chosen: int  # kept pairs whose chosen response is longer
    longer_rejected: int
    prompt_lengths: Distribution | None  # before truncation
    chosen_lengths: Distribution | None
    rejected_lengths: Distribution | None
    cut_prompts: int  # kept pairs
    cut_responses: int
    tokens: int  # of kept pairs, each prompt once
    longest_pair: int
    found: dict[str, int] = field(default_factory=dict)  # SET_FINDINGS: pairs

    @property
    def longer_wins(self) -> float:
        """Accuracy of the rule "the longer response wins" on kept pairs. Equal lengths count one half."""
        equal = self.kept - self.longer_chosen - self.longer_rejected
        return (self.longer_chosen + equal / 2) / self.kept if self.kept else 0.5

    def as_dict(self) -> dict[str, Any]:
        """The facts as ``audit.json`` has them."""
        reasons = {reason: left.count for reason, left in self.left_out.items()}
        examples = {reason: {"row": left.row, "text": left.example} for reason, left in self.left_out.items()}
        return {
            **asdict(self),
            "format": ", ".join(self.formats),
            "left_out": reasons,
            "examples": examples,
            "longer_wins": self.longer_wins,
        }


@dataclass(frozen=True)
class Part:
    """A part of a pair as the policy reads it."""

    kind: str  # "prompt", "chosen" or "rejected"
    tokens: list[tuple[str, bool, bool]]  # text, whether it is trained, whether it is a special token


@dataclass(frozen=True)
class TemplateFacts:
    """What the chat template wrote, over a sample of kept pairs."""

    pairs: int
    bos: str | None
    without_bos: int  # pairs whose prompt has no BOS
    several_bos: int  # pairs whose prompt begins with two
    eos: str | None
    without_eos: int  # whole responses that end without EOS
    whole_responses: int
    prompt_end: str
    example: list[Part]


class _Columns:
    """The cached columns of one source, as arrays."""

    def __init__(self, pairs: PairDataset, part: int) -> None:
        starts = [*(one.start for one in pairs.parts), len(pairs.columns)]
        self.start, self.end = starts[part], starts[part + 1]
        self._data = pairs.columns.data

    def __getitem__(self, name: str) -> Any:
        """A column as an Arrow array."""
        return self._data.column(name).slice(self.start, self.end - self.start).combine_chunks()

    @cached_property
    def kept_reason(self) -> np.ndarray:
        """Which rows became pairs, before what others are was looked at."""
        return np.asarray(self["reason"].to_numpy(zero_copy_only=False) == "")

    def lengths(self, name: str) -> np.ndarray:
        """The length of each list in a column, whose numbers are not read."""
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        lists = self._data.column(name).slice(self.start, self.end - self.start)
        return np.asarray(pc.list_value_length(lists).to_numpy(), np.int64)

    def at(self, name: str, place: int) -> np.ndarray:
        """The number at a place in each list of a column, from the end if negative; 0 where there is none."""
        lengths = self.lengths(name)
        there = lengths > place if place >= 0 else lengths >= -place
        stops = lengths.cumsum()
        places = stops - lengths + place if place >= 0 else stops + place
        return np.asarray(np.where(there, self._flat(name)[np.where(there, places, -1)], 0))

    def sums(self, name: str) -> np.ndarray:
        """The sum of the numbers in each list of a column."""
        lengths = self.lengths(name)
        stops, sums = lengths.cumsum(), np.append(0, self._flat(name)[:-1].cumsum())
        return np.asarray(sums[stops] - sums[stops - lengths])

    def _flat(self, name: str) -> np.ndarray:
        """The numbers of all lists, and a 0 after them."""
        import pyarrow.compute as pc

        return np.append(pc.list_flatten(self[name]).to_numpy(zero_copy_only=False), 0)


def facts_of(loaded: Loaded) -> list[SourceFacts]:
    """The facts of each source, first those of the training pairs."""
    found = []
    sets = [("training", loaded.train), ("held-out", loaded.val)]
    if loaded.train is not None and loaded.val is not None and loaded.train.columns is loaded.val.columns:
        sets = [("both", loaded.train)]  # data.val_size parts them
    given = iter(loaded.rows)
    for use, pairs in sets:
        if pairs is None:
            continue
        numbers = [np.asarray(pairs.indices, np.int64)]
        if use == "both":
            assert loaded.val is not None
            numbers.append(np.asarray(loaded.val.indices, np.int64))
        for part in range(len(pairs.parts)):
            findings = loaded.held_out_findings if use == "held-out" else loaded.findings
            found.append(_facts(pairs, part, use, numbers, findings, next(given, None)))
    return found


def _facts(
    pairs: PairDataset, part: int, use: str, numbers: list[np.ndarray], findings: Sequence[Finding], rows: Any
) -> SourceFacts:
    columns = _Columns(pairs, part)
    source, name = pairs.parts[part].source, pairs.parts[part].name
    total = columns.end - columns.start
    kept, held = np.zeros(total, bool), 0
    for number, indices in enumerate(numbers):
        own = indices[(indices >= columns.start) & (indices < columns.end)] - columns.start
        kept[own] = True
        held += len(own) if number else 0
    left_out = {
        reason: LeftOut(count, row, _example(rows, row))
        for reason, (count, row) in counts(columns["reason"]).items()
        if reason
    }
    set_findings: dict[str, int] = {}
    for finding in findings:
        own = finding.rows[(finding.rows >= columns.start) & (finding.rows < columns.end)] - columns.start
        if len(own):
            set_findings[SET_FINDINGS[finding.what]] = len(own)
            if finding.action == "drop":
                left_out[finding.what] = LeftOut(len(own), int(own[0]), _example(rows, int(own[0])))
    best, worst = columns.at("scores", 0), columns.at("scores", -1)
    scored = columns.lengths("scores") > 0
    prompt, full_chosen, full_rejected = (columns.at("full_lengths", place) for place in (0, 1, -1))
    responses = columns.lengths("full_lengths") > 1
    chosen, rejected = columns.lengths("chosen"), columns.lengths("rejected")
    full_responses = columns.sums("full_lengths") - prompt
    num_tokens = columns["num_tokens"].to_numpy()
    cut_prompt = kept & (columns.lengths("prompt") < prompt)
    _, repeats = np.unique(as_digests(columns["prompt_key"])[kept], return_counts=True)
    reasons = {reason: left.count for reason, left in left_out.items()}
    return SourceFacts(
        source=source,
        name=name or source,
        use=use,
        formats={text: count for text, (count, _) in counts(columns["format"]).items() if text},
        rows=total,
        kept=int(kept.sum()),
        held_out=held,
        left_out=dict(sorted(left_out.items(), key=lambda item: -item[1].count)),
        unread=sorted(counts(columns["unread"])),
        notes={text: count for text, (count, _) in counts(columns["notes"]).items()},
        identical=sum(reasons.get(reason, 0) for reason in IDENTICAL),
        empty=sum(reasons.get(reason, 0) for reason in EMPTY),
        scored=int(scored.sum()),
        ties=int((scored & (best == worst)).sum()),
        against=int((scored & (best < worst)).sum()),
        margins=Distribution.of((best - worst)[scored]),
        prompts=len(repeats),
        most_common_prompt=int(repeats.max(initial=0)),
        longer_chosen=int((kept & (chosen > rejected)).sum()),
        longer_rejected=int((kept & (chosen < rejected)).sum()),
        prompt_lengths=Distribution.of(prompt[responses]),
        chosen_lengths=Distribution.of(full_chosen[responses]),
        rejected_lengths=Distribution.of(full_rejected[responses]),
        cut_prompts=int(cut_prompt.sum()),
        cut_responses=int((kept & (num_tokens - columns.lengths("prompt") < full_responses)).sum()),
        tokens=int(num_tokens[kept].sum()),
        longest_pair=int(num_tokens[kept].max(initial=0)),
        found=set_findings,
    )


def template_facts(pairs: PairDataset, tokenizer: PreTrainedTokenizerBase) -> TemplateFacts:
    """What the chat template wrote, over at most ``SAMPLE`` pairs, evenly spread."""
    chosen = np.unique(np.linspace(0, len(pairs) - 1, min(SAMPLE, len(pairs))).astype(int)).tolist()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    counted = {"without_bos": 0, "several_bos": 0, "without_eos": 0, "whole_responses": 0}
    lengths: list[int] = []
    full = pairs.columns.data.column("full_lengths")
    for index in chosen:
        pair = pairs.pair(index)
        lengths.append(pair.num_tokens)
        whole = full[int(pairs.indices[index])].as_py()
        was_cut = sum(map(len, pair.responses)) < sum(whole[1:])
        counted["whole_responses"] += 0 if was_cut else len(pair.responses)
        if bos is not None and bos != eos:
            counted["without_bos"] += bos not in pair.prompt
            counted["several_bos"] += pair.prompt[:2] == [bos, bos]
        if eos is not None and not was_cut:
            counted["without_eos"] += sum(eos not in response[-ENDING:] for response in pair.responses)
    middle = pairs.pair(chosen[int(np.argsort(lengths)[len(lengths) // 2])])
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }

    def shown(ids: list[int], trained: list[bool], before: Sequence[int] = ()) -> list[tuple[str, bool, bool]]:
        texts = token_texts(tokenizer, ids, before)
        return [(text, yes, one in special) for text, one, yes in zip(texts, ids, trained, strict=True)]

    parts = [Part("prompt", shown(middle.prompt, [False] * len(middle.prompt)))]
    for kind, ids, place in (("chosen", middle.chosen, 0), ("rejected", middle.rejected, -1)):
        runs = middle.runs[place] if middle.runs else (len(ids),)
        trained = [turn % 2 == 0 for turn, run in enumerate(runs) for _ in range(run)]
        parts.append(Part(kind, shown(ids, trained, middle.prompt)))
    return TemplateFacts(
        pairs=len(chosen),
        bos=tokenizer.bos_token if bos != eos else None,
        eos=tokenizer.eos_token,
        prompt_end=str(tokenizer.decode(middle.prompt[-8:])),
        example=parts,
        **counted,
    )


def _example(rows: Any, number: int, most: int = 300) -> str:
    """The beginning of a row, as text."""
    if rows is None:
        return ""
    text = "  ".join(f"{name}: {value!r:.120}" for name, value in rows[number].items() if value is not None)
    return text if len(text) <= most else text[: most - 1] + "…"

"""Facts ──► verdicts in plain words, worst first. Each rule is a few lines, and each threshold has its reason."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lit_dpo.audit.facts import SourceFacts, TemplateFacts
from lit_dpo.data.filters import Filters
from lit_dpo.data.rendering import CONTROL_TOKENS, NO_EOS, REASONING_CUT, THINKING_CUT

Severity = Literal["error", "warning", "note"]
ORDER: tuple[Severity, ...] = ("error", "warning", "note")

FEW_PAIRS = 200  # of which a held-out share of 10 % tells accuracies apart by no less than 0.2
MOST_LEFT_OUT = (0.5, 0.1)  # share of rows: error, warning
MOST_CUT = 0.2  # share of pairs
LONGER_WINS = (
    0.65  # UltraFeedback has about 0.55; above, "be longer" explains most labels (Park et al. 2024, 2403.19159)
)
MOST_CONTRADICTIONS = 0.02  # share of pairs
MOST_DUPLICATES = 0.02
MOST_TIES = 0.05  # share of scored rows
MOST_OF_ONE_PROMPT = 0.05  # share of pairs


@dataclass(frozen=True)
class Verdict:
    """A judgement of the data, with its remedy."""

    severity: Severity
    code: str  # a stable name
    message: str


def verdicts(sources: list[SourceFacts], template: TemplateFacts | None, filters: Filters) -> list[Verdict]:
    """All verdicts, worst first.

    Args:
        sources: The facts of each source.
        template: What the chat template wrote; None if no pair was kept.
        filters: What is left out.
    """
    found = [verdict for source in sources for verdict in _of_source(source, filters)]
    found += _of_all(sources)
    found += [] if template is None else _of_template(template)
    return sorted(found, key=lambda verdict: ORDER.index(verdict.severity))


def unreadable(message: str) -> Verdict:
    """The verdict on data that ``fit`` would refuse, in the words of its error."""
    return Verdict("error", "unreadable", message)


def _of_source(source: SourceFacts, filters: Filters) -> Iterator[Verdict]:
    name = source.source
    if not source.kept:
        yield Verdict("error", "no_pairs", f"{name}: no pair is left.")
        return
    share = 1 - source.kept / source.rows
    worst = next(iter(source.left_out), "")
    for limit, severity in zip(MOST_LEFT_OUT, ("error", "warning"), strict=True):
        if share > limit:
            message = f"{name}: {share:.0%} of the rows are left out, most of them for this reason: {worst}."
            yield Verdict(severity, "left_out", message)  # type: ignore[arg-type]
            break
    if source.use != "held-out":
        yield from _of_labels(source, filters)
    if len(source.formats) > 1:
        formats = ", ".join(f"{name} ({count})" for name, count in source.formats.items())
        yield Verdict("warning", "several_formats", f"{name}: its rows have several formats: {formats}.")
    cut = max(source.cut_prompts, source.cut_responses) / source.kept
    if cut > MOST_CUT:
        yield Verdict(
            "warning",
            "cut",
            f"{name}: {cut:.0%} of the pairs are cut (prompts {source.cut_prompts}, responses {source.cut_responses}). "
            "A cut response has no end to learn from. Raise data.max_length or data.max_response_length, or set "
            "data.overlong=drop.",
        )
    for note, code, severity in (
        (NO_EOS, "no_eos", "error"),
        (THINKING_CUT, "thinking_cut", "warning"),
        (REASONING_CUT, "reasoning_cut", "warning"),
        (CONTROL_TOKENS, "control_tokens", "warning"),
    ):
        if count := source.notes.get(note, 0):
            yield Verdict(severity, code, f"{name}, {count} pairs: {note}.")  # type: ignore[arg-type]
    if source.unread:
        yield Verdict("note", "unread_columns", f"{name}: columns that are not read: {', '.join(source.unread)}.")


def _of_labels(source: SourceFacts, filters: Filters) -> Iterator[Verdict]:
    """Verdicts on which response is preferred, and on pairs that stand beside one another."""
    name, kept = source.source, source.kept
    longer = max(source.longer_wins, 1 - source.longer_wins)
    if longer > LONGER_WINS and kept >= FEW_PAIRS:
        which = "longer" if source.longer_wins > 0.5 else "shorter"
        yield Verdict(
            "warning",
            "length_bias",
            f'{name}: the {which} response is preferred in {longer:.0%} of the pairs. "Be {which}" is learned first. '
            "Compare every accuracy with this number; model.objective=SimPO, LDDPO or SigmoidNorm weighs length less.",
        )
    if source.scored:
        ties = source.ties / source.scored
        if ties > MOST_TIES and filters.ties == "keep" and not filters.min_margin:
            yield Verdict(
                "warning",
                "ties",
                f"{name}: {source.ties} of {source.scored} scored rows are ties, whose label is chance. Set "
                "data.filters.ties=drop.",
            )
        if source.against and not filters.min_margin:
            yield Verdict(
                "warning",
                "against_scores",
                f"{name}: in {source.against} of {source.scored} scored rows the rejected response has the higher "
                "score. Set data.filters.min_margin to a small number to leave them out.",
            )
    contradictions = source.found.get("contradictions", 0)
    if contradictions and filters.contradictions == "keep":
        severity: Severity = "error" if contradictions / kept > MOST_CONTRADICTIONS else "warning"
        message = f"{name}: {contradictions} pairs contradict another pair. Set data.filters.contradictions=drop."
        yield Verdict(severity, "contradictions", message)
    duplicates = source.found.get("duplicates", 0)
    if duplicates and filters.duplicates == "keep":
        severity = "warning" if duplicates / kept > MOST_DUPLICATES else "note"
        message = f"{name}: {duplicates} pairs repeat another one. Set data.filters.duplicates=drop."
        yield Verdict(severity, "duplicates", message)
    leaks = source.found.get("leaks", 0) + source.found.get("near_leaks", 0)
    if leaks and filters.leaks == "keep":
        yield Verdict(
            "error",
            "leaks",
            f"{name}: {leaks} training pairs have a prompt that is also held out, so held-out metrics are too good. "
            "Set data.filters.leaks=drop.",
        )
    if source.most_common_prompt > max(MOST_OF_ONE_PROMPT * kept, 10):
        yield Verdict(
            "warning",
            "one_prompt",
            f"{name}: {source.most_common_prompt} of {kept} pairs have one and the same prompt.",
        )


def _of_all(sources: list[SourceFacts]) -> Iterator[Verdict]:
    trained = sum(source.kept - source.held_out for source in sources if source.use != "held-out")
    held_out = sum(
        source.held_out if source.use == "both" else source.kept for source in sources if source.use != "training"
    )
    if not held_out:
        yield Verdict(
            "warning",
            "nothing_held_out",
            "No pairs are held out, so nothing tells whether training helps. Set data.val_size, data.val_source or "
            "data.val_split.",
        )
    elif held_out < FEW_PAIRS // 2:
        error = 1.96 * 0.5 / held_out**0.5
        message = f"{held_out} pairs are held out: an accuracy of them is uncertain by ±{error:.2f}."
        yield Verdict("note", "few_held_out", message)
    if 0 < trained < FEW_PAIRS:
        yield Verdict("note", "few_pairs", f"{trained} training pairs are few; watch val/loss for overfitting.")


def _of_template(template: TemplateFacts) -> Iterator[Verdict]:
    responses = template.whole_responses
    if template.eos is None:
        yield Verdict("error", "no_eos", "The tokenizer has no EOS token, so no response has an end to learn.")
    elif template.without_eos > responses / 2:
        yield Verdict(
            "error",
            "no_eos",
            f"{template.without_eos} of {responses} whole responses do not end with {template.eos}, so the policy is "
            "not trained to stop. The chat template and the tokenizer's eos_token do not fit each other.",
        )
    elif template.without_eos:
        message = f"{template.without_eos} of {responses} whole responses do not end with {template.eos}."
        yield Verdict("warning", "no_eos", message)
    if template.several_bos:
        yield Verdict(
            "error",
            "several_bos",
            f"{template.several_bos} of {template.pairs} prompts begin with {template.bos} more than once.",
        )
    if template.bos is not None and 0 < template.without_bos < template.pairs:
        message = f"{template.without_bos} of {template.pairs} prompts have no {template.bos}, the others have one."
        yield Verdict("warning", "some_bos", message)

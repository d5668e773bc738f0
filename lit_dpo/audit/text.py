"""An audit as text for the terminal."""

from collections.abc import Iterator

from lit_dpo.audit.cost import Cost
from lit_dpo.audit.facts import Distribution, SourceFacts, TemplateFacts
from lit_dpo.audit.verdicts import Verdict

BARS = "▁▂▃▄▅▆▇█"
COLORS = {
    "error": "31;1",
    "warning": "33",
    "note": "2",
    "prompt": "2",
    "chosen": "32",
    "rejected": "31",
    "special": "35",
}
MOST_TOKENS = 120  # of each part of the example


def as_text(
    verdicts: list[Verdict],
    sources: list[SourceFacts],
    template: TemplateFacts | None,
    cost: Cost | None,
    *,
    color: bool = False,
    bars: bool = True,
) -> str:
    """The audit in lines of at most about 100 characters.

    Args:
        verdicts: The verdicts, worst first.
        sources: The facts of each source.
        template: What the chat template wrote.
        cost: What training would take.
        color: Whether to use a terminal's colours.
        bars: Whether to draw histograms with block characters.
    """

    def paint(text: str, kind: str) -> str:
        return f"\033[{COLORS[kind]}m{text}\033[0m" if color and text else text

    lines = ["", "Verdicts, worst first"]
    lines += [f"  {paint(f'{one.severity:<8}', one.severity)} {one.code:<16} {one.message}" for one in verdicts]
    if not verdicts:
        lines.append("  nothing to object to")
    for source in sources:
        lines += ["", *_source(source, bars)]
    if template is not None:
        lines += ["", "A pair as the policy reads it (trained tokens in colour, special tokens in another)"]
        for part in template.example:
            tokens = (
                part.tokens if len(part.tokens) <= MOST_TOKENS else [*part.tokens[:MOST_TOKENS], ("…", False, False)]
            )
            painted = (paint(text, "special" if special else part.kind) for text, _, special in tokens)
            written = "".join(painted).replace("\n", "\n             ")
            lines.append(f"  {part.kind:<10} {written}")
    if cost is not None:
        lines += ["", "Estimates for an epoch", *(f"  {name:<34}{value}" for name, value in cost_rows(cost))]
    return "\n".join(lines)


def cost_rows(cost: Cost) -> list[tuple[str, str]]:
    """Names and values of the estimates."""
    hours = ", ".join(f"{card} {_time(number)}" for card, number in cost.hours.items()) or "it fits none of T4 to H100"
    return [
        ("tokens, each prompt once", f"{cost.tokens:,}"),
        ("operations, with reference", f"{cost.operations + cost.reference_operations:.2e}"),
        ("memory of the longest batch", f"about {cost.memory / 1e9:.1f} GB"),
        ("  without recomputation", f"about {cost.memory_without_recomputation / 1e9:.1f} GB"),
        ("least time, at 40 % of its rate", hours),
    ]


def _source(source: SourceFacts, bars: bool) -> Iterator[str]:
    use = "training and held-out" if source.use == "both" else source.use
    yield f"{source.source} ({use})"
    yield f"  read as       {', '.join(f'{name} ({count})' for name, count in source.formats.items()) or 'nothing'}"
    held = f", of which {source.held_out:,} are held out" if source.held_out else ""
    yield f"  rows          {source.rows:,}, of which {source.kept:,} are kept{held}"
    for reason, left in source.left_out.items():
        yield f"  left out      {left.count:,}: {reason} (first: row {left.row})"
        if left.example:
            yield f"                {left.example:.100}"
    for note, count in source.notes.items():
        yield f"  noted         {count:,}: {note}"
    for finding, count in source.found.items():
        yield f"  found         {count:,} {finding.replace('_', ' ')}"
    if source.scored:
        yield f"  scores        {source.scored:,} rows, {source.ties:,} ties, {source.against:,} against the label"
    yield (
        f"  longer wins   {source.longer_wins:.1%} (chosen longer in {source.longer_chosen:,} pairs, rejected longer "
        f"in {source.longer_rejected:,})"
    )
    yield f"  prompts       {source.prompts:,} different ones; the most common has {source.most_common_prompt:,} pairs"
    yield f"  cut           {source.cut_prompts:,} prompts, {source.cut_responses:,} pairs with a cut response"
    yield f"  {'':<18}{'least':>9}{'median':>9}{'95 %':>9}{'most':>9}"
    for name, distribution in distributions(source):
        values = (distribution.least, distribution.median, distribution.p95, distribution.most)
        yield f"  {name:<18}{''.join(f'{number(value):>9}' for value in values)}  {_bars(distribution) if bars else ''}"


def distributions(source: SourceFacts) -> list[tuple[str, Distribution]]:
    """The distributions of a source that there are, with their names."""
    named = (
        ("prompt tokens", source.prompt_lengths),
        ("chosen tokens", source.chosen_lengths),
        ("rejected tokens", source.rejected_lengths),
        ("score margin", source.margins),
    )
    return [(name, distribution) for name, distribution in named if distribution is not None]


def number(value: float) -> str:
    """A number with thousands separated, and with decimals only where they matter."""
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def _bars(distribution: Distribution) -> str:
    most = max(distribution.counts) or 1
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] if count else " " for count in distribution.counts)


def _time(hours: float) -> str:
    minutes = 60 * hours
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1 else "under a minute"

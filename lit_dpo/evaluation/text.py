"""Metrics of held-out pairs ──► tables for the terminal, and what they say in words."""

import math

from lit_dpo.evaluation.held_out import ACCURACY, CONTROLLED, LONGER, Group, HeldOut
from lit_dpo.evaluation.statistics import Comparison, Estimate

LABELS = {
    LONGER: '"the longer one wins"',
    CONTROLLED: "rewards/accuracies, lengths controlled",
}
FIRST = ("loss", ACCURACY, CONTROLLED, LONGER)


def held_out_text(found: HeldOut) -> str:
    """All metrics with their intervals, the groups, and what the accuracy says."""
    total = found.total
    head = f"{total.num_pairs:,} held-out pairs, {total.num_prompts:,} prompts"
    lines = ["", f"{head:<44}{'value':>12}   {100 * found.level:g} % interval"]
    names = [*FIRST, *(name for name in total.metrics if name not in FIRST)]
    lines += [_row(LABELS.get(name, name), total.metrics[name], 44) for name in names]
    kind = ""
    for group in found.groups:
        if group.kind != kind:
            kind = group.kind
            title = "by " + kind
            lines += ["", f"{title:<28}{'pairs':>7}   {'accuracy':<26}{'lengths controlled':<28}longer wins"]
        lines.append(_group_row(group))
    return "\n".join([*lines, "", *verdicts(total)])


def verdicts(total: Group) -> list[str]:
    """What the accuracy says, in words."""
    accuracy, longer, controlled = (total.metrics[name] for name in (ACCURACY, LONGER, CONTROLLED))
    said = []
    if math.isnan(accuracy.low):
        said.append("There are too few prompts for an interval.")
    elif accuracy.low <= 0.5 <= accuracy.high:
        said.append(
            f"The accuracy {accuracy.value:.3f} cannot be told from chance (0.5) with {total.num_prompts} prompts."
        )
    else:
        side = "above" if accuracy.value > 0.5 else "below"
        said.append(f"The accuracy {accuracy.value:.3f} is {side} chance (0.5).")
    rule, of_rule = ("longer", longer.value) if longer.value >= 0.5 else ("shorter", 1 - longer.value)
    if accuracy.low <= of_rule <= accuracy.high:
        said.append(f"It cannot be told from that of preferring the {rule} response ({of_rule:.3f}).")
    if math.isnan(controlled.value):
        said.append(f"Lengths cannot be controlled: in every pair the chosen response is the {rule} one.")
    elif not math.isnan(controlled.low) and controlled.low <= 0.5 <= controlled.high and accuracy.low > 0.5:
        said.append(
            f"With lengths controlled it is {controlled.value:.3f}, which cannot be told from chance: what was learned "
            "may be length alone."
        )
    return said


def comparison_text(first: str, second: str, comparison: dict[str, Comparison], level: float) -> str:
    """Two models on the same pairs."""
    lines = ["", f"A  {first}", f"B  {second}", ""]
    lines.append(f"{'on the same pairs':<40}{'A':>11}{'B':>11}{'A - B':>11}   {f'{100 * level:g} % interval':<24}p")
    for name, one in comparison.items():
        low, high = one.difference.low, one.difference.high
        interval = "" if math.isnan(low) else f"[{low:.4f}, {high:.4f}]"
        numbers = (one.first, one.second, one.difference.value)
        values = "".join(f"{'-':>11}" if math.isnan(number) else f"{number:>11.4f}" for number in numbers)
        lines.append(f"{LABELS.get(name, name):<40}{values}   {interval:<24}{_p(one.p_value)}")
    accuracy = comparison[ACCURACY]
    chance = accuracy.p_value >= 1 - level
    said = "may be chance" if chance else "is more than chance"
    lines += [
        "",
        f"The difference in accuracy, {accuracy.difference.value:+.3f}, {said} (p {_p(accuracy.p_value, '= ')}).",
    ]
    return "\n".join(lines)


def _p(value: float, sign: str = "") -> str:
    if math.isnan(value):
        return "-"
    return "< 0.001" if value < 0.001 else f"{sign}{value:.3f}"


def _row(name: str, estimate: Estimate, width: int) -> str:
    if math.isnan(estimate.value):
        return f"{name:<{width}}{'-':>12}"
    interval = "" if math.isnan(estimate.low) else f"   [{estimate.low:.4f}, {estimate.high:.4f}]"
    return f"{name:<{width}}{estimate.value:>12.4f}{interval}"


def _group_row(group: Group) -> str:
    cells = [_cell(group.metrics[name]) for name in (ACCURACY, CONTROLLED)]
    return f"  {group.name:<26.26}{group.num_pairs:>7,}   {cells[0]:<26}{cells[1]:<28}{group.metrics[LONGER].value:.3f}"


def _cell(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "-"
    interval = "" if math.isnan(estimate.low) else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.value:.3f}{interval}"

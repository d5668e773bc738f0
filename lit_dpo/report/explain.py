"""A trained model and one pair ──► its token view, for the terminal and as a page."""

import shutil
from dataclasses import replace
from itertools import accumulate

import torch
from datasets import Dataset

from lit_dpo.data.pairs import PairDataset
from lit_dpo.evaluation.trained import Trained
from lit_dpo.policy.precision import float16_autocast
from lit_dpo.report.tokens import ResponseView, TokenView, pair_tokens, token_view
from lit_dpo.training.step import BatchRecord

OWN = "your pair"  # name of a source made of a prompt and two answers
MOST = 8  # tokens that are listed on each side
# Backgrounds of 24 bits: blue where the policy finds a token likelier than the reference, orange where it does not
PLUS, MINUS, GROUND = (47, 127, 196), (196, 105, 31), (0, 0, 0)


def own_pair(trained: Trained, prompt: str, chosen: str, rejected: str) -> PairDataset:
    """A pair of one's own, rendered and tokenized as in training.

    Args:
        trained: The model.
        prompt: What the user says.
        chosen: The better answer.
        rejected: The worse answer.

    Raises:
        ValueError: If it cannot be read as a pair, such as two answers that are the same.
    """
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    pairs = trained.held_out(Dataset.from_list([row]))
    return PairDataset(pairs.columns, pairs.indices, [part._replace(source=OWN) for part in pairs.parts])


def place_of_row(pairs: PairDataset, row: int) -> int:
    """The place of the held-out pair that is a given row of its source.

    Raises:
        ValueError: If no held-out pair is that row, or if several sources have it.
    """
    rows = [number for _, number in pairs.origins()]
    if rows.count(row) > 1:
        raise ValueError(f"--row {row}: several sources have such a row: {pairs.source}. Name one with --source.")
    if row not in rows:
        some = ", ".join(map(str, sorted(rows)[:8]))
        raise ValueError(
            f"--row {row}: no held-out pair of {pairs.source} is that row (counted from 0). There are {len(rows)}: "
            f"{some}{', …' if len(rows) > 8 else ''}. Rows of the training pairs are not held out."
        )
    return rows.index(row)


@torch.no_grad()
def explained(trained: Trained, pairs: PairDataset, place: int) -> TokenView:
    """The token view of one pair. The reference's log-probs come from the cache, or from the policy before training.

    Args:
        trained: The model; it is loaded if it is not.
        pairs: The pairs.
        place: Place of the pair.
    """
    module = trained.load_once()
    batch = pairs[[place]].to(module.policy.model.device)
    with float16_autocast(module.policy.model):
        policy, reference = module.policy.logps(batch), module.reference.logps(batch)
    record = BatchRecord(batch, torch.zeros(1), policy, reference if module.reference.exists else None)
    (tokens,) = pair_tokens(record, module.objective, [0])
    view = token_view(tokens, trained.tokenizer)
    return replace(view, row=-1) if view.source == OWN else view


def explanation(view: TokenView, color: bool = False, width: int | None = None) -> str:
    """A token view for the terminal: both responses, and the tokens that count most.

    Args:
        view: The pair.
        color: Whether to colour the background of each token.
        width: Width of the terminal.
    """
    width = width or min(100, shutil.get_terminal_size((100, 24)).columns)
    strongest = max((abs(one) for side in (view.chosen, view.rejected) for one in side.rewards if one), default=0.0)
    order = "as people ordered them" if view.margin > 0 else "against the label" if view.margin < 0 else "undecided"
    lines = [
        view.name,
        f"margin {view.margin:+.4f}: {order}."
        + ("" if view.moved is None else f" The policy has moved {view.moved:.4f} nats per token."),
        "",
        *_wrapped(view.prompt.strip(), width),
    ]
    for name, side in (("chosen", view.chosen), ("rejected", view.rejected)):
        lines += ["", f"─── {name}: reward {side.reward:+.4f} of {len(side.tokens)} tokens ".ljust(width, "─"), ""]
        lines.append(_coloured(side, strongest) if color else "".join(side.tokens).rstrip())
    lines += ["", *_table(view)]
    return "\n".join(lines)


def _table(view: TokenView) -> list[str]:
    """The tokens with the greatest effect on the margin, in both directions."""
    rows = []
    for sign, name, side in ((1, "chosen", view.chosen), (-1, "rejected", view.rejected)):
        sums = accumulate(one or 0.0 for one in side.rewards)
        for number, (token, policy, reference, reward, total) in enumerate(
            zip(side.tokens, side.policy, side.reference, side.rewards, sums, strict=True)
        ):
            if reward is not None and policy is not None:
                rows.append((sign * reward, name, number + 1, token, policy, reference, reward, total))
    rows.sort(key=lambda row: -row[0])
    lines = [f"{'margin':>9}  {'side':<8} {'at':>4}  {'token':<18}{'log π':>9}{'log π_ref':>11}{'share':>9}{'sum':>9}"]
    groups = [("for the chosen response", [row for row in rows if row[0] > 0][:MOST])]
    groups.append(("for the rejected response", [row for row in rows[::-1] if row[0] < 0][:MOST]))
    for title, few in groups:
        lines.append(f"{title}:" if few else f"{title}: none")
        for effect, name, place, token, policy, reference, reward, total in few:
            text = repr(token)[1:-1]
            text = text if len(text) <= 16 else f"{text[:15]}…"
            against = "–" if reference is None else f"{reference:.3f}"  # noqa: RUF001
            numbers = f"{policy:>9.3f}{against:>11}{reward:>+9.4f}{total:>+9.3f}"
            lines.append(f"{effect:>+9.4f}  {name:<8} {place:>4}  {text:<18}{numbers}")
    return lines


def _coloured(side: ResponseView, strongest: float) -> str:
    """A response with the background of each token as strong as its share of the reward."""
    parts = []
    for token, reward in zip(side.tokens, side.rewards, strict=True):
        if not reward or not strongest:
            parts.append(token)
            continue
        share = min(1.0, abs(reward) / strongest) ** 0.7
        red, green, blue = (
            round(ground + share * (full - ground))
            for ground, full in zip(GROUND, PLUS if reward > 0 else MINUS, strict=True)
        )
        start, end = f"\x1b[48;2;{red};{green};{blue}m\x1b[97m", "\x1b[0m"
        parts.append(start + token.replace("\n", f"{end}\n{start}") + end)
    return "".join(parts).rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return [part for line in text.splitlines() for part in (textwrap.wrap(line, width) or [""])]

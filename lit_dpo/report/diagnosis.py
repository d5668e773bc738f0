"""A run ──► verdicts in plain words, worst first: what went wrong, what to do, and where the threshold comes from."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_dpo.audit.verdicts import ORDER, Severity
from lit_dpo.evaluation.held_out import ACCURACY, CONTROLLED, LONGER
from lit_dpo.report.folder import Run
from lit_dpo.report.quantities import calibration

MOST_DROP = 0.5  # nats per token, as CollapseGuard
LENGTH_CORRELATION = 0.5  # |r| of margin and difference of lengths
LEAD_LEFT = 0.5  # of the accuracy's lead over chance, once lengths are controlled
LOSS_RISE = 0.05  # share of the best held-out loss
ACCURACY_GAP = 0.2  # of training over held-out pairs
START_KL = 0.02  # nats per token; bfloat16 alone gives about 0.005
SMALL_KL = 1e-3  # nats per token: half the square of a change of 0.045 in a token's log-prob
LARGE_KL = 1.0  # nats per token
CALIBRATION_ERROR = 0.1
FEW = 30  # pairs, below which a rule about correlations or calibration says nothing


@dataclass(frozen=True)
class Diagnosis:
    """A verdict on a run."""

    severity: Severity
    code: str  # a stable name
    message: str
    remedy: str
    source: str  # of the threshold


def diagnose(run: Run) -> list[Diagnosis]:
    """All verdicts on a run, worst first."""
    found = [one for rule in RULES for one in rule(run)]
    return sorted(found, key=lambda one: ORDER.index(one.severity))


def _dead(run: Run) -> Iterator[Diagnosis]:
    norms = run.curves.get("train/grad_norm")
    zero, total = run.facts.get("adapters_zero", 0), run.facts.get("adapters", 0)
    if (total and zero == total) or (norms and norms.values and not any(norms.values)):
        yield Diagnosis(
            "error",
            "dead_adapters",
            "The adapters did not train: every gradient is zero, or all their weights are still zero.",
            "Look whether the learning rate is 0, whether all parameters are frozen, and whether bitsandbytes warns of "
            "a kernel without gradients.",
            "exact: a LoRA adapter starts with B = 0 (Hu et al. 2021, arXiv:2106.09685), and one step moves it",
        )
    elif zero:
        names = ", ".join(run.facts.get("adapters_zero_names", []))
        yield Diagnosis(
            "warning",
            "dead_adapters",
            f"{zero} of {total} adapters did not train: their weights are still zero ({names}).",
            "Their layers have no part in the log-probs. Leave them out of lora.target_modules.",
            "exact: a LoRA adapter starts with B = 0 (Hu et al. 2021, arXiv:2106.09685), and one step moves it",
        )


def _reference(run: Run) -> Iterator[Diagnosis]:
    before = run.metrics("before")
    kl, loss = before.get("kl"), before.get("loss", math.nan)
    if not run.facts.get("starts_at_reference") or kl is None or not kl > START_KL:
        return
    yield Diagnosis(
        "error",
        "reference_mismatch",
        f"Before the first step, policy and reference are {kl:.3g} nats per token apart (loss {loss:.4f}). They should "
        "be the same function.",
        "Is dropout on in one of them, or is the reference cache of another machine? Try model.reference=live.",
        f"{START_KL} nats per token: policies that are the same differ by rounding alone, in bfloat16 by 0.005",
    )


def _displacement(run: Run) -> Iterator[Diagnosis]:
    after = run.metrics("after")
    drop, rejected = after.get("displacement/chosen"), after.get("displacement/rejected", math.nan)
    if drop is None or not drop < 0:
        return
    source = f"{MOST_DROP} nats per token, as guard.max_drop; Razin et al. 2024, arXiv:2410.08847"
    if -drop > MOST_DROP:
        yield Diagnosis(
            "warning",
            "displacement",
            f"Likelihood displacement: the chosen responses are {-drop:.2f} nats per token less likely than under the "
            f"reference (rejected: {-rejected:.2f}). Their probability goes to texts that nobody compared.",
            "Lower the learning rate, raise β, or add a term for the chosen response (RPO, CPO, APO-zero). Leave out "
            "pairs whose responses are nearly the same.",
            source,
        )
    else:
        yield Diagnosis(
            "note",
            "displacement",
            f"The chosen responses are {-drop:.3f} nats per token less likely than under the reference, the rejected "
            f"ones {-rejected:.3f}. DPO rewards the difference alone, so this is common.",
            "Watch displacement/chosen if you train longer.",
            source,
        )


def _length(run: Run) -> Iterator[Diagnosis]:
    found, table = run.held_out, run.after
    if found is None or table is None:
        return
    metrics = found.total.metrics
    accuracy, longer, controlled = (metrics.get(name) for name in (ACCURACY, LONGER, CONTROLLED))
    if accuracy is None or longer is None or controlled is None or not accuracy.low > 0.5:
        return
    rule = max(longer.value, 1 - longer.value)
    which = "longer" if longer.value > 0.5 else "shorter"
    source = "less than half of the lead over chance is left; Park et al. 2024, arXiv:2403.19159, on length in DPO"
    remedy = (
        "Train and test on pairs of similar length, or choose an objective that weighs length less: "
        "SimPO, LDDPO, SigmoidNorm."
    )
    if math.isnan(controlled.value):
        yield Diagnosis(
            "warning",
            "length_exploitation",
            f"In every held-out pair the {which} response is the chosen one. That the policy learned more than "
            f'"be {which}" cannot be seen from these pairs.',
            remedy,
            "exact; Park et al. 2024, arXiv:2403.19159, on length in DPO",
        )
    elif not controlled.low > 0.5 and controlled.value - 0.5 < LEAD_LEFT * (accuracy.value - 0.5):
        yield Diagnosis(
            "warning",
            "length_exploitation",
            f"Length exploitation: the accuracy is {accuracy.value:.3f}, but with lengths controlled it is "
            f"{controlled.value:.3f} [{controlled.low:.3f}, {controlled.high:.3f}], which cannot be told from chance. "
            f"Preferring the {which} response alone gives {rule:.3f}.",
            remedy,
            source,
        )
    else:
        margins = table.values["rewards/margins"]
        difference = table.values["lengths/chosen"] - table.values["lengths/rejected"]
        if len(table) >= FEW and np.std(difference) > 0 and np.std(margins) > 0:
            r = float(np.corrcoef(margins, difference)[0, 1])
            if abs(r) > LENGTH_CORRELATION:
                yield Diagnosis(
                    "warning",
                    "length_exploitation",
                    f"The margin follows the difference of lengths (r = {r:.2f}): the policy prefers "
                    f"{'longer' if r > 0 else 'shorter'} responses.",
                    remedy,
                    f"|r| above {LENGTH_CORRELATION}; Singhal et al. 2023, arXiv:2310.03716, for reward and length",
                )


def _overfitting(run: Run) -> Iterator[Diagnosis]:
    loss = run.curves.get("val/loss")
    trained = [] if loss is None or loss.mean_of > 1 else [place for place, step in enumerate(loss.steps) if step > 0]
    if loss is not None and len(trained) > 1:
        best, last = min(trained, key=lambda place: loss.values[place]), trained[-1]
        rise = loss.values[last] / loss.values[best] - 1 if loss.values[best] > 0 else 0.0
        if rise > LOSS_RISE:
            epoch = loss.epochs[best] if loss.epochs else math.nan
            when = "" if math.isnan(epoch) else f" (epoch {epoch + 1:.0f})"
            yield Diagnosis(
                "warning",
                "overfitting",
                f"Overfitting: the held-out loss is lowest at step {loss.steps[best]:.0f}{when} and {rise:.0%} higher "
                "at the end.",
                f"Take the checkpoint best-step{loss.steps[best]:.0f}, or train fewer epochs (trainer.max_epochs) or "
                "with a lower learning rate.",
                f"a rise of {LOSS_RISE:.0%}; Rafailov et al. 2024, arXiv:2406.02900, see DPO degrade within an epoch",
            )
    training, held_out = (run.curves.get(f"{stage}/rewards/accuracies") for stage in ("train", "val"))
    if training and held_out and len(training.values) >= 10 and held_out.values:
        seen, unseen = training.last(), held_out.values[-1]
        if seen - unseen > ACCURACY_GAP and (run.summary.get("epochs") or 0) > 1:
            yield Diagnosis(
                "warning",
                "memorized",
                f"At the end the accuracy of training pairs is {seen:.2f}, of held-out pairs {unseen:.2f}: pairs were "
                "learned by heart.",
                "Train one epoch, or with more and more different pairs.",
                f"a gap of {ACCURACY_GAP}: ours, far outside the interval of 100 pairs (±0.1)",
            )


def _step_size(run: Run) -> Iterator[Diagnosis]:
    kl = run.metrics("after").get("kl")
    if kl is None or (run.facts.get("adapters_zero", 0) and run.facts["adapters_zero"] == run.facts.get("adapters")):
        return
    if kl < SMALL_KL:
        yield Diagnosis(
            "warning",
            "small_step",
            f"The policy has hardly moved: {kl:.2g} nats per token from the reference.",
            "Raise the learning rate by ten, train more steps, or lower β.",
            f"{SMALL_KL} nats per token: ours; a token's log-prob has then changed by about 0.045",
        )
    elif kl > LARGE_KL:
        yield Diagnosis(
            "warning",
            "large_step",
            f"The policy is far from the reference: {kl:.2f} nats per token. What it writes may no longer be language.",
            "Read samples.md. Lower the learning rate, raise β, or train fewer steps.",
            f"{LARGE_KL} nats per token: ours; Gao et al. 2022, arXiv:2210.10760, on over-optimization with distance",
        )


def _loss(run: Run) -> Iterator[Diagnosis]:
    before, after = run.metrics("before").get("loss"), run.metrics("after").get("loss")
    if before is not None and after is not None and after > before:
        yield Diagnosis(
            "warning",
            "loss_rose",
            f"The held-out loss rose from {before:.4f} to {after:.4f}: the policy is more wrong, and surer of it, than "
            "before.",
            "Lower the learning rate, or look at the labels: python -m lit_dpo suspects.",
            "exact: at the reference the loss is what knowing nothing costs (ln 2 for DPO)",
        )


def _chance(run: Run) -> Iterator[Diagnosis]:
    found = run.held_out
    accuracy = None if found is None else found.total.metrics.get(ACCURACY)
    if found is None or accuracy is None or math.isnan(accuracy.low):
        return
    if accuracy.low <= 0.5 <= accuracy.high:
        yield Diagnosis(
            "warning",
            "chance",
            f"The held-out accuracy {accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}] cannot be told from "
            f"chance, with {found.total.num_pairs} pairs of {found.total.num_prompts} prompts.",
            "Hold out more pairs, or train longer.",
            "the 95 % interval of a bootstrap over prompts (Miller 2024, arXiv:2411.00640)",
        )
    elif accuracy.high < 0.5:
        yield Diagnosis(
            "error",
            "reversed",
            f"The held-out accuracy {accuracy.value:.3f} is below chance: the policy prefers the rejected responses.",
            "Are chosen and rejected swapped in the held-out or in the training data?",
            "the 95 % interval of a bootstrap over prompts (Miller 2024, arXiv:2411.00640)",
        )


def _calibrated(run: Run) -> Iterator[Diagnosis]:
    if run.after is None or len(run.after) < FEW:
        return
    found = calibration(run.after.values["rewards/margins"])
    sure = float(np.average(found.confidence, weights=found.counts)) if found.counts else 0.0
    right = float(np.average(found.accuracy, weights=found.counts)) if found.counts else 0.0
    if found.error > CALIBRATION_ERROR:
        yield Diagnosis(
            "note",
            "calibration",
            f"The preference probability is badly calibrated (error {found.error:.2f}): it is on average "
            f"{sure:.0%} sure and {right:.0%} right.",
            "This matters if rewards are read as probabilities. Label smoothing or a lower β tempers it."
            if sure > right
            else "This matters if rewards are read as probabilities. Training longer sharpens it.",
            f"an expected calibration error above {CALIBRATION_ERROR}: ours; Guo et al. 2017, arXiv:1706.04599",
        )


def _few(run: Run) -> Iterator[Diagnosis]:
    if run.after is not None and len(run.after) < FEW:
        yield Diagnosis(
            "note",
            "few_held_out",
            f"{len(run.after)} held-out pairs were measured: too few to judge calibration, and whether margins follow "
            "lengths.",
            "Hold out more pairs (data.val_size), or let the Trainer use all (trainer.limit_val_batches).",
            f"{FEW} pairs: ours",
        )


def _not_finite(run: Run) -> Iterator[Diagnosis]:
    lost = {name: curve.not_finite for name, curve in run.curves.items() if curve.not_finite}
    lost |= {f"{name} at the end": 1 for name, value in run.summary.get("after", {}).items() if value is None}
    if lost:
        names = ", ".join(f"{name} ({count})" for name, count in lost.items())
        yield Diagnosis(
            "warning",
            "not_finite",
            f"Logged numbers are not finite, and are left out of the curves: {names}.",
            "Under 16-mixed single gradients may overflow; a loss must not. See model.on_nonfinite.",
            "exact",
        )


RULES: tuple[Callable[[Run], Iterator[Any]], ...] = (
    _dead,
    _reference,
    _displacement,
    _length,
    _overfitting,
    _step_size,
    _loss,
    _chance,
    _calibrated,
    _few,
    _not_finite,
)

"""Records what TRL's losses and their gradients are: ``python -m tests.parity.record_trl_objectives --output X.json``.

The loss functions of its trainers are called on given token log-probs, in float64 where TRL can; nothing is loaded.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.objectives.examples import examples
from tests.parity.objectives import Case, cases


def run_trl(case: Case, example: dict[str, Any]) -> dict[str, Any]:
    """The mean loss of the pairs, and its gradient in the policy's token log-probs, (R,)."""
    tokens = torch.tensor(example["policy"], dtype=case.dtype, requires_grad=True)
    reference = torch.tensor(example["reference"], dtype=case.dtype)
    squares = torch.tensor(example["log_sum_squares"], dtype=case.dtype)
    compute = {"dpo": _dpo, "cpo": _cpo, "orpo": _orpo}[case.trainer]
    loss = compute(case.settings, tokens, reference, squares, example["lengths"])
    loss.backward()
    assert tokens.grad is not None
    return {"loss": loss.item(), "gradient": tokens.grad.tolist()}


def _dpo(settings: dict[str, Any], tokens: Tensor, reference: Tensor, squares: Tensor, lengths: list[int]) -> Tensor:
    """``DPOTrainer._compute_loss`` on rows [chosen; rejected] of one prompt token and the response, padded."""
    from trl import DPOTrainer

    mask = _rows(torch.ones_like(reference), lengths)
    completion_mask = torch.cat([torch.zeros(len(lengths), 1), mask], 1).long()

    def model(logps: Tensor) -> Any:
        rows = _rows(logps, lengths)
        nothing = torch.zeros_like(mask)
        return lambda **inputs: SimpleNamespace(
            log_probs=rows,
            log_sum_sq_probs=_rows(squares, lengths),
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )

    def same(value: Any) -> Any:
        return value

    class Everything(dict[str, Any]):
        def __missing__(self, key: str) -> list[float]:
            return self.setdefault(key, [])

    with torch.no_grad():
        sums = _rows(reference, lengths).sum(1)
        if settings.get("ld_alpha") is not None:  # TRL weighs the reference's tokens too, then hands on the sums
            half = len(lengths) // 2
            shared = mask[:half].sum(1).minimum(mask[half:].sum(1)).repeat(2)
            weights = torch.ones_like(mask).masked_fill(mask.cumsum(1) > shared[:, None], settings["ld_alpha"])
            sums = (_rows(reference, lengths) * weights).sum(1)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"train": Everything()},
        _total_train_tokens=0,
        _tp_size=1,
        **{
            "ld_alpha": None,
            "f_divergence_type": "reverse_kl",
            "f_alpha_divergence_coef": 0.5,
            "label_smoothing": 0.0,
            "use_weighting": False,
            "loss_weights": [1.0] * len(settings["loss_types"]),
            **settings,
        },
    )
    chosen, rejected = sums.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss: Tensor = DPOTrainer._compute_loss(trainer, model(tokens), inputs, False)
    return loss


def _cpo(settings: dict[str, Any], tokens: Tensor, reference: Tensor, squares: Tensor, lengths: list[int]) -> Tensor:
    """``CPOTrainer.cpo_loss``, without the fine-tuning that its ``cpo_alpha`` weighs."""
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(alpha=0.0, accelerator=SimpleNamespace(device=torch.device("cpu")), **settings)
    average = settings["loss_type"] == "simpo"
    losses: Tensor = CPOTrainer.cpo_loss(trainer, *_sums(tokens, lengths, average))[0]
    return losses.mean()


def _orpo(settings: dict[str, Any], tokens: Tensor, reference: Tensor, squares: Tensor, lengths: list[int]) -> Tensor:
    """``ORPOTrainer.odds_ratio_loss``, without the fine-tuning."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")), **settings)
    losses: Tensor = ORPOTrainer.odds_ratio_loss(trainer, *_sums(tokens, lengths, average=True))[0]
    return -losses.mean()


def _rows(values: Tensor, lengths: list[int]) -> Tensor:
    """Padded rows of responses, all chosen ones and then all rejected ones."""
    parts = values.split(lengths)
    return torch.nn.utils.rnn.pad_sequence([*parts[0::2], *parts[1::2]], batch_first=True)


def _sums(tokens: Tensor, lengths: list[int], average: bool) -> tuple[Tensor, Tensor]:
    """Sums or means over the tokens of the chosen and of the rejected responses."""
    values = torch.stack([part.mean() if average else part.sum() for part in tokens.split(lengths)])
    return values[0::2], values[1::2]


def record() -> dict[str, Any]:
    """What TRL gives for all cases and examples."""
    given = examples()
    return {
        "versions": {name: version(name) for name in ("trl", "torch")},
        "examples": given,
        "results": {
            name: {example: run_trl(case, values) for example, values in given.items()}
            for name, case in cases().items()
        },
    }


def main() -> None:
    """Writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.parse_args().output.write_text(json.dumps(record(), indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Nothing is trained on a loss that is not finite, and a policy that leaves its reference behind is noticed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lit_dpo import DPOModule
from lit_dpo.callbacks import CollapseGuard, LastCheckpoint
from lit_dpo.objectives import SFT, BCOPair, Mixture, PairLogps, Sigmoid, SimPO
from lit_dpo.training.finite import NonFiniteLossError, read_nonfinite_step
from lit_dpo.training.requirements import Placement
from tests.test_module import adapters, data, fit, module, sgd

pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches",
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:.* steps were skipped",
)


class Breaks(Sigmoid):
    """A loss that is not finite for the pairs whose chosen response has so many tokens, or whose gradient is not."""

    def __init__(self, beta: float = 0.1, length: int = 0, gradient: bool = False) -> None:
        super().__init__(beta)
        self.length, self.gradient = length, gradient

    def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        losses = super().forward(policy, reference)
        broken = policy.chosen_lengths == self.length
        if self.gradient:
            return losses + (0 * losses[broken]).sqrt().sum()
        return losses.masked_fill(broken, torch.nan)


class Watch(Callback):
    """Keeps the adapters after each step, and the batches."""

    def __init__(self) -> None:
        self.adapters: list[dict[str, Tensor]] = []
        self.batches: list[Any] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.adapters.append(adapters(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.adapters.append(adapters(pl_module))
        self.batches.append(batch)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def broken_length(pairs_file: str, batch: int) -> tuple[int, int, list[tuple[str, int]]]:
    """A length of a chosen response, the first batch of two that has it from ``batch`` on, and the pairs with it."""
    watch = Watch()
    fit(module_of(pairs_file), data(pairs_file, batch_size=2), callbacks=[watch])
    lengths = [[segment.responses[0] for segment in b.segments] for b in watch.batches]
    length = lengths[batch][0]
    first = next(index for index, found in enumerate(lengths) if length in found)
    origins = watch.batches[first].origins
    return length, first, [origin for origin, n in zip(origins, lengths[first], strict=True) if n == length]


BASE: list[str] = []


@pytest.fixture(autouse=True)
def base(tiny_base: str) -> None:
    BASE[:] = [tiny_base]


def module_of(pairs_file: str, **options: Any) -> DPOModule:
    return module(BASE[0], **options)


@pytest.mark.parametrize("gradient", [False, True])
def test_the_run_stops_before_the_step_and_leaves_what_reproduces_it(
    pairs_file: str, tmp_path: Path, gradient: bool
) -> None:
    length, first, origins = broken_length(pairs_file, 3)
    watch, model = Watch(), module_of(pairs_file, objective=Breaks(0.1, length, gradient))
    with pytest.raises(NonFiniteLossError) as error:
        fit(model, data(pairs_file, batch_size=2), callbacks=[watch], default_root_dir=tmp_path)
    path = tmp_path / f"nonfinite-step{first + 1}.ckpt"
    for part in (f"Step {first + 1}:", str(path), "is not finite", "model.on_nonfinite=skip"):
        assert part in str(error.value)
    source, _ = origins[0]
    assert re.findall(r"\d+", str(error.value).split(f"{source} row")[1].split(" is not")[0]) == (
        [str(row) for _, row in (read_nonfinite_step(path)[0].origins if gradient else origins)]
    )
    assert ("the gradient (norm nan)" in str(error.value)) == gradient
    assert same(adapters(model), watch.adapters[-1]), "nothing was trained on it"

    (batch,) = read_nonfinite_step(path)
    assert set(origins) <= set(batch.origins)
    loaded = DPOModule.load_from_checkpoint(path, weights_only=True)
    assert same(adapters(loaded), adapters(model))
    assert isinstance(loaded.objective, Breaks)
    loss = loaded.objective(loaded.policy.logps(batch), loaded.reference.logps(batch)).sum()
    (found,) = torch.autograd.grad(loss, [next(p for p in loaded.parameters() if p.requires_grad)])
    assert not (found if gradient else loss).isfinite().all(), "it happens again"


def test_the_step_is_skipped_where_asked(pairs_file: str, tmp_path: Path) -> None:
    length, _, _ = broken_length(pairs_file, 3)
    watch = Watch()
    model = module_of(pairs_file, objective=Breaks(0.1, length), on_nonfinite="skip", optimizer=torch.optim.AdamW)
    with (
        pytest.warns(UserWarning, match=r"Step \d: the loss of .* The step is skipped"),
        pytest.warns(UserWarning, match=r"\d steps were skipped because their loss or gradient was not finite"),
    ):
        fit(model, data(pairs_file, batch_size=2), callbacks=[watch], default_root_dir=tmp_path)
    moved = [not same(*pair) for pair in zip(watch.adapters[:-1], watch.adapters[1:], strict=True)]
    held = [length in [segment.responses[0] for segment in batch.segments] for batch in watch.batches]
    assert len(moved) == 8
    assert moved == [not broken for broken in held]
    assert {path.name for path in tmp_path.glob("nonfinite*")} == {
        f"nonfinite-step{step + 1}.ckpt" for step, broken in enumerate(held) if broken
    }
    assert all(torch.isfinite(value).all() for value in adapters(model).values())


def test_the_whole_step_is_kept_where_batches_are_accumulated(pairs_file: str, tmp_path: Path) -> None:
    length, first, _ = broken_length(pairs_file, 3)
    model = module_of(pairs_file, objective=Breaks(0.1, length))
    with pytest.raises(NonFiniteLossError):
        fit(model, data(pairs_file, batch_size=2), accumulate_grad_batches=4, default_root_dir=tmp_path)
    (path,) = tmp_path.glob("nonfinite*")
    assert path.name == f"nonfinite-step{first // 4 + 1}.ckpt"
    assert [len(batch) for batch in read_nonfinite_step(path)] == [2, 2, 2, 2]


def test_another_checkpoint_is_told_apart(pairs_file: str, tmp_path: Path) -> None:
    fit(module_of(pairs_file), data(pairs_file)).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="not the checkpoint of a step whose loss"):
        read_nonfinite_step(tmp_path / "x.ckpt")


def test_a_skipped_step_leaves_bcos_shift_alone(pairs_file: str, tmp_path: Path) -> None:
    length, first, _ = broken_length(pairs_file, 0)
    shifts = []

    class Note(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
            shifts.append(pl_module.objective.objectives[0].seen.tolist())

    objective = Mixture([BCOPair(), Breaks(0.1, length)], [1.0, 1.0])
    model = module_of(pairs_file, objective=objective, on_nonfinite="skip")
    with pytest.warns(UserWarning, match="is skipped"):
        fit(model, data(pairs_file, batch_size=2), callbacks=[Note()], default_root_dir=tmp_path)
    assert first == 0
    assert shifts[0] == [0.0, 0.0]
    assert shifts[-1][1] > 0


def guarded(pairs_file: str, guard: CollapseGuard, tmp_path: Path, **options: Any) -> Trainer:
    """A run that by default unlearns the chosen responses: it climbs the loss of fine-tuning on them."""
    unlearns = {"objective": SFT(), "reference": "live", "optimizer": lambda p: torch.optim.SGD(p, 0.5, maximize=True)}
    model = module_of(pairs_file, **(options or unlearns))
    kept = {"callbacks": [guard, LastCheckpoint()], "enable_checkpointing": True, "default_root_dir": tmp_path}
    return fit(model, data(pairs_file, batch_size=2), **kept)


def test_displacement_is_told_once_with_the_pairs_that_did_it(
    pairs_file: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    trainer = guarded(pairs_file, CollapseGuard(max_drop=0.02), tmp_path)
    told = [str(warning.message) for warning in recwarn if "less likely than under the reference" in str(warning)]
    assert len(told) == 1
    assert "nats per token" in told[0]
    assert "(max_drop=0.02)" in told[0]
    assert f"{pairs_file} row" in told[0]
    assert "lower the learning rate" in told[0]
    assert trainer.callback_metrics["train/displacement/chosen"] < -0.02
    assert trainer.global_step == 8


def test_it_stops_where_asked_and_keeps_everything(pairs_file: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Step \d: the chosen responses .* The run stops\."):
        trainer = guarded(pairs_file, CollapseGuard(max_drop=0.02, action="stop"), tmp_path)
    assert trainer.global_step < 8
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == trainer.global_step


def test_the_kl_budget(pairs_file: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"the KL divergence from the reference is .* \(max_kl=0\.0001\): .* row"):
        trainer = guarded(pairs_file, CollapseGuard(max_drop=None, max_kl=1e-4, action="stop"), tmp_path)
    assert trainer.global_step < 8
    assert trainer.callback_metrics["train/kl"] > 1e-4


def test_a_good_run_is_left_in_peace(pairs_file: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    guarded(pairs_file, CollapseGuard(), tmp_path, optimizer=sgd(0.01))
    assert [str(warning.message) for warning in recwarn if "reference" in str(warning.message)] == []


def test_a_limit_that_is_passed_again_is_told_again() -> None:
    guard = CollapseGuard()
    assert [guard._passes(value, 0.5, "max_drop") for value in (0.4, 0.6, 0.7, 0.4, 0.6)] == [
        *(False, True, False, False, True)
    ]


def test_a_skipped_step_ends_the_run_where_the_guard_stops(pairs_file: str, tmp_path: Path) -> None:
    length, first, _ = broken_length(pairs_file, 3)
    options = {"objective": Breaks(0.1, length), "on_nonfinite": "skip"}
    with pytest.warns(UserWarning, match="is skipped"):
        trainer = guarded(pairs_file, CollapseGuard(action="stop"), tmp_path, **options)
    assert trainer.global_step == first + 1


def test_without_a_reference_it_says_what_it_cannot_see(
    pairs_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guarded(pairs_file, CollapseGuard(), tmp_path, objective=SimPO())
    assert "there is no reference, so max_drop and max_kl are not checked" in caplog.text


@pytest.mark.parametrize("arguments", [{"max_drop": 0.0}, {"max_kl": -1.0}])
def test_limits_must_be_positive(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"guard.{next(iter(arguments))} must be positive"):
        CollapseGuard(**arguments)


def test_a_run_goes_on_afresh_after_one_that_was_broken_off(pairs_file: str, tmp_path: Path) -> None:
    length, _, _ = broken_length(pairs_file, 3)
    model = module_of(pairs_file, objective=Breaks(0.1, length))
    with pytest.raises(NonFiniteLossError):
        fit(model, data(pairs_file, batch_size=2), accumulate_grad_batches=4, default_root_dir=tmp_path)
    model.objective.length = 0
    seen = []

    class Note(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            seen.append(len(pl_module.step.batches))

    fit(model, data(pairs_file, batch_size=2), accumulate_grad_batches=4, callbacks=[Note()])
    assert seen == [4, 4]


def test_only_its_own_checkpoint_holds_the_pairs(pairs_file: str, tmp_path: Path) -> None:
    length, _, _ = broken_length(pairs_file, 3)
    model = module_of(pairs_file, objective=Breaks(0.1, length), on_nonfinite="skip")
    kept = {"callbacks": [LastCheckpoint(every_n_steps=1)], "enable_checkpointing": True}
    with pytest.warns(UserWarning, match="is skipped"):
        trainer = fit(model, data(pairs_file, batch_size=2), default_root_dir=tmp_path, **kept)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    for path in (tmp_path / "checkpoints/last.ckpt", tmp_path / "end.ckpt"):
        assert "nonfinite_step" not in torch.load(path, weights_only=True)


def test_a_policy_that_is_broken_for_good_stops_the_run(pairs_file: str, tmp_path: Path) -> None:
    class Always(Sigmoid):
        def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
            return super().forward(policy, reference) * torch.nan

    model = module_of(pairs_file, objective=Always(), on_nonfinite="skip")
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(NonFiniteLossError, match="the 10th such step in a row"),
    ):
        fit(model, data(pairs_file, batch_size=2), max_epochs=2, default_root_dir=tmp_path)
    assert len(list(tmp_path.glob("nonfinite*"))) == 10


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_grad_scaler_may_skip_steps_but_not_for_ever(pairs_file: str, tmp_path: Path) -> None:
    """Gradients that are not finite at any scale are no overflow."""
    from lightning.pytorch.plugins import MixedPrecision

    class Broken(BCOPair):
        def forward(self, policy: PairLogps, reference: PairLogps) -> Tensor:
            return super().forward(policy, reference) + (0 * policy.chosen).sqrt().sum()

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model = module_of(pairs_file, objective=Broken())
    model.build_policy(Placement(torch.float32, torch.device("cpu")))
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    with pytest.raises(NonFiniteLossError, match="Step 4: the gradient"):  # the scale was 4, 2, 1, and is a half
        fit(model, data(pairs_file, batch_size=2), plugins=[precision], default_root_dir=tmp_path, limit_val_batches=0)
    assert model.objective.seen.tolist() == [0.0, 0.0], "of steps that were not taken nothing is kept"


@pytest.mark.filterwarnings("ignore:You're resuming", "ignore:.*is skipped")
def test_a_run_that_stopped_goes_on_from_the_file_it_left(pairs_file: str, tmp_path: Path) -> None:
    length, _, _ = broken_length(pairs_file, 3)

    def run(folder: str, on_nonfinite: Any, ckpt: Path | None = None) -> DPOModule:
        model = module_of(pairs_file, objective=Breaks(0.1, length), on_nonfinite=on_nonfinite)
        options = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
        trainer = Trainer(**options, default_root_dir=tmp_path / folder, enable_progress_bar=False)
        trainer.fit(model, data(pairs_file, batch_size=2), ckpt_path=ckpt, weights_only=True)
        return model

    whole = run("whole", "skip")
    with pytest.raises(NonFiniteLossError):
        run("stopped", "stop")
    (path,) = (tmp_path / "stopped").glob("nonfinite*")
    assert same(adapters(run("resumed", "skip", path)), adapters(whole))

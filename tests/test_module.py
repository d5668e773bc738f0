import math
from pathlib import Path
from typing import Any, Literal

import lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from lit_dpo import DPOModule, PreferenceDataModule
from lit_dpo.data.batch import PairBatch
from lit_dpo.files.cache import cache_dir
from lit_dpo.objectives import IPO, LDDPO, ODPO, RPO, SFT, WPO, AlphaDivergence, JensenShannon, Mixture, Sigmoid
from lit_dpo.reference import InitialPolicy
from lit_dpo.training.checkpoint import kept_names
from lit_dpo.training.requirements import Placement
from tests.closeness import LOSS, TINY, assert_same
from tests.tiny import random_batch

STEPS = 4  # of an epoch of the pairs that are trained on: each adds rounding of its own
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches",
    "ignore:The '.*dataloader' does not have many workers",
)


def sgd(lr: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def module(base: str, **options: Any) -> DPOModule:
    seed_everything(3, verbose=False)
    arguments = {"quantization": None, "optimizer": sgd(1.0), "lr_scheduler": "constant", "warmup": 0.0}
    return DPOModule(base, **{**arguments, **options})


def data(source: str, **options: Any) -> PreferenceDataModule:
    return PreferenceDataModule(source, **{"val_size": 4, "batch_size": 4, **options})


def fit(model: LightningModule, datamodule: PreferenceDataModule, **options: Any) -> Trainer:
    trainer = Trainer(**{**QUIET, "accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, **options})
    trainer.fit(model, datamodule)
    return trainer


class Losses(Callback):
    """Keeps the loss of each batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self.values.append(float(arguments[1]["loss"]))


EIGHT_BITS = 1e-3  # an activation near the middle between two of 255 steps may be rounded to either


@pytest.mark.parametrize(
    ("quantization", "slack"), [(None, LOSS), ("nf4", LOSS), (BitsAndBytesConfig(load_in_8bit=True), EIGHT_BITS)]
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_the_first_loss_is_ln_2(tiny_base: str, pairs_file: str, quantization: Any, slack: float) -> None:
    losses = Losses()
    fit(module(tiny_base, quantization=quantization), data(pairs_file), callbacks=[losses], limit_train_batches=1)
    assert losses.values[0] == pytest.approx(math.log(2), abs=slack)


def test_the_reference_is_bit_identical_after_training(tiny_base: str, pairs_file: str) -> None:
    model, datamodule = module(tiny_base, quantization="nf4", reference="live"), data(pairs_file)
    model.build_policy(Placement(torch.float32, torch.device("cpu")))
    datamodule.tokenizer = model.tokenizer
    datamodule.setup("fit")
    assert datamodule.val_pairs is not None
    batch = datamodule.val_pairs[[0, 1, 2]]
    reference, policy = model.reference.logps(batch), model.policy.logps(batch)
    fit(model, datamodule)
    after = model.reference.logps(batch)
    assert torch.equal(reference.chosen, after.chosen)
    assert torch.equal(reference.rejected, after.rejected)
    assert (model.policy.logps(batch).chosen - policy.chosen).abs().max() > 1e-3, "the policy has moved"


def test_every_adapter_trains_after_the_sanity_check(tiny_base: str, pairs_file: str) -> None:
    model = module(tiny_base, quantization="nf4", optimizer=sgd(0.1))
    fit(model, data(pairs_file), num_sanity_val_steps=-1, limit_train_batches=2)
    trained = {name: parameter for name, parameter in model.named_parameters() if "lora_B" in name}
    assert len(trained) == 14
    for name, parameter in trained.items():
        assert parameter.abs().sum() > 0, f"{name} is still zero"


def adapters(model: DPOModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_accumulation_equals_one_large_batch_and_a_short_last_window_weighs_right(
    tiny_base: str, pairs_file: str
) -> None:
    """16 pairs: batches of 2, accumulated by 3, make windows of 6, 6 and 4 pairs."""
    accumulated = module(tiny_base)
    fit(accumulated, data(pairs_file, batch_size=2, shuffle=False), accumulate_grad_batches=3)

    # The same by hand: one gradient step on the mean over each window.
    plain, datamodule = module(tiny_base), data(pairs_file, shuffle=False)
    plain.build_policy(Placement(torch.float32, torch.device("cpu")))
    datamodule.tokenizer = plain.tokenizer
    datamodule.setup("fit")
    assert datamodule.train_pairs is not None
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=1.0)
    for start, end in ((0, 6), (6, 12), (12, 16)):
        batch = datamodule.train_pairs[list(range(start, end))]
        optimizer.zero_grad()
        plain.objective(plain.policy.logps(batch), plain.reference.logps(batch)).mean().backward()
        optimizer.step()
    assert_same(adapters(accumulated), adapters(plain), STEPS * TINY)


def test_settings_that_must_not_matter_give_the_same_adapters(tiny_base: str, pairs_file: str) -> None:
    runs = []
    for options in ({}, {"gradient_checkpointing": True}, {"layout": "padded"}):
        model = module(tiny_base, **options)
        fit(model, data(pairs_file))
        runs.append(adapters(model))
    assert_same(runs[1], runs[0], STEPS * TINY)
    assert_same(runs[2], runs[0], STEPS * TINY)


def test_metrics_carry_the_fields_names(tiny_base: str, pairs_file: str) -> None:
    trainer = fit(module(tiny_base), data(pairs_file))
    names = (
        "loss rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected".split()
    )
    assert {f"{stage}/{name}" for stage in ("train", "val") for name in names} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true"])
def test_other_precisions_are_refused(tiny_base: str, pairs_file: str, precision: Any) -> None:
    with pytest.raises(ValueError, match=f"trainer.precision={precision} is not supported"):
        fit(module(tiny_base), data(pairs_file), precision=precision)


# Of a live reference the first loss is exact; a cached one was computed in other batches, which may round otherwise.
@pytest.mark.parametrize(("reference", "slack"), [("live", 1e-7), ("cached", 0.05)])
def test_bfloat16_trains_with_float32_adapters(
    tiny_base: str, pairs_file: str, reference: Literal["live", "cached"], slack: float
) -> None:
    model = module(tiny_base, quantization="nf4", reference=reference)
    losses = Losses()
    fit(model, data(pairs_file), precision="bf16-mixed", callbacks=[losses])
    assert losses.values[0] == pytest.approx(math.log(2), abs=slack)
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    assert model.model.get_base_model().get_input_embeddings().weight.dtype == torch.bfloat16


def test_a_checkpoint_holds_what_trains_as_plain_values(tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    model = module(
        tiny_base, quantization="nf4", lora=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    trainer = fit(model, data(pairs_file))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(adapters(model))

    loaded = DPOModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert_same(adapters(loaded), adapters(model), 0.0)
    assert loaded.lora.r == 2
    assert loaded.quantization == "nf4"
    assert repr(loaded.objective) == repr(Sigmoid())


def test_a_checkpoint_of_other_adapters_is_refused(tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    fit(module(tiny_base, lora=lora), data(pairs_file)).save_checkpoint(tmp_path / "x.ckpt")
    trainer = Trainer(**QUIET, accelerator="cpu", max_epochs=2)
    with pytest.raises(ValueError, match="of them fit the 28 of this model"):
        trainer.fit(module(tiny_base), data(pairs_file), ckpt_path=tmp_path / "x.ckpt", weights_only=True)


def test_arguments_that_contradict_are_refused(tiny_base: str) -> None:
    with pytest.raises(ValueError, match=r"leave model\.lora out"):
        module(tiny_base, adapter="somewhere", lora=LoraConfig(r=3))
    with pytest.raises(ValueError, match=r"model\.warmup"):
        module(tiny_base, warmup=10)
    with pytest.raises(ValueError, match="excludes val_source"):
        PreferenceDataModule("x", val_source="y", val_size=3)


def test_going_on_from_an_adapter_starts_at_ln_2(tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    """Whatever dropout that adapter was trained with."""
    first = module(
        tiny_base, lora=LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    fit(first, data(pairs_file))
    first.model.save_pretrained(str(tmp_path / "adapter"))
    losses = Losses()
    second = module(tiny_base, adapter=str(tmp_path / "adapter"))
    fit(second, data(pairs_file), callbacks=[losses])
    assert losses.values[0] == pytest.approx(math.log(2), abs=LOSS)
    assert losses.values[-1] != losses.values[0]


class Scaled(Sigmoid):
    """An objective of somebody's own, with an argument and something derived from it."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(beta=0.1 * factor)
        self.factor = factor


class Forgetful(Sigmoid):
    """An objective that does not keep its argument."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(beta=factor)


def test_an_objective_of_ones_own_survives_a_checkpoint(tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    trainer = fit(module(tiny_base, objective=Scaled(3.0)), data(pairs_file))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = DPOModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert repr(loaded.objective) == repr(Scaled(3.0))
    with pytest.raises(ValueError, match="must store its argument 'factor'"):
        module(tiny_base, objective=Forgetful(3.0))


@pytest.mark.parametrize(
    "objective",
    [
        Mixture([Sigmoid(0.2), SFT(), IPO(0.3)], [0.8, 0.2, 1.0]),
        Mixture(),
        WPO(LDDPO(0.3, IPO(0.2, JensenShannon()))),
        Mixture([WPO(), ODPO(scale="linear")], [1.0, 2.0]),
        Sigmoid(divergence=AlphaDivergence(0.3)),
        RPO(0.2, 0.5),
    ],
    ids=repr,
)
def test_nested_objectives_survive_a_checkpoint(
    tiny_base: str, pairs_file: str, tmp_path: Path, objective: Any
) -> None:
    model = module(tiny_base, objective=objective)
    model.build_policy(Placement(torch.float32, torch.device("cpu")))
    checkpoint = {
        "state_dict": {name: value for name, value in model.state_dict().items() if name in kept_names(model)},
        "hyper_parameters": {**model.hparams},
        "pytorch-lightning_version": lightning.__version__,
    }
    torch.save(checkpoint, tmp_path / "x.ckpt")
    loaded = DPOModule.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert repr(loaded.objective) == repr(objective)


def test_the_users_compute_type_is_kept_and_the_object_untouched(tiny_base: str) -> None:
    own = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = module(tiny_base, quantization=own)
    model.build_policy(Placement(torch.float32, torch.device("cpu")))
    layers = [layer for layer in model.modules() if hasattr(layer, "compute_dtype")]
    assert {layer.compute_dtype for layer in layers} == {torch.bfloat16}
    following = module(tiny_base)
    following.quantization = BitsAndBytesConfig(load_in_4bit=True)
    following.build_policy(Placement(torch.bfloat16, torch.device("cpu")))
    assert following.quantization.bnb_4bit_compute_dtype == torch.float32
    assert {m.compute_dtype for m in following.modules() if hasattr(m, "compute_dtype")} == {torch.bfloat16}


def test_the_learning_rate_rises_and_falls_over_the_whole_run(tiny_base: str, pairs_file: str) -> None:
    model = module(tiny_base, lr_scheduler="linear", warmup=0.25)
    trainer = fit(model, data(pairs_file, batch_size=2), max_epochs=1)
    assert trainer.global_step == 8
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Numbers of pairs of each batch that the reference computes, from an empty cache."""
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    numbers: list[int] = []
    live = InitialPolicy.token_logps

    def counted(self: InitialPolicy, batch: PairBatch) -> torch.Tensor:
        numbers.append(len(batch))
        return live(self, batch)

    monkeypatch.setattr(InitialPolicy, "token_logps", counted)
    return numbers


@pytest.mark.ci
@pytest.mark.slow
def test_a_sweep_computes_the_reference_once(tiny_base: str, pairs_file: str, computed: list[int]) -> None:
    fit(module(tiny_base), data(pairs_file, batch_size=4, val_size=4), max_epochs=2)
    assert sum(computed) == 20
    for change in ({"objective": Sigmoid(0.5)}, {"optimizer": sgd(0.1)}, {"warmup": 0.5}):
        fit(module(tiny_base, **change), data(pairs_file, batch_size=3, val_size=5, shuffle=False), max_epochs=3)
    assert sum(computed) == 20
    fit(module(tiny_base), data(pairs_file, max_response_length=3), max_steps=1)
    assert sum(computed) > 20, "other token ids, other log-probs"


def test_only_pairs_that_will_be_met_are_computed(tiny_base: str, pairs_file: str, computed: list[int]) -> None:
    fit(module(tiny_base), data(pairs_file, batch_size=2, val_size=6), max_steps=3, limit_val_batches=0)
    assert sum(computed) == 6
    fit(module(tiny_base), data(pairs_file, batch_size=2, val_size=6), max_steps=4, limit_val_batches=2)
    assert sum(computed) == 6 + 2 + 4


def test_live_references_leave_nothing_on_disk(tiny_base: str, pairs_file: str, computed: list[int]) -> None:
    fit(module(tiny_base, reference="live"), data(pairs_file, batch_size=4, val_size=4), max_epochs=2)
    assert sum(computed) == 2 * 16 + 3 * 4  # each epoch, and the sanity check
    assert not (cache_dir() / "reference").exists()


def test_cached_and_live_references_train_the_same_adapters(tiny_base: str, pairs_file: str) -> None:
    trained = []
    for reference in ("cached", "live"):
        model = module(tiny_base, reference=reference, optimizer=sgd(0.1))
        fit(model, data(pairs_file), max_epochs=2)
        trained.append(adapters(model))
    assert_same(*trained, 2 * STEPS * TINY)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_loaders_of_ones_own_are_served_as_they_come(tiny_base: str, pairs_file: str, computed: list[int]) -> None:
    batches = [random_batch([(5, 7, 3), (2, 3, 4)]), random_batch([(9, 4, 12)], seed=1)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    for _ in range(2):
        trainer = Trainer(**QUIET, accelerator="cpu", max_epochs=2, limit_val_batches=0)
        trainer.fit(module(tiny_base), loader)
        assert computed == [2, 1]


def test_metrics_of_tokens_are_logged_where_asked(tiny_base: str, pairs_file: str) -> None:
    logged = fit(module(tiny_base, token_metrics=True), data(pairs_file)).callback_metrics
    assert 0 < logged["train/entropy"] < math.log(400)
    assert 0 <= logged["val/mean_token_accuracy"] <= 1
    assert "train/entropy" not in fit(module(tiny_base), data(pairs_file)).callback_metrics

"""Each reference in training: what it costs, that it stays or moves as it should, and what is refused."""

import copy
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig
from torch.nn.functional import logsigmoid

from lit_dpo import DPOModule
from lit_dpo.data.batch import PairBatch
from lit_dpo.objectives import CPO, ORPO, SFT, BCOPair, Mixture, Objective, Sigmoid, SimPO
from lit_dpo.policy.adapters import belongs_to, trained_counterpart
from lit_dpo.policy.policy import Policy
from lit_dpo.reference import AnotherModel, MovingReference
from lit_dpo.training.checkpoint import kept_names
from lit_dpo.training.requirements import Placement
from tests.closeness import LOSS, TINY, assert_same
from tests.test_module import STEPS, Losses, adapters, data, fit, module, sgd
from tests.tiny import save_tiny_base, tiny_policy, wake_adapters

pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches",
    "ignore:The '.*dataloader' does not have many workers",
)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each forward over a batch was with gradients."""
    seen: list[bool] = []
    forward = Policy.token_logps

    def counted(self: Policy, batch: PairBatch, *arguments: Any) -> Any:
        seen.append(torch.is_grad_enabled())
        return forward(self, batch, *arguments)

    monkeypatch.setattr(Policy, "token_logps", counted)
    return seen


@pytest.mark.parametrize("objective", [SimPO(), ORPO(), CPO(), SFT(), Mixture([SimPO(), SFT()])], ids=repr)
def test_without_a_reference_none_is_computed(
    tiny_base: str, pairs_file: str, passes: list[bool], objective: Objective
) -> None:
    model = module(tiny_base, objective=objective)
    trainer = fit(model, data(pairs_file), limit_val_batches=0)
    assert passes == [True] * 4
    assert not {name for name in trainer.callback_metrics if "kl" in name or "displacement" in name}
    passes.clear()
    fit(module(tiny_base, reference="live"), data(pairs_file), limit_val_batches=0)
    assert passes == [False, True] * 4, "with one, each batch costs another forward"


def test_a_reference_that_the_objective_ignores_feeds_the_metrics(tiny_base: str, pairs_file: str) -> None:
    plain = module(tiny_base, objective=SimPO())
    fit(plain, data(pairs_file))
    watched = module(tiny_base, objective=SimPO(), reference="live")
    trainer = fit(watched, data(pairs_file))
    assert trainer.callback_metrics["train/kl"] > 0
    for name, parameter in adapters(plain).items():
        assert torch.equal(parameter, adapters(watched)[name])


def test_no_reference_for_an_objective_that_needs_one_is_refused(tiny_base: str) -> None:
    with pytest.raises(ValueError, match=r"model\.reference=none: Sigmoid needs a reference"):
        module(tiny_base, reference="none")
    assert module(tiny_base, objective=SimPO(), reference="none").reference_choice == "none"


def test_a_hard_update_makes_the_next_loss_ln_2_exactly(tiny_base: str, pairs_file: str) -> None:
    losses = Losses()
    model = module(tiny_base, reference=MovingReference(alpha=1.0, tau=3), objective=Sigmoid(0.5))
    fit(model, data(pairs_file, batch_size=2), callbacks=[losses])
    ln_2 = float(torch.tensor(2.0).log())
    assert [index for index, loss in enumerate(losses.values) if loss == ln_2] == [0, 3, 6]
    assert len(losses.values) == 8


def test_it_starts_from_the_adapter_that_training_goes_on_from(tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    policy = tiny_policy(tiny_base)
    policy.model.save_pretrained(str(tmp_path / "adapter"))
    losses = Losses()
    options = {"adapter": str(tmp_path / "adapter"), "reference": MovingReference(alpha=1.0, tau=2)}
    fit(module(tiny_base, **options), data(pairs_file), callbacks=[losses])
    assert losses.values[0] == losses.values[2] == pytest.approx(math.log(2), abs=1e-7)
    assert losses.values[1] != losses.values[0]


class Steps(Callback):
    """Keeps the batches and their losses."""

    def __init__(self) -> None:
        self.batches: list[PairBatch] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: PairBatch, index: int) -> None:
        self.batches.append(batch)
        self.losses.append(float(outputs["loss"]))


def slow_logps(model: torch.nn.Module, pair: Any) -> list[torch.Tensor]:
    """Log-probs of both responses in rows of their own, by transformers alone."""
    sums = []
    for response in (pair.chosen, pair.rejected):
        logits = model(input_ids=torch.tensor([[*pair.prompt, *response]])).logits[0]
        logps = torch.log_softmax(logits[len(pair.prompt) - 1 : -1], -1)
        sums.append(logps[torch.arange(len(response)), torch.tensor(response)].sum())
    return sums


def test_soft_updates_equal_two_full_models_in_float64(tiny_base: str, pairs_file: str) -> None:
    alpha, beta, rate = 0.3, 0.5, 0.05
    steps = Steps()
    model = module(
        tiny_base, reference=MovingReference(alpha), objective=Sigmoid(beta), optimizer=sgd(rate), layout="flat"
    )
    model.build_policy(Placement(torch.float32, torch.device("cpu")))
    wake_adapters(model.model)
    with torch.no_grad():  # the copy was made before they woke
        for name, parameter in model.model.named_parameters():
            if ".moving." in name:
                parameter.copy_(model.model.get_parameter(name.replace(".moving.", ".default.")))
    start = copy.deepcopy(model.model.double())
    fit(model, data(pairs_file, batch_size=2), callbacks=[steps])

    policy = start
    policy.delete_adapter("moving")
    policy.set_adapter("default")
    reference = copy.deepcopy(policy).requires_grad_(False)
    trained = {name: p for name, p in policy.named_parameters() if "lora_" in name}
    expected = []
    for batch in steps.batches:
        losses = []
        for pair in batch.pairs():
            (chosen, rejected), (chosen_before, rejected_before) = slow_logps(policy, pair), slow_logps(reference, pair)
            losses.append(-logsigmoid(beta * ((chosen - chosen_before) - (rejected - rejected_before))))
        loss = torch.stack(losses).mean()
        expected.append(loss.item())
        gradients = torch.autograd.grad(loss, list(trained.values()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
                parameter -= rate * gradient
                before = reference.get_parameter(name)
                before.copy_(alpha * parameter + (1 - alpha) * before)
    assert len(expected) == 8
    assert max(expected) - min(expected) > 0.05, "the losses must move"
    assert_same(torch.tensor(steps.losses), torch.tensor(expected), 2 * STEPS * TINY)
    moved = {name: p for name, p in reference.named_parameters() if "lora_" in name}
    found = {name: model.model.get_parameter(name.replace(".default.", ".moving.")) for name in moved}
    assert_same(found, moved, 2 * STEPS * TINY)


def test_a_moving_reference_resumes_bit_for_bit(tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    def run(ckpt: Path | None = None, **length: int) -> tuple[DPOModule, Trainer]:
        model = module(tiny_base, reference=MovingReference(0.5, tau=2))
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **length,
        )
        trainer.fit(model, data(pairs_file), ckpt_path=ckpt, weights_only=True)
        return model, trainer

    whole, _ = run(max_epochs=2)
    _, trainer = run(max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["reference"]["init_args"] == {"alpha": 0.5, "tau": 2, "cached": False}
    resumed, _ = run(tmp_path / "x.ckpt", max_epochs=2)
    expected = dict(whole.named_parameters())
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert sum(".moving." in name for name in checkpoint["state_dict"]) == 28


def test_the_exported_adapter_is_the_policys_alone(tiny_base: str, pairs_file: str, tmp_path: Path) -> None:
    from lit_dpo.callbacks import AdapterExport

    model = module(tiny_base, reference=MovingReference())
    fit(model, data(pairs_file), callbacks=[AdapterExport()], default_root_dir=tmp_path)
    assert {path.name for path in (tmp_path / "adapter").iterdir() if path.is_dir()} == set()
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_another_model_by_path(tiny_base: str, pairs_file: str, tmp_path: Path, cached: bool) -> None:
    """The same base as another model, in its own quantization, and with an adapter of its own."""
    losses = Losses()
    same = AnotherModel(tiny_base, quantization=None, cached=cached)
    fit(module(tiny_base, reference=same), data(pairs_file), callbacks=[losses])
    assert losses.values[0] == pytest.approx(math.log(2), abs=LOSS)

    tiny_policy(tiny_base).model.save_pretrained(str(tmp_path / "adapter"))
    for other in ({"quantization": "nf4"}, {"quantization": None, "adapter": str(tmp_path / "adapter")}):
        moved, model = Losses(), module(tiny_base, reference=AnotherModel(tiny_base, cached=cached, **other))
        fit(model, data(pairs_file), callbacks=[moved])
        assert abs(moved.values[0] - math.log(2)) > 1e-4, other
        frozen = getattr(model.reference, "initial", model.reference)
        assert ("policy" in vars(frozen)) != cached, "a cached one gives its memory back"
        assert not any("reference" in name for name, _ in model.named_parameters()), "it is no part of the module"


def test_another_model_cached_and_live_train_the_same(tiny_base: str, pairs_file: str) -> None:
    models = []
    for cached in (True, False):
        models.append(module(tiny_base, reference=AnotherModel(tiny_base, quantization="nf4", cached=cached)))
        fit(models[-1], data(pairs_file))
    assert_same(adapters(models[0]), adapters(models[1]), STEPS * TINY)


def test_another_vocabulary_is_refused_before_anything_is_loaded(
    tiny_base: str, pairs_file: str, tmp_path: Path
) -> None:
    from tests.tiny import tiny_tokenizer

    other = save_tiny_base(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match=r"model\.reference\.base=.*another vocabulary"):
        fit(module(tiny_base, reference=AnotherModel(other, quantization=None)), data(pairs_file))
    with pytest.raises(ValueError, match=r"model\.reference\.base=/nowhere: there is no such folder"):
        fit(module(tiny_base, reference=AnotherModel("/nowhere")), data(pairs_file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cached": True}, "cannot be cached, as its log-probs change"),
        ({"alpha": 0.0}, r"model\.reference\.alpha must lie in \(0, 1\]"),
        ({"alpha": 1.5}, r"model\.reference\.alpha"),
        ({"tau": 0}, r"model\.reference\.tau"),
    ],
)
def test_what_a_moving_reference_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MovingReference(**arguments)


@pytest.mark.filterwarnings("ignore:You're resuming")
def test_adapters_are_taken_from_a_checkpoint_of_another_reference_or_objective(
    tiny_base: str, pairs_file: str, tmp_path: Path
) -> None:
    first = module(tiny_base, reference=MovingReference(), objective=BCOPair())
    fit(first, data(pairs_file)).save_checkpoint(tmp_path / "x.ckpt")
    quiet: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    other = module(tiny_base)
    with pytest.warns(UserWarning, match=r"belongs to another model\.objective or model\.reference: objective\.seen"):
        Trainer(**quiet).validate(other, data(pairs_file), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    for name, parameter in adapters(first).items():
        assert torch.equal(parameter, adapters(other)[name])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_embeddings_with_adapters_move_too(tiny_base: str, pairs_file: str) -> None:
    lora = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    model = module(tiny_base, lora=lora, reference=MovingReference(alpha=1.0, tau=1), optimizer=sgd(0.1))
    fit(model, data(pairs_file))
    parameters = dict(model.named_parameters())
    moving = [name for name in parameters if belongs_to(name, "moving")]
    assert any("embedding" in name for name in moving)
    for name in moving:
        assert torch.equal(parameters[name], parameters[trained_counterpart(name)]), name
    assert set(moving) <= kept_names(model)


def test_another_model_is_gone_once_its_log_probs_are_on_disk(tiny_base: str, pairs_file: str) -> None:
    model, alive = module(tiny_base, reference=AnotherModel(tiny_base, quantization=None)), []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
            alive.extend(weight for weight in weights if weight() is not None)

    weights = []
    opened = AnotherModel.open

    def noted(self: AnotherModel, *arguments: Any) -> Any:
        initial = opened(self, *arguments)
        weights.extend(weakref.ref(parameter) for parameter in initial.policy.parameters())
        return initial

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnotherModel, "open", noted)
        fit(model, data(pairs_file), callbacks=[Look()])
    assert weights
    assert not alive

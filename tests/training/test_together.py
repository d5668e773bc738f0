"""Several processes: the base split over them, weights that must be the same, and processes that die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from lit_dpo.cli.app import main
from lit_dpo.data.batch import PairBatch
from lit_dpo.policy.policy import Policy
from lit_dpo.policy.sharding import is_part
from lit_dpo.report.evidence import read_lines
from lit_dpo.training.sharded import ShardedBaseStrategy
from tests.closeness import TINY, assert_same
from tests.test_module import STEPS, data, fit, module
from tests.tiny import tiny_policy

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
    pytest.mark.filterwarnings("ignore:`torch.distributed"),
]


class Unreduced(DDPStrategy):
    """A strategy that forgets the gradients."""

    def configure_ddp(self) -> None:
        """Does nothing."""


def test_processes_that_train_different_weights_are_stopped(tiny_base: str, pairs_file: str) -> None:
    with pytest.raises(Exception, match=r"(?s)After 1 optimizer steps.*not reduced by Unreduced"):
        fit(module(tiny_base), data(pairs_file, batch_size=2), strategy=Unreduced(start_method="fork"), devices=2)


def lines(folder: Path) -> dict[str, torch.Tensor]:
    from tests.cli.test_cli import logged

    return logged(folder)


class Parts(Callback):
    """Writes how much of the base this process holds, which a test in the parent process reads."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        parts = [p for p in pl_module.parameters() if is_part(p)]
        held = sum(p.to_local().numel() for p in parts) / max(1, sum(p.numel() for p in parts))
        Path(f"{trainer.global_rank}.part").write_text(f"{len(parts)} {held}")


def evidence(folder: Path) -> dict[str, torch.Tensor]:
    """Margins that a run left: of the held-out pairs, of the tokens of some of them, of the training pairs."""
    pairs, tokens, dynamics = (
        read_lines(folder / "evidence" / f"{name}.jsonl") for name in ("held_out", "tokens", "dynamics")
    )
    by_row = sorted(tokens, key=lambda view: view["row"])
    return {
        "held out": torch.tensor([line["after"]["rewards/margins"] for line in pairs]),
        "tokens": torch.tensor([one for view in by_row for one in view["chosen"]["rewards"]]),
        "training": torch.tensor([margin for line in dynamics for margin in line["margins"]]),
    }


def arguments(base: str, pairs: str, *more: str) -> list[str]:
    return [
        *("fit", "--model.base", base, "--model.optimizer.lr", "0.01", "--data.source", pairs, "--data.val_size", "5"),
        *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.enable_progress_bar", "false"),
        *("--samples.num_prompts", "2", "--samples.max_new_tokens", "4", "--guard.max_drop", "null", *more),
    ]


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (2, []),
        pytest.param(3, ["--model.quantization", "null"], marks=pytest.mark.slow),
        pytest.param(2, ["--model.reference", "live", "--model.layout", "padded"], marks=pytest.mark.slow),
        pytest.param(
            2,
            ["--model.reference", "MovingReference", "--model.gradient_checkpointing", "true"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_split_base_gives_the_numbers_of_a_whole_one(
    tiny_base: str,
    pairs_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    options: list[str],
) -> None:
    """With 4 bits, held-out pairs that do not divide evenly, and answers that all processes generate together."""
    monkeypatch.chdir(tmp_path)
    split = ["--trainer.strategy", "sharded_fork", "--trainer.devices", str(processes), "--data.batch_size", "2"]
    split += ["--trainer.callbacks+=tests.training.test_together.Parts"]
    main(arguments(tiny_base, pairs_file, "--run_name", "split", *options, *split))
    for rank in range(processes):
        number, held = Path(f"{rank}.part").read_text().split()
        assert int(number) >= 14, "each linear layer of both decoder layers"
        assert float(held) == pytest.approx(1 / processes, abs=0.05)
    main(arguments(tiny_base, pairs_file, "--run_name", "whole", *options, "--data.batch_size", str(2 * processes)))
    folders = [Path(f"runs/{name}/version_0") for name in ("split", "whole")]
    assert_same(*map(lines, folders), STEPS * TINY)
    assert_same(*map(evidence, folders), STEPS * TINY)
    answers = [(folder / "samples.md").read_text() for folder in folders]
    assert answers[0] == answers[1]
    last = [torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in folders]
    assert last[0]["state_dict"].keys() == last[1]["state_dict"].keys(), "one file, for any strategy"


def test_a_class_of_strategy_on_the_command_line(tiny_base: str, pairs_file: str) -> None:
    with pytest.raises(ValueError, match=r"trainer\.strategy=a\.B: a class is given in a configuration file"):
        main(arguments(tiny_base, pairs_file, "--trainer.strategy", "a.B"))


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "LIT_DPO_CACHE": str(cache), "HF_DATASETS_CACHE": str(cache / "d"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_nodes_without_a_common_cache(tiny_base: str, pairs_file: str, tmp_path: Path, strategy: str) -> None:
    """Each node, started by torchrun, computes what its own cache lacks."""
    more = ["--trainer.num_nodes", "2", "--trainer.strategy", strategy, "--trainer.devices", "1"]
    command = arguments(tiny_base, pairs_file, "--run_name", "nodes", "--data.batch_size", "2", *more)
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
    launcher += ["--rdzv_endpoint", f"localhost:{29700 + len(strategy)}"]
    nodes = [
        subprocess.Popen(
            [sys.executable, *launcher, "--node_rank", str(node), "-m", "lit_dpo", *command],
            cwd=tmp_path,
            env=environment(tmp_path / f"node{node}"),
        )
        for node in range(2)
    ]
    assert [node.wait(timeout=200) for node in nodes] == [0, 0]
    one = arguments(tiny_base, pairs_file, "--run_name", "one", "--data.batch_size", "4")
    subprocess.run([sys.executable, "-m", "lit_dpo", *one], cwd=tmp_path, env=environment(tmp_path / "c"), check=True)
    assert_same(*(lines(tmp_path / f"runs/{name}/version_0") for name in ("nodes", "one")), STEPS * TINY)
    for node in range(2):
        assert list((tmp_path / f"node{node}/reference").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
@pytest.mark.parametrize("victim", ["first", "second"])
def test_when_one_process_dies_the_others_end(
    tiny_base: str, pairs_file: str, tmp_path: Path, strategy: str, victim: str
) -> None:
    more = ["--trainer.devices", "2", "--trainer.strategy", strategy, "--trainer.max_epochs", "9999"]
    more += ["--run_name", "dies", "--trainer.check_val_every_n_epoch", "9999"]
    command = [sys.executable, "-m", "lit_dpo", *arguments(tiny_base, pairs_file, "--data.batch_size", "2", *more)]
    first = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path / "cache"), start_new_session=True)
    metrics = tmp_path / "runs/dies/version_0/metrics.csv"
    try:
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
            time.sleep(0.2)
            assert first.poll() is None
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        second = next(int(pid) for pid in children if "lit_dpo" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(first.pid if victim == "first" else second, signal.SIGKILL)
        start = time.monotonic()
        assert first.wait(timeout=60) != 0
        while Path(f"/proc/{second}").exists() and "Z" not in Path(f"/proc/{second}/status").read_text():
            time.sleep(0.2)
            assert time.monotonic() - start < 60
    finally:
        os.killpg(first.pid, signal.SIGKILL) if first.poll() is None else None


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_a_split_base_on_a_gpu(tiny_base: str, pairs_file: str, quantization: Any) -> None:
    losses = []
    for strategy in ("auto", ShardedBaseStrategy(process_group_backend="nccl")):
        from tests.test_module import Losses

        seen = Losses()
        options = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "strategy": strategy}
        fit(module(tiny_base, quantization=quantization), data(pairs_file), callbacks=[seen], **options)
        losses.append(torch.tensor(seen.values))
    torch.distributed.destroy_process_group()
    assert_same({"losses": losses[1]}, {"losses": losses[0]}, 1e-2)


def split_on_one_gpu(rank: int, base: str, store: str, dtype: torch.dtype, tolerance: float) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{store}")
    place: dict[str, Any] = {"device": torch.device("cuda", 0), "dtype": dtype}
    from lit_dpo.policy.precision import quantization_for

    place["quantization"] = quantization_for("nf4", dtype)
    # A split base is quantized on the CPU, which rounds a few weights to the other side than a GPU.
    whole = tiny_policy(base, **{**place, "device": torch.device("cpu")}).to(place["device"])
    split = tiny_policy(base, mesh=init_device_mesh("cuda", (2,)), **place)
    batch: PairBatch = whole._small_batch(place["device"])
    results = []
    policy: Policy
    for policy in (whole, split):
        logps = policy.logps(batch)
        (logps.chosen - logps.rejected).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        results.append({"logps": logps.chosen.detach(), "gradients": gradients})
    assert split.flat == whole.flat
    assert_same(results[1], results[0], tolerance)
    held = sum(p.to_local().numel() for p in split.parameters() if hasattr(p, "to_local"))
    assert held > 0
    print("told: a base split over two processes on one GPU")


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_a_base_split_over_two_processes_of_one_gpu(
    tiny_base: str, tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    arguments = (tiny_base, str(tmp_path / "store"), dtype, tolerance)
    torch.multiprocessing.spawn(split_on_one_gpu, arguments, nprocs=2)

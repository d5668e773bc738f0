"""Model and data by their hub ids, from a hub that runs in this process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Dataset

from tests.base.hub_server import serve_hub
from tests.tiny import made_up_rows

MODEL, DATA, ABSENT = "org/tiny", "org/prefs", "org/absent"
DATA_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train_prefs
    path: data/train_prefs-*
  - split: test_prefs
    path: data/test_prefs-*
---

# Preferences
"""


@pytest.fixture(scope="module")
def endpoint(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A hub with one model and one data set."""
    folder = tmp_path_factory.mktemp("prefs")
    (folder / "README.md").write_text(DATA_CARD)
    (folder / "data").mkdir()
    rows = made_up_rows(12)
    for split, part in {"train_prefs": rows[:8], "test_prefs": rows[8:]}.items():
        Dataset.from_list(part).to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    with serve_hub(models={MODEL: Path(tiny_base)}, datasets={DATA: folder}) as url:
        yield url


ASK = """
import sys
from lit_dpo.__main__ import main
for data in {data}:
    sys.argv = ["lit_dpo", "fit", *{arguments}, "--data.source", data]
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code
    print("status", status, data, file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def run(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Folder, and lines of errors, of a process that starts with empty caches.

    It trains two steps, first with a data set that is not there, and then with one that is.
    """
    folder = tmp_path_factory.mktemp("hub")
    arguments = [
        *("--model.base", MODEL, "--model.quantization", "null", "--data.batch_size", "2"),
        *("--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "2"),
        *("--samples.num_prompts", "1", "--samples.max_new_tokens", "4"),
        *("--model.reference", "AnotherModel", "--model.reference.base", MODEL),  # in 4 bits, its default
    ]
    # Nothing of the user's own settings: no token, no offline mode, no cache, no proxy.
    settings = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(settings) and not name.lower().endswith("_proxy")
    }
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "LIT_DPO_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, "-c", ASK.format(data=[ABSENT, DATA], arguments=arguments)]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in ran.stderr, ran.stderr
    return folder, ran.stderr.splitlines()


def test_fit_with_model_and_data_of_the_hub(run: tuple[Path, list[str]]) -> None:
    folder, errors = run
    assert errors[-1] == f"status 0 {DATA}", errors
    (adapter,) = folder.glob("runs/dpo/*/adapter")
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == MODEL


def test_an_unknown_data_set_is_told_in_a_line(run: tuple[Path, list[str]]) -> None:
    _, errors = run
    end = errors.index(f"status 1 {ABSENT}")
    last = errors[end - 1]
    assert last.startswith("error:")
    assert ABSENT in last

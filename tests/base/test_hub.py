"""Model and data by their hub ids, from a hub that runs in this process."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Dataset

from tests.base.hub_server import serve_hub
from tests.tiny import made_up_rows, write_jsonl

MODEL, DATA, ABSENT, SUBSETS, GATED = "org/tiny", "org/prefs", "org/absent", "org/subsets", "org/gated"
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


SUBSETS_CARD = """---
configs:
- config_name: plain
  data_files: plain.jsonl
- config_name: reversed
  data_files: reversed.jsonl
---
"""


@pytest.fixture(scope="module")
def endpoint(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A hub with one model, a data set, one with two subsets and one that needs a token."""
    folder, subsets, gated = (tmp_path_factory.mktemp(name) for name in ("prefs", "subsets", "gated"))
    (folder / "README.md").write_text(DATA_CARD)
    (folder / "data").mkdir()
    rows = made_up_rows(12)
    for split, part in {"train_prefs": rows[:8], "test_prefs": rows[8:]}.items():
        Dataset.from_list(part).to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    (subsets / "README.md").write_text(SUBSETS_CARD)
    for name in ("plain", "reversed"):
        write_jsonl(subsets / f"{name}.jsonl", rows)
    write_jsonl(gated / "train.jsonl", rows)
    datasets = {DATA: folder, SUBSETS: subsets, GATED: gated}
    with serve_hub(models={MODEL: Path(tiny_base)}, datasets=datasets, gated=[GATED]) as url:
        yield url


ASK = """
import sys
from lit_dpo.__main__ import main
for data, options in {cases}:
    sys.argv = ["lit_dpo", "fit", *{arguments}, "--data.source", data, *options]
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code
    print("status", status, data, *options, file=sys.stderr, flush=True)
"""


@pytest.mark.ci
@pytest.mark.slow
def test_models_and_data_of_the_hub(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One process with empty caches asks for data that it cannot have, and then trains two steps."""
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
    held_out = ["--data.val_size", "4"]
    cases = [
        (ABSENT, []),
        (GATED, held_out),
        (SUBSETS, held_out),
        (SUBSETS, ["--data.subset", "none", *held_out]),
        (DATA, ["--data.revision", "none"]),
        (SUBSETS, ["--data.subset", "reversed", *held_out]),
        (DATA, []),
        (DATA, ["--data.streaming", "true"]),
    ]
    command = [sys.executable, "-c", ASK.format(cases=cases, arguments=arguments)]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in ran.stderr, ran.stderr
    errors = ran.stderr.splitlines()
    told = {line: before for before, line in itertools.pairwise(errors) if line.startswith("status")}
    assert [line.split()[1] for line in told] == ["1", "1", "1", "1", "1", "0", "0", "0"], ran.stderr
    absent, gated, subsets, no_subset, no_revision, *_ = told.values()
    assert absent.startswith("error:")
    assert ABSENT in absent
    assert "gated" in gated
    assert "log in with `hf auth login`" in gated
    for line in (subsets, no_subset):
        assert "choose one of its subsets with data.subset" in line
        assert "plain" in line
        assert "reversed" in line
    assert "none" in no_revision
    adapters = list(folder.glob("runs/dpo/*/adapter"))
    assert len(adapters) == 3
    for adapter in adapters:
        assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == MODEL

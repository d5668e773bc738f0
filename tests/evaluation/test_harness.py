"""lm-evaluation-harness on the adapter as it is: base and aligned on the same documents."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_dpo.cli.app import main
from lit_dpo.evaluation.harness import compared_samples, harness_text
from lit_dpo.evaluation.statistics import Resampling
from lit_dpo.evaluation.trained import find_trained
from tests.conftest import CHECKPOINT
from tests.tiny import write_jsonl

pytestmark = pytest.mark.filterwarnings("ignore:.*")
TASK = """task: cats
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: a
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def sample(number: int, value: Any) -> dict[str, Any]:
    return {"doc_id": number, "filter": "none", "metrics": ["acc", "odd"], "acc": value, "odd": [value]}


def test_differences_are_paired() -> None:
    base = {"cats": [sample(number, float(number % 2)) for number in range(40)]}
    aligned = {"cats": [sample(number, 1.0) for number in reversed(range(40))]}
    with pytest.warns(UserWarning, match="cats: odd is no number of each document, so it is left out"):
        (line,) = compared_samples(base, aligned, Resampling(500))
    assert (line.result.second, line.result.first, line.number) == (0.5, 1.0, 40)
    assert line.result.difference.low > 0.3
    assert line.result.p_value < 0.01
    assert "cats acc" in harness_text([line], 0.95)


@pytest.mark.ci
@pytest.mark.slow
def test_tasks_of_ones_own(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"q": f"the cat {number}?", "choices": ["on a mat", "ran away"], "a": number % 2} for number in range(6)]
    (tmp_path / "cats.yaml").write_text(TASK.format(file=write_jsonl(tmp_path / "docs.jsonl", rows)))
    checkpoint, output = str(trained / CHECKPOINT), tmp_path / "table.json"
    options = ["--tasks", "cats", "--include_path", str(tmp_path), "--output", str(output), "--chat_template", "false"]
    main(["evaluate", "--ckpt_path", checkpoint, *options])
    (line,) = json.loads(output.read_text())
    assert line["documents"] == 6

    found = find_trained(checkpoint, None)
    module, tokenizer = found.load(), found.tokenizer
    for name in ("base", "aligned"):
        hits = []
        for row in rows:
            scores = []
            for choice in row["choices"]:  # type: ignore[attr-defined]
                prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (row["q"], choice))
                ids = torch.tensor([prompt + answer])
                with torch.no_grad():
                    if name == "base":
                        with module.policy.initial():
                            logits = module.model(input_ids=ids).logits
                    else:
                        logits = module.model(input_ids=ids).logits
                logps = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                scores.append(float(logps.gather(1, ids[0, len(prompt) :, None]).sum()))
            hits.append(float(scores.index(max(scores)) == row["a"]))
        assert line[name] == pytest.approx(sum(hits) / 6), name

    with pytest.raises(ValueError, match="lm-evaluation-harness has no task 'nothing'"):
        main(["evaluate", "--ckpt_path", checkpoint, "--tasks", "nothing"])
    with pytest.raises(ConnectionError, match="--tasks: their data cannot be loaded"):
        main(["evaluate", "--ckpt_path", checkpoint, "--tasks", "arc_easy"])
    monkeypatch.setattr("lit_dpo.evaluation.harness.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lit_dpo\[evaluate\]'"):
        main(["evaluate", "--ckpt_path", checkpoint, "--tasks", "cats"])

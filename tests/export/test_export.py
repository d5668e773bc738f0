"""``export`` through the front door: what it writes, checks, refuses and sends."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lit_dpo.cli.app import main
from lit_dpo.evaluation.trained import find_trained
from lit_dpo.export import run
from lit_dpo.export.card import _data, run_facts
from lit_dpo.export.check import Agreement, Spec
from lit_dpo.export.hub import push_folder
from lit_dpo.export.serving import vllm_options
from lit_dpo.export.verify import compare, load
from lit_dpo.policy.adapters import save_adapter
from tests.conftest import CHECKPOINT
from tests.export.upload_server import serve_uploads
from tests.tiny import tiny_policy, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check in this process, which saves ten seconds. A test that is run by .ci/run starts a fresh one."""

    def verify(spec: Spec, distributions: Path) -> Agreement:
        return Agreement(*compare(load(*spec), str(distributions)))

    monkeypatch.setattr(run, "verify", verify)


def exported(trained: Path, output: Path, *arguments: str) -> Path:
    """The folder of an export."""
    main(
        [
            "export",
            "--ckpt_path",
            str(trained / CHECKPOINT),
            "--output",
            str(output),
            "--progress_bar",
            "false",
            *arguments,
        ]
    )
    return output


def test_the_adapter_alone(trained: Path, tiny_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported(trained, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "KL 0.0000 nats per token, same most likely token in 100.0 %" in printed
    assert f"vllm serve {tiny_base} --enable-lora --max-lora-rank 16" in printed
    own, of_run = (load_file(place / "adapter_model.safetensors") for place in (folder, trained / "version_0/adapter"))
    assert own.keys() == of_run.keys()
    assert all(torch.equal(own[name], of_run[name]) for name in own)
    again = tmp_path / "again"
    main(
        [
            "export",
            "--adapter",
            str(folder),
            "--output",
            str(again),
            "--merge",
            "dequantized",
            "--progress_bar",
            "false",
        ]
    )
    assert "KL 0.00" in capsys.readouterr().out, "an export tells a later one its quantization and its data"
    facts = json.loads((again / "export.json").read_text())
    assert facts["run"]["steps"] == 2
    assert facts["model"]["quantization"] == "nf4"


def test_merged_and_gguf(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported(trained, tmp_path / "merged", "--merge", "dequantized", "--dtype", "float16")
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float16
    folder = exported(trained, tmp_path / "gguf", "--format", "gguf", "--gguf_type", "q8_0")
    assert {path.name for path in folder.iterdir()} == {"model-q8_0.gguf", "README.md", "export.json"}
    assert capsys.readouterr().out.count("Against the trained policy, in a fresh process") == 2


def test_an_export_that_is_not_what_was_trained_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"The export is not what was trained: KL 0\.\d+ .* Use --merge dequantized, or"
    ):
        exported(trained, tmp_path / "out", "--merge", "original", "--max_kl", "0.001")
    assert not list(tmp_path.iterdir()), "nothing half-written is left"
    folder = exported(
        trained,
        tmp_path / "out",
        "--merge",
        "original",
        "--max_kl",
        "50",
        "--source",
        str(trained.parents[1] / "pairs.jsonl"),
    )
    assert "merged into the original weights" in (folder / "README.md").read_text()


def test_the_model_card(trained: Path, tmp_path: Path) -> None:
    folder = exported(trained, tmp_path / "aligned", "--num_pairs", "0", "--merge", "dequantized")
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert "dpo" in card.data.tags
    for said in (
        "# aligned",
        "Sigmoid (beta 0.1",
        "arXiv:2305.18290",
        "16 training pairs, 4 held-out pairs",
        "2 of 8 pairs",
    ):
        assert said in card.text, said
    assert "| reward accuracy | 0.5000 |" in card.text
    assert "It was not compared with the trained policy" in card.text
    assert card.text.count("[to fill in") == 4
    for text in (card.content, (folder / "export.json").read_text()):
        assert str(trained) not in text, "no folder of this machine"
        assert str(trained.parents[1]) not in text
    assert "of these, the run took a part: limit_train_batches 1" in _data(
        find_trained(str(trained / CHECKPOINT), None), {"limits": {"limit_train_batches": 1}}
    )
    best = next((trained / "version_0/checkpoints").glob("best-*.ckpt"))
    found = find_trained(str(best), None)
    assert run_facts(replace(found, step=1)).keys().isdisjoint({"after", "seconds"}), "of the last step alone"


def test_the_card_of_an_adapter_tells_its_own_rank(tiny_base: str, tmp_path: Path) -> None:
    policy = tiny_policy(tiny_base)
    save_adapter(policy.model, tiny_tokenizer(), tmp_path / "adapter")
    main(
        ["export", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out"), "--quantization", "null"]
    )
    assert "LoRA of rank 4, alpha 8" in (tmp_path / "out/README.md").read_text()


def test_no_password_of_an_address_is_written(trained: Path, tmp_path: Path) -> None:
    found = find_trained(str(trained / CHECKPOINT), None)
    found.data["source"] = "s3://me:hidden@host/pairs.jsonl"
    run.export_model(found, tmp_path / "out", run.Export(num_pairs=0), progress_bar=False)
    assert all(b"hidden" not in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_wrong_arguments(trained: Path, tiny_base: str, tmp_path: Path) -> None:
    adapter, checkpoint = str(trained / "version_0/adapter"), str(trained / CHECKPOINT)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    cases = {
        ("--ckpt_path", adapter): "is the folder of an adapter. Give it as --adapter",
        ("--ckpt_path", str(trained)): "is a folder. Give a checkpoint file",
        ("--ckpt_path", str(trained / "version_0/metrics.csv")): "is no checkpoint of this project, or it is damaged",
        ("--ckpt_path", "nowhere"): "there is no such file",
        ("--ckpt_path", checkpoint, "--base", "x"): "are for an adapter",
        ("--ckpt_path", checkpoint, "--dtype", "float16", "--format", "gguf"): "Choose --gguf_type",
        ("--ckpt_path", checkpoint, "--dtype", "float16"): "give --merge too",
        ("--ckpt_path", checkpoint, "--gguf_type", "q8_0"): "needs --format gguf",
        ("--ckpt_path", checkpoint, "--push_to_hub", "a/b/c"): "--push_to_hub a/b/c: ",
        ("--adapter", tiny_base): "is a whole model",
        ("--adapter", str(tmp_path)): "is no adapter: it has no adapter_config.json",
        ("--adapter", checkpoint): "is a file. Give a checkpoint as --ckpt_path",
        ("--adapter", "no/where"): "--adapter no/where: Cannot find",
        ("--adapter", adapter, "--base", "./gone"): "model.base=./gone: there is no such folder",
        ("--adapter", adapter, "--output", str(tmp_path / "full")): "exists. Choose another folder",
    }
    for arguments, message in cases.items():
        with pytest.raises((ValueError, OSError), match=message):
            main(["export", "--output", str(tmp_path / "out"), "--num_pairs", "1", *arguments])
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_vllm() -> None:
    assert vllm_options(LoraConfig(r=12), "a/b", None) == ("--enable-lora --max-lora-rank 16", [])
    assert vllm_options(LoraConfig(r=8), "a/b", "nf4")[0].endswith("--quantization bitsandbytes")
    given: dict[str, Any] = {"r": 600, "rank_pattern": {"q": 8}, "use_dora": True, "modules_to_save": ["x"]}
    _, reasons = vllm_options(LoraConfig(**given, bias="all"), "./gone", BitsAndBytesConfig(load_in_8bit=True))
    assert len(reasons) == 7


def test_sending_goes_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# Model\n")
    (folder / "weights").write_bytes(b"0123")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with serve_uploads(tmp_path / "hub", failures=1) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        with pytest.raises(OSError, match=r"507 .* To send it again: hf upload team/model"):
            push_folder(folder, "team/model")
        assert push_folder(folder, "team/model") == f"{server.endpoint}/team/model"
        assert {asked["visibility"] for asked in server.created} == {"private"}
    assert (tmp_path / "hub/team/model/weights").read_bytes() == b"0123"
    with pytest.raises(OSError, match="To send it again"):  # nothing listens there any more
        push_folder(folder, "team/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="--push_to_hub team/model: .*offline"):
        push_folder(folder, "team/model")


ANSWER = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
messages = [{"role": "user", "content": "Hi"}]
text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**text, max_new_tokens=4)[0]))
assert not any(name.startswith(("lit_dpo", "peft")) for name in sys.modules)
"""


@pytest.mark.ci
@pytest.mark.slow
def test_a_fresh_process_loads_it(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_dpo.export import check

    monkeypatch.setattr(run, "verify", check.verify)
    exported(trained, tmp_path / "adapter")
    folder = exported(trained, tmp_path / "merged", "--merge", "dequantized")
    answer = subprocess.run(
        [sys.executable, "-c", ANSWER, str(folder)], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert "<|im_start|>assistant" in answer.stdout
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert model.peft_config["default"].r == 16

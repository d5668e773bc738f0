"""A GGUF file ──► a safetensors folder in the cache. It is converted once and loads in 4 bits like any other model."""

import functools
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf as library
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from lit_dpo.files.cache import cache_dir
from lit_dpo.files.console import library_bars, say


def convert(gguf: Path) -> Path:
    """Converts a GGUF file to bfloat16 safetensors, unless the cache already holds them, and returns the folder."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_dir() / "models" / f"{gguf.stem}-{digest[:12]}"
    if folder.exists():
        return folder

    import torch

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    say(f"Converting {gguf.name} to safetensors, once (about 15 seconds) ...")
    verbosity = transformers_logging.get_verbosity()
    try:
        transformers_logging.set_verbosity_error()
        with library_bars(False, "transformers"), _each_read_once():
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            tokenizer.eos_token = _eos_token(gguf)  # some releases of transformers take the token that begins a turn
            card = _card(gguf)
        # The weights are dequantized now. The GGUF mark in the config would forbid another quantization.
        if hasattr(model.config, "quantization_config"):  # transformers 5.0 sets no mark
            del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
        model.is_quantized = False  # type: ignore[assignment]
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    finally:
        transformers_logging.set_verbosity(verbosity)
        shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextmanager
def _each_read_once() -> Iterator[None]:
    """Lets the ``gguf`` package remember what it read.

    transformers reads the header for the config, the weights and the tokenizer, and maps the names of the tensors for
    each module of the model. Both take most of the time of a conversion.
    """
    originals = {name: getattr(library, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, original in originals.items():
        setattr(library, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(library, name, original)


def _eos_token(gguf: Path) -> str:
    """The end-of-sequence token that a GGUF file names."""
    fields = library.GGUFReader(str(gguf)).fields
    index = int(fields["tokenizer.ggml.eos_token_id"].contents())
    return str(fields["tokenizer.ggml.tokens"].contents(index))


def _card(gguf: Path) -> str:
    """The licence and the name that a GGUF file gives itself, as the head of a model card."""
    fields = library.GGUFReader(str(gguf)).fields
    told = {"license": "general.license", "model_name": "general.name"}
    lines = [f"{key}: {fields[name].contents()}" for key, name in told.items() if name in fields]
    return "\n".join(["---", *lines, "---", f"Converted from {gguf.name}.", ""])

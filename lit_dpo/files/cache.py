"""The folder for converted models, tokenized pairs and reference log-probs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder: ``$LIT_DPO_CACHE``, by default ``~/.cache/lit_dpo``."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "lit_dpo"
    return Path(os.environ.get("LIT_DPO_CACHE", default)).expanduser()

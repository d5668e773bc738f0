"""Keys, passwords and folders of a machine are cut from settings."""

import json
from pathlib import Path
from typing import Any

from lit_dpo.files.atomic import write_json
from lit_dpo.files.secrets import remove_secrets, shorten_paths


def test_secrets_at_every_depth() -> None:
    settings: dict[str, Any] = {
        "a": ({"api_key": "S"},),
        "b": ["s3://me:pw@host/x", {"password": "p"}],
        "pad_token": "<pad>",
    }
    assert set(remove_secrets(settings)) == {"a.api_key", "b", "b.password"}
    assert settings["a"] == ({"api_key": None},)
    assert settings["b"] == ["s3://***@host/x", {"password": None}]
    assert settings["pad_token"] == "<pad>"


def test_folders() -> None:
    told = {
        "source": "/home/me/data/pairs.jsonl",
        "lines": ["/home/me/pairs.jsonl: read as: chosen", "~/x/y.csv [train]"],
    }
    assert shorten_paths(told) == {"source": "pairs.jsonl", "lines": ["pairs.jsonl: read as: chosen", "y.csv [train]"]}
    kept = ["org/model", "package:lit_dpo/data/examples", "s3://bucket/a/b.jsonl", "and/or", 3, None, "1/2"]
    assert shorten_paths(kept) == kept


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [float("nan"), (1.0, float("inf"))]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, [1.0, None]]}

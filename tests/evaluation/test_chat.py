"""``chat``: who answers, what is kept as a pair, and that ``fit`` reads it."""

import io
import sys
from pathlib import Path

import pytest

from lit_dpo import PreferenceDataModule
from lit_dpo.cli.app import main
from tests.export.test_export import CHECKPOINT, trained  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.*")


def talk(trained: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:  # noqa: F811
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    options = ["--max_new_tokens", "6", "--temperature", "0", "--pairs", "pairs.jsonl"]
    main(["chat", "--ckpt_path", str(trained / CHECKPOINT), *options])


def test_a_conversation(
    trained: Path,  # noqa: F811
    tiny_base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    talk(
        trained,
        monkeypatch,
        "/save base",
        "the cat?",
        "/both",
        "on a mat?",
        "/save",
        "/save base",
        "/system brief",
        "rain?",
    )
    printed = capsys.readouterr().out
    for said in (
        "[a pair needs the answers of both",
        "aligned> ",
        "[base and aligned]",
        "[which one is better?",
        "[saved to pairs.jsonl]",
        "[a new conversation]",
    ):
        assert said in printed, said
    data = PreferenceDataModule("pairs.jsonl", val_source="pairs.jsonl", tokenizer=tiny_base)
    data.setup("predict")
    assert data.val_pairs is not None
    assert len(data.val_pairs) == 1
    prompt = data.load_tokenizer().decode(data.val_pairs.pair(0).prompt)
    assert "the cat?" in prompt
    assert "on a mat?" in prompt


def test_commands_that_cannot_be(
    trained: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    talk(
        trained, monkeypatch, "/retry", "/nothing", "the " * 1500 + "cat?", "the cat?", "/retry", "/quit", "never read"
    )
    printed = capsys.readouterr().out
    assert "[there is no answer yet]" in printed
    assert "[there is no /nothing]" in printed
    assert "leave no room for an answer in 2,048: begin anew with /new" in printed
    answers = [line for line in printed.splitlines() if line.startswith("aligned> ")]
    assert len(answers) == 2
    assert answers[0] == answers[1], "greedy decoding gives the same answer"
    assert not Path("pairs.jsonl").exists()

"""``chat``: who answers, what is kept as a pair, and that ``fit`` reads it."""

import io
import json
import sys
from pathlib import Path

import pytest

from lit_dpo import PreferenceDataModule
from lit_dpo.cli.app import main
from lit_dpo.evaluation.chat import Conversation
from tests.conftest import CHECKPOINT
from tests.tiny import tiny_policy, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*")


def talk(trained: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    options = ["--max_new_tokens", "6", "--temperature", "0", "--pairs", "pairs.jsonl"]
    main(["chat", "--ckpt_path", str(trained / CHECKPOINT), *options])


def test_a_conversation(
    trained: Path,
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
    trained: Path,
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


def test_a_retry_that_is_stopped_leaves_the_answers_of_before(tiny_base: str, tmp_path: Path) -> None:
    said: list[str] = []
    policy = tiny_policy(tiny_base)
    conversation = Conversation(policy, tiny_tokenizer(), said.append, tmp_path / "p.jsonl", max_new_tokens=4)
    for line in ("/both", "the cat?", "on a mat?"):
        conversation.say(line)
    turns = list(conversation.turns)

    def stopped(text: str) -> None:
        raise KeyboardInterrupt

    conversation.write = stopped
    with pytest.raises(KeyboardInterrupt):
        conversation.say("/retry")
    conversation.write = said.append
    assert conversation.turns == turns
    conversation.last = {"base": "a", "aligned": "b"}
    conversation.say("/save base")
    conversation.say("/save aligned")
    (line,) = (tmp_path / "p.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["prompt"][-1]["content"] == "on a mat?"
    assert "a pair needs the answers of both" in said[-1], "a second choice would contradict the first"

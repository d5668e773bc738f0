"""What a user sees on the terminal: errors of one line, no output that ends a run, quiet when asked."""

import io
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from lit_dpo.cli.app import main
from lit_dpo.cli.errors import line_for
from lit_dpo.cli.help import installation, print_help
from lit_dpo.cli.overrides import read_integers_first
from tests.cli.test_cli import environment, tiny  # noqa: F401
from tests.tiny import CHATML, made_up_rows, save_tiny_base, tiny_tokenizer, write_jsonl

pytestmark = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:The number of training batches",
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    return iter(())


def failed(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """The line of an error of the process's own arguments."""
    monkeypatch.setattr(sys, "argv", ["lit_dpo", *arguments])
    with pytest.raises(SystemExit):
        main()
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    lines = printed[printed.index("error: ") :].strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


SETTINGS = [
    ("--trainer.val_check_interval 1000", "error: trainer.val_check_interval: "),
    ("--trainer.strategy foo", "error: trainer.strategy: "),
]
if find_spec("wandb") is None:
    wandb = "error: lightning.pytorch.loggers.WandbLogger: Requirement 'wandb"
    SETTINGS.append(("--trainer.logger WandbLogger", wandb))
if not torch.cuda.is_available():
    SETTINGS.append(("--trainer.accelerator gpu", "error: trainer.accelerator: "))


@pytest.mark.parametrize(("arguments", "message"), SETTINGS)
def test_an_error_about_a_setting_takes_one_line_with_its_key(
    tiny: list[str],  # noqa: F811
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert failed(["fit", *tiny, *arguments.split()], monkeypatch, capfd).startswith(message)


def test_the_whole_traceback_is_there_when_asked_for(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("LIT_DPO_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["lit_dpo", "fit", *tiny, "--trainer.strategy", "foo"])
    with pytest.raises(ValueError, match="invalid strategy name"):
        main()


@pytest.mark.parametrize("mistake", [lambda: {}["x"], lambda: int("x")])
def test_a_mistake_in_the_code_keeps_its_traceback(mistake: Any) -> None:
    with pytest.raises((KeyError, ValueError)) as raised:
        mistake()
    assert line_for(raised.value) == "", "raised neither here nor by Lightning"


def test_a_template_that_raises_is_told_with_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_base(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['content'].endswith(' 3?') %}{{ raise_exception('no threes') }}{% endif %}" + CHATML
    )
    tokenizer.save_pretrained(base)
    source = write_jsonl(tmp_path / "pairs.jsonl", made_up_rows(8))
    arguments = ["--model.base", base, "--data.source", source, "--data.val_size", "2", "--trainer.accelerator", "cpu"]
    line = failed(["fit", *arguments], monkeypatch, capfd)
    remedy = "To leave out such rows, set data.on_bad_row=drop."
    assert line == f"error: {source}, row 3: the chat template rejects the messages: no threes. {remedy}"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_results_alone_are_shown_without_boxes_and_without_a_progress_bar(
    tiny: list[str],  # noqa: F811
    encoding: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An encoding that has no boxes ends no run, and ``tiny`` switches the bar off."""
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "a"))
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    main(["fit", *tiny, "--trainer.max_steps", "2"])
    printed, errors = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())  # type: ignore[attr-defined]
    assert " | aligned" in printed
    assert "│" not in printed
    for sign in ("UnicodeEncodeError", "it/s", "examples/s", "pair/s", "%|", "step 1/2"):
        assert sign not in errors, sign
    assert Path("runs/dpo/version_0/samples.md").read_text(encoding="utf-8")


def test_a_long_wait_shows_its_progress(
    tiny: list[str],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    on = ["--trainer.enable_progress_bar", "true", "--trainer.max_steps", "2"]
    main(["fit", *tiny, *on])
    printed = capfd.readouterr().err
    for sign in ("Tokenizing", "Reference log-probs", "step 2/2", "held out"):
        assert sign in printed, sign


def test_training_without_held_out_pairs_works_when_told_so(tiny: list[str], tmp_path: Path) -> None:  # noqa: F811
    source = write_jsonl(tmp_path / "train.jsonl", made_up_rows(8))
    place = tiny.index("--data.val_size")
    arguments: list[Any] = [*tiny[:place], *tiny[place + 2 :], "--data.source", source]
    with pytest.raises(ValueError, match=r"No held-out pairs.*trainer\.limit_val_batches=0"):
        main(["fit", *arguments])
    main(["fit", *arguments, "--trainer.limit_val_batches", "0"])
    assert list(Path("runs").rglob("adapter_model.safetensors"))


def test_a_number_of_batches_is_not_a_share() -> None:
    parser: Any = ArgumentParser()
    parser.add_argument("--trainer.limit", type=float | int | None, default=None)
    read_integers_first(parser)
    for given, expected in (("1", 1), ("1.0", 1.0), ("0.5", 0.5)):
        found = parser.parse_args(["--trainer.limit", given]).trainer.limit
        assert (found, type(found)) == (expected, type(expected))


@pytest.mark.ci
@pytest.mark.slow
def test_help_tells_of_every_argument_and_is_quick_once_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "lit_dpo", "fit", "--help"]
    built = subprocess.run(command, env=environment(), capture_output=True, check=True, text=True).stdout
    start = time.perf_counter()
    kept = subprocess.run(command, env=environment(), capture_output=True, check=True, text=True).stdout
    assert time.perf_counter() - start < 5
    assert built == kept
    assert "--data.max_length MAX_LENGTH" in kept
    ours = [
        part
        for part in kept.split("\n  --")[1:]
        if part.startswith(("data.", "model.")) and ".help" not in part[:40] and "CONFIG" not in part[:40]
    ]
    for part in ours:
        text = " ".join(part.split())
        assert "default:" in text or "required" in text, text
        assert len(text.split(" (type")[0].split()) > 4, f"no sentence: {text}"


def test_help_is_built_anew_for_other_packages_and_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = installation()
    assert installation() == before
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "torch-99.0.dist-info").mkdir()
    assert installation() != before
    monkeypatch.setattr(sys, "path", sys.path[1:])
    assert installation() == before
    monkeypatch.setenv("COLUMNS", "47")
    assert installation() != before


def test_help_is_printed_where_nothing_can_be_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "file"))
    print_help("fit", lambda: print("the help"))
    assert capsys.readouterr().out == "the help\n"

"""The audit finds what is in the data, judges it, and shows it."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig

from lit_dpo import PreferenceDataModule
from lit_dpo.audit.cost import PairTokens, cost_of
from lit_dpo.audit.facts import Distribution
from lit_dpo.audit.memory import model_size
from lit_dpo.audit.run import Audit, audit_data
from lit_dpo.cli.app import main
from tests.tiny import CHATML, made_up_rows, tiny_policy, tiny_tokenizer, write_jsonl


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    return iter(())


def row(number: int = 0, chosen: str = "a mat", rejected: str = "a roof", **columns: Any) -> dict[str, Any]:
    return {"prompt": f"the cat number {number}?", "chosen": chosen, "rejected": rejected, **columns}


def audited(rows: list[dict[str, Any]], tokenizer: Any = None, **options: Any) -> Audit:
    held_out = (
        {} if "val_size" in options or "val_split" in options else {"val_source": Dataset.from_list(made_up_rows(3))}
    )
    given = {**held_out, "tokenizer": tokenizer or tiny_tokenizer(), **options}
    return audit_data(PreferenceDataModule(Dataset.from_list(rows), **given), progress_bar=False)


def codes(audit: Audit, severity: str | None = None) -> set[str]:
    return {verdict.code for verdict in audit.verdicts if severity in (None, verdict.severity)}


def test_rows_are_counted_by_what_became_of_them() -> None:
    rows = [row(n, score_chosen=n % 3, score_rejected=1.0, model="m") for n in range(9)]
    rows += [row(10, chosen="a roof"), row(11, rejected=" "), row(12, chosen=" " + "long " * 200), row(13, "x", "x")]
    facts = audited(rows, max_length=64, overlong="drop").sources[0]
    assert (facts.rows, facts.kept, facts.identical, facts.empty) == (13, 9, 2, 1)
    assert {reason: left.count for reason, left in facts.left_out.items()} == {
        "identical responses": 2,
        "empty response": 1,
        "longer than allowed": 1,
    }
    assert facts.left_out["empty response"].row == 10
    assert "the cat number 11" in facts.left_out["empty response"].example
    assert facts.rows == facts.kept + sum(left.count for left in facts.left_out.values())
    assert (facts.scored, facts.ties, facts.against) == (9, 3, 3)
    assert facts.unread == ["model"]
    assert facts.formats == {"chosen and rejected": 13}


def test_lengths_are_those_before_truncation() -> None:
    tokenizer = tiny_tokenizer()
    rows = [row(1, "a mat " * 60, "a roof"), row(2, "a mat", "a roof")]
    facts = audited(rows, max_length=80, val_size=1).sources[0]
    assert facts.chosen_lengths is not None
    longest = tokenizer("a mat " * 59 + "a mat<|im_end|>\n", add_special_tokens=False)["input_ids"]
    assert abs(facts.chosen_lengths.most - len(longest)) <= 1
    assert (facts.cut_prompts, facts.cut_responses, facts.kept, facts.held_out) == (0, 1, 2, 1)
    assert facts.use == "both"


@pytest.mark.parametrize(("chosen", "rejected", "share"), [("a b c", "a", 1.0), ("a", "a b c", 0.0), ("ab", "cd", 0.5)])
def test_how_often_the_longer_response_wins(chosen: str, rejected: str, share: float) -> None:
    audit = audited([row(n, chosen, rejected) for n in range(250)])
    assert audit.sources[0].longer_wins == share
    assert ("length_bias" in codes(audit, "warning")) == (share != 0.5)


def test_pairs_beside_others() -> None:
    rows = [row(n) for n in range(30)]
    leaked = made_up_rows(1)[0]
    rows += [row(0, "a roof", "a mat"), row(1), row(2), row() | {"prompt": leaked["prompt"]}]
    audit = audited(rows)
    assert audit.sources[0].found == {"contradictions": 2, "duplicates": 2, "leaks": 1}
    assert audit.sources[0].left_out["prompt also held out"].count == 1
    assert {"contradictions"} <= codes(audit, "error")
    assert "duplicates" in codes(audit, "warning")
    assert audit.failed
    kept = {"contradictions": "drop", "duplicates": "drop", "leaks": "keep"}
    clean = audited(rows, filters=kept)
    assert codes(clean, "error") == {"leaks"}
    facts = clean.sources[0]
    assert facts.rows == facts.kept + sum(left.count for left in facts.left_out.values())


def test_a_mixture_has_the_facts_of_each_source(tmp_path: Path) -> None:
    files = [
        write_jsonl(tmp_path / "a.jsonl", made_up_rows(8)),
        write_jsonl(tmp_path / "b.jsonl", made_up_rows(12)[6:]),
    ]
    data = PreferenceDataModule(
        [str(name) for name in files],  # type: ignore[arg-type]
        val_size=2,
        filters={"duplicates": "drop"},  # type: ignore[arg-type]
        tokenizer=tiny_tokenizer(),
    )
    one, two = audit_data(data, progress_bar=False).sources
    assert (one.name, one.rows, one.kept, one.found) == ("a", 8, 8, {})
    assert (two.name, two.rows, two.kept, two.found) == ("b", 6, 4, {"duplicates": 2})
    assert one.held_out + two.held_out == 2


def test_what_the_template_writes_is_checked() -> None:
    tokenizer = tiny_tokenizer()
    assert not codes(audited([row(n) for n in range(250)], tokenizer)) - {"few_held_out"}
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "[end]")
    audit = audited([row(n) for n in range(250)], tokenizer)
    assert "no_eos" in codes(audit, "error")
    twice = tiny_tokenizer()
    twice.add_special_tokens({"bos_token": "<s>"})
    twice.chat_template = "<s><s>" + CHATML
    assert "several_bos" in codes(audited([row(n) for n in range(9)], twice), "error")


def test_a_row_that_would_stop_training_is_an_error() -> None:
    audit = audited([row(0, image=None), row(1, image=None), row(2, image="x.png")])
    assert audit.verdicts[0].code == "unreadable"
    assert "row 2: 'image' could change what is trained" in audit.verdicts[0].message
    assert audit.sources[0].kept == 2
    assert audit.failed


def test_a_split_that_is_not_there_is_an_error() -> None:
    audit = audited([row(n) for n in range(5)], val_source=None, val_split="tset")
    assert audit.verdicts[0].code == "unreadable"
    assert "tset" in audit.verdicts[0].message


def test_held_out_rows_that_are_left_out_are_counted() -> None:
    held_out = Dataset.from_list([row(1), row(1), row(2)])
    audit = audited([row(n + 9) for n in range(5)], val_source=held_out, filters={"duplicates": "drop"})
    assert audit.sources[1].left_out["duplicate of another pair"].count == 1


def test_nothing_held_out_is_told() -> None:
    data = PreferenceDataModule(Dataset.from_list([row(n) for n in range(5)]), tokenizer=tiny_tokenizer())
    assert "nothing_held_out" in codes(audit_data(data, progress_bar=False), "warning")


class Opened(HTMLParser):
    """Tags that are open at the end, and all that a page loads or runs."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loaded += [f"{name}={value}" for name, value in attrs if name in ("src", "href") or name.startswith("on")]
        if tag not in ("meta", "line", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_shows_texts_as_texts(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    rows = [row(n, evil, f"{evil} no", **{evil: 1}) for n in range(5)] + [row(9, evil, evil)]
    folder = tmp_path / "out"
    written = audited(rows).save(folder)
    assert {path.name for path in written} == {"audit.json", "audit.html"}
    page = Opened()
    page.feed((folder / "audit.html").read_text(encoding="utf-8"))
    assert not page.open
    assert not page.tags & {"script", "img", "link", "iframe"}
    assert not page.loaded
    assert {"svg", "table", "figure"} <= page.tags


def test_the_text_has_each_part() -> None:
    text = audited([row(n, score_chosen=2, score_rejected=1) for n in range(5)]).as_text()
    for part in (
        "Verdicts, worst first",
        "read as",
        "longer wins",
        "prompt tokens",
        "score margin",
        "<|im_start|>user",
    ):
        assert part in text
    assert "\033" not in text
    assert "\033[32m" in audited([row(1), row(2)]).as_text(color=True)


def test_a_histogram_has_every_value_once() -> None:
    for values in ([1.0], [2.0, 2.0, 2.0], list(range(1000)), [0.0] * 500 + [1e9]):
        distribution = Distribution.of(np.array(values))
        assert distribution is not None
        assert sum(distribution.counts) == len(values)
        assert (distribution.least, distribution.most) == (min(values), max(values))
    assert Distribution.of(np.array([])) is None


def test_parameters_are_those_of_the_loaded_model(tiny_base: str) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    size = model_size(tiny_base, lora)
    model = tiny_policy(tiny_base).model
    base = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora" not in name)
    assert size.linear + size.other == base
    assert (size.layers, size.hidden) == (model.config.num_hidden_layers, model.config.hidden_size)
    assert size.trained > 0


def same(count: int) -> PairTokens:
    """Pairs of 100 tokens each."""
    return PairTokens(*(np.full(count, number) for number in (100, 20, 80)))


def test_costs_grow_with_tokens_and_shrink_with_bits(tiny_base: str) -> None:
    size = model_size(tiny_base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    options = {"batch_size": 2, "quantized": True, "reference": True}
    few, many = (cost_of(size, same(count), **options) for count in (10, 20))  # type: ignore[arg-type]
    assert many.operations == 2 * few.operations
    options["reference"] = False  # whose pass has a peak of its own
    few, many = (cost_of(size, same(count), **options) for count in (10, 20))  # type: ignore[arg-type]
    assert many.memory == few.memory, "the longest batch is the same"
    plain = cost_of(size, same(10), batch_size=2, quantized=False, reference=False)
    assert plain.memory > few.memory
    assert plain.reference_operations == 0
    assert few.memory < few.memory_without_recomputation


@pytest.fixture
def tiny(tiny_base: str, pairs_file: str) -> list[str]:
    source = ["--data.source", pairs_file, "--data.val_size", "4"]
    return [*source, "--model.base", tiny_base, "--model.quantization", "null", "--trainer.accelerator", "cpu"]


def test_the_command(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", *tiny, "--output", "out", "--trainer.enable_progress_bar", "false"])
    printed = capsys.readouterr()
    assert "20, of which 20 are kept, of which 4 are held out" in printed.out
    assert "Estimates for an epoch" in printed.out
    assert "%|" not in printed.err
    found = json.loads(Path("out/audit.json").read_text(encoding="utf-8"))
    source = found["sources"][0]
    assert (source["format"], source["rows"], source["kept"]) == ("chosen and rejected", 20, 20)
    assert {"left_out", "ties", "identical", "longer_wins"} <= source.keys()
    assert all({"severity", "code", "message"} == verdict.keys() for verdict in found["verdicts"])
    assert not Path("runs").exists()


def test_the_command_ends_with_status_1_on_an_error(tiny: list[str], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [row(n) for n in range(9)] + [row(0, "a roof", "a mat")])
    with pytest.raises(SystemExit) as ended:
        main(["audit", *tiny, "--data.source", path])
    assert ended.value.code == 1


def test_the_configuration_of_a_run_can_be_audited(tiny: list[str]) -> None:
    main(["fit", *tiny, "--trainer.max_steps", "1", "--samples.num_prompts", "0"])
    main(["audit", "--config", "runs/dpo/version_0/config.yaml"])
    with pytest.raises(ValueError, match="reads no checkpoint. If a configuration file sets one, add --ckpt_path null"):
        main(["audit", *tiny, "--ckpt_path", "runs/dpo/version_0/checkpoints/last.ckpt"])


def test_prepare_does_what_fit_would_do_first(tiny: list[str], caplog: pytest.LogCaptureFixture) -> None:
    from lit_dpo.files.cache import cache_dir

    other = [*tiny, "--data.max_response_length", "7"]
    before = {path for path in cache_dir().rglob("*") if path.is_file()}
    main(["prepare", *other])
    assert "Prepared: 15 training and 4 held-out pairs. The reference log-probs of those that the run" in caplog.text
    made = {path for path in cache_dir().rglob("*") if path.is_file()} - before
    assert any("pairs" in path.parts for path in made)
    assert any(re.search("reference|logps", str(path)) for path in made)
    assert not Path("runs").exists()
    main(["fit", *other, "--samples.num_prompts", "0", "--trainer.max_steps", "2"])
    after = {path for path in cache_dir().rglob("*") if path.is_file()} - before
    assert after == made, "fit reads both from the caches"


@pytest.mark.ci
@pytest.mark.slow
def test_on_real_rows(ultrafeedback: Path, tiny: list[str]) -> None:
    main(["audit", *tiny[4:], "--data.source", str(ultrafeedback), "--output", "out", "--data.max_length", "4096"])
    sources = json.loads(Path("out/audit.json").read_text(encoding="utf-8"))["sources"]
    totals = [sum(source[name] for source in sources) for name in ("rows", "ties", "identical", "empty")]
    assert totals == [1000, 111, 4, 2]

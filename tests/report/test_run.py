"""The report of a run and of several: what it is made from, what it says, and what is missing."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_dpo.callbacks import RunReport
from lit_dpo.cli.app import main
from lit_dpo.cli.config_file import changed_settings
from lit_dpo.report.evidence import pair_lines, read_lines, table_of, write_lines
from lit_dpo.report.folder import read_run
from lit_dpo.report.run import write_report
from tests.conftest import CHECKPOINT


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the folder of a run."""
    return Path(shutil.copytree(trained / "version_0", tmp_path / "mine/version_0"))


def test_a_run_leaves_its_report(trained: Path) -> None:
    folder = trained / "version_0"
    content = json.loads((folder / "report.json").read_text())
    page = (folder / "report.html").read_text()
    one = content["runs"][0]
    assert content["title"] == one["name"] == "tiny/version_0"
    values = {value["key"]: value for value in one["values"]}
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("loss", "rewards/margins", "kl"):
        assert values[key]["before"] == summary["before"][f"val/{key}"]
        assert values[key]["after"] == summary["after"][f"val/{key}"]
        assert values[key]["interval"] == summary["intervals"][f"val/{key}"]
    assert {chart["title"] for chart in content["charts"]} >= {"Loss", "Learning rate", "Gradient norm", "Peak memory"}
    assert len(one["curves"]["train/loss"]["values"]) == summary["steps"]
    assert sum(one["histograms"]["rewards/margins"]["after"]) == 4
    assert one["groups"][0]["num_pairs"] == 4
    assert one["audit"]["sources"][0]["rows"] == 20
    assert one["changed"]["model.optimizer.init_args.lr"] == "0.02"
    assert "trainer.log_every_n_steps" not in one["changed"]
    assert one["tokens"]
    assert "tiny/version_0" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_the_held_out_pairs_are_those_of_the_metrics(trained: Path) -> None:
    found = read_run(trained)
    assert found.before is not None
    assert found.after is not None
    for table, when in ((found.before, "before"), (found.after, "after")):
        for name in ("loss", "rewards/margins", "logps/chosen", "kl"):
            mean = table.values[name].sum() / table.counts[name].sum()
            assert mean == pytest.approx(found.summary[when][f"val/{name}"], abs=1e-5)
    lines = pair_lines(found.before, found.after)
    assert [line["row"] for line in lines] == [line["row"] for line in found.lines]
    again = table_of(lines, "after")
    assert again is not None
    for name, values in found.after.values.items():
        np.testing.assert_allclose(again.values[name], values)
    rewards = {(v.source, v.row): v.margin for v in found.tokens}
    for line in found.lines:
        known = rewards.get((line["source"], line["row"]))
        assert known is None or known == pytest.approx(line["after"]["rewards/margins"], abs=1e-5)


def test_several_runs_on_one_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other/version_3"))
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("beta: 0.1", "beta: 0.5"))
    main(["report", str(run), str(tmp_path / "other"), "--output", str(tmp_path / "out")])
    assert f"Wrote {tmp_path}/out/report.html" in capsys.readouterr().out
    content = json.loads((tmp_path / "out/report.json").read_text())
    assert content["title"] == "2 runs"
    assert [one["name"] for one in content["runs"]] == ["mine/version_0", "other/version_3"]
    differences = {row["name"]: row["values"] for row in content["differences"]}
    assert differences == {"model.objective.init_args.beta": ["0.1", "0.5"]}
    assert len(content["frontier"]) == 2
    page = (tmp_path / "out/report.html").read_text()
    assert page.count('class="run" value=') == 2
    with pytest.raises(ValueError, match="is given twice"):
        write_report([run, str(run) + "/../version_0"], tmp_path)


@pytest.mark.parametrize(
    ("left_out", "told"),
    [
        ("metrics.csv", "no curves"),
        ("summary.json", "no summary"),
        ("evidence/held_out.jsonl", "nothing of single pairs"),
        ("evidence/audit.json", "no audit"),
        ("evidence/changed.json", None),
        ("evidence/tokens.jsonl", None),
        ("config.yaml", None),
    ],
)
def test_what_is_missing_is_named(run: Path, left_out: str, told: str | None) -> None:
    (run / left_out).unlink()
    html, _ = write_report([run])
    assert html.parent == run
    page = html.read_text()
    assert told is None or told in page
    if "changed" in left_out:
        assert "is not known: the run was not started from the command line" in page


def test_an_interrupted_run_has_a_report_too(run: Path) -> None:
    for name in ("summary.json", "evidence/run.json", "evidence/warnings.jsonl"):
        (run / name).unlink()
    content = json.loads(write_report([run])[1].read_text())
    assert content["runs"][0]["values"][0]["after"] is not None, "from the last evaluation"


def test_folders_that_are_no_runs(tmp_path: Path, run: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        write_report([tmp_path / "nothing"])
    with pytest.raises(FileNotFoundError, match=r"is no folder of a run: it has no summary\.json"):
        write_report([tmp_path])
    (run / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is not what a run writes"):
        write_report([run])


def test_texts_of_the_data_stay_texts(run: Path) -> None:
    nasty = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    lines = read_lines(run / "evidence/tokens.jsonl")
    lines[0]["prompt"] = nasty
    lines[0]["chosen"]["tokens"][0] = nasty
    (run / "evidence/tokens.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report([run])[0].read_text()
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert page.count("</script>") == 4, "the data and three scripts"


def test_the_quiet_settings_of_the_callback(tiny_base: str, pairs_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"report\.num_pairs must be at least 0"):
        RunReport(num_pairs=-1)


def test_what_differs_from_the_defaults() -> None:
    defaults: dict[str, Any] = {"a": 1, "b": {"class_path": "x.Y", "init_args": {"lr": 0.1}}, "c": None, "d": (1, 2)}
    config = {"a": 2, "b": {"class_path": "x.Y", "init_args": {"lr": 0.1}}, "c": {"class_path": "no.Such"}, "d": [1, 2]}
    assert changed_settings(config, defaults) == {"a": 2, "c.class_path": "no.Such"}
    adam = {"b": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.3, "betas": [0.9, 0.999], "eps": 1e-8}}}
    assert changed_settings(adam, defaults) == {"b.class_path": "torch.optim.AdamW", "b.init_args.lr": 0.3}


def test_explaining_a_held_out_pair(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = {line["row"]: line for line in read_lines(trained / "version_0/evidence/held_out.jsonl")}
    row = next(iter(known))
    command = ["explain", "--ckpt_path", str(trained / CHECKPOINT)]
    main([*command, "--row", str(row), "--output", str(tmp_path / "e.json")])
    view = json.loads((tmp_path / "e.json").read_text())
    # The checkpoint's policy computes without the Trainer here, in the same type.
    assert view["margin"] == pytest.approx(known[row]["after"]["rewards/margins"], abs=1e-4)
    printed = capsys.readouterr().out
    assert f"row {row}" in printed
    assert "for the chosen response:" in printed
    assert "\033" not in printed
    own = ["--prompt", "the cat", "--chosen", "sat <b>on</b> a mat", "--rejected", "ran"]
    main([*command, *own, "--output", str(tmp_path / "e.html")])
    assert "your pair\n" in capsys.readouterr().out
    page = (tmp_path / "e.html").read_text()
    assert "<b>on" not in page
    assert page.count('class="tokens"') == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give either --row NUMBER"),
        (["--row", "1", "--prompt", "a"], "Give either --row NUMBER"),
        (["--prompt", "a", "--chosen", "b"], "needs --rejected too"),
        (["--row", "999"], "no held-out pair of .* is that row .* There are 4: "),
        (["--row", "1", "--output", "e.txt"], r"must end in \.html or \.json"),
        (["--prompt", "a", "--chosen", "b", "--rejected", "c", "--source", "x"], "--source goes with --row"),
    ],
)
def test_what_cannot_be_explained(trained: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(["explain", "--ckpt_path", str(trained / CHECKPOINT), *arguments])


def broken(value: float) -> float:
    """A number as a run that diverged logs it."""
    return value * float("nan")


def test_a_run_that_diverged_has_a_report(run: Path) -> None:
    path = run / "evidence/tokens.jsonl"
    lines = read_lines(path)
    lines[0]["margin"] = lines[0]["moved"] = lines[0]["chosen"]["reward"] = float("nan")
    lines[0]["chosen"]["rewards"] = [float("nan")] * len(lines[0]["chosen"]["rewards"])
    write_lines(path, lines)
    path = run / "evidence/held_out.jsonl"
    lines = read_lines(path)
    lines[0]["after"] = {name: broken(value) for name, value in lines[0]["after"].items()}
    write_lines(path, lines)
    summary = json.loads((run / "summary.json").read_text())
    summary["after"]["val/loss"] = None
    (run / "summary.json").write_text(json.dumps(summary))
    content = json.loads(write_report([run])[1].read_text())
    codes = {one["code"]: one["message"] for one in content["runs"][0]["verdicts"]}
    assert "val/loss at the end (1)" in codes["not_finite"]


def test_no_folder_of_this_machine_is_in_the_page(run: Path) -> None:
    told = {
        "config.yaml": "model:\n  base: /home/zoltan/models/x\ndata:\n  source: /home/zoltan/client/p.jsonl\n",
        "evidence/run.json": '{"base": "/home/zoltan/models/x", "objective": "Sigmoid"}',
    }
    for name, text in told.items():
        (run / name).write_text(text)
    for name in ("tokens", "held_out"):
        path = run / f"evidence/{name}.jsonl"
        write_lines(path, [line | {"source": "/home/zoltan/client/p.jsonl"} for line in read_lines(path)])
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"data": ["/home/zoltan/client/p.jsonl: read as: x"]}))
    html, plain = write_report([run])
    for path in (html, plain):
        assert "zoltan" not in path.read_text()
        assert "p.jsonl" in path.read_text()


def test_runs_on_files_of_the_same_name_differ(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other/version_0"))
    for folder, place in ((run, "v1"), (other, "v2")):
        (folder / "config.yaml").write_text(f"data:\n  source: /data/{place}/train.jsonl\n")
    content = json.loads(write_report([run, other], tmp_path)[1].read_text())
    assert content["differences"] == [
        {"name": "data.source", "values": ["train.jsonl (folder 1)", "train.jsonl (folder 2)"]}
    ]


def test_verdicts_of_an_interrupted_run_come_from_its_pairs(run: Path) -> None:
    (run / "summary.json").unlink()
    path = run / "evidence/held_out.jsonl"
    lines = read_lines(path)
    for line in lines:
        line["after"] |= {"kl": 3.0, "displacement/chosen": -2.0}
    write_lines(path, lines)
    content = json.loads(write_report([run])[1].read_text())
    assert {"displacement", "large_step"} <= {one["code"] for one in content["runs"][0]["verdicts"]}

"""The pages in a real browser: no errors, every chart drawn, keyboard, contrast, texts that stay texts, pictures."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_dpo.report.cleaning import read_decisions
from lit_dpo.report.evidence import read_lines, write_lines
from lit_dpo.report.page import review_page
from lit_dpo.report.quantities import histogram
from lit_dpo.report.run import write_report
from tests.conftest import CHECKPOINT, REPOSITORY
from tests.report.browser import SCHEMES, chromium, opened, violations, wait_for

QUICKSTART = Path(__file__).parent / "quickstart"  # what a run of the quickstart left, on 2026-11-26
PICTURES = REPOSITORY / ".github/pictures"
NASTY = "</script><script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"
UNDRAWN = (
    "[...document.querySelectorAll('figure.chart')]"
    ".filter(f => !f.querySelector('svg') && !f.closest('details:not([open])')).length"
)


def drawn(page: Any) -> None:
    """Waits until every chart that can be seen is drawn."""
    wait_for(page, f"{UNDRAWN} === 0")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the recorded run, with an answer that would like to be a script."""
    folder = Path(shutil.copytree(QUICKSTART, tmp_path_factory.mktemp("page") / "quickstart"))
    path = folder / "version_0/evidence/tokens.jsonl"
    lines = read_lines(path)
    lines[0]["chosen"]["tokens"][2] = lines[0]["prompt"] = NASTY
    write_lines(path, lines)
    return write_report([folder], folder)[0]


AT_EACH_CHANGE = [pytest.mark.ci, pytest.mark.slow]


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (360, "dark"),
        (1280, "light"),
        pytest.param(360, "light", marks=AT_EACH_CHANGE),
        pytest.param(1280, "dark", marks=AT_EACH_CHANGE),
    ],
)
def test_the_report_in_a_browser(page_file: Path, width: int, scheme: str) -> None:
    with opened(page_file, width, scheme) as page:
        drawn(page)
        assert page.locator("figure.chart svg").count() >= 16
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
        assert page.title() == "quickstart/version_0 · lit_dpo"
        assert page.locator(".tokens").first.inner_text().count("onerror") == 1, "shown as text"
        assert violations(page) == []


def test_the_reports_controls(page_file: Path) -> None:
    with opened(page_file) as page:
        drawn(page)
        line = "document.querySelector('figure.chart svg path').getAttribute('d')"
        before = page.evaluate("document.querySelector('figure.chart .canvas').innerHTML")
        page.locator("#logarithmic").check()
        assert page.evaluate("document.querySelector('figure.chart .canvas').innerHTML") != before
        assert page.evaluate(line)
        page.locator("#theme").click()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        # by keyboard: from the text of the chosen response, token by token
        tokens = page.locator(".tokens").first
        tokens.focus()
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        told = page.locator(".readout").first.inner_text()
        assert "token 4" in told
        assert "log π ref" in told
        assert page.locator(".tokens span.at").count() == 1
        page.keyboard.press("End")
        assert "token 29" in page.locator(".readout").first.inner_text()
        page.locator(".tokens").nth(1).locator("span").nth(5).hover()
        assert "rejected token 6" in page.locator(".readout").first.inner_text()
        # a closed pair is drawn when it is opened
        closed = page.locator("details.pair").nth(1)
        closed.locator("summary").click()
        wait_for(page, "!!document.querySelectorAll('details.pair')[1].querySelector('svg')")
        # on paper
        page.emulate_media(media="print")
        assert not page.locator("nav.bar").is_visible()


@pytest.mark.ci
@pytest.mark.slow
def test_several_runs_in_a_browser(tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(QUICKSTART, tmp_path / name)
    path = tmp_path / "two/version_0/config.yaml"
    path.write_text(path.read_text().replace("lr: 0.0004", "lr: 0.0001"))
    html, _ = write_report([tmp_path / "one", tmp_path / "two"], tmp_path)
    with opened(html) as page:
        drawn(page)
        count = "document.querySelectorAll('figure[data-chart=\"0\"] svg path').length"
        both = page.evaluate(count)
        page.locator("input.run").nth(1).uncheck()
        assert page.evaluate(count) < both
        assert page.locator("#differences + div table tbody tr").count() == 1
        assert violations(page) == []


def suspect(number: int) -> dict[str, Any]:
    turns = {"prompt": f"question {number} {NASTY}", "chosen": "good", "rejected": "bad"}
    messages = {
        name: [{"role": "user" if name == "prompt" else "assistant", "content": t}] for name, t in turns.items()
    }
    return {"source": "p.jsonl", "row": number, **messages, "score_chosen": 2.0, "score_rejected": 1.0}


@pytest.mark.parametrize("embedded", [True, False])
def test_the_review_of_labels_in_a_browser(tmp_path: Path, embedded: bool) -> None:
    pairs = [suspect(number) for number in range(6)]
    ranked = [
        {"rank": n + 1, "margin": -0.1 + n / 9, "spread": 0.1, "wrong": 0.6, "action": "keep", **one}
        for n, one in enumerate(pairs[:4])
    ]
    margins = histogram(None, np.linspace(-1, 1, 6))._asdict()
    content = {
        "title": "Suspicious labels", "charts": [], "share": ["some"], "num_pairs": 6, "suspects": ranked,
        "runs": [{"name": "", "histograms": {"rewards/margins": margins}, "tokens": []}],
        "pairs": pairs if embedded else None,
    }  # fmt: skip
    path = tmp_path / "suspects.html"
    path.write_text(review_page(content), encoding="utf-8")
    with opened(path) as page:
        drawn(page)
        assert page.title() == "Suspicious labels · lit_dpo"
        page.locator("article.suspect").first.focus()
        for key in "fnd":
            page.keyboard.press(key)
        page.locator("article.suspect").nth(2).locator("input[value=flip]").check()
        assert page.locator("#count").inner_text() == "2 flipped, 1 dropped"
        assert violations(page) == []
        page.reload()
        assert page.locator("#count").inner_text() == "2 flipped, 1 dropped", "kept in the browser"
        with page.expect_download() as download:
            page.locator("#decisions" if embedded else "#save").click()
        download.value.save_as(tmp_path / "decisions.jsonl")
        decided = read_decisions(tmp_path / "decisions.jsonl")
        assert [decided["p.jsonl", row] for row in range(4)] == ["flip", "drop", "flip", "keep"]
        if not embedded:
            return
        with page.expect_download() as download:
            page.locator("#save").click()
        download.value.save_as(tmp_path / "cleaned.jsonl")
    cleaned = [json.loads(line) for line in (tmp_path / "cleaned.jsonl").read_text().splitlines()]
    assert len(cleaned) == 5
    assert cleaned[0]["chosen"] == pairs[0]["rejected"]
    assert "score_chosen" not in cleaned[0]
    assert cleaned[-1] == {name: pairs[5][name] for name in pairs[5] if name not in ("source", "row")}


@pytest.mark.ci
@pytest.mark.slow
def test_the_comparison_page_in_a_browser(trained: Path, tmp_path: Path) -> None:
    chromium()
    (tmp_path / "prompts.txt").write_text(f"the cat {NASTY}\n")
    command = [sys.executable, "-m", "lit_dpo", "compare", "--ckpt_path", str(trained / CHECKPOINT)]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--max_new_tokens", "8", "--output", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            told = next(line for line in server.stdout if line.startswith("Open "))
            with opened(told.split()[1]) as page:
                page.get_by_role("button", name="Next of 1 prompts").click()
                wait_for(page, "document.querySelector('#prompt textarea').value.includes('onerror')")
                page.locator("#ask").click()
                wait_for(page, "!document.querySelector('#vote-left').disabled")
                page.locator("#vote-left").click()
                wait_for(page, "document.querySelector('#told textarea').value.startsWith('Left was')")
                assert page.title() == "Compare", "no text ran as a script"
                assert violations(page) == []
        finally:
            server.send_signal(signal.SIGINT)
    assert len(read_lines(tmp_path / "votes.jsonl")) == 1


@pytest.mark.ci
@pytest.mark.slow
def test_the_pictures_of_the_readme(tmp_path: Path) -> None:
    """Made from the recorded run. ``LIT_DPO_PICTURES=1 pytest -m slow -k pictures`` replaces those of the README."""
    html, _ = write_report([QUICKSTART], tmp_path)
    target = PICTURES if os.environ.get("LIT_DPO_PICTURES") == "1" else tmp_path
    names = []
    for scheme in SCHEMES:
        with opened(html, 1120, scheme, height=1000) as page:
            drawn(page)
            names += [f"report-{scheme}.png", f"tokens-{scheme}.png"]
            page.screenshot(path=target / names[-2])
            pair = page.locator("details.pair").first
            pair.locator(".tokens").nth(1).locator("span").nth(20).hover()
            page.evaluate("document.querySelector('nav.bar').style.position = 'static'")
            pair.screenshot(path=target / names[-1])
    for name in names:
        made, shown = ((folder / name).stat().st_size for folder in (target, PICTURES))
        assert 0.5 < made / shown < 2, "the README shows another page"

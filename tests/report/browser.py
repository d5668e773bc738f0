"""A headless Chromium for tests of pages. Debian's package ``chromium`` has one."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
SCHEMES = ("light", "dark")


def chromium() -> str:
    """The path of a Chromium. A test that needs one is skipped where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"there is no {', '.join(NAMES)}: install Debian's package chromium to test the pages")
    return found


@contextmanager
def opened(address: str | Path, width: int = 1280, scheme: str = "light", height: int = 900) -> Iterator[Any]:
    """A page in a browser window. Errors on its console, and failed requests, fail the test.

    Args:
        address: A file, or an address on this machine.
        width: Width of the window, in pixels.
        scheme: ``light`` or ``dark``.
        height: Height of the window.
    """
    from playwright.sync_api import sync_playwright

    path = chromium()
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda told: problems.append(told.text) if told.type == "error" else None)
        page.on(
            "request", lambda request: problems.append(f"asks for {request.url}") if _is_abroad(request.url) else None
        )
        page.goto(f"file://{address}" if isinstance(address, Path) else address)
        try:
            yield page
        finally:
            browser.close()
    assert not problems, problems


def _is_abroad(address: str) -> bool:
    return not address.startswith(("file://", "http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:"))


def violations(page: Any) -> list[str]:
    """What axe finds against WCAG 2 A and AA: contrast, names, roles, keyboard."""
    from axe_playwright_python.sync_playwright import Axe

    options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
    found = Axe().run(page, options=options).response["violations"]
    nodes = [(one["id"], node) for one in found for node in one["nodes"][:3]]
    return [f"{name}: {node['html'][:120]} {node.get('failureSummary', '')[:200]}" for name, node in nodes]


def wait_for(page: Any, condition: str, seconds: float = 60.0) -> None:
    """Waits until an expression is true. (The page's policy forbids what Playwright's own waiting does.)"""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)

"""Pages in a real browser: what goes wrong in it, and how they look in a wide and in a narrow window."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

WIDE, NARROW = (1400, 900), (390, 800)


@contextmanager
def opened(page: Path, size: tuple[int, int], failures: list[str]) -> Iterator[Any]:
    """Open a file in a window of so many pixels and yield playwright's page. `failures` gets errors of the console, of scripts, and of requests.

    Skips where there is no browser; .ci/run installs one.
    """
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": size[0], "height": size[1]})
        window.on("console", lambda message: failures.append(message.text) if message.type in ("error", "warning") else None)
        window.on("pageerror", lambda error: failures.append(str(error)))
        window.on("request", lambda request: failures.append(f"asks for {request.url}") if request.url != page.as_uri() else None)
        window.goto(page.as_uri())
        yield window
        browser.close()


def check_page(page: Path, pictures: int) -> None:
    """Open a page wide and narrow: no errors, nothing asked for, every picture there with a size and within the window, nothing to scroll to the side."""
    for size in (WIDE, NARROW):
        failures: list[str] = []
        with opened(page, size, failures) as window:
            boxes = [picture.bounding_box() for picture in window.query_selector_all("svg")]
            assert len(boxes) == pictures
            for box in boxes:
                assert box["width"] > 200
                assert box["height"] > 80
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= size[0]
            assert window.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert failures == []

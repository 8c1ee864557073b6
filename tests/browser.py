"""A real browser for tests: Chromium by Playwright, or a skip that says what to install.

TORCH2EBM_BROWSER names the program; without it, the Chromium or Chrome of the system is taken, then Playwright's own.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

WIDTHS = {1280: 800, 400: 800}  # of a desk and of a phone, with the height
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL = "no browser: pip install torch2ebm[browser], and apt-get install chromium or playwright install chromium"
SIDEWAYS = "() => document.scrollingElement.scrollWidth - document.documentElement.clientWidth"


@dataclass
class Opened:
    """One page in the browser, and all that went wrong in it.

    Attributes:
        page: Playwright's page.
        errors: What the console said as an error or a warning, and uncaught exceptions.
        requests: Addresses of all that was asked for, but the page itself.
        failed: Addresses that gave no answer, or one of 400 or more.
        address: Of the page itself.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    address: str = ""

    def go(self, address: str) -> None:
        """On to another page, to its end; what was wrong with the one before is forgotten."""
        self.page.goto("about:blank")  # what the page before still asks for ends here
        for seen in (self.errors, self.requests, self.failed):
            seen.clear()
        self.address = address
        self.page.goto(address, wait_until="load")
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.page.evaluate(SIDEWAYS))


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium without a window. Skips the test where there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip(INSTALL)
    with sync_playwright() as playwright:
        named = os.environ.get("TORCH2EBM_BROWSER")
        own = playwright.chromium.executable_path
        program = named or next(filter(None, map(shutil.which, PROGRAMS)), own if Path(own).exists() else None)
        if program is None:
            pytest.skip(INSTALL)
        # inside a container, where tests run as root, Chromium's sandbox cannot start
        options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=program, args=options)
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def opened(chromium: Any, address: str, width: int = 1280, scheme: str = "light") -> Iterator[Opened]:
    """A page, loaded to its end, in a context of its own."""
    size = {"width": width, "height": WIDTHS.get(width, 800)}
    context = chromium.new_context(viewport=size, color_scheme=scheme)
    found = Opened(context.new_page())
    found.page.set_default_timeout(20_000)
    found.page.on("console", lambda said: _told(found, said))
    found.page.on("pageerror", lambda error: found.errors.append(str(error)))
    found.page.on("request", lambda request: request.url != found.address and found.requests.append(request.url))
    found.page.on("requestfailed", lambda request: found.failed.append(f"{request.url}: {request.failure}"))
    found.page.on("response", lambda answer: _answered(found, answer))
    try:
        found.go(address)
        yield found
    finally:
        with suppress(Exception):  # the browser may be gone, and the test has said why
            context.close()


def _told(found: Opened, said: Any) -> None:
    if said.type in ("error", "warning"):
        found.errors.append(said.text)


def _answered(found: Opened, answer: Any) -> None:
    if answer.status >= 400:
        found.failed.append(f"{answer.url}: {answer.status}")

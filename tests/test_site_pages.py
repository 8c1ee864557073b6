"""Every page of the site in a real browser, at two widths: no error, nothing that is missing, nothing that sticks out.

The site is the folder ``site`` that ``make docs`` writes. Without it, it is built where the extra ``docs`` is
installed, then without the outputs of the tutorials. TORCH2EBM_SCREENSHOTS names a folder for the pictures.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import WIDTHS, Opened, browser, opened
from test_site import ROOT, built

OPEN_BLOCKS = """() => [...document.querySelectorAll("p, li")].map(part => part.textContent)
                 .filter(text => text.trimStart().startsWith("```"))"""

pytestmark = pytest.mark.slow


class Quiet(SimpleHTTPRequestHandler):
    """Serves the site at the path that it has on the web, without a word."""

    prefix = urlsplit(next(re.finditer(r"^site_url: (\S+)$", (ROOT / "mkdocs.yml").read_text(), re.M))[1]).path

    def translate_path(self, path: str) -> str:
        return super().translate_path(path.removeprefix(self.prefix.removesuffix("/")))

    def log_message(self, *arguments: Any) -> None:
        pass


@dataclass(frozen=True)
class Site:
    """A folder of pages, and the address at which it is served."""

    folder: Path
    address: str

    @property
    def pages(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.html"))


def served(folder: Path) -> Iterator[Site]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield Site(folder, f"http://127.0.0.1:{server.server_port}{Quiet.prefix}")
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def site(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = ROOT / "site"
    if not (folder / "index.html").is_file():
        folder = tmp_path_factory.mktemp("site")
        done = built(folder)  # skips where it cannot
        assert done.returncode == 0, done.stderr[-4000:]
    yield from served(folder)


def faults(found: Opened, site: Site, page: str, picture: Path) -> list[str]:
    """What is wrong with a page, after a look at it."""
    own = site.address.removesuffix(Quiet.prefix)
    found.go(site.address + page.removesuffix("index.html"))
    found.page.screenshot(path=picture, full_page=True)
    elsewhere = [request for request in found.requests if not request.startswith((own, "data:", "blob:"))]
    wide, open_blocks = found.overflow(), found.page.evaluate(OPEN_BLOCKS)
    return [
        *(f"{page}: {text}" for text in [*found.errors, *found.failed]),
        *(f"{page}: asks for {request}" for request in elsewhere),
        *([f"{page}: {wide} pixels too wide"] if wide > 0 else []),
        *(f"{page}: a fence is text: {text[:80]}" for text in open_blocks),
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_is_whole(width: int, site: Site, chromium: Any, tmp_path: Path) -> None:
    pictures = Path(os.environ.get("TORCH2EBM_SCREENSHOTS", tmp_path)) / str(width)
    pictures.mkdir(parents=True, exist_ok=True)
    assert len(site.pages) > 40
    wrong: list[str] = []
    with opened(chromium, "about:blank", width) as found:
        for page in site.pages:
            name = page.removesuffix("index.html").strip("/").replace("/", "_") or "home"
            wrong += faults(found, site, page, pictures / f"{name}.jpg")
    assert wrong == []
    assert len(list(pictures.glob("*.jpg"))) >= len(site.pages)


def test_what_is_missing_wide_or_from_elsewhere_is_seen(tmp_path: Path, chromium: Any) -> None:
    """The negative twin."""
    lines = (
        '<link rel="icon" href="data:,"><p style="width: 3000px">wide</p><img src="absent.png">'
        "<p>```python no-run and its code</p>"
        '<script src="https://elsewhere.invalid/a.js"></script><script>console.error("told")</script>'
    )
    (tmp_path / "index.html").write_text(f"<!DOCTYPE html>{lines}")
    (tmp_path / "whole.html").write_text('<!DOCTYPE html><link rel="icon" href="data:,"><p>whole</p>')
    for site in served(tmp_path):
        with opened(chromium, "about:blank", 400) as found:
            seen = "\n".join(faults(found, site, "index.html", tmp_path / "a.jpg"))
            for part in (
                "told",
                "absent.png: 404",
                "asks for https://elsewhere.invalid",
                "pixels too wide",
                "fence is text",
            ):
                assert part in seen
            assert faults(found, site, "whole.html", tmp_path / "b.jpg") == []


def test_the_search_finds_an_algorithm(site: Site, chromium: Any) -> None:
    with opened(chromium, site.address) as found:
        found.page.keyboard.press("f")
        found.page.locator(".md-search__input").fill("ErrorConjugateGradient")
        link = found.page.locator("a.md-search-result__link").first
        link.wait_for()
        assert "solvers" in str(link.get_attribute("href")) or "ErrorConjugateGradient" in str(link.text_content())
        assert found.errors == [] and found.failed == []

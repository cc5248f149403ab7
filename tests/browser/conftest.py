"""A real browser without a window: Debian's or anybody's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OWN = ("", "localhost", "127.0.0.1")
"""Hosts that are this machine; a file, a blob and inline data have none."""
WIDE = 1280


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of a module, not of the session: while Playwright runs, asyncio.run() fails in the thread of the tests."""
    driver = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'concept-unlearn[dev]'")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with driver.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, headless=True, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page of its own context, 1280 pixels wide or as ``parametrize("page", [390], indirect=True)`` says.

    Fails the test that opened it where a script failed or anything was asked of another machine.
    """
    width = getattr(request, "param", WIDE)
    context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
    context.set_default_timeout(10_000)
    failed: list[str] = []
    asked: list[str] = []
    context.on("weberror", lambda error: failed.append(str(error.error)))
    context.on("request", lambda request: asked.append(request.url))
    context.on("page", lambda opened: opened.on("websocket", lambda socket: asked.append(socket.url)))
    yield context.new_page()
    context.close()
    assert not failed
    assert not [url for url in asked if (urlsplit(url).hostname or "") not in OWN]


@pytest.fixture
def overflow() -> Callable[[Page], int]:
    """By how many pixels a page is wider than its window."""
    return lambda page: int(page.evaluate("document.documentElement.scrollWidth - innerWidth"))

"""A headless Chromium for tests, the one that the system has: Debian's chromium-headless-shell, chromium, or another.

    async with open_page("http://127.0.0.1:8000/") as page: ...

Whatever the page logs as an error, or throws, fails the test at the end of the block.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, ConsoleMessage, Page, ViewportSize, async_playwright

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESKTOP: ViewportSize = {"width": 1400, "height": 1000}
PHONE: ViewportSize = {"width": 360, "height": 740}
TIMEOUT_MS = 10_000


def program() -> str:
    """Its path. AssertionError that says how to get one."""
    found = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    assert found, f"no browser found ({', '.join(PROGRAMS)}). On Debian: apt-get install chromium-headless-shell"
    return found


@asynccontextmanager
async def open_browser() -> AsyncIterator[Browser]:
    """For the time of a `with` block."""
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # it has none for root
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program(), args=arguments)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def open_page(
    browser: Browser, url: str, *, viewport: ViewportSize = DESKTOP, dark: bool = False, expect: str = ""
) -> AsyncIterator[Page]:
    """A page in a profile of its own. `expect`: part of errors that are meant to be logged."""
    context = await browser.new_context(viewport=viewport, color_scheme="dark" if dark else "light")
    page = await context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    problems: list[str] = []

    def logged(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not (expect and expect in message.text):
            problems.append(message.text)

    page.on("console", logged)
    page.on("pageerror", lambda error: problems.append(str(error)))
    try:
        await page.goto(url)
        yield page
        assert not problems, problems
    finally:
        await context.close()

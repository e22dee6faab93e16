"""A page in headless Chromium: what it says on its console, and what it asks of a network."""

import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
LOCAL = ("file:", "data:", "blob:")


@contextmanager
def opened(file, width=1440, scheme="light"):
    """Yields Playwright's page of a file once its plots are drawn. Afterwards, fails for an error
    on the console, for anything that was asked of a network, and for a page wider than the
    window."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian's package `chromium`)")
    sync_api = pytest.importorskip("playwright.sync_api")
    said, asked = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=width < 500
        )
        page.set_default_timeout(120_000)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.resolve().as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached")
        yield page
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert not said, said  # pytest explains asserts of test modules alone
    network = [url for url in asked if not url.startswith(LOCAL)]
    assert not network, network

"""The service with a tiny model, and Debian's Chromium looking at its page. Nothing but the service may be asked for anything."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright
from transformers import LlamaConfig, LlamaForCausalLM

from tests.engine.models import SIZES, make_tokenizer, save, train
from tests.patience import PATIENCE
from tests.workers.conftest import SHORT
from tests.workers.test_stack import address_and_key

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


class Site:
    """The address of the page with the key in its fragment, and what a browser there must not have done."""

    def __init__(self, url: str, key: str) -> None:
        self.url, self.key = url, key
        self.faults: list[str] = []

    def watch(self, page: Page) -> None:
        def asked(request: Request) -> None:
            if (
                request.url.split(":")[0] not in ("blob", "data")
                and urlsplit(request.url).netloc != urlsplit(self.url).netloc
            ):
                self.faults.append(f"asked {request.url}")

        def said(message: ConsoleMessage) -> None:
            if message.type == "error" and "Failed to load resource" not in message.text:  # an answer of 4xx
                self.faults.append(f"console: {message.text}")

        page.on("request", asked)
        page.on("console", said)
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    data = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    save(train(LlamaForCausalLM(LlamaConfig(**SIZES)), tokenizer, 60), tokenizer, data / "models" / "tiny")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SECATEUR_")}
    environment |= {f"SECATEUR_{name}": value for name, value in SHORT.items()}
    environment |= {"SECATEUR_DATA_DIR": str(data), "SECATEUR_TORCH_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "workers", "up"], stdout=subprocess.PIPE, env=environment)
    yield Site(*address_and_key(process, data))
    process.send_signal(signal.SIGINT)
    process.wait(PATIENCE)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        raise RuntimeError("There is no chromium: 'make test-browser' installs Debian's.")
    with sync_playwright() as playwright:
        expect.set_options(timeout=1000 * PATIENCE)
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(1000 * PATIENCE)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, site: Site) -> Iterator[Page]:
    """Signed in. Fails if the page asked another host, broke its policy or threw anything."""
    site.faults.clear()
    page = context.new_page()
    site.watch(page)
    page.goto(f"{site.url}/#key={site.key}")
    page.get_by_role("heading", name="Jobs").wait_for()
    yield page
    assert not site.faults


@pytest.fixture
def pictures() -> Path | None:
    """Where screenshots go that a person wants to look at: ``SECATEUR_PICTURES``."""
    folder = os.environ.get("SECATEUR_PICTURES")
    return Path(folder) if folder else None

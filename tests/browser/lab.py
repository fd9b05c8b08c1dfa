"""A real JupyterLab and a real browser: a server on a free loopback port, Debian's Chromium.

The idea: what a person does, a test does, by mouse and keyboard, and sees what a person sees. The
limit: one kernel at a time, and a window as tall as its notebook, so that a picture shows all of it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from playwright.sync_api import Error, Locator, Page, sync_playwright

CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Cells out of sight are not drawn otherwise, and no test could look at them.
SETTINGS = {"notebook-extension/tracker": '{"windowingMode": "none"}'}
WAIT_MS = 180_000


class Lab:
    """One notebook in a page; ``cell`` finds the code cell whose text holds some words."""

    def __init__(self, page: Page, url: str, pictures: Path) -> None:
        self.page = page
        self.url = url
        self.pictures = pictures

    def open(self, notebook: str) -> None:
        self.page.goto(f"{self.url.format(path=notebook)}", timeout=WAIT_MS)
        self.page.wait_for_selector(".jp-CodeCell", timeout=WAIT_MS)

    def run_all(self) -> None:
        """Restart the kernel and run every cell; waits until the last one has its number."""
        restart = self.page.locator(".jp-Dialog button:has-text('Restart')")
        for _ in range(30):
            self.page.click(".lm-MenuBar-itemLabel:text-is('Run')")
            self.page.click(".lm-Menu-itemLabel:text-is('Restart Kernel and Run All Cells…')")
            # Without a kernel the menu does nothing, and one takes its time to start.
            with suppress(Error):
                restart.click(timeout=5000)
                break
        self.page.wait_for_function(
            """() => {
                const cells = [...document.querySelectorAll('.jp-CodeCell')]
                    .filter(cell => cell.querySelector('.cm-content')?.innerText.trim());
                const prompts = cells.map(c => c.querySelector('.jp-InputPrompt').innerText);
                const failed = document.querySelector(
                    "[data-mime-type='application/vnd.jupyter.error']");
                const first = prompts[0] === '[1]:' || prompts[0] === '[2]:';
                return failed || (first && prompts.every(p => /^\\[\\d+\\]:$/.test(p)));
            }""",
            timeout=WAIT_MS,
        )

    def errors(self) -> list[str]:
        mimes = ("application/vnd.jupyter.error", "application/vnd.jupyter.stderr")
        return [
            text
            for mime in mimes
            for text in self.page.locator(f"[data-mime-type='{mime}']").all_inner_texts()
        ]

    def cell(self, words: str) -> Locator:
        return self.page.locator(".jp-CodeCell").filter(has_text=words).first

    def picture(self, name: str) -> None:
        """The whole notebook in the light and the dark theme, for people to look at."""
        panel = ".jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer"
        height = self.page.evaluate(f"document.querySelector('{panel}').scrollHeight")
        self.page.set_viewport_size({"width": 1300, "height": min(16_000, height + 150)})
        for theme in ("Dark", "Light"):
            self.page.click(".lm-MenuBar-itemLabel:text-is('Settings')")
            self.page.hover(".lm-Menu-itemLabel:text-is('Theme')")
            self.page.click(f".lm-Menu-itemLabel:text-is('JupyterLab {theme}')")
            self.page.wait_for_timeout(1500)
            self.page.screenshot(path=self.pictures / f"{name}-{theme.lower()}.png")
        self.page.set_viewport_size({"width": 1300, "height": 1200})


def changed(output: Locator, before: str) -> None:
    """Waits until what is shown is not ``before``."""
    deadline = time.monotonic() + 60
    while output.inner_html() == before:
        assert time.monotonic() < deadline, "the picture did not change"
        time.sleep(0.1)


@contextmanager
def server(folder: Path, settings: Path) -> Iterator[str]:
    """The address of a page of a JupyterLab on ``folder``, with ``{path}`` in it."""
    for name, text in SETTINGS.items():
        file = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(8)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
    command += [f"--IdentityProvider.token={token}"]
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(settings / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(settings / "workspaces"),
    }
    log = (settings / "server.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5)
                break
            except OSError:
                assert process.poll() is None, (settings / "server.log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/lab/tree/{{path}}?token={token}&reset"
    finally:
        process.terminate()
        process.wait(30)
        log.close()


@contextmanager
def chromium() -> Iterator[Page]:
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("no chromium: apt-get install chromium", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM)
        yield browser.new_page(viewport={"width": 1300, "height": 1200})
        browser.close()

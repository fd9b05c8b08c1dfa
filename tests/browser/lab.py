"""A real JupyterLab and a real browser: a server on a free loopback port, Debian's Chromium.

The idea: what a person does, a test does, by mouse and keyboard, and sees what a person sees. The
limit: one kernel at a time, and a window as tall as its notebook, so that a picture shows all of it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from nbconvert import HTMLExporter
from playwright.sync_api import Browser, Locator, Page, Route, sync_playwright

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
# What stands beside each code cell that has any code: its number, a star, or neither.
PROMPTS = """[...document.querySelectorAll('.jp-CodeCell')]
    .filter(cell => cell.querySelector('.cm-content')?.innerText.trim())
    .map(cell => cell.querySelector('.jp-InputPrompt').innerText)"""


class Lab:
    """One notebook in a page of its own; ``cell`` finds the code cell whose text has some words."""

    def __init__(self, browser: Browser, address: Address, folder: Path, pictures: Path) -> None:
        self.browser = browser
        self.address = address
        self.folder = folder
        self.pictures = pictures
        self.page = browser.new_page()

    def open(self, notebook: str) -> None:
        """A new page and a new kernel, ready to run; those of the notebook before are gone."""
        self.page.close()
        self.address.end_kernels()
        self.page = self.browser.new_page(viewport={"width": 1300, "height": 1200})
        self.page.set_default_timeout(WAIT_MS)
        self.page.goto(self.address.of(notebook))
        self.page.wait_for_selector(".jp-CodeCell")
        self._wait_for_kernel()

    def _wait_for_kernel(self) -> None:
        """Without a kernel the menu does nothing, and one takes its time to start."""
        ask = self.page.locator(".jp-Dialog:has-text('Select Kernel') button.jp-mod-accept")
        deadline = time.monotonic() + WAIT_MS / 1000
        while self.address.kernel_states() != ["idle"]:
            assert time.monotonic() < deadline, self.address.kernel_states()
            if ask.count():  # a page that is faster than its list of kernels
                ask.click()
            self.page.wait_for_timeout(300)

    def run_all(self) -> None:
        """Run every cell; waits until the last one has its number, or one has failed."""
        # Those of the file have their numbers already, and could not be told from new ones.
        self.menu("Edit", "Clear Outputs of All Cells")
        self.page.wait_for_function(f"() => {PROMPTS}.every(p => p === '[ ]:')")
        self.menu("Run", "Run All Cells")
        self.page.wait_for_function(
            f"() => {PROMPTS}.every(p => /^\\[\\d+\\]:$/.test(p)) || "
            "document.querySelector(\"[data-mime-type='application/vnd.jupyter.error']\")"
        )

    @contextmanager
    def exported(self, notebook: Path, folder: Path) -> Iterator[Page]:
        """nbconvert's HTML of a notebook, written to ``folder``, in a page without a network."""
        html, _ = HTMLExporter().from_filename(str(notebook))
        path = folder / f"{notebook.stem}.html"
        path.write_text(html)
        page = self.browser.new_page(viewport={"width": 1000, "height": 900})
        page.route("**/*", only_files)
        page.goto(path.as_uri())
        yield page
        page.close()

    def menu(self, *labels: str) -> None:
        """Choose an entry of the menu bar by its labels, from the bar on."""
        dialog = self.page.locator(".jp-Dialog")
        assert not dialog.count(), f"JupyterLab asks: {dialog.first.inner_text()}"
        first, *inner, last = labels
        self.page.click(f".lm-MenuBar-itemLabel:text-is('{first}')")
        for label in inner:
            self.page.hover(f".lm-Menu-itemLabel:text-is('{label}')")
        self.page.click(f".lm-Menu-itemLabel:text-is('{last}')")

    def command(self, label: str) -> None:
        """Choose a command from the palette by its label."""
        self.page.keyboard.press("Control+Shift+c")
        self.page.locator(".lm-CommandPalette-input").fill(label)
        self.page.locator(f".lm-CommandPalette-itemLabel:has-text('{label}')").first.click()

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
        # The page follows the last cell; from the top it draws all that fits the window.
        self.page.evaluate(f"document.querySelector('{panel}').scrollTo(0, 0)")
        for theme in ("Dark", "Light"):
            self.menu("Settings", "Theme", f"JupyterLab {theme}")
            self.page.wait_for_function(
                f"() => document.body.dataset.jpThemeLight === '{str(theme == 'Light').lower()}'"
            )
            # The style sheet is there before everything is drawn with it.
            self.page.wait_for_timeout(3000)
            self.page.screenshot(path=self.pictures / f"{name}-{theme.lower()}.png")
        self.page.set_viewport_size({"width": 1300, "height": 1200})


def only_files(route: Route) -> None:
    """A network that is off: the handler of a page's requests."""
    if route.request.url.startswith(("file:", "data:")):
        route.continue_()
    else:
        route.abort()


def changed(output: Locator, before: str) -> None:
    """Waits until what is shown is not ``before``."""
    deadline = time.monotonic() + 60
    while output.inner_html() == before:
        assert time.monotonic() < deadline, "the picture did not change"
        time.sleep(0.1)


@dataclass(frozen=True)
class Address:
    """Where a JupyterLab answers, and to whom."""

    port: int
    token: str

    def of(self, notebook: str) -> str:
        return f"http://127.0.0.1:{self.port}/lab/tree/{notebook}?token={self.token}&reset"

    def api(self, path: str, method: str = "GET") -> bytes:
        """What the server's interface answers. Raises ``OSError`` where it does not."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/{path}",
            method=method,
            headers={"Authorization": f"token {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    def kernel_states(self) -> list[str]:
        return [one["kernel"]["execution_state"] for one in json.loads(self.api("sessions"))]

    def end_kernels(self) -> None:
        for session in json.loads(self.api("sessions")):
            self.api(f"sessions/{session['id']}", "DELETE")


@contextmanager
def server(folder: Path, settings: Path) -> Iterator[Address]:
    """A JupyterLab on ``folder``, with settings of its own."""
    for name, text in SETTINGS.items():
        file = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = Address(free.getsockname()[1], secrets.token_hex(8))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--port={address.port}", "--ServerApp.port_retries=0"]
    command += [f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={address.token}"]
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
                address.api("status")
                break
            except OSError:
                assert process.poll() is None, (settings / "server.log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)
        log.close()


@contextmanager
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("no chromium: apt-get install chromium", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM)
        yield browser
        browser.close()

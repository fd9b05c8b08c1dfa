"""The converter by mouse: the kernel is free, the page may be reloaded, Cancel ends it cleanly.

A gate in the kernel holds the conversion at its checks, so that nothing depends on its speed.
"""

import shutil
from collections.abc import Iterator

import nbformat
import pytest
from lab import Lab
from playwright.sync_api import Locator

NAME = "converting.ipynb"
CELLS = [
    """import threading
import llamaconv.convert.disk_file
from llamaconv.notebook import background
llamaconv.convert.disk_file._JOURNAL_BYTES = 1000  # the sample is too small to be kept otherwise
gate, tell = threading.Event(), background.Work._progress
def held(work, step, done, total):
    tell(work, step, done, total)
    if step == "verify" and done < total:
        while not gate.wait(0.05):
            tell(work, step, done, total)
background.Work._progress = held""",
    """from llamaconv import Target, open_checkpoint
from llamaconv.notebook.panels.convert import ConvertPanel
from llamaconv.notebook.parameters import Parameters
options = {**vars(Target()), "max_shard_size": "5GB", "interactive": "yes", "overwrite": False}
parameters = Parameters.of("4-convert", options | {"source": "", "target": "mine"})
panel = ConvertPanel(open_checkpoint(parameters.source), parameters)
panel.show(parameters.wants_controls)""",
    "print('the kernel is free:', 6 * 7)",
    "gate.set(); panel.convert().verification.ok",
    "gate.clear(); panel.convert().target",
]


@pytest.fixture(scope="module")
def ready(lab: Lab) -> Iterator[Lab]:
    cells = [nbformat.v4.new_code_cell(text) for text in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), lab.folder / NAME)
    lab.open(NAME)
    yield lab
    for name in ("mine", "again"):
        shutil.rmtree(lab.folder / name, ignore_errors=True)


def run(lab: Lab, words: str) -> Locator:
    """Run one cell, by keyboard."""
    cell = lab.cell(words)
    cell.locator(".cm-content").click()
    lab.page.keyboard.press("Control+Enter")
    return cell


def test_conversion_leaves_the_kernel_free_survives_a_reload_and_is_cancelled_and_resumed(
    ready: Lab,
) -> None:
    lab = ready
    run(lab, "gate, tell =")
    run(lab, "ConvertPanel(").locator("button:has-text('Convert')").wait_for()
    live = lab.page.locator(".llamaconv-live")
    live.locator("button:has-text('Convert')").click()
    verifying = live.locator("text=2 of 2, verifying")
    verifying.wait_for()
    assert live.locator("button:has-text('Convert')").is_disabled()
    assert live.locator("select").first.is_disabled()
    run(lab, "the kernel is free").locator("text=the kernel is free: 42").wait_for()

    lab.menu("File", "Save Notebook")
    lab.page.reload()
    lab.page.wait_for_selector(".jp-CodeCell")
    verifying.wait_for()
    lab.picture("converting")
    live.locator("button:has-text('Cancel')").click()
    live.locator("text=⚠ cancelled; the target was not changed").wait_for()
    assert "Convert continues from there" in live.inner_text()
    assert not (lab.folder / "mine").exists()
    lab.picture("cancelled")

    button = live.locator("button:has-text('Convert')")
    lab.page.wait_for_function("b => !b.disabled", arg=button.element_handle())
    button.click()
    verifying.wait_for()
    run(lab, "gate.set()").locator("text=True").wait_for()
    live.locator("text=✓ mine: done, every check passed").wait_for()
    assert (lab.folder / "mine" / "llamaconv.json").is_file()
    lab.picture("converted")

    shutil.rmtree(lab.folder / "mine")
    live.locator("select >> nth=2").select_option("half_split")
    live.locator("select >> nth=2").select_option("auto")
    live.locator("text=no longer exists").wait_for()
    assert not button.is_disabled()
    assert not lab.errors()


def test_interrupted_kernel_ends_the_conversion_of_its_cell_and_leaves_the_panel_alive(
    ready: Lab,
) -> None:
    lab = ready
    live = lab.page.locator(".llamaconv-live")
    target = live.get_by_role("textbox", name="target")
    target.fill("again")
    lab.page.keyboard.press("Enter")
    live.locator("text=convert SAMPLE again").wait_for()
    cell = run(lab, "gate.clear()")
    live.locator("text=2 of 2, verifying").wait_for()
    lab.menu("Kernel", "Interrupt Kernel")
    cell.locator("text=error: cancelled; the target was not changed").wait_for()
    live.locator("text=⚠ cancelled; the target was not changed").wait_for()
    assert not live.get_by_role("button", name="Convert").is_disabled()
    assert not target.is_disabled()
    lab.picture("interrupted")
    run(lab, "gate.set()").locator("text=True").wait_for()
    live.locator("text=✓ again: done, every check passed").wait_for()

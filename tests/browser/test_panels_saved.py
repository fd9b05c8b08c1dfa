"""Panels after their kernel: saved, opened again, exported, and opened by somebody else."""

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from lab import Lab, changed
from playwright.sync_api import Page

NAME = "panels.ipynb"
MOVES = """from llamaconv import make_plan, open_checkpoint, sample_path
from llamaconv.notebook.panels import preview
plan = make_plan(open_checkpoint(sample_path()))
preview.moves(plan).show(True)"""
ROWS = "preview.one_tensor(plan).show(True)"


@pytest.fixture(scope="module")
def saved(lab: Lab) -> Path:
    """A notebook whose controls were used, saved in JupyterLab, and whose kernel has ended."""
    cells = [nbformat.v4.new_code_cell(text) for text in (MOVES, ROWS)]
    path = lab.folder / NAME
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    lab.open(NAME)
    lab.run_all()
    panels = lab.page.locator(".llamaconv-live")
    panels.nth(1).wait_for()
    assert not lab.page.locator(".llamaconv-still:visible").count()
    table = panels.first.locator(".widget-html.jp-RenderedHTMLCommon")
    before = table.inner_html()
    panels.first.locator("select").first.select_option("copy")
    changed(table, before)
    lab.page.locator(".llamaconv-still:has-text('31 of 39 moves')").first.wait_for(state="attached")
    lab.menu("File", "Save Notebook")
    lab.page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")
    lab.picture("panels-live")
    lab.address.end_kernels()
    return path


@pytest.fixture(scope="module")
def exported(lab: Lab, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with lab.exported(saved, tmp_path_factory.mktemp("export")) as page:
        yield page


def shows_the_stills(page: Page) -> None:
    """What was chosen last, and nothing about widgets that are gone."""
    stills = page.locator(".llamaconv-still")
    stills.first.wait_for()
    assert stills.count() == 2
    assert "31 of 39 moves" in stills.first.inner_text()
    assert stills.nth(1).locator("img[alt*='change places']").is_visible()
    seen = page.locator("body").inner_text()
    for words in ("Error displaying widget", "model not found", "Loading widget", "VBox("):
        assert words not in seen


def test_panels_in_an_export_show_what_was_chosen(lab: Lab, exported: Page) -> None:
    exported.screenshot(path=lab.pictures / "panels-exported.png", full_page=True)
    shows_the_stills(exported)


def test_panels_of_a_notebook_opened_again_show_what_was_chosen(lab: Lab, saved: Path) -> None:
    lab.open(NAME)
    lab.picture("panels-reopened")
    shows_the_stills(lab.page)


def test_panels_of_a_notebook_that_is_not_trusted_show_what_was_chosen(
    lab: Lab, saved: Path
) -> None:
    """Another person's notebook: JupyterLab runs none of its scripts and takes none of its styles."""
    other = lab.folder / "other.ipynb"
    notebook = nbformat.read(saved, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("From somebody else."))
    nbformat.write(notebook, other)
    lab.open(other.name)
    lab.picture("panels-untrusted")
    shows_the_stills(lab.page)

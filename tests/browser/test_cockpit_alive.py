"""The cockpit where people meet it: in JupyterLab, saved and opened again, and in an HTML export.

No test here runs a kernel after the notebook was saved.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import torch
from lab import Lab
from nbclient import NotebookClient
from playwright.sync_api import Locator, Page

from llamaconv import sample_path
from llamaconv.model import rope
from llamaconv.notebook import lesson
from llamaconv.notebook.cockpit import cockpit

NAME = "cockpit.ipynb"
CELL = """from llamaconv import sample_path
from llamaconv.notebook import lesson
from llamaconv.notebook.cockpit import cockpit
cockpit(lesson.open_specimen(sample_path()))"""
LAYOUTS = ("half_split", "interleaved")
HEAD = cockpit(lesson.open_specimen(sample_path())).head


@pytest.fixture(scope="module")
def saved(lab: Lab) -> Path:
    """A notebook that was run elsewhere, so JupyterLab does not trust it."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    NotebookClient(notebook, timeout=100, store_widget_state=False).execute()
    path = lab.folder / NAME
    nbformat.write(notebook, path)
    return path


@pytest.fixture(scope="module")
def exported(lab: Lab, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """nbconvert's HTML in a page without a network."""
    with lab.exported(saved, tmp_path_factory.mktemp("export")) as page:
        yield page


def wanted(rows: str, rotation: str, position: int, distance: int) -> float:
    """The score by `rope.scores`, without its division by the root of the head's rows."""
    q, k = (
        rope.relayout(torch.tensor(x), 1, "half_split", rows)[None, None] for x in (HEAD.q, HEAD.k)
    )
    angles_PF = rope.angles(
        torch.tensor([position + distance, position]), torch.tensor(HEAD.speeds)
    )
    scores = rope.scores(q.expand(2, 1, -1), k.expand(2, 1, -1), angles_PF, rotation)
    return scores[0, 0, 1].item() * len(HEAD.q) ** 0.5


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def set_slider(host: Locator, name: str, value: int) -> None:
    """By keyboard, as someone without a mouse does."""
    slider = host.locator(f"input[name={name}]")
    slider.focus()
    host.page.keyboard.press("Home")
    for _ in range(value):
        host.page.keyboard.press("ArrowRight")
    assert slider.input_value() == str(value)


def choose(host: Locator, name: str, value: str) -> None:
    """By keyboard: an arrow key goes to the other of two."""
    host.locator(f"input[name={name}]:checked").focus()
    if not host.locator(f"input[name={name}][value={value}]").is_checked():
        host.page.keyboard.press("ArrowRight")
    assert host.locator(f"input[name={name}][value={value}]").is_checked()


def answers_by_keyboard(host: Locator) -> None:
    """Every combination at some positions, compared with the package; all by keyboard."""
    for position, distance in ((0, 1), (5, 0), (2, 3), (1, 17)):
        set_slider(host, "position", position)
        set_slider(host, "distance", distance)
        right = wanted("half_split", "half_split", position, distance)
        for rows, rotation in itertools.product(LAYOUTS, LAYOUTS):
            choose(host, "rows", rows)
            choose(host, "rotation", rotation)
            found = wanted(rows, rotation, position, distance)
            scores = [number(one) for one in host.locator(".score").all_text_contents()]
            assert scores == pytest.approx([right, found], abs=0.0051)
            pairs = [
                number(one)
                for one in host.locator("svg").nth(1).locator(".product").all_text_contents()
            ]
            assert len(pairs) == 4 and sum(pairs) == pytest.approx(found, abs=0.021)
            answer = host.locator("[role=status]").inner_text()
            if rows == rotation:
                assert "✓ right" in answer and "joins partners" in answer
            elif distance == 0:
                assert "✓ looks right" in answer and "distance 0" in answer
            else:
                assert "✗ wrong" in answer and "joins strangers" in answer
                off = answer.partition("off by ")[2].partition(":")[0]
                assert number(off) == pytest.approx(abs(found - right), abs=0.0051)
            chosen = host.locator("td[aria-current=true]")
            assert float(chosen.get_attribute("data-score")) == pytest.approx(found, abs=1e-3)


def test_cockpit_in_an_export_computes_what_the_package_computes(exported: Page) -> None:
    host = exported.locator(".llamaconv-cockpit")
    assert host.locator("svg").count() == 2
    answers_by_keyboard(host)


def test_every_control_and_picture_of_the_cockpit_has_a_name(exported: Page) -> None:
    host = exported.locator(".llamaconv-cockpit")
    for name in LAYOUTS:
        assert exported.get_by_role("radio", name=name, exact=True).count() == 2
    for name in ("rows", "rotation"):
        assert exported.get_by_role("group", name=name, exact=True).count() == 1
    for name in ("position of k", "distance from k to q"):
        assert exported.get_by_role("slider", name=name).count() == 1
    for picture in host.locator("svg").all():
        words = picture.get_attribute("aria-label") or ""
        assert "rows with the" in words and "sum" in words


@pytest.mark.parametrize("width", [1000, 500, 320])
def test_cockpit_fits_a_narrow_window(exported: Page, width: int) -> None:
    """A window of 1000 pixels at a zoom of 200 % is one of 500."""
    exported.set_viewport_size({"width": width, "height": 900})
    for picture in exported.locator(".llamaconv-cockpit svg").all():
        box = picture.bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= width
        # The smallest text has 12.5 of the picture's 432 units.
        assert 12.5 * box["width"] / 432 >= (9 if width > 320 else 7)


def test_saved_notebook_shows_the_picture_and_once_trusted_the_cockpit(
    lab: Lab, saved: Path
) -> None:
    lab.open(saved.name)
    lab.address.end_kernels()
    picture = lab.page.locator(".llamaconv-cockpit img")
    picture.wait_for()
    assert picture.evaluate("image => image.complete && image.naturalWidth > 500")
    assert "strangers" in (picture.get_attribute("alt") or "")
    assert not lab.page.locator(".llamaconv-cockpit form").count()
    lab.command("Trust Notebook")
    lab.page.locator(".jp-Dialog button:has-text('Trust')").click()
    host = lab.page.locator(".llamaconv-cockpit")
    host.locator("form").wait_for()
    answers_by_keyboard(host)
    assert lab.page.locator(".jp-Notebook .jp-Cell").count() == 1, "no key went to JupyterLab"
    lab.picture("cockpit")


def test_cockpit_works_after_its_cell_ran_and_after_saving_and_opening_again(
    lab: Lab, saved: Path
) -> None:
    lab.open(saved.name)
    lab.run_all()
    host = lab.page.locator(".llamaconv-cockpit")
    host.locator("form").wait_for()
    lab.menu("File", "Save Notebook")
    lab.page.wait_for_timeout(1000)
    lab.open(saved.name)
    lab.address.end_kernels()
    host = lab.page.locator(".llamaconv-cockpit")
    host.locator("form").wait_for()
    set_slider(host, "distance", 0)
    assert "looks right" in host.locator("[role=status]").inner_text()

"""The lesson as a page, opened in Chromium with the network off."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import lesson_page
import pytest
from lab import Lab, only_files
from playwright.sync_api import Page

from llamaconv import sample_path
from llamaconv.notebook import lesson
from llamaconv.notebook.cockpit import cockpit

CELLS = json.loads(lesson_page.NOTEBOOK.read_text())["cells"]
PROSE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]


class Opened:
    """A page, every request that it made beyond its own file, and what the console said."""

    def __init__(self, lab: Lab, path: Path, theme: str = "light", width: int = 1000) -> None:
        context = lab.browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, offline=True
        )
        self.page: Page = context.new_page()
        self.requests: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.route("**/*", only_files)
        self.page.goto(path.as_uri())

    @property
    def other_requests(self) -> list[str]:
        return [one for one in self.requests[1:] if not one.startswith("data:")]


@pytest.fixture(scope="module")
def opened(lab: Lab) -> Iterator[Opened]:
    one = Opened(lab, lesson_page.PAGE)
    yield one
    one.page.context.close()


def test_page_asks_for_nothing_and_has_no_errors(opened: Opened) -> None:
    opened.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    opened.page.wait_for_timeout(500)
    assert not opened.other_requests
    assert not opened.said
    assert opened.page.title()
    assert opened.page.locator("html").get_attribute("lang") == "en"


def test_every_section_is_there_and_every_picture_is_drawn(opened: Opened) -> None:
    headings = [one for text in PROSE for one in re.findall(r"^## (.+)$", text, re.MULTILINE)]
    assert opened.page.locator("h2").all_inner_texts() == headings
    text = opened.page.locator("main").inner_text()
    assert "$" not in text.replace("$OUT", ""), "a formula was left as LaTeX"
    images = opened.page.locator("img")
    broken = images.evaluate_all("all => all.filter(i => !i.complete || !i.naturalWidth).length")
    assert images.count() and not broken


def test_answers_are_hidden_and_open_by_keyboard(opened: Opened) -> None:
    answers = opened.page.locator("main details:not(.fold) > summary")
    assert answers.count() > 3
    for number in range(answers.count()):
        summary = answers.nth(number)
        if summary.is_visible():
            assert not summary.evaluate("one => one.parentElement.open")
            summary.focus()
            opened.page.keyboard.press("Enter")
            assert summary.evaluate("one => one.parentElement.open")


def test_cockpit_on_the_page_answers_keys(lab: Lab, tmp_path: Path) -> None:
    """Of a notebook with one more cell, in case it has none."""
    notebook = json.loads(lesson_page.NOTEBOOK.read_text())
    data = cockpit(lesson.open_specimen(sample_path()))._repr_mimebundle_()
    notebook["cells"].append(
        {
            "cell_type": "code",
            "source": "cockpit(specimen)",
            "metadata": {},
            "outputs": [{"output_type": "execute_result", "data": data, "metadata": {}}],
        }
    )
    other = tmp_path / "lesson.ipynb"
    other.write_text(json.dumps(notebook))
    path = tmp_path / "lesson.html"
    path.write_text(lesson_page.page(other), encoding="utf-8")
    one = Opened(lab, path)
    host = one.page.locator(".llamaconv-cockpit").last
    status = host.locator("[role=status]")
    assert "✗ wrong" in status.inner_text()
    host.locator("input[name=rotation]:checked").focus()
    one.page.keyboard.press("ArrowLeft")
    assert "✓ right" in status.inner_text()
    one.page.keyboard.press("ArrowLeft")
    host.locator("input[name=distance]").focus()
    one.page.keyboard.press("Home")
    assert "✓ looks right" in status.inner_text()
    assert not one.other_requests and not one.said
    one.page.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1000, 500])
def test_page_fits_its_window_in_both_themes(lab: Lab, theme: str, width: int) -> None:
    one = Opened(lab, lesson_page.PAGE, theme, width)
    assert one.page.evaluate("document.documentElement.scrollWidth") <= width
    ground, text = (
        one.page.evaluate(f"getComputedStyle(document.body).{name}")
        for name in ("backgroundColor", "color")
    )
    assert (brightness(ground) > brightness(text)) == (theme == "light")
    assert abs(brightness(ground) - brightness(text)) > 150
    one.page.screenshot(path=lab.pictures / f"lesson-page-{theme}-{width}.png", full_page=True)
    one.page.context.close()


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

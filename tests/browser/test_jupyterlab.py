"""The notebooks as people use them: opened in JupyterLab, run, worked by keyboard, looked at."""

from pathlib import Path

import pytest
from lab import Lab, changed

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9]-*.ipynb"))


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def ran(request: pytest.FixtureRequest, lab: Lab) -> tuple[str, Lab]:
    """A notebook after all its cells have run."""
    lab.open(request.param.name)
    lab.run_all()
    return request.param.stem, lab


def test_every_cell_runs_without_an_error(ran: tuple[str, Lab]) -> None:
    name, lab = ran
    errors = lab.errors()
    lab.picture(name)
    assert not errors, errors


def test_every_control_works_by_keyboard_and_changes_what_is_shown(ran: tuple[str, Lab]) -> None:
    _, lab = ran
    panels = lab.page.locator(".widget-vbox:has(.widget-html)")
    assert panels.count() >= 1
    worked = set()
    for number in range(panels.count()):
        panel = panels.nth(number)
        panel.scroll_into_view_if_needed()
        output = panel.locator(".widget-html.jp-RenderedHTMLCommon").first
        for kind, selector, pressed in (
            ("slider", ".noUi-handle", ["ArrowRight"]),
            ("dropdown", "select:enabled", ["End"]),
            ("text", "input[type=text]:enabled", ["w", "1", "Enter"]),
            ("checkbox", "input[type=checkbox]:enabled", ["Space"]),
        ):
            control = panel.locator(selector).first
            if not control.count() or kind in worked:
                continue
            if kind == "dropdown" and control.evaluate("s => s.selectedIndex == s.length - 1"):
                pressed = ["Home"]
            before = output.inner_html()
            control.focus()
            for key in pressed:
                lab.page.keyboard.press(key)
            changed(output, before)
            worked.add(kind)
    assert worked
    assert not lab.errors()


def test_the_converter_by_keyboard(lab: Lab) -> None:
    lab.open("4-convert.ipynb")
    lab.run_all()
    panel = lab.cell("panel = ConvertPanel(").locator(".widget-vbox").first
    output = panel.locator(".widget-html.jp-RenderedHTMLCommon").first
    button = panel.locator("button:has-text('Convert')")
    before = output.inner_html()
    target, shards = (panel.locator("input[type=text]").nth(n) for n in (0, 1))
    shards.fill("none")
    lab.page.keyboard.press("Enter")
    changed(output, before)
    assert "shards must be int; got 'none'" in output.inner_text()
    assert button.is_disabled()
    shards.fill("2")
    lab.page.keyboard.press("Enter")
    lab.page.wait_for_function("b => !b.disabled", arg=button.element_handle())
    assert "--shards 2" in output.inner_text()
    target.fill("elsewhere")
    lab.page.keyboard.press("Enter")
    panel.locator("text=elsewhere --shards 2").first.wait_for()
    assert "--overwrite" not in output.inner_text()
    panel.get_by_role("checkbox", name="overwrite").focus()
    lab.page.keyboard.press("Space")
    panel.locator("text=--overwrite").first.wait_for()
    button.focus()
    lab.page.keyboard.press("Enter")
    panel.locator("text=every check passed").wait_for(timeout=60_000)
    assert not lab.errors()

"""Panels by screen reader, in a narrow window, at 200 % zoom and in the dark theme."""

import re

import pytest
from lab import Lab, changed
from playwright.sync_api import Locator

# Zoom is a window of fewer, larger pixels.
WINDOWS = {"1000": (1000, 1), "1400": (1400, 1), "1000-zoomed": (500, 2), "1400-zoomed": (700, 2)}


@pytest.fixture(scope="module")
def ran(lab: Lab) -> Lab:
    """Notebook 2 has every kind of control but a check box."""
    lab.open("2-preview-keys.ipynb")
    lab.run_all()
    lab.page.locator(".llamaconv-live").first.wait_for()
    return lab


def panel(lab: Lab, words: str) -> Locator:
    return lab.cell(words).locator(".llamaconv-live")


def test_every_control_has_an_accessible_name(ran: Lab) -> None:
    for role in ("slider", "combobox", "textbox"):
        live = ran.page.locator(".llamaconv-live")
        named = live.get_by_role(role, name=re.compile(r"\w"))
        everything = live.get_by_role(role).count()
        assert everything and named.count() == everything, role
    assert (
        panel(ran, "one_tensor(plan)")
        .get_by_role("slider", name="row of the head to follow")
        .is_visible()
    )


def test_change_is_announced_by_the_alt_text_of_the_new_picture(ran: Lab) -> None:
    rows = panel(ran, "one_tensor(plan)")
    said = rows.locator(".llamaconv-said [role=status][aria-live=polite]")
    said.wait_for(state="attached")
    before = said.inner_html()
    rows.get_by_role("combobox", name="target key").focus()
    ran.page.keyboard.press("Home")
    changed(said, before)
    assert said.inner_text() == rows.locator("img").get_attribute("alt")
    assert rows.get_by_role("combobox", name="head").is_disabled()
    assert "keep their places" in rows.inner_text()


@pytest.mark.parametrize("name", WINDOWS)
def test_operations_and_labels_can_be_read_in_every_window(ran: Lab, name: str) -> None:
    width, scale = WINDOWS[name]
    page = ran.page
    page.set_viewport_size({"width": width, "height": 1200 // scale})
    ran.page.wait_for_timeout(500)
    table = panel(ran, "panels.moves(plan)").locator("table")
    table.scroll_into_view_if_needed()
    box = table.locator("th", has_text="operation").bounding_box()
    assert box["x"] + box["width"] < width, "the first column is in sight"
    picture = panel(ran, "one_tensor(plan)").locator("img")
    assert picture.bounding_box()["width"] >= 640, "its labels do not shrink"
    picture.scroll_into_view_if_needed()
    page.screenshot(path=ran.pictures / f"panels-{name}.png")
    page.set_viewport_size({"width": 1300, "height": 1200})


def test_arrows_of_dropdowns_and_captions_in_both_themes(ran: Lab) -> None:
    ran.picture("notebook-2")
    look = "(e, name) => getComputedStyle(e)[name]"
    select = ran.page.locator(".llamaconv-live select").first
    assert "%23888" in select.evaluate(look, "backgroundImage"), "grey, seen on both grounds"
    caption = panel(ran, "one_tensor(plan)").locator("figcaption")
    height, size = (
        float(caption.evaluate(look, one).removesuffix("px")) for one in ("lineHeight", "fontSize")
    )
    assert height < 1.6 * size

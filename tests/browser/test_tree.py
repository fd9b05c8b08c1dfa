"""The tree of notebook 1 as a reader meets it: in the file, without running anything."""

from lab import Lab


def test_tree_unfolds_by_keyboard_and_by_mouse_before_any_cell_ran(lab: Lab) -> None:
    lab.open("1-browse-index.ipynb")
    tree = lab.cell("panels.tree(")
    tree.scroll_into_view_if_needed()
    summaries = tree.locator("summary")
    layers = tree.locator("summary:has-text('layers —')").first
    assert not layers.is_visible(), "the tree begins folded"
    summaries.first.focus()
    lab.page.keyboard.press("Enter")
    layers.wait_for(state="visible")
    layers.click()
    tree.locator("summary:has-text('3 — 9 tensors')").click()
    tree.locator("li:has-text('input_layernorm.weight')").last.wait_for(state="visible")
    tree.screenshot(path=lab.pictures / "tree.png")

"""The lesson as a page: it is that of the committed notebook, and complete in itself."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import lesson_page
import pytest

PAGE = lesson_page.PAGE.read_text(encoding="utf-8")


def facts(page: str) -> tuple[str, list[str], list[str], list[str]]:
    """What a reader gets: text, pictures, scripts, styles and links, but not how the HTML is laid out."""
    scripts = [words for _, words in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)]
    rest = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]*>", " ", rest))
    return (
        " ".join(text.split()),
        re.findall(r"<img\b[^>]*>", rest),
        scripts,
        re.findall(r'href="([^"]*)"', rest),
    )


def test_committed_page_is_that_of_the_committed_notebook() -> None:
    assert facts(PAGE) == facts(lesson_page.page()), "run: python notebooks/make.py page"


def test_changed_notebook_gives_another_page(tmp_path: Path) -> None:
    notebook = json.loads(lesson_page.NOTEBOOK.read_text())
    notebook["cells"][0]["source"] = ["# Another title"]
    path = tmp_path / "other.ipynb"
    path.write_text(json.dumps(notebook))
    page = lesson_page.page(path)
    assert "<title>Another title</title>" in page
    assert facts(page) != facts(PAGE)


def test_page_is_complete_in_itself() -> None:
    assert len(PAGE.encode()) < 2_000_000
    assert "<html lang=" in PAGE and "default-src 'none'" in PAGE
    assert not re.search(
        r"<(?:script|link|iframe|img|source)\b[^>]*\b(?:src|href)=\"(?!data:)", PAGE
    )
    assert not re.search(r"@import|url\(", PAGE)
    images = re.findall(r"<img\b[^>]*>", PAGE)
    assert images
    for image in images:
        assert len(re.search(r'alt="([^"]*)"', image)[1]) > 40  # type: ignore[index]


def test_links_lead_to_a_section_of_the_page_or_to_an_address() -> None:
    links = re.findall(r'<a\b[^>]*\bhref="([^"]+)"', PAGE)
    anchors = re.findall(r'<h\d id="([^"]+)"', PAGE)
    assert len(anchors) == len(set(anchors))
    for link in links:
        assert link.startswith("https://") or link[1:] in anchors, link
    text = [
        "".join(cell["source"])
        for cell in json.loads(lesson_page.NOTEBOOK.read_text())["cells"]
        if cell["cell_type"] == "markdown"
    ]
    headings = [one for cell in text for one in re.findall(r"^## (.+)$", cell, re.MULTILINE)]
    assert [one.replace(" ", "-") for one in headings] == [
        html.unescape(one) for one in re.findall(r'<h2 id="([^"]+)"', PAGE)
    ]


def test_prose_keeps_code_and_turns_links() -> None:
    prose = lesson_page.prose("`$x$` of W_q; see [4](4-convert.ipynb) and [end](#end).")
    assert "<code>$x$</code>" in prose and "W_q" in prose
    assert f"{lesson_page.REPOSITORY}/blob/HEAD/notebooks/4-convert.ipynb" in prose
    assert 'href="#end"' in prose


def test_cell_that_failed_is_refused() -> None:
    with pytest.raises(ValueError, match="NameError"):
        lesson_page.output({"output_type": "error", "ename": "NameError"})


def test_code_is_folded_unless_its_cell_says_so() -> None:
    cell = {"cell_type": "code", "source": ["x < 1"], "outputs": [], "metadata": {}}
    assert lesson_page.blocks(cell)[0].startswith("<details")
    cell["metadata"] = {"tags": [lesson_page.SHOW_CODE]}
    assert lesson_page.blocks(cell) == ['<pre class="code"><code>x &lt; 1</code></pre>']

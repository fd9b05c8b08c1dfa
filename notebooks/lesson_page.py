"""The lesson as one HTML file that needs no network and no kernel, from notebook 3 as committed.

The text becomes plain HTML, and outputs are taken as they are, the cockpit with its script among
them. The file forbids itself any request (its Content-Security-Policy).

Limit: no LaTeX. Formulas of the lesson are written with the signs of Unicode.
"""

from __future__ import annotations

import base64
import html
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import mistune

HERE = Path(__file__).parent
NOTEBOOK, PAGE = HERE / "3-rope-layouts.ipynb", HERE / "rope-layouts.html"
REPOSITORY = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["urls"][
    "Repository"
]

# A cell with this tag shows its code; that of other cells is folded.
SHOW_CODE = "show-code"
# A cell with this tag is left out.
HIDE = "not-on-page"

# Best first: HTML has the alt text and the caption.
MIMES = ("text/html", "image/svg+xml", "image/png", "text/plain")

NOTE = (
    'This page is <a href="3-rope-layouts.ipynb">notebook 3</a> of '
    f'<a href="{REPOSITORY}">llamaconv</a> with its results. It needs no network and no Python: '
    "the controls work in the browser. To run the lesson on another checkpoint, open the notebook."
)


def page(notebook: Path = NOTEBOOK) -> str:
    """Return the page of a notebook that has its outputs."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    body = "\n".join(part for cell in cells if HIDE not in tags(cell) for part in blocks(cell))
    opening, _, rest = body.partition("</h1>")
    title = re.sub(r"<[^>]+>", "", opening.rpartition("<h1")[2].partition(">")[2])
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f'<title>{title}</title>\n<link rel="icon" href="data:,">',
            f"<style>\n{(HERE / 'lesson_page.css').read_text(encoding='utf-8')}</style>\n</head>",
            f'<body>\n<main>\n{opening}</h1>\n<p class="note">{with_addresses(NOTE)}</p>',
            f"{contents(rest)}\n{rest}\n</main>\n</body>\n</html>\n",
        ]
    )


def tags(cell: dict[str, Any]) -> list[str]:
    """Return the tags of a cell."""
    return list(cell["metadata"].get("tags", []))


def blocks(cell: dict[str, Any]) -> list[str]:
    """Return the HTML of a cell: its text, or its code and its outputs."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [prose(source)]
    if not source.strip():
        return []
    code = f'<pre class="code"><code>{html.escape(source, quote=False)}</code></pre>'
    if SHOW_CODE not in tags(cell):
        code = f'<details class="fold"><summary>code</summary>{code}</details>'
    return [code, *(output(one) for one in cell["outputs"])]


def output(found: dict[str, Any]) -> str:
    """Return the HTML of one output of a cell."""
    if found["output_type"] == "error":
        raise ValueError(f"{NOTEBOOK}: a cell ended with {found['ename']}; run notebooks/make.py")
    if found["output_type"] == "stream":
        return f'<pre class="output">{html.escape("".join(found["text"]), quote=False)}</pre>'
    mime = next((mime for mime in MIMES if mime in found["data"]), None)
    if mime is None:
        return ""
    value = "".join(found["data"][mime])
    if mime == "image/png":
        alt = html.escape("".join(found["data"].get("text/plain", "")))
        value = f'<img alt="{alt}" src="data:image/png;base64,{value.strip()}">'
    elif mime == "text/plain":
        value = f"<pre>{html.escape(value, quote=False)}</pre>"
    return f'<div class="output">{value}</div>'


def prose(source: str) -> str:
    """Return the HTML of a Markdown text."""
    convert = mistune.create_markdown(escape=False, plugins=["table", "strikethrough"])
    return with_images(with_addresses(with_anchors(str(convert(source)).strip())))


def with_anchors(body: str) -> str:
    """Return ``body`` with an id for each heading, as Jupyter gives them."""

    def named(match: re.Match[str]) -> str:
        words = html.unescape(re.sub(r"<[^>]+>", "", match[2]))
        return f'<h{match[1]} id="{html.escape(words.replace(" ", "-"))}">{match[2]}</h{match[1]}>'

    return re.sub(r"<h([1-6])>(.*?)</h\1>", named, body, flags=re.DOTALL)


def contents(body: str) -> str:
    """Return the list of sections."""
    sections = re.findall(r'<h2 id="([^"]*)">(.*?)</h2>', body, re.DOTALL)
    listed = "\n".join(f'<li><a href="#{anchor}">{words}</a></li>' for anchor, words in sections)
    return (
        f'<nav aria-label="Contents"><details><summary>Contents</summary>\n<ul>\n{listed}\n</ul>'
        "</details></nav>"
    )


def with_addresses(body: str) -> str:
    """Return ``body`` with links to files as links to the repository."""
    return re.sub(
        r'(<a\b[^>]*\bhref=")(?!https?:|#|data:)([^"]+)',
        lambda match: f"{match[1]}{REPOSITORY}/blob/HEAD/notebooks/{match[2]}",
        body,
    )


def with_images(body: str) -> str:
    """Return ``body`` with the PNG files that it shows inside it."""

    def inside(match: re.Match[str]) -> str:
        data = base64.b64encode((HERE / match[2]).read_bytes()).decode()
        return f"{match[1]}data:image/png;base64,{data}"

    return re.sub(r'(<img\b[^>]*\bsrc=")(?!data:)([^"]+\.png)', inside, body)


def write() -> None:
    """Write the page next to the notebooks."""
    PAGE.write_text(page(), encoding="utf-8")

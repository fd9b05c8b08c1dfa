"""Run the notebooks on the bundled sample, keep their outputs, and write what is made from them.

    python notebooks/make.py         # the notebooks, the README's picture, the lesson as a page
    python notebooks/make.py page    # only the page, from notebook 3 as it is

Outputs are committed, so that the notebooks can be read without running them. What depends on the
machine is removed: the folder, execution times, widget state.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import lesson_page
import nbformat
from nbclient import NotebookClient

from llamaconv.notebook import figures

HERE = Path(__file__).parent
FOLDER = "/home/you/llamaconv/notebooks"


def run(path: Path) -> None:
    """Execute one notebook in its own folder, and save it with neutral outputs."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        resources={"metadata": {"path": str(HERE)}},
        store_widget_state=False,
        record_timing=False,
    )
    client.execute()
    text = nbformat.writes(notebook)
    path.write_text(re.sub(re.escape(str(HERE.resolve())), FOLDER, text).rstrip() + "\n")


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["page"]):
        sys.exit("usage: python notebooks/make.py [page]")
    if not sys.argv[1:]:
        for notebook in sorted(HERE.glob("[0-9]-*.ipynb")):
            run(notebook)
        figures.head_layouts(head_dim=16).save(HERE / "images" / "head-layouts.png")
    lesson_page.write()

"""Runs the notebooks on the bundled sample and keeps their outputs; draws the README's pictures.

    python notebooks/make.py

Outputs are committed, so that a notebook reads well where it is only shown. What depends on the
machine is taken out: where the folder lies, execution times, widget state.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from llamaconv import convert_checkpoint, figures, lesson, make_plan, open_checkpoint, sample_path

HERE = Path(__file__).parent
FOLDER = "/home/you/llamaconv/notebooks"


def run(path: Path) -> None:
    """Executes one notebook in its own folder and saves it with neutral outputs."""
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


def draw(folder: Path) -> None:
    """The pictures of the README, from the sample."""
    figures.head_layouts(head_dim=16).save(folder / "head-layouts.png")
    plan = make_plan(open_checkpoint(sample_path()))
    done = convert_checkpoint(plan, HERE / "converted" / "for-the-readme", overwrite=True)
    assert done.verification is not None
    figures.score_errors(done.verification).save(folder / "score-errors.png")
    maps = lesson.attention_maps(lesson.open_specimen(sample_path()), layer=1, head=0)
    figures.attention_maps(maps).save(folder / "attention-maps.png")


if __name__ == "__main__":
    for notebook in sorted(HERE.glob("[0-9]-*.ipynb")):
        run(notebook)
    draw(HERE / "images")

"""A panel's output in two parts: a still that survives its kernel, and the controls.

A widget is alive only while its kernel answers. A saved notebook that is opened again would show an
error in its place, and an export its ``repr``. So a still of the same view is in the output too. In
JupyterLab and Jupyter Notebook one of the two is shown, by a style that comes with the still; where
neither styles nor widgets work, such as on GitHub, only the still has anything to show.

Limit: elsewhere, such as in VS Code, a running notebook shows both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from IPython.display import DisplayHandle, display

LIVE, SAID = "llamaconv-live", "llamaconv-said"
"""Classes of the box of a panel, and of the line that is read aloud."""


class HasHtml(Protocol):
    """What a view returns: anything that a notebook can show as HTML."""

    def _repr_html_(self) -> str: ...


class PanelOutput:
    """The two parts. IPython shows them if it is the last value of a cell.

    Attributes:
        still: What is shown without a kernel.
    """

    def __init__(self, box: Any, still: HasHtml) -> None:
        """Combine them.

        Args:
            box: The ipywidget, with the class `LIVE`.
            still: The same without controls.
        """
        self._box = box
        self.still = still
        self._shown: DisplayHandle | None = None

    def _ipython_display_(self) -> None:
        self._shown = display(_bundle(self.still), raw=True, display_id=True)
        # A viewer that has no widgets takes the empty text, not "VBox(children=...".
        live = {**self._box._repr_mimebundle_(), "text/html": "", "text/plain": ""}
        display(live, raw=True)

    def update(self, still: HasHtml) -> None:
        """Replace the still, so that a saved notebook shows the last choice."""
        self.still = still
        if self._shown is not None:
            self._shown.update(_bundle(still), raw=True)


def _bundle(still: HasHtml) -> dict[str, Any]:
    html = f'<div class="llamaconv-still">{still._repr_html_()}</div>'
    look = f"<style>{_file('panel.css')}</style><script>{_file('panel.js')}</script>"
    return {"text/html": f"{html}{look}", "text/plain": repr(still)}


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")

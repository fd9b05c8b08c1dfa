"""The cockpit as one piece of HTML: a picture, and a script that replaces it by controls.

The script runs in JupyterLab, in a saved notebook that is trusted, in an HTML export and on a page,
without a kernel and without the network. Where scripts do not run, the picture stays.

A widget would need its state in the notebook's metadata and a library from a CDN in an export.
"""

from __future__ import annotations

import base64
import html
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llamaconv.notebook.cockpit.small_head import SmallHead, small_head
from llamaconv.notebook.cockpit.still import Start, number, row_name, still
from llamaconv.notebook.figures.picture import COLOURS, RIGHT, WRONG
from llamaconv.notebook.lesson.specimen import Specimen

# The last position and the largest distance that can be chosen.
_MOST = 24


@dataclass(frozen=True)
class Cockpit:
    """Two switches and two sliders over one small head, right beside wrong.

    Attributes:
        head: The numbers.
        start: What it shows first.
    """

    head: SmallHead
    start: Start = field(default_factory=Start)

    @property
    def alt(self) -> str:
        """What the picture shows, in words."""
        start = self.start
        right, wrong = (
            sum(self.head.products(start.rows, rotation, start.position, start.distance))
            for rotation in (start.rows, start.rotation)
        )
        off = abs(wrong - right)
        right_score, wrong_score, difference = (
            number(value, self.head.digits) for value in (right, wrong, off)
        )
        return (
            f"One head of {len(self.head.q)} rows in {start.rows} order, twice. With the "
            f"{start.rows} rotation, arcs join partners and the score is {right_score}. With the "
            f"{start.rotation} rotation, dashed arcs join strangers and the score is "
            f"{wrong_score}, off by {difference}."
        )

    @property
    def note(self) -> str:
        """Where the numbers come from, and what the signs mean."""
        head, pairs = self.head, len(self.head.speeds)
        first_a, last_a, first_b, last_b = (
            row_name(row, pairs) for row in (0, pairs - 1, pairs, 2 * pairs - 1)
        )
        return (
            f"Real numbers of {head.model}: q of one {head.unit} and k of the {head.unit} before it, "
            f"in head 0 of the first layer. To fit the picture, the head has only its first {pairs} "
            f"pairs: {first_a} to {last_a} are rows 0 to {pairs - 1}, and their partners {first_b} "
            f"to {last_b} are rows {head.rows[pairs]} to {head.rows[-1]}. θ is the angle per "
            "position, in radians. "
            "Attention also divides the sum by √(number of rows)."
        )

    def _repr_html_(self) -> str:
        image = base64.b64encode(still(self.head, self.start).encode()).decode()
        # JupyterLab's own shortcuts must not take the arrow keys from the controls.
        return (
            '<div class="llamaconv-cockpit" data-lm-suppress-shortcuts="true">'
            '<figure style="margin:0">'
            f'<img alt="{html.escape(self.alt)}" src="data:image/svg+xml;base64,{image}" '
            f'style="max-width:100%"><figcaption>k at position {self.start.position}, q '
            f"{self.start.distance} further on. The switches and sliders need scripts: run this "
            "cell, or trust the notebook.</figcaption></figure></div>"
            f"<script>{self._script()}</script>"
        )

    def _repr_mimebundle_(self, **_options: object) -> dict[str, str]:
        return {
            "text/html": self._repr_html_(),
            "image/svg+xml": still(self.head, self.start),
            "text/plain": f"<Cockpit: {self.alt}>",
        }

    def _script(self) -> str:
        style = _file("cockpit.css").replace("RIGHT_COLOUR", RIGHT).replace("WRONG_COLOUR", WRONG)
        data = {
            **{name: getattr(self.head, name) for name in ("q", "k", "speeds", "digits")},
            "start": asdict(self.start),
            "most": _MOST,
            "colours": COLOURS[: len(self.head.speeds)],
            "note": html.escape(self.note),
            "style": style,
        }
        # A name with "</script>" must not end the script.
        text = json.dumps(data, ensure_ascii=False).replace("</", "<\\/")
        return _file("cockpit.js").replace("HEAD_JSON", text)


def cockpit(specimen: Specimen) -> Cockpit:
    """Return the cockpit on one head of ``specimen``."""
    return Cockpit(small_head(specimen))


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")

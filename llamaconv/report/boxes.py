"""Boxes for a notebook: what stops, what warns and what is done look different."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Literal

Kind = Literal["error", "warning", "done"]

# A sign, a line and a colour that both themes can show; the sign alone tells them apart.
_LOOKS: dict[Kind, tuple[str, str, str]] = {
    "error": ("✗", "5px solid #c44", "alert"),
    "warning": ("⚠", "5px dotted #b80", "status"),
    "done": ("✓", "5px double #393", "status"),
}


def box(kind: Kind, lines: Iterable[str]) -> str:
    """Return a box with one line per text, as HTML; texts are escaped."""
    sign, border, role = _LOOKS[kind]
    shown = "".join(
        f'<li style="overflow-wrap:anywhere">{sign} {html.escape(line)}</li>' for line in lines
    )
    style = f"border-left:{border};padding-left:1em;margin:0.4em 0;list-style:none"
    return f'<ul role="{role}" style="{style}">{shown}</ul>'

"""An answer that is hidden until the reader opens it, with nothing but HTML."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, repr=False)
class Hidden:
    """Something that a notebook can show as HTML, folded under a line of text.

    Attributes:
        answer: What is hidden: a table or a picture.
        label: The line that opens it.
    """

    answer: Any = field(repr=False)
    label: str

    def __repr__(self) -> str:
        return f"{self.label}:\n{self.answer}"

    def _repr_html_(self) -> str:
        inside = self.answer._repr_html_()
        return f"<details><summary>{html.escape(self.label)}</summary>{inside}</details>"


def reveal(answer: Any, label: str = "show the answer") -> Hidden:
    """Hide ``answer`` under ``label``, so that the reader can predict it first.

    Args:
        answer: A table or a picture.
        label: The line that opens it.
    """
    return Hidden(answer, label)

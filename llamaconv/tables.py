"""Tables that read well in a terminal and in a notebook, from the same rows.

Everything shown is escaped: names come from files that strangers made. Colours are the
theme's own. The limit: cells are short texts; nothing wraps.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llamaconv.problems import printable, shortened

_LEFT = "text-align:left"
_RIGHT = "text-align:right;white-space:nowrap"


@dataclass(frozen=True, repr=False)
class Table:
    """Rows under named columns; ``right`` names the columns that align to the right."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    right: tuple[str, ...] = ()
    most: int = 60

    def _shown(self) -> tuple[list[list[str]], int]:
        rows = [[shortened(printable(str(cell))) for cell in row] for row in self.rows[: self.most]]
        return rows, len(self.rows) - len(rows)

    def __str__(self) -> str:
        rows, left = self._shown()
        widths = [max(map(len, column)) for column in zip(self.columns, *rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            padded = (
                cell.rjust(width) if column in self.right else cell.ljust(width)
                for cell, width, column in zip(cells, widths, self.columns, strict=True)
            )
            return "  ".join(padded).rstrip()

        lines = [printable(self.caption)] if self.caption else []
        lines += [line(self.columns), line(["-" * width for width in widths])]
        lines += map(line, rows)
        return "\n".join([*lines, f"… and {left} more rows"] if left else lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows, left = self._shown()

        def cells(tag: str, texts: Sequence[str]) -> str:
            parts = (
                f'<{tag} style="{_RIGHT if column in self.right else _LEFT}">'
                f"{html.escape(text)}</{tag}>"
                for text, column in zip(texts, self.columns, strict=True)
            )
            return f"<tr>{''.join(parts)}</tr>"

        caption = (
            f"<caption>{html.escape(printable(self.caption))}</caption>" if self.caption else ""
        )
        body = "\n".join(cells("td", row) for row in rows)
        if left:
            body += f'\n<tr><td colspan="{len(self.columns)}">… and {left} more rows</td></tr>'
        head = cells("th", self.columns)
        table = f"<table>{caption}\n<thead>{head}</thead>\n<tbody>{body}</tbody></table>"
        # A table that is wider than its window scrolls; without this its right side is cut off.
        return f'<div style="overflow-x:auto">{table}</div>'


@dataclass(frozen=True, repr=False)
class Sentence:
    """One sentence that a notebook shows as such; escaped."""

    text: str

    def __str__(self) -> str:
        return printable(self.text)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>"


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of a size as people write it, ``5GB`` or ``500 MB``. Raises ``ValueError``."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is no size; one like 5GB or 500MB was expected")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def size(n_bytes: int) -> str:
    """Bytes as a person reads them, in powers of ten: ``1.64 MB``."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    scaled = float(n_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        scaled /= 1000
        if scaled < 999.5 or unit == "TB":
            break
    return f"{scaled:.3g} {unit}"

"""Tables that read well in a terminal and in a notebook, from the same rows.

Everything shown is escaped, because names come from untrusted files. Colours are those of the
theme. Limit: cells are short texts; nothing wraps.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llamaconv.report.errors import printable, shortened

_LEFT = "text-align:left"
_RIGHT = "text-align:right;white-space:nowrap"
# Characters of a cell that does not wrap.
_SHORT = 40


@dataclass(frozen=True, repr=False)
class Table:
    """Rows under named columns.

    Attributes:
        columns: Names of the columns.
        rows: One sequence of cells per row.
        caption: A line above the table.
        right: The columns that are aligned to the right.
        most: How many rows are shown, at most.
    """

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
                f'<{tag} style="{_style(text, column in self.right)}">{html.escape(text)}</{tag}>'
                for text, column in zip(texts, self.columns, strict=True)
            )
            return f"<tr>{''.join(parts)}</tr>"

        caption = (
            f'<caption style="{_LEFT}">{html.escape(printable(self.caption))}</caption>'
            if self.caption
            else ""
        )
        body = "\n".join(cells("td", row) for row in rows)
        if left:
            body += f'\n<tr><td colspan="{len(self.columns)}">… and {left} more rows</td></tr>'
        head = cells("th", self.columns)
        table = f"<table>{caption}\n<thead>{head}</thead>\n<tbody>{body}</tbody></table>"
        # A table that is wider than its window scrolls; otherwise its right side is cut off.
        return f'<div style="overflow-x:auto">{table}</div>'


def _style(text: str, is_right: bool) -> str:
    """Return the style of a cell."""
    if is_right:
        return _RIGHT
    if "  " in text:
        # A run of spaces may be what a model wrote, or align numbers.
        return f"{_LEFT};white-space:pre-wrap"
    # In a narrow window a short text would get one line per word; the table scrolls instead.
    return f"{_LEFT};white-space:nowrap" if len(text) <= _SHORT else _LEFT


@dataclass(frozen=True)
class Fold:
    """Rows under a title, which a notebook shows folded.

    Attributes:
        title: What the rows are.
        rows: The rows.
        folds: Further rows, each part under a title of its own.
        is_open: Whether the rows are seen at first.
    """

    title: str
    rows: Sequence[Sequence[object]]
    folds: Sequence[Fold] = ()
    is_open: bool = False

    def every_row(self) -> list[Sequence[object]]:
        """Return its rows and those of its folds."""
        return [*self.rows, *(row for fold in self.folds for row in fold.every_row())]


# A checkpoint may claim any number of tensors; 405B has 1,138.
_MOST_FOLDED = 4000


@dataclass(frozen=True, repr=False)
class FoldedTable:
    """Rows in folds, of which none is out of reach in a notebook. A few rows are a plain table.

    Attributes:
        columns: Names of the columns.
        folds: The rows.
        caption: A line above them.
        right: The columns that are aligned to the right.
        most: Up to so many rows nothing is folded; as text, how many rows are shown at most.
    """

    columns: tuple[str, ...]
    folds: Sequence[Fold]
    caption: str = ""
    right: tuple[str, ...] = ()
    most: int = 60

    @property
    def rows(self) -> list[Sequence[object]]:
        """All rows."""
        return [row for fold in self.folds for row in fold.every_row()]

    def _table(self, rows: Sequence[Sequence[object]], caption: str, most: int) -> Table:
        return Table(self.columns, rows, caption=caption, right=self.right, most=most)

    def __str__(self) -> str:
        return str(self._table(self.rows, self.caption, self.most))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        if not self.most < len(self.rows) <= _MOST_FOLDED:
            return self._table(self.rows, self.caption, self.most)._repr_html_()
        caption = f"<p>{html.escape(printable(self.caption))}</p>" if self.caption else ""
        return "\n".join([caption, *map(self._fold, self.folds)])

    def _fold(self, fold: Fold) -> str:
        inner = [self._table(fold.rows, "", len(fold.rows))._repr_html_()] if fold.rows else []
        inner += map(self._fold, fold.folds)
        title = f"<summary>{html.escape(printable(fold.title))}</summary>"
        style = ' style="margin-left:1em"' if fold.folds else ""
        opened = " open" if fold.is_open else ""
        return f"<details{opened}>{title}<div{style}>{''.join(inner)}</div></details>"


@dataclass(frozen=True, repr=False)
class Sentence:
    """One sentence for a notebook, escaped."""

    text: str

    def __str__(self) -> str:
        return printable(self.text)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>"


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``5GB`` or ``500 MB``, in powers of ten.

    Raises:
        ValueError: It is not a number with a unit.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"invalid size {text!r}; use a number with a unit, such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def size(n_bytes: int) -> str:
    """Return a number of bytes as text, in powers of ten: ``1.64 MB``."""
    if n_bytes < 1000:
        return f"{n_bytes} B"
    scaled = float(n_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        scaled /= 1000
        if scaled < 999.5 or unit == "TB":
            break
    return f"{scaled:.3g} {unit}"

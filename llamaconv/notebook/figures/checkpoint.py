"""The bytes of each file, by kind of module: one strip per file, as long as its bytes.

Colour and hatch show the kind of module. With many files, strips get thinner and only some are
named.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.patches import Patch

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.notebook import browse
from llamaconv.notebook.figures.picture import COLOURS, INK, Picture, drawing, picture
from llamaconv.report.errors import printable
from llamaconv.report.tables import size

# One colour and one hatch per kind; the largest kind has no hatch.
_LOOKS = {
    "embedding": (COLOURS[2], ".."),
    "q and k": (COLOURS[0], "\\\\"),
    "v and o": (COLOURS[1], "//"),
    "feed-forward": (INK, ""),
    "norms": (COLOURS[3], "**"),
    "head": (COLOURS[4], "xx"),
    browse.OTHER: (COLOURS[7], "++"),
}
_MOST_LABELS = 16
_MOST_EDGED = 60


def shard_strips(checkpoint: Checkpoint) -> Picture:
    """Draw each file of the checkpoint as a strip, cut by kind of module.

    White lines separate the tensors of one kind, if there is room.
    """
    by_file = browse.bytes_by_file(checkpoint)
    by_kind = {
        kind: total
        for kind in browse.KINDS
        if (total := sum(sum(kinds[kind]) for kinds in by_file.values()))
    }
    lengths = [sum(map(sum, kinds.values())) for kinds in by_file.values()]
    unit, name = _unit(max(lengths, default=0))
    strip = min(0.45, max(0.034, 5.6 / max(len(by_file), 1)))
    with drawing(8.0, 1.35 + strip * max(len(by_file), 1)) as (figure, axes):
        edged = len(checkpoint.tensors) <= _MOST_EDGED and len(by_file) <= _MOST_LABELS
        _strips(axes, list(by_file.values()), unit, edged)
        _name_strips(axes, list(by_file))
        axes.set_xlim(0, max(lengths, default=unit) / unit or 1)
        axes.set_xlabel(f"{name} in the file")
        looks = [Patch(**_look(kind), label=kind) for kind in by_kind]
        figure.legend(handles=looks, loc="outside right upper", frameon=False, handleheight=1.2)
        if not by_kind:
            axes.text(0.5, 0.5, "no tensor could be read", ha="center", transform=axes.transAxes)
        return picture(
            figure,
            _alt(checkpoint, by_kind, lengths),
            "One strip per file, as long as its tensors in bytes. Equal areas are equal bytes.",
        )


def _look(kind: str) -> dict[str, Any]:
    colour, hatch = _LOOKS[kind]
    return {"facecolor": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}


def _strips(axes: Any, by_file: list[dict[str, list[int]]], unit: int, edged: bool) -> None:
    """Draw one collection of boxes per kind, since hundreds of hatched patches take seconds."""
    boxes: dict[str, list[Any]] = {}
    edges = []
    # Gaps between thin strips would be one pixel wide here and two there.
    half = 0.42 if len(by_file) <= _MOST_EDGED else 0.5
    for row, kinds in enumerate(by_file):
        top, bottom, left = row - half, row + half, 0.0
        for kind, pieces in kinds.items():
            right = left + sum(pieces) / unit
            if right > left:
                corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
                boxes.setdefault(kind, []).append(corners)
            inner = accumulate((n_bytes / unit for n_bytes in pieces[:-1]), initial=left)
            edges += [[(x, top), (x, bottom)] for x in list(inner)[1:]]
            left = right
    for kind, corners_of in boxes.items():
        axes.add_collection(PolyCollection(corners_of, **_look(kind)))
    if edged:
        axes.add_collection(LineCollection(edges, colors="white", linewidths=0.8))


def _name_strips(axes: Any, files: list[str]) -> None:
    """Label as many strips as there is room for, with the part of the names that differs."""
    front, back = _shared(files)
    step = -(-len(files) // _MOST_LABELS)
    rows = list(range(0, len(files), step or 1))
    if rows:
        rows[-1] = len(files) - 1
    cut = [files[row][len(front) : len(files[row]) - len(back)] for row in rows]
    axes.set_yticks(rows, [_short(text) for text in cut], fontsize=10)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a name with $ in it is not a formula
    axes.set_ylim(max(len(files), 1) - 0.4, -0.6)
    if front or back:
        names = _short(f"{front}…{back}", 72)
        axes.set_title(names, loc="left", fontsize=10, parse_math=False)


def _shared(files: list[str]) -> tuple[str, str]:
    """Return what all names begin and end with, without parts of numbers."""
    if len(files) < 2:
        return "", ""
    front = _same_start(files).rstrip("0123456789")
    back = _same_start([file[len(front) :][::-1] for file in files])[::-1].lstrip("0123456789")
    return front, back


def _same_start(texts: list[str]) -> str:
    # What the first and the last in alphabetical order share, all between them share too.
    first, last = min(texts), max(texts)
    pairs = enumerate(zip(first, last, strict=False))
    return first[: next((at for at, (one, other) in pairs if one != other), len(first))]


def _short(text: str, most: int = 36) -> str:
    """Return at most ``most`` characters, all of which every font has."""
    text = "".join(c if c.isascii() or c == "…" else "?" for c in printable(text))
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 + 1 :]}"


def _unit(longest: int) -> tuple[int, str]:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if longest >= unit:
            return unit, name
    return 1, "bytes"


def _alt(checkpoint: Checkpoint, by_kind: dict[str, int], lengths: list[int]) -> str:
    if not by_kind:
        return "An empty picture: no tensor of this checkpoint could be read; see its problems."
    total = sum(by_kind.values())
    shares = ", ".join(
        f"{kind} {n_bytes / total:.1%}" if n_bytes >= total / 1000 else f"{kind} below 0.1%"
        for kind, n_bytes in sorted(by_kind.items(), key=lambda one: -one[1])
    )
    files = "1 file"
    if len(lengths) > 1:
        files = f"{len(lengths)} files of {size(min(lengths))} to {size(max(lengths))}"
    lost = "; some files have errors, and only what could be read is drawn"
    return (
        f"{len(checkpoint.tensors):,} tensors in {files}, {size(total)} in all, by kind: "
        f"{shares}{lost if checkpoint.errors else ''}."
    )

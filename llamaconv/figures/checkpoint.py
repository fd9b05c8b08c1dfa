"""What lies in which file: a strip a file, its area the bytes of each kind of module."""

from __future__ import annotations

from collections.abc import Mapping

from llamaconv.figures.picture import Picture, drawing, picture
from llamaconv.tables import size

_HATCHES = ("", "///", "\\\\\\", "...", "xx", "++", "oo")


def files(found: Mapping[str, Mapping[str, int]], kinds: tuple[str, ...]) -> Picture:
    """``found`` has the bytes of each kind by file, see `browse.files_of`."""
    names = list(found)
    # Thin strips where there are many; a picture taller than a screen shows nothing at once.
    height = min(0.42 * max(1, len(names)), 7.0)
    total = sum(sum(of_file.values()) for of_file in found.values())
    shown = [kind for kind in kinds if any(kind in of_file for of_file in found.values())]
    with drawing(8.6, height + 1.3) as (figure, axes):
        left = [0.0] * len(names)
        for number, kind in enumerate(kinds):
            if kind not in shown:
                continue
            widths = [found[name].get(kind, 0) / 1e6 for name in names]
            axes.barh(
                range(len(names)),
                widths,
                left=left,
                height=0.8,
                color=f"C{number}",
                hatch=_HATCHES[number % len(_HATCHES)],
                edgecolor="white",
                linewidth=0.6 if len(names) < 40 else 0.0,
                label=kind,
            )
            left = [start + width for start, width in zip(left, widths, strict=True)]
        step = max(1, len(names) // 24)
        places = range(0, len(names), step)
        axes.set_yticks(list(places), [_short(names[place]) for place in places], fontsize=9)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel("megabytes")
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        kind, most = _largest(found)
        return picture(
            figure,
            f"{size(total)} in {len(names)} files; most of them, {100 * most / max(1, total):.0f}%, "
            f"are {kind}.",
            "A strip a file, as long as its bytes; a part a kind of module"
            + (f". Every {step}th file is named." if step > 1 else "."),
        )


def _largest(found: Mapping[str, Mapping[str, int]]) -> tuple[str, int]:
    sums: dict[str, int] = {}
    for of_file in found.values():
        for kind, n_bytes in of_file.items():
            sums[kind] = sums.get(kind, 0) + n_bytes
    return max(sums.items(), key=lambda item: item[1], default=("nothing", 0))


def _short(name: str, most: int = 34) -> str:
    # A dollar sign would begin a formula.
    name = name.replace("$", r"\$")
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-most // 2 :]}"

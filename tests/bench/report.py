"""The tables and the picture of a run: medians of paired ratios, with their range.

A ratio is the time of a program over that of the copy beside it. Nothing is left out: a program
that did not end well is a row with the reason.
"""

from __future__ import annotations

import datetime
import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import measure

Row = dict[str, Any]
DISK = "the disk alone"
TITLES = {
    "hf-dcp": "Hugging Face to DCP",
    "dcp-hf": "DCP to Hugging Face",
    "meta-dcp": "Meta to DCP",
    "hf-meta": "Hugging Face to Meta",
    "cast": "Hugging Face bf16 to DCP float32",
}


def machine() -> Row:
    """What everything is measured on."""
    today = datetime.date.today().isoformat()
    return {**measure.machine(), "torch": version("torch"), "date": today}


def machine_line(about: Row) -> str:
    return (
        f"{about['cores']} cores, {about['memory'] / 1e9:.0f} GB of memory, {about['system']}, "
        f"torch {about['torch']}, {about['date']}."
    )


def about(folder: Path, params: Any, n_bytes: int, warm: bool, pairs: int) -> Row:
    """What was measured on what, for the head of the report."""
    return {
        **machine(),
        "disk_free": shutil.disk_usage(folder).free,
        "bytes": n_bytes,
        "params": asdict(params),
        "cache": "warm" if warm else "cold",
        "pairs": pairs,
    }


def row(
    direction: str,
    name: str,
    otherwise: str,
    runs: Sequence[measure.Measurement],
    copies: Sequence[float],
    n_bytes: int,
) -> Row:
    """A program's row; ``n_bytes`` is what it left on the disk."""
    seconds = [run.seconds for run in runs]
    largest = {
        name: max(getattr(run, name) for run in runs)
        for name in ("resident", "anonymous", "mapped", "asked", "handed", "read", "written")
    }
    return {
        "direction": direction,
        "name": name,
        "otherwise": otherwise,
        **_ratios(seconds, copies),
        "copies": list(copies),
        **largest,
        "target_bytes": n_bytes,
    }


def engine(
    whole: Row, seconds: Sequence[float], copies: Sequence[float], disk: Sequence[float]
) -> Row:
    """The row of the engine's own time, from the same runs as the whole command's."""
    times = sorted(one / other for one, other in zip(seconds, disk, strict=True))
    shown = f"{statistics.median(times):.2f} ({times[0]:.2f} to {times[-1]:.2f})"
    return {
        **whole,
        "name": "llamaconv's engine",
        "otherwise": f"imports and checks apart; {shown} times the disk alone",
        "disk_ratios": times,
        **_ratios(seconds, copies),
    }


def disk(whole: Row, seconds: Sequence[float], copies: Sequence[float]) -> Row:
    """The row of direct writers of as many bytes: what no program can be faster than."""
    return {
        "direction": whole["direction"],
        "name": DISK,
        "otherwise": "writes the same bytes over and over; the best of 1, 2 and 4 writers",
        "target_bytes": whole["target_bytes"],
        **_ratios(seconds, copies),
    }


def _ratios(seconds: Sequence[float], copies: Sequence[float]) -> Row:
    ratios = [one / other for one, other in zip(seconds, copies, strict=True)]
    return {"seconds": list(seconds), "ratios": ratios, "ratio": statistics.median(ratios)}


def failed(
    direction: str,
    name: str,
    otherwise: str,
    reason: str,
    run: measure.Measurement | None = None,
) -> Row:
    memory = {"resident": run.resident, "anonymous": run.anonymous} if run else {}
    return {
        "direction": direction,
        "name": name,
        "otherwise": otherwise,
        "failure": reason,
        **memory,
    }


def write(out: Path, about: Row, rows: Sequence[Row]) -> None:
    """bench.json, bench.md and, where anything was measured, bench.png, in the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps({"about": about, "rows": list(rows)}, indent=1))
    (out / "bench.md").write_text(markdown(about, rows))
    if any("ratio" in one for one in rows):
        picture(about, rows).save(out / "bench.png")


def noise(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Seconds of the fastest, median and slowest copy among ``rows``."""
    copies = [one for row in rows for one in row.get("copies", ())]
    return (min(copies), statistics.median(copies), max(copies)) if copies else (0, 0, 0)


def markdown(about: Row, rows: Sequence[Row]) -> str:
    lines = [
        f"{about['bytes'] / 1e9:.2f} GB in bf16, {about['pairs']} pairs with a copy (cp and fsync), "
        f"page cache {about['cache']}; {machine_line(about)}",
        "Ratio: median of the pairs (lowest to highest); below 1 is faster than the copy.",
    ]
    for direction, title in TITLES.items():
        mine = [row for row in rows if row["direction"] == direction]
        if not mine:
            continue
        lowest, median, highest = noise(mine)
        lines += [
            "",
            f"**{title}.** The copy took {median:.1f} s, {lowest:.1f} to {highest:.1f}: "
            f"the machine's noise is a factor of {highest / (lowest or 1):.2f}.",
            "",
            "| program | time / copy | peak memory (anonymous) | target | what it does otherwise |",
            "|---|---|---|---|---|",
            *map(_line, mine),
        ]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    memory = "" if row["name"] == DISK else "not measured"
    if "resident" in row:
        memory = f"{nbytes(row['resident'])} ({nbytes(row['anonymous'])})"
    if "failure" in row:
        return (
            f"| {row['name']} | did not end: {row['failure']} | {memory} | | {row['otherwise']} |"
        )
    ratios = row["ratios"]
    time = f"{row['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"| {row['name']} | {time} | {memory} | {nbytes(row['target_bytes'])} | {row['otherwise']} |"


def nbytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def picture(about: Row, rows: Sequence[Row]) -> Any:
    """A point a program with the range of its pairs, the copy a line; failures named at its side."""
    from llamaconv.notebook.figures.picture import drawing, picture

    shown = [title for title in TITLES if any(row["direction"] == title for row in rows)]
    groups = [[row for row in rows if row["direction"] == direction] for direction in shown]
    heights = [len(group) + 1 for group in groups]
    options = {"sharex": True, "squeeze": False, "height_ratios": heights}
    with drawing(8, 0.8 + 0.3 * sum(heights), len(shown), 1, **options) as (figure, axes):
        for axis, direction, group in zip(axes[:, 0], shown, groups, strict=True):
            for at, row in enumerate(group):
                _draw(axis, at, row)
            axis.axvline(1, color="0.4", linestyle=":")
            axis.set_yticks(range(len(group)), [row["name"] for row in group])
            axis.set_ylim(len(group) - 0.5, -0.5)
            axis.set_xscale("log")
            axis.set_title(TITLES[direction], loc="left", fontsize=10)
            axis.spines["left"].set_visible(False)
            axis.tick_params(left=False)
        ticks = [0.5, 1, 2, 5, 10, 20, 50]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        most = max(max(row["ratios"]) for row in rows if "ratio" in row)
        least = min(min(row["ratios"]) for row in rows if "ratio" in row)
        axis.set_xlim(min(0.5, least * 0.9), most * 3)
        axis.set_xlabel("time over that of a plain copy; left is faster")
        words = ", ".join(
            f"{row['name']} {row['ratio']:.2g}" if "ratio" in row else f"{row['name']} did not end"
            for row in groups[0]
        )
        return picture(
            figure,
            f"Time over that of a plain copy, {TITLES[shown[0]]}: {words}.",
            f"Median and range of {about['pairs']} pairs, {about['bytes'] / 1e9:.1f} GB of weights.",
        )


def _draw(axis: Any, at: int, row: Row) -> None:
    colour, marker = ("#006BA4", "o") if row["name"].startswith("llamaconv") else ("#C85200", "s")
    if row["name"] == DISK:
        colour, marker = "0.45", "D"
    if "failure" in row:
        text = "could not run" if "anonymous" not in row else "did not end"
        axis.text(1.05, at, f"{text}: {row['failure'][:60]}", va="center", fontsize=8, color=colour)
        return
    low, high = min(row["ratios"]), max(row["ratios"])
    axis.plot([low, high], [at, at], color=colour, linewidth=2, solid_capstyle="round")
    axis.plot(row["ratio"], at, marker=marker, color=colour, markersize=7)
    words = [f"{row['ratio']:.2f}×", *([nbytes(row["resident"])] if "resident" in row else [])]
    over_line = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    place = {"textcoords": "offset points", "va": "center", "fontsize": 8, "bbox": over_line}
    axis.annotate(", ".join(words), (high, at), (8, 0), **place)

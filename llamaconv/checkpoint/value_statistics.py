"""Statistics of weights as values: per tensor, and for all layers of one role.

`weight_values` computes them. This module does without torch, so that tables and pictures do too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import Any

from llamaconv.checkpoint.model_order import folded_names
from llamaconv.report.tables import Table

FAR = 6
"""Deviations from the mean beyond which a histogram counts values without a bar of their own."""


@dataclass(frozen=True)
class Statistics:
    """What the values of one tensor, or of several, look like.

    Attributes:
        name: The tensor.
        n_elements: Number of elements.
        n_finite: Number of elements that are neither NaN nor infinite; the next four are theirs.
        minimum: The smallest.
        maximum: The largest.
        mean: The mean.
        squares: Sum of the squared distances from the mean.
        n_nan: Number of elements that are NaN.
        n_infinite: Number of elements that are infinite.
        n_zero: Number of elements that are 0 or -0.
        n_zero_rows: Number of rows of a matrix of which every element is zero.
    """

    name: str
    n_elements: int = 0
    n_finite: int = 0
    minimum: float = float("inf")
    maximum: float = -float("inf")
    mean: float = 0.0
    squares: float = 0.0
    n_nan: int = 0
    n_infinite: int = 0
    n_zero: int = 0
    n_zero_rows: int = 0

    def __add__(self, other: Statistics) -> Statistics:
        """Return the statistics of both together (Chan, Golub and LeVeque 1979), under this name."""
        n_finite = self.n_finite + other.n_finite
        if not n_finite:
            return replace(self, **_counts(self, other))
        apart = other.mean - self.mean
        shared = self.n_finite / n_finite * other.n_finite
        return replace(
            self,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            mean=self.mean + apart * other.n_finite / n_finite,
            squares=self.squares + other.squares + apart * apart * shared,
            **_counts(self, other),
        )

    @property
    def deviation(self) -> float:
        """The standard deviation."""
        return sqrt(self.squares / self.n_finite) if self.n_finite else 0.0

    @property
    def furthest(self) -> float:
        """The largest distance of a value from the mean, in standard deviations."""
        if not self.deviation:
            return 0.0
        return max(self.maximum - self.mean, self.mean - self.minimum) / self.deviation

    @property
    def is_zero(self) -> bool:
        """Whether there are elements, and every one is zero."""
        return 0 < self.n_elements == self.n_zero

    def to_json(self) -> dict[str, Any]:
        """Return the figures by name; null if a figure is not finite or has no values."""
        figures = {
            "min": self.minimum,
            "max": self.maximum,
            "mean": self.mean,
            "std": self.deviation,
        }
        return {
            "name": self.name,
            "elements": self.n_elements,
            **{k: v if self.n_finite and isfinite(v) else None for k, v in figures.items()},
            "nan": self.n_nan,
            "inf": self.n_infinite,
            "zeros": self.n_zero,
            "zero_rows": self.n_zero_rows,
        }

    def row(self) -> tuple[str, ...]:
        """Return the cells under `COLUMNS`."""
        figures = (self.minimum, self.maximum, self.mean, self.deviation)
        return (
            self.name,
            *(f"{value:.3g}" if self.n_finite else "—" for value in figures),
            f"{self.furthest:.0f}",
            *(
                f"{count:,}" if count else "·"
                for count in (self.n_nan, self.n_infinite, self.n_zero, self.n_zero_rows)
            ),
        )


def _counts(one: Statistics, other: Statistics) -> dict[str, Any]:
    names = ("n_elements", "n_finite", "n_nan", "n_infinite", "n_zero", "n_zero_rows")
    return {name: getattr(one, name) + getattr(other, name) for name in names}


COLUMNS = (
    *("tensor", "min", "max", "mean", "deviation", "furthest"),
    *("NaN", "inf", "zeros", "zero rows"),
)


def folded_statistics(found: Iterable[Statistics]) -> list[Statistics]:
    """Return the statistics of all layers of each role together, under a name with all layers."""
    by_name = {one.name: one for one in found}
    return [
        sum((by_name[each] for each in names), Statistics(name))
        for name, names in folded_names(by_name).items()
    ]


def statistics_table(
    found: Iterable[Statistics], copies: Sequence[Sequence[str]] = (), most: int = 60
) -> Table:
    """Return one row per entry; ``copies`` are tensors of the same values."""
    rows = [one.row() for one in found]
    caption = "values; furthest: the largest distance from the mean, in deviations"
    for names in copies:
        caption += f"; same values: {' = '.join(names)}"
    return Table(COLUMNS, rows, caption=caption, right=COLUMNS[1:], most=most)


@dataclass(frozen=True)
class Histogram:
    """How often values occur.

    Attributes:
        of: The statistics of the tensor.
        lowest: Where the first bar begins.
        highest: Where the last bar ends.
        counts: Number of values of each bar; all bars are equally wide.
        n_below: Number of finite values below the first bar.
        n_above: Number of finite values above the last bar.
    """

    of: Statistics
    lowest: float
    highest: float
    counts: tuple[int, ...]
    n_below: int = 0
    n_above: int = 0

    @property
    def n_far(self) -> int:
        """Number of values that are further from the mean than `FAR` deviations."""
        return self.n_below + self.n_above

    def __str__(self) -> str:
        width = (self.highest - self.lowest) / len(self.counts)
        most = max([*self.counts, 1])
        lines = [
            f"{self.lowest + at * width:>10.3g}  {'█' * round(48 * count / most):<48}  {count:,}"
            for at, count in enumerate(self.counts)
        ]
        far = f"{self.n_far:,} values are more than {FAR} deviations from the mean"
        return "\n".join([*lines, far])

"""What differs between two checkpoints: the result of `compare`, largest difference first."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import Any

from llamaconv.report.errors import Problem, printable
from llamaconv.report.tables import Table


@dataclass(frozen=True)
class Pair:
    """One tensor of both checkpoints.

    Attributes:
        role: Its role in a Llama; empty for tensors that a Llama does not have.
        layer: Its layer; None outside the layers.
        names: Its name in each checkpoint.
        dtypes: Its dtype in each.
        shapes: Its shape in each.
        n_different: Number of elements that differ.
        largest: The largest absolute difference of two elements.
        relative: Norm of the difference, divided by the norm of the first checkpoint's tensor.
        reason: Why values were not compared; empty if they were.
    """

    role: str
    layer: int | None
    names: tuple[str, str]
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    n_different: int = 0
    largest: float = 0.0
    relative: float = 0.0
    reason: str = ""

    @property
    def differs(self) -> bool:
        """Whether a value or the shape differs, or values could not be compared."""
        return bool(self.n_different or self.reason)

    @property
    def n_elements(self) -> int:
        """Number of elements in the first checkpoint."""
        return prod(self.shapes[0])

    def to_json(self) -> dict[str, Any]:
        """Return the attributes; ``relative`` and ``largest`` are null if they are not finite."""
        figures = {"largest": self.largest, "relative": self.relative}
        return {
            "role": self.role or None,
            "layer": self.layer,
            "names": list(self.names),
            "dtypes": list(self.dtypes),
            "shapes": [list(shape) for shape in self.shapes],
            "elements": self.n_elements,
            "different": None if self.reason else self.n_different,
            **{
                key: value if isfinite(value) and not self.reason else None
                for key, value in figures.items()
            },
            "reason": self.reason or None,
        }


@dataclass(frozen=True, repr=False)
class Compared:
    """The result of comparing two checkpoints.

    Attributes:
        paths: The two checkpoints.
        pairs: Every tensor that both have, in the order of the roles.
        only: Names of the tensors that only the first has, and of those that only the second has.
        description: Parameters that differ, with both values, by the names of config.json.
        notes: How the sides were brought together.
        errors: What is wrong with either checkpoint by itself.
    """

    paths: tuple[str, str]
    pairs: tuple[Pair, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    description: Mapping[str, tuple[object, object]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    errors: tuple[Problem, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether both are the same model: all values, shapes and parameters."""
        return not (self.different or any(self.only) or self.description)

    @property
    def different(self) -> list[Pair]:
        """The tensors that differ, the largest relative difference first."""
        found = [pair for pair in self.pairs if pair.differs]
        return sorted(found, key=lambda pair: (not pair.reason, -pair.relative, -pair.n_different))

    def to_json(self) -> dict[str, Any]:
        """Return what ``compare --json`` prints.

        Returns:
            ``equal``, ``paths``, ``tensors`` (those that differ first, see `Pair.to_json`),
            ``only`` (two lists of names), ``description`` (both values of each parameter that
            differs), ``notes`` and ``problems``.
        """
        different = self.different
        rest = [pair for pair in self.pairs if not pair.differs]
        return {
            "equal": self.equal,
            "paths": list(self.paths),
            "tensors": [pair.to_json() for pair in (*different, *rest)],
            "only": [list(names) for names in self.only],
            "description": {
                name: [_plain(value) for value in both] for name, both in self.description.items()
            },
            "notes": list(self.notes),
            "problems": [problem.message for problem in self.errors],
        }

    def summary(self) -> str:
        """Return the result in one line."""
        different, n_values = len(self.different), sum(pair.n_elements for pair in self.pairs)
        if self.equal:
            return f"equal: all {n_values:,} values of {len(self.pairs)} tensors"
        parts = [f"{different} of {len(self.pairs)} tensors differ"]
        for side, names in zip(("first", "second"), self.only, strict=True):
            parts += [f"{len(names)} only in the {side}"] if names else []
        if self.description:
            parts.append(f"{len(self.description)} parameters differ")
        casts = sum(pair.dtypes[0] != pair.dtypes[1] for pair in self.pairs)
        parts += [f"{casts} have another dtype"] if casts else []
        return "; ".join(parts)

    def table(self, most: int = 20) -> Table:
        """Return the tensors that differ, the largest relative difference first."""
        rows = []
        for pair in self.different:
            figures = (
                (f"{pair.n_different:,}", _short(pair.largest), _short(pair.relative))
                if not pair.reason
                else (pair.reason, "—", "—")
            )
            rows.append(
                (
                    pair.names[0],
                    " × ".join(map(str, pair.shapes[0])),
                    " → ".join(dict.fromkeys(pair.dtypes)),
                    *figures,
                )
            )
        columns = ("tensor", "shape", "dtype", "different", "largest", "relative")
        right = ("shape", "different", "largest", "relative")
        return Table(columns, rows, caption=self.summary(), right=right, most=most)

    def lines(self, most: int = 20) -> list[str]:
        """Return everything besides the table: parameters, tensors of one side, notes."""
        lines = [
            f"{name}: {_plain(one)} → {_plain(other)}"
            for name, (one, other) in self.description.items()
        ]
        for side, names in zip(("first", "second"), self.only, strict=True):
            lines += [f"only in the {side}: {name}" for name in names[:most]]
            lines += [f"only in the {side}: {len(names) - most} more"] if len(names) > most else []
        return [printable(line) for line in (*lines, *(f"note: {note}" for note in self.notes))]

    def __str__(self) -> str:
        shown = [str(self.table())] if self.different else [self.summary()]
        return "\n".join([*shown, *self.lines()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in self.lines())
        shown = self.table()._repr_html_() if self.different else f"<p>{self.summary()}</p>"
        return shown + (f"<ul>{lines}</ul>" if lines else "")


def _short(value: float) -> str:
    return f"{value:.2g}" if isfinite(value) else "not finite"


def _plain(value: object) -> object:
    """Return a parameter as JSON can hold it."""
    return value if isinstance(value, (int, float, str, type(None))) else str(value)

"""What verification finds, as values: a check is one figure beside its yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

from llamaconv.problems import FailedError, Problem
from llamaconv.tables import Table

# Scores of the two layouts differ only by the rounding of float32 sums.
SCORE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Check:
    """One figure. ``value`` is at most ``tolerance`` when all is right; ``yardstick`` is the same
    figure for the conversion done wrong on purpose, None where there is none to compare with."""

    name: str
    ok: bool
    value: float
    yardstick: float | None
    detail: str
    tolerance: float = 0.0

    def shown_value(self) -> str:
        """The figure for people: rounding noise, none at all included, is below the tolerance."""
        if self.tolerance and self.value <= self.tolerance:
            return f"< {self.tolerance:g}"
        return f"{self.value:.3g}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ok": self.ok,
            # JSON has neither of inf and nan.
            "value": self.value if isfinite(self.value) else None,
            "yardstick": self.yardstick,
            "detail": self.detail,
        }


@dataclass(frozen=True)
class TensorResult:
    """Elements of one target tensor, how many differ from the source's, and how many would if
    rows were left in (or brought into) the other layout."""

    name: str
    n_elements: int
    n_different: int
    n_if_wrong: int


@dataclass(frozen=True, repr=False)
class Verification:
    """All checks of one target; ``ok`` only if each is.

    ``layers`` holds each layer's rotated-score error and its yardstick, ``tensors`` the bits
    of each tensor; neither is in the receipt, which stays short.
    """

    checks: tuple[Check, ...]
    layers: tuple[tuple[float, float], ...] = ()
    tensors: tuple[TensorResult, ...] = ()

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "checks": [check.to_json() for check in self.checks]}

    def problems(self) -> list[Problem]:
        return [
            Problem(f"check {check.name} failed: {check.detail}")
            for check in self.checks
            if not check.ok
        ]

    def check(self) -> None:
        """Raises `FailedError` with every check that failed, where one did."""
        if not self.ok:
            raise FailedError(self.problems() or "nothing was checked")

    def tensor_table(self, text: str = "", only_different: bool = False, most: int = 20) -> Table:
        """A row a tensor whose name contains ``text``."""
        found = [
            one
            for one in self.tensors
            if text.lower() in one.name.lower() and (one.n_different or not only_different)
        ]
        rows = [
            (
                "✗" if one.n_different else "✓",
                one.name,
                f"{one.n_elements:,}",
                f"{one.n_different:,}",
                f"{one.n_if_wrong:,}",
            )
            for one in found
        ]
        different = sum(one.n_different > 0 for one in self.tensors)
        caption = f"{len(found)} of {len(self.tensors)} tensors, {different} differ"
        columns = ("", "tensor", "elements", "different", "done wrong")
        return Table(columns, rows, caption=caption, right=columns[2:], most=most)

    def table(self) -> Table:
        rows = [
            (
                "✓" if check.ok else "✗",
                check.name,
                check.shown_value(),
                "—" if check.yardstick is None else f"{check.yardstick:.2g}",
                check.detail,
            )
            for check in self.checks
        ]
        columns = ("", "check", "value", "done wrong", "what it says")
        caption = "every check passed" if self.ok else "NOT what the source says"
        return Table(columns, rows, caption=caption, right=("value", "done wrong"))

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

"""Results of verification: each check is one figure next to its control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from math import isfinite
from typing import Any

from llamaconv.report.errors import FailedError, Problem
from llamaconv.report.tables import Table

# Scores of the two layouts differ only by the rounding of float32 sums.
SCORE_TOLERANCE = 1e-4

CONTROL = (
    "value: how far the target is from its source; control: the same figure for a deliberately wrong "
    "conversion"
)
"""The legend of `Verification.table`."""


# What the figure of each check counts or measures; a difference "%" is a share.
_UNITS = {
    "structure": "tensors",
    "bits": "elements",
    "trainer's values": "entries",
    "rotated scores": "% of the largest score",
    "logits": "% of the largest logit",
    "loss": "nats per token",
    "digests": "tensors",
    "receipt": "entries",
    "repository": "files",
    "fetched": "files",
}


@dataclass(frozen=True)
class Check:
    """One figure, and whether it is as it should be.

    Attributes:
        name: structure, bits, trainer's values, rotated scores, logits, loss, digests, receipt,
            repository or fetched.
        ok: Whether it passed.
        value: The figure; at most ``tolerance`` if all is right.
        control: The same figure for a deliberately wrong conversion, None if there is none.
        detail: One line for people.
        tolerance: What rounding may cause.
    """

    name: str
    ok: bool
    value: float
    control: float | None
    detail: str
    tolerance: float = 0.0

    @property
    def unit(self) -> str:
        """The unit in which `shown_value` and `shown_control` give the figures."""
        return _UNITS[self.name]

    def shown_value(self) -> str:
        """Return the figure in its unit, for people; rounding noise is shown as the tolerance."""
        if self.tolerance and self.value <= self.tolerance:
            return f"< {self._in_unit(self.tolerance):g}"
        return self._shown(self.value)

    def shown_control(self) -> str:
        """Return the control in the same unit."""
        return "—" if self.control is None else self._shown(self.control)

    def _in_unit(self, value: float) -> float:
        return 100 * value if self.unit.startswith("%") else value

    def _shown(self, value: float) -> str:
        value = self._in_unit(value)
        # Counts are whole numbers.
        is_count = not self.tolerance and isfinite(value)
        return f"{value:,.0f}" if is_count or 100 <= value < 1e9 else f"{value:.2g}"

    def to_json(self) -> dict[str, Any]:
        """Return ``name``, ``ok``, ``value`` (null for inf and nan), ``yardstick``, ``detail``.

        ``yardstick`` is the control, or null.
        """
        return {
            "name": self.name,
            "ok": self.ok,
            "value": self.value if isfinite(self.value) else None,
            "yardstick": self.control,
            "detail": self.detail,
        }


def checks_to_json(checks: Sequence[Check]) -> list[Any]:
    """Return ``checks`` as a value for `llamaconv.ranks.Ranks.broadcast`, tolerances included."""
    return [astuple(check) for check in checks]


def checks_from_json(values: list[Any]) -> list[Check]:
    """Return the inverse of `checks_to_json`."""
    return [Check(*value) for value in values]


@dataclass(frozen=True)
class TensorResult:
    """The bits of one target tensor.

    Attributes:
        name: Its name in the target.
        n_elements: Number of elements.
        n_different: How many differ from the source's.
        n_if_wrong: How many would differ with rows left in (or brought into) the other layout.
        n_nan: How many of the target's are NaN.
        n_infinite: How many of the target's are infinite.
    """

    name: str
    n_elements: int
    n_different: int
    n_if_wrong: int
    n_nan: int = 0
    n_infinite: int = 0


@dataclass(frozen=True, repr=False)
class Verification:
    """All checks of one target.

    Attributes:
        checks: At least the structure; later checks are left out once a side cannot be read.
        layers: Per layer, the error of the rotated scores and its control. Not in the receipt.
        tensors: The bits of each tensor. Not in the receipt.
    """

    checks: tuple[Check, ...]
    layers: tuple[tuple[float, float], ...] = ()
    tensors: tuple[TensorResult, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check passed, and there is one."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return ``ok``, and ``checks`` as `Check.to_json` describes them."""
        return {"ok": self.ok, "checks": [check.to_json() for check in self.checks]}

    @property
    def problems(self) -> list[Problem]:
        """A problem for each check that failed."""
        return [
            Problem(f"check {check.name} failed: {check.detail}")
            for check in self.checks
            if not check.ok
        ]

    def raise_for_errors(self) -> None:
        """Raise `FailedError` with every check that failed, if any did."""
        if not self.ok:
            raise FailedError(self.problems or "nothing was checked")

    def tensor_table(self, text: str = "", only_different: bool = False, most: int = 20) -> Table:
        """Return the bits, one row per tensor.

        Args:
            text: Only tensors whose name contains this, in any case.
            only_different: Only tensors of which an element differs.
            most: Rows to show.
        """
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
        columns = ("", "tensor", "elements", "different", "control")
        return Table(columns, rows, caption=caption, right=columns[2:], most=most)

    def table(self) -> Table:
        """Return one row per check."""
        rows = [
            (
                "✓" if check.ok else "✗",
                check.name,
                check.shown_value(),
                check.shown_control(),
                check.unit,
                check.detail,
            )
            for check in self.checks
        ]
        columns = ("", "check", "value", "control", "unit", "detail")
        caption = "every check passed" if self.ok else "NOT as expected: a check failed"
        return Table(columns, rows, caption=caption, right=("value", "control"))

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

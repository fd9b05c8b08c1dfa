"""Checks for what the reader writes in notebook 3: a reordering of rows, and a rotation.

The checks compare scores, as every conversion does. If a score is wrong, they name the mistake from
the order of the rows.

Shapes: R rows of a weight (H·D or G·D), C its columns, P positions, H heads of q, G heads of k, D
rows of a head, F pairs of a head.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llamaconv.model import rope
from llamaconv.notebook.lesson.rotation import inverse_frequencies, projected
from llamaconv.notebook.lesson.scores import ROUNDING
from llamaconv.notebook.lesson.specimen import Specimen
from llamaconv.notebook.lesson.variants import variants
from llamaconv.report.tables import Table

Reorder = Callable[[Tensor, int], Tensor]
"""Takes the half_split rows of a weight (R, C) and its number of heads; returns the new rows."""

Rotation = Callable[[Tensor, Tensor], Tensor]
"""Takes numbers (P, H, D) and angles (P, F); returns the rotated numbers (P, H, D)."""


@dataclass(frozen=True, repr=False)
class ReorderCheck:
    """What is right or wrong about a reordering.

    Attributes:
        mistake: The name of the mistake, "" if there is none.
        detail: What the function did, and what to try next.
    """

    mistake: str
    detail: str

    @property
    def is_right(self) -> bool:
        """Whether the reordering is that of a conversion to interleaved rows."""
        return not self.mistake

    def __repr__(self) -> str:
        return f"{'✓ right' if self.is_right else f'✗ {self.mistake}'}: {self.detail}"

    def _repr_html_(self) -> str:
        return f"<p><b>{html.escape(repr(self))}</b></p>"


def check_reorder(reorder: Reorder, specimen: Specimen) -> ReorderCheck:
    """Run the reader's ``reorder`` on q and k, and compare the scores of the interleaved rotation.

    Args:
        reorder: ``reorder(w, n_heads)``, for half_split rows ``w`` of ``n_heads`` heads.
        specimen: The model.

    Returns:
        Whether the scores are right, or the name of the mistake. Errors of ``reorder`` are part of
        the result, so that the notebook runs on.
    """
    params = specimen.params
    orders = {}
    for role, n_heads in (("q", params.n_heads), ("k", params.n_kv_heads)):
        found = _order(reorder, n_heads, params.head_dim)
        if isinstance(found, ReorderCheck):
            return ReorderCheck(found.mistake, f"with the rows of {role}, {found.detail}")
        orders[role] = found
    error = _score_error(specimen, orders["q"], orders["k"])
    shown = f"the scores differ from the right ones by {error:.0%} of the largest"
    if error < ROUNDING:
        return ReorderCheck("", "the scores are those of the original model, at every distance")
    q_rows, k_rows = (torch.arange(len(orders[role]), dtype=torch.float64) for role in "qk")
    for variant in variants(params):
        q_wanted = variant.apply("wq", q_rows, params)
        k_wanted = variant.apply("wk", k_rows, params)
        if torch.equal(orders["q"], q_wanted) and torch.equal(orders["k"], k_wanted):
            return ReorderCheck(variant.name, f"{_HINTS[variant.name]}; {shown}")
    return ReorderCheck(*_another_order(orders, params.n_heads, params.n_kv_heads, shown))


_HINTS = {
    "not reordered": "the rows are where they were",
    "only q": "k's rows are where they were",
    "wrong kv heads": "q is right, but k was cut into a wrong number of heads. Use n_heads",
    "wrong direction": "this is the reordering from interleaved to half_split. Row 1 goes to 2, "
    "not to D/2",
    "twice": "every row was moved a second time",
}


def _order(reorder: Reorder, n_heads: int, head_dim: int) -> Tensor | ReorderCheck:
    """Return which row is at each place after ``reorder`` (R,), or why it is no order of rows."""
    # Every number names its row and its column; a vector would hide a function that moves columns.
    rows_RC = torch.arange(n_heads * head_dim, dtype=torch.float64)[:, None] * 4 + torch.arange(4.0)
    given = rows_RC.clone()
    try:
        found = reorder(given, n_heads)
    except Exception as error:
        return ReorderCheck("an error", f"your function raised {type(error).__name__}: {error}")
    if not isinstance(found, Tensor):
        kind = type(found).__name__
        return ReorderCheck("no tensor", f"your function returned {kind}. Does it end in return?")
    if found.shape != rows_RC.shape:
        shapes = f"{tuple(rows_RC.shape)} became {tuple(found.shape)}"
        return ReorderCheck("wrong shape", f"{shapes}. End with .reshape(w.shape)")
    order_R = (found.double()[:, 0] / 4).round()
    if not torch.equal(found.double(), order_R[:, None] * 4 + torch.arange(4.0)):
        return ReorderCheck("changed rows", "numbers changed within a row. Move whole rows only")
    if not torch.equal(order_R.sort().values, rows_RC[:, 0] / 4):
        return ReorderCheck("lost rows", "some rows are missing and others appear twice")
    return order_R


def _score_error(specimen: Specimen, q_order: Tensor, k_order: Tensor) -> float:
    """Return the largest error of a score, relative to the largest score."""
    tokens_P = specimen.excerpt
    angles_PF = rope.angles(torch.arange(len(tokens_P)), inverse_frequencies(specimen))
    q_PHD, k_PGD = projected(specimen, "half_split", tokens_P)
    right = rope.scores(q_PHD, k_PGD, angles_PF, "half_split")
    # Reordering the numbers of x·wq is reordering the rows of wq.
    q_PHD, k_PGD = (
        x.flatten(1)[:, order.long()].view_as(x)
        for x, order in ((q_PHD, q_order), (k_PGD, k_order))
    )
    found = rope.scores(q_PHD, k_PGD, angles_PF, "interleaved")
    return ((found - right).abs().max() / right.abs().max()).item()


def _another_order(
    orders: dict[str, Tensor], n_heads: int, n_kv_heads: int, shown: str
) -> tuple[str, str]:
    """Return the mistake and its detail for an order that is none of the known variants."""
    for role, heads in (("q", n_heads), ("k", n_kv_heads)):
        rows_R = torch.arange(len(orders[role]), dtype=torch.float64)
        if heads > 1 and torch.equal(orders[role], rope.half_split_to_interleaved(rows_R, 1)):
            detail = f"{role} was reordered as one head of {len(rows_R)} rows. Use n_heads; {shown}"
            return "heads ignored", detail
        right_R = rope.half_split_to_interleaved(rows_R, heads)
        if wrong := (orders[role] != right_R).nonzero().flatten().tolist():
            place = wrong[0]
            detail = (
                f"in {role}, place {place} has row {orders[role][place]:.0f}; row "
                f"{right_R[place]:.0f} belongs there. {shown.capitalize()}"
            )
            return "another order", detail
    raise AssertionError("the scores differ, so some row is at a wrong place")


def compare_programs(specimen: Specimen, **programs: tuple[Reorder | None, Rotation]) -> Table:
    """Run attention scores by the code of the notebook, and compare them with the package's.

    Args:
        specimen: The model, as half_split rows.
        programs: By name, a reordering of the rows of q and k (None leaves them), and a rotation.

    Returns:
        One row per program: the largest error at distance 0, and at all distances, relative to the
        largest score.
    """
    params = specimen.params
    tokens_P = specimen.excerpt
    angles_PF = rope.angles(torch.arange(len(tokens_P)), inverse_frequencies(specimen))
    split = projected(specimen, "half_split", tokens_P)
    right = rope.scores(*split, angles_PF, "half_split")
    rows = []
    for name, (reorder, rotate) in programs.items():
        q_PHD, k_PGD = (
            x if reorder is None else reorder(x.flatten(1).T, heads).T.reshape(x.shape)
            for x, heads in zip(split, (params.n_heads, params.n_kv_heads), strict=True)
        )
        found = rope.scores(rotate(q_PHD, angles_PF), rotate(k_PGD, angles_PF), None, "half_split")
        error = (found - right).abs() / right.abs().max()
        at_0 = error.diagonal(dim1=1, dim2=2).max().item()
        rows.append((name.replace("_", " "), _shown(at_0), _shown(error.max().item())))
    columns = ("program", "error at distance 0", "largest error")
    return Table(columns, rows, right=columns[1:], caption="relative to the largest score")


def _shown(error: float) -> str:
    return f"< {ROUNDING:g}" if error < ROUNDING else f"{error:.2f}"

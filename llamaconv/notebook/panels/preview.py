"""The panels of notebook 2: views of the plan with their controls.

A control that changes the target makes a real plan, which a conversion would execute. Only the
panels of one tensor read weights, and only they import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llamaconv.model.names import ROLES, Layout
from llamaconv.notebook import figures, preview
from llamaconv.notebook.panels.panel import Choice, HasHtml, Offer, Panel, Slider, Text
from llamaconv.notebook.panels.target_offers import target_offers
from llamaconv.plan.plan import Move, Plan
from llamaconv.plan.planner import make_plan
from llamaconv.plan.target import CHOICES
from llamaconv.report.errors import LlamaconvError

if TYPE_CHECKING:
    from llamaconv.notebook.sample_rows import SampleRows


@dataclass(frozen=True, repr=False)
class StackedViews:
    """Several views, one below the other."""

    parts: Sequence[HasHtml]

    def __repr__(self) -> str:
        return "\n\n".join(map(str, self.parts))

    def _repr_html_(self) -> str:
        return "\n".join(part._repr_html_() for part in self.parts)


def moves(plan: Plan, most: int = 12) -> Panel:
    """Return the plan's moves; choose operation and layer, or search the names.

    Reordered rows are shown first, if there are any.

    Args:
        plan: The plan.
        most: The largest number of rows shown.
    """
    found = {preview.layer_of(move) for move in plan.moves} - {preview.NO_LAYER}
    operations = (preview.ALL, *preview.operations(plan))
    return Panel(
        lambda operation, layer, text: preview.moves(plan, operation, layer, text, most),
        operation=Choice(
            "operation", operations, "reorder" if "reorder" in operations else preview.ALL
        ),
        layer=Choice(
            "layer", (preview.ALL, preview.NO_LAYER, *sorted(found, key=int)), preview.ALL
        ),
        text=Text("name or reason contains", placeholder="wk, down_proj, heads"),
    )


def other_target(
    plan: Plan,
    *,
    to: str | None = None,
    generation: str | None = None,
    rope: Layout | None = None,
    dtype: str | None = None,
) -> Panel:
    """Return what another target for the same source would change, its problems, and its cost.

    Args:
        plan: The plan to compare with.
        to: The first choice of ``to``; without it, the plan's own. So for the others.
        generation: The first choice of ``generation``.
        rope: The first choice of ``rope``.
        dtype: The first choice of ``dtype``.
    """
    given = {"to": to, "generation": generation, "rope": rope, "dtype": dtype}
    chosen = {name: value or getattr(plan.target, name) for name, value in given.items()}

    def view(**options: str) -> HasHtml:
        # What the format decides is not a choice; the rest of the plan's options stays.
        for name in target_offers(plan.source, options["to"]).keys() & options.keys():
            options[name] = getattr(plan.target, name)
        other = make_plan(plan.source, replace(plan.target, **options))  # type: ignore[arg-type]
        return StackedViews(
            (preview.changes(plan, other), preview.problem_table(other, given), other.cost())
        )

    def offers(to: str) -> dict[str, Offer]:
        return {n: one for n, one in target_offers(plan.source, to).items() if n in given}

    options = {"to": CHOICES["to"][1:]} | {name: CHOICES[name] for name in given if name != "to"}
    return Panel(
        view,
        lambda to, **_others: offers(to),
        **{name: Choice(name, options[name], chosen[name]) for name in given},
    )


def glossary(plan: Plan, role: str = "wk") -> Panel:
    """Return the names of one kind of tensor in every naming; choose the kind, biases included."""
    return Panel(
        lambda role: preview.names(role, plan.params),
        role=Choice("tensor", tuple(ROLES), role),
    )


def flavours(plan: Plan, flavour: str = "") -> Panel:
    """Return the differences from a stock TorchTitan flavour; choose it, at first the nearest."""
    names = preview.flavour_names(plan)
    return Panel(
        lambda flavour: preview.against_flavour(plan, flavour),
        flavour=Choice("flavour", names, flavour or preview.nearest_flavour(plan)),
    )


def one_tensor(plan: Plan, key: str = "") -> Panel:
    """Return rows of one tensor in source and target; choose key, head and the row to follow.

    Reads only the rows that it shows. At first it shows the first k, which has fewer heads than q.
    """
    found = {move.target_name: move for move in plan.written}
    first = key or _first_key(plan)

    def offers(key: str, **_others: int) -> dict[str, Offer]:
        move = found.get(key)
        if move is None:
            return {}
        if not move.heads:
            reason = "the rows of this tensor keep their places, whatever the head"
            return {"head": Offer(off=reason, instead="—"), "row": Offer(off=reason)}
        n_rows = move.shape[0] if move.shape else 1
        last = max(1, n_rows // move.heads) - 1
        return {"head": Offer(tuple(range(move.heads))), "row": Offer(highest=last)}

    highest = offers(first or "").get("row", Offer()).highest or 0
    return Panel(
        lambda key, head, row: _sampled(
            plan, key, head, lambda sample: figures.sample_rows(sample, row)
        ),
        offers,
        key=Choice("target key", tuple(found), first),
        head=Choice("head", tuple(range(_heads(found.get(first or "")))), 0),
        row=Slider("row of the head to follow", 0, highest, min(1, highest)),
    )


def _heads(move: Move | None) -> int:
    return (move.heads if move else None) or 1


def _first_key(plan: Plan) -> str | None:
    first_k = (move.target_name for move in plan.written if move.place[0] == "wk")
    return next(first_k, plan.written[0].target_name if plan.written else None)


def one_tensor_table(plan: Plan, key: str = "", head: int = 0) -> HasHtml:
    """Return the rows of `one_tensor` as numbers, the first four of each row."""
    return _sampled(plan, key or _first_key(plan), head, lambda sample: sample.table())


def _sampled(
    plan: Plan, key: str | None, head: int, show: Callable[[SampleRows], HasHtml]
) -> HasHtml:
    """Return what ``show`` makes of the rows, or the problem, since any plan can be viewed."""
    if key is None:
        return preview.problem_table(plan)
    from llamaconv.notebook.sample_rows import sample_rows

    try:
        return show(sample_rows(plan, key, head))
    except LlamaconvError as error:
        return error

"""The panels of notebook 2: each a view of the plan and what one chooses in it.

What changes the target makes a real plan, the one that a conversion would execute. Only the
panel of one tensor reads weights, and only it waits for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llamaconv import figures, keys, preview, titan
from llamaconv.panels.panel import Choice, Panel, Shown, Slider, Text
from llamaconv.plan import CHOICES, Plan
from llamaconv.planner import make_plan
from llamaconv.problems import LlamaconvError

if TYPE_CHECKING:
    from llamaconv.sample_rows import SampleRows


@dataclass(frozen=True, repr=False)
class Stack:
    """Several views, one under the other."""

    parts: Sequence[Shown]

    def __repr__(self) -> str:
        return "\n\n".join(map(str, self.parts))

    def _repr_html_(self) -> str:
        return "\n".join(part._repr_html_() for part in self.parts)


def moves(plan: Plan, most: int = 12) -> Panel:
    """The plan's moves; choose operation and layer, or search the names."""
    found = {preview.layer_of(plan, move) for move in plan.moves} - {preview.NO_LAYER}
    layers = (preview.ALL, preview.NO_LAYER, *sorted(found, key=int))
    return Panel(
        lambda operation, layer, text: preview.moves(plan, operation, layer, text, most),
        operation=Choice(
            "operation", (preview.ALL, *preview.operations(plan)), _first_operation(plan)
        ),
        layer=Choice("layer", layers, preview.ALL),
        text=Text("name or reason has", placeholder="wk, down_proj, heads"),
    )


def _first_operation(plan: Plan) -> str:
    """What is worth a look first: re-ordered rows where there are any."""
    return "reorder" if "reorder" in preview.operations(plan) else preview.ALL


def other_target(
    plan: Plan,
    *,
    to: str | None = None,
    generation: str | None = None,
    rope: keys.Layout | None = None,
    dtype: str | None = None,
) -> Panel:
    """Another target for the same source: what would change, its problems, and its cost.

    The options given are chosen first; those left out are the plan's own.
    """
    given = {"to": to, "generation": generation, "rope": rope, "dtype": dtype}
    chosen = {name: value or getattr(plan.target, name) for name, value in given.items()}

    def view(to: str, generation: str, rope: keys.Layout, dtype: str) -> Shown:
        target = replace(plan.target, to=to, generation=generation, rope=rope, dtype=dtype)
        other = make_plan(plan.source, target)
        return Stack((preview.changes(plan, other), preview.problems(other), other.cost()))

    options = {"to": CHOICES["to"][1:]} | {name: CHOICES[name] for name in given if name != "to"}
    return Panel(view, **{name: Choice(name, options[name], chosen[name]) for name in given})


def glossary(plan: Plan, role: str = "wk") -> Panel:
    """One tensor's names in every naming; choose the tensor, biases included."""
    return Panel(
        lambda role: preview.names(role, plan.params),
        role=Choice("tensor", tuple(keys.ROLES), role),
    )


def flavours(plan: Plan, flavour: str = "") -> Panel:
    """What a stock TorchTitan flavour has otherwise; choose the flavour, at first the nearest."""
    return Panel(
        lambda flavour: preview.against_flavour(plan, flavour),
        flavour=Choice(
            "flavour",
            tuple(one.name for one in titan.FLAVOURS),
            flavour or preview.nearest_flavour(plan),
        ),
    )


def one_tensor(plan: Plan, key: str = "") -> Panel:
    """Rows of one tensor in source and target; choose the key, the head, and the row to follow.

    Reads the rows that it shows. At first the first k, whose heads are fewer than q's.
    """
    found = tuple(move.writes for move in plan.written)
    heads = max((move.heads or 1 for move in plan.written), default=1)
    last = max((move.shape[0] // move.heads for move in plan.written if move.heads), default=1) - 1
    return Panel(
        lambda key, head, row: _sampled(
            plan, key, head, lambda sample: figures.sample_rows(sample, row)
        ),
        key=Choice("target key", found, key or _first_key(plan)),
        head=Choice("head", tuple(range(heads)), 0),
        row=Slider("row of the head to follow", 0, last, min(1, last)),
    )


def _first_key(plan: Plan) -> str | None:
    first_k = (move.writes for move in plan.written if move.place[0] == "wk")
    return next(first_k, plan.written[0].writes if plan.written else None)


def one_tensor_table(plan: Plan, key: str = "", head: int = 0) -> Shown:
    """The numbers of `one_tensor`, the first four of each row."""
    return _sampled(plan, key or _first_key(plan), head, lambda sample: sample.table())


def _sampled(plan: Plan, key: str | None, head: int, show: Callable[[SampleRows], Shown]) -> Shown:
    """What ``show`` makes of the rows, or the problem in its place: such a plan is looked at, too."""
    if key is None:
        return preview.problems(plan)
    from llamaconv.sample_rows import sample_rows

    try:
        return show(sample_rows(plan, key, head))
    except LlamaconvError as error:
        return error

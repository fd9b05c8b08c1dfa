"""The plan as tables: its moves, its problems, and what another target would change.

Everything comes from plans that `make_plan` made and from the tables of `model.names` and
`torchtitan.releases`; no weight is read. Limit: tables fold layers together if they agree, so one
row may count many tensors. The plan itself lists each.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, replace
from math import log, prod
from pathlib import Path

from llamaconv.model.names import ROLES, every_role
from llamaconv.model.params import LlamaParams
from llamaconv.notebook import browse
from llamaconv.notebook.words import Words
from llamaconv.plan.plan import Move, Plan
from llamaconv.plan.target import Target
from llamaconv.report.errors import RefusedError
from llamaconv.report.tables import FoldedTable, Table, size
from llamaconv.torchtitan import releases

ALL, NO_LAYER = browse.ALL, browse.NO_LAYER


def moves(
    plan: Plan, operation: str = ALL, layer: int | str = ALL, text: str = "", most: int = 60
) -> FoldedTable:
    """Return one row per move that passes every filter, by layers.

    Args:
        plan: The plan.
        operation: An operation, or `ALL`.
        layer: A number, `NO_LAYER` or `ALL`.
        text: Part of either name or of the reason, upper or lower case.
        most: Up to so many rows nothing is folded.
    """
    found = [
        move
        for move in plan.moves
        if operation in (ALL, move.operation)
        and layer in (ALL, layer_of(move))
        and text.strip().lower() in f"{move.source} {move.target or ''} {move.reason}".lower()
    ]
    shown = replace(plan, moves=tuple(found)).table(most)
    return replace(shown, caption=f"{len(found)} of {len(plan.moves)} moves; {plan.summary()}")


def layer_of(move: Move) -> int | str:
    """Return the number of the move's layer, or `NO_LAYER`."""
    return NO_LAYER if move.layer is None else move.layer


def operations(plan: Plan) -> list[str]:
    """Return the operations that occur in the plan, in its order."""
    return list(dict.fromkeys(move.operation for move in plan.moves))


def problem_table(plan: Plan, controls: Collection[str] = ()) -> Table:
    """Return the problems of the plan, errors first. A plan with errors writes nothing.

    Args:
        plan: The plan.
        controls: Options that the panel around the table has; others are the notebook's parameters.
    """
    found = sorted(plan.problems, key=lambda problem: problem.level != "error")
    here, elsewhere = Words(controls, controls=True), Words(vars(Target()), controls=False)
    rows: list[tuple[str, str]] = [
        (problem.level, elsewhere.text(here.text(problem.message))) for problem in found
    ]
    levels = Counter(problem.level for problem in found)
    caption = ", ".join(f"{n} {level}{'s' * (n > 1)}" for level, n in levels.items())
    return Table(
        ("level", "problem and remedy"),
        rows or [("none", "no problems: this plan can be executed")],
        caption=caption + ("; nothing would be written" if plan.errors else ""),
    )


def changes(before: Plan, after: Plan) -> Table:
    """Compare two plans for the same source: one row per change, and per kind of tensor.

    Compares target keys, operations and dtypes. The column ``tensors`` counts those that differ;
    the last row has the bytes to write.
    """
    old, new = _by_role(before), _by_role(after)
    every = list(dict.fromkeys(role for role, _ in [*old, *new]))
    roles: dict[tuple[str, str, str], list[str]] = {}
    for key in dict.fromkeys([*old, *new]):
        was, now = _written(before, old.get(key)), _written(after, new.get(key))
        for what in was:
            if was[what] != now[what]:
                roles.setdefault((what, was[what], now[what]), []).append(key[0])
    rows: list[tuple[object, ...]] = [
        (what, _folded(found, every), was, now, len(found))
        for (what, was, now), found in roles.items()
    ]
    rows.sort(key=lambda row: ("target key", "operation", "dtype").index(str(row[0])))
    written = (size(before.bytes_to_write), size(after.bytes_to_write))
    rows.append(("bytes to write", "all", *written, len(after.written)))
    columns = ("what", "of", "before", "after", "tensors")
    return Table(columns, rows, caption=_options(before, after), right=("tensors",))


def _written(plan: Plan, move: Move | None) -> dict[str, str]:
    """Return what two plans may do differently; the key has N for the layer."""
    if move is None:
        return dict.fromkeys(("target key", "operation", "dtype"), "not written")
    key = ROLES[move.place[0]].names[plan.target.naming] or "—"
    return {"target key": key, "operation": move.operation, "dtype": move.dtype}


def _folded(found: list[str], every: list[str]) -> str:
    """List each role of ``found`` once, or if shorter, the roles of ``every`` that it lacks."""
    roles = list(dict.fromkeys(found))
    rest = [role for role in every if role not in roles]
    if len(rest) >= len(roles):
        return ", ".join(roles)
    return f"all but {', '.join(rest)}" if rest else "all"


def _options(before: Plan, after: Plan) -> str:
    old, new = asdict(before.target), asdict(after.target)
    pairs = [f"{name} {old[name]} → {new[name]}" for name in old if old[name] != new[name]]
    return ", ".join(pairs) or "the same options, so the same plan"


def _by_role(plan: Plan) -> dict[tuple[str, int | None], Move]:
    """Return the moves that write, by role and layer."""
    return {move.place: move for move in plan.written}


_NAMINGS = {
    "huggingface": "Hugging Face",
    "meta": "Meta",
    "titan-0.2": "TorchTitan 0.2",
    "titan-0.3": "TorchTitan 0.3",
    "titan-main": "TorchTitan main (unreleased)",
}
_PRODUCTS = {"q_rows": "n_heads × head_dim", "kv_rows": "n_kv_heads × head_dim"}


def names(role: str, params: LlamaParams | None = None) -> Table:
    """Return the names of one kind of tensor in every naming, and its shape as a formula.

    Args:
        role: A key of `model.names.ROLES`.
        params: A model whose shape is added.
    """
    found = ROLES[role]
    rows = [
        (title, found.names[naming] or "has no such tensor") for naming, title in _NAMINGS.items()
    ]
    rows.append(("shape", " × ".join(found.axes)))
    rows += [(axis, _PRODUCTS[axis]) for axis in found.axes if axis in _PRODUCTS]
    if params:
        rows.append(("shape in this model", _shape(found.shape(params))))
    reordered = f"reordered within each of {found.heads} heads" if found.heads else "unchanged"
    rows.append(("rows between RoPE layouts", reordered))
    return Table(("naming", f"name of {role}"), rows)


def _shape(lengths: tuple[int, ...]) -> str:
    return " × ".join(map(str, lengths))


def flavour_params(flavour: releases.Flavour) -> LlamaParams:
    """Return a stock flavour's parameters, with the scaling of the newest release."""
    scaling = releases.RELEASES[0].scaling.get(flavour.module)
    return replace(flavour.params, rope_scaling=scaling)


def nearest_flavour(plan: Plan) -> str:
    """Return the stock flavour that fits, or else the one closest in number of elements."""
    params = plan.params
    if params is None:
        return "8B"
    if fitting := releases.flavour_of_shapes(params, plan.biases):
        return fitting.name
    own = log(_elements(params))
    return min(
        releases.flavours_of(params), key=lambda one: abs(log(_elements(flavour_params(one))) - own)
    ).name


def _flavours(plan: Plan) -> tuple[releases.Flavour, ...]:
    return releases.flavours_of(plan.params) if plan.params else releases.FLAVOURS


def flavour_names(plan: Plan) -> tuple[str, ...]:
    """Return the stock flavours of the model that computes what the plan's family does."""
    return tuple(dict.fromkeys(one.name for one in _flavours(plan)))


def _elements(params: LlamaParams) -> int:
    """Return the number of elements, without counting layer by layer."""
    total = 0
    for role, _ in every_role(replace(params, n_layers=1)):
        total += prod(role.shape(params)) * (params.n_layers if role.per_layer else 1)
    return max(1, total)


def against_flavour(plan: Plan, flavour: str) -> Table:
    """Compare the plan's tensors with a stock TorchTitan flavour: presence, shape and dtype.

    The flavour's shapes come from formulas; no model is built. Names are those of the plan's
    generation.

    Args:
        plan: The plan.
        flavour: The name of one of `flavour_names`.

    Returns:
        One row per difference, and one per differing parameter that is in no tensor.

    Raises:
        RefusedError: There is no such flavour.
    """
    found = {one.name: one for one in _flavours(plan)}
    if flavour not in found:
        raise RefusedError(f"flavour must be one of {', '.join(found)}; got {flavour!r}")
    stock = flavour_params(found[flavour])
    mine = _by_role(plan)
    theirs = {(role.name, layer): role.shape(stock) for role, layer in every_role(stock)}
    rows: Counter[tuple[str, str, str, str]] = Counter()
    for key in dict.fromkeys([*theirs, *mine]):
        role, move, shape = ROLES[key[0]], mine.get(key), theirs.get(key)
        name = role.names[plan.target.generation] or role.names["huggingface"] or role.name
        own = _shape(move.shape) if move else "missing"
        other = _shape(shape) if shape else "missing"
        if own != other:
            rows["shape" if move and shape else "presence", name, own, other] += 1
    shown: list[tuple[object, ...]] = [(*row, count) for row, count in rows.items()]
    # TorchTitan builds its model in float32 by default; loading copies into that.
    for dtype, count in Counter(move.dtype for move in mine.values()).items():
        if dtype != "float32":
            shown.append(("dtype", "all of this dtype", dtype, "float32", count))
    shown += [("in no tensor", *row, 0) for row in _unstored(plan.params, stock)]
    caption = (
        f"{sum(rows.values())} tensors differ from TorchTitan's {flavour} in shape or presence"
    )
    columns = ("what", "name", "this plan", flavour, "tensors")
    return Table(columns, shown, caption=caption, right=("tensors",))


def _unstored(params: LlamaParams | None, stock: LlamaParams) -> list[tuple[str, str, str]]:
    """Return the differing parameters that no weight carries: name, this model's, the flavour's."""
    if params is None:
        return []
    pairs = [
        ("RoPE base", f"{params.rope_theta:g}", f"{stock.rope_theta:g}"),
        ("RoPE scaling", _scaling(params), _scaling(stock)),
        ("eps of the norms", f"{params.norm_eps:g}", f"{stock.norm_eps:g}"),
    ]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _scaling(params: LlamaParams) -> str:
    return f"factor {params.rope_scaling.factor:g}" if params.rope_scaling else "none"


def disk(plan: Plan, folder: str | Path) -> Table:
    """Return the bytes that the target needs, and those that are free where ``folder`` would be."""
    path = Path(folder).absolute()
    existing = next(one for one in (path, *path.parents) if one.is_dir())
    free = shutil.disk_usage(existing).free
    enough = free > plan.bytes_to_write
    rows = [
        ("needed", size(plan.bytes_to_write)),
        ("free", size(free)),
        ("enough", "yes" if enough else "no: choose another disk, or free some space"),
    ]
    return Table(("disk", ""), rows, right=("",))

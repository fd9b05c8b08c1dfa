"""The plan looked at from all sides, as tables: its moves, its problems, what another would change.

Everything is read off plans that `make_plan` made, and off the tables of `keys` and `titan`;
nothing is planned a second time and no weight is read. Limit: a view folds the layers together
where they agree, so a row may stand for many tensors; the plan itself has each.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import asdict, replace
from math import log
from pathlib import Path

from llamaconv import browse, keys, titan
from llamaconv.params import LlamaParams
from llamaconv.plan import Move, Plan
from llamaconv.problems import RefusedError
from llamaconv.tables import Table, size

ALL, NO_LAYER = browse.ALL, browse.NO_LAYER


def moves(
    plan: Plan,
    operation: str = ALL,
    layer: int | str = ALL,
    text: str = "",
    most: int = 60,
) -> Table:
    """The plan's moves, those that fit every filter, in the plan's order.

    ``layer`` is a number, `NO_LAYER` or `ALL`; ``text`` is part of either name or of the reason,
    in any case of letters.
    """
    found = [
        move
        for move in plan.moves
        if operation in (ALL, move.operation)
        and layer in (ALL, layer_of(plan, move))
        and text.strip().lower() in f"{move.source} {move.target or ''} {move.reason}".lower()
    ]
    shown = replace(plan, moves=tuple(found)).table(most)
    return replace(shown, caption=f"{len(found)} of {len(plan.moves)} moves; {plan.summary()}")


def layer_of(plan: Plan, move: Move) -> int | str:
    """The number of the move's layer, or `NO_LAYER`."""
    layer = browse.layer_of(move.source, plan.source.naming)
    return NO_LAYER if layer is None else layer


def operations(plan: Plan) -> list[str]:
    """The operations that occur in the plan, in its order."""
    return list(dict.fromkeys(move.operation for move in plan.moves))


def problems(plan: Plan) -> Table:
    """Every problem of the plan, errors first; a plan with errors writes nothing."""
    found = sorted(plan.problems, key=lambda problem: problem.level != "error")
    rows: list[tuple[str, str]] = [(problem.level, problem.message) for problem in found]
    rows = rows or [("none", "no problems: this plan can be executed")]
    levels = Counter(problem.level for problem in found)
    caption = ", ".join(f"{n} {level}{'s' * (n > 1)}" for level, n in levels.items())
    caption += "; nothing would be written" if plan.errors else ""
    return Table(("level", "what, and the way out"), rows, caption=caption)


def changes(before: Plan, after: Plan) -> Table:
    """What ``after`` does to the target otherwise than ``before``: a row a kind of tensor.

    Compares target keys, operations and dtypes; ``tensors`` counts those that differ. The last
    row is the bytes to write. Both plans should be of one source.
    """
    old, new = _by_role(before), _by_role(after)
    every = list(dict.fromkeys(role for role, _ in [*old, *new]))
    roles: dict[tuple[str, str, str], list[str]] = {}
    for key in dict.fromkeys([*old, *new]):
        one, other = old.get(key), new.get(key)
        for what, was, is_now in (
            ("target key", _key(before, key[0], one), _key(after, key[0], other)),
            ("operation", _part(one, "operation"), _part(other, "operation")),
            ("dtype", _part(one, "dtype"), _part(other, "dtype")),
        ):
            if was != is_now:
                roles.setdefault((what, was, is_now), []).append(key[0])
    rows: list[tuple[object, ...]] = [
        (what, _folded(found, every), was, is_now, len(found))
        for (what, was, is_now), found in roles.items()
    ]
    rows.sort(key=lambda row: ("target key", "operation", "dtype").index(str(row[0])))
    written = (size(before.bytes_to_write), size(after.bytes_to_write))
    rows.append(("bytes to write", "all", *written, len(after.written)))
    columns = ("what", "of", "before", "after", "tensors")
    return Table(columns, rows, caption=_options(before, after), right=("tensors",))


def _folded(found: list[str], every: list[str]) -> str:
    """The roles of ``found``, each once; by those left out where that is shorter."""
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
    """The moves that write, by role and layer of what they write."""
    return {move.place: move for move in plan.written}


def _key(plan: Plan, role: str, move: Move | None) -> str:
    """The target's key with N for the layer, so that layers fold together."""
    return "not written" if move is None else keys.ROLES[role].names[plan.target.naming] or "—"


def _part(move: Move | None, name: str) -> str:
    return "not written" if move is None else str(getattr(move, name))


_NAMINGS = {
    "huggingface": "Hugging Face",
    "meta": "Meta",
    "titan-0.2": "TorchTitan 0.2",
    "titan-0.3": "TorchTitan 0.3",
}
_PRODUCTS = {"q_rows": "n_heads × head_dim", "kv_rows": "n_kv_heads × head_dim"}


def names(role: str, params: LlamaParams | None = None) -> Table:
    """What one tensor is called in every naming, and its shape as a formula; N is the layer.

    ``role`` is one of `keys.ROLES`. With ``params``, the lengths of this model too.
    """
    found = keys.ROLES[role]
    rows = [
        (title, found.names[naming] or "has no place for it") for naming, title in _NAMINGS.items()
    ]
    rows.append(("shape", " × ".join(found.axes)))
    rows += [(axis, _PRODUCTS[axis]) for axis in found.axes if axis in _PRODUCTS]
    if params:
        rows.append(("shape in this model", _shape(found.shape(params))))
    ordered = f"by head, {found.heads} of them" if found.heads else "stay where they are"
    rows.append(("rows between RoPE layouts", ordered))
    return Table(("naming", f"{role} is called"), rows)


def _shape(lengths: tuple[int, ...]) -> str:
    return " × ".join(map(str, lengths))


def flavour_params(flavour: titan.Flavour) -> LlamaParams:
    """A stock flavour as parameters: theta 500000, eps 1e-5 and the stock scaling."""
    return LlamaParams(
        dim=flavour.dim,
        n_layers=flavour.n_layers,
        n_heads=flavour.n_heads,
        n_kv_heads=flavour.n_kv_heads,
        head_dim=flavour.dim // flavour.n_heads,
        ffn_dim=flavour.ffn_dim,
        vocab_size=flavour.vocab_size,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=titan.STOCK_SCALING,
        tied=flavour.tied,
    )


def nearest_flavour(plan: Plan) -> str:
    """The stock flavour whose number of elements is nearest, by ratio; one that fits comes first."""
    params = plan.params
    if params is None:
        return "8B"
    if fitting := titan.flavour_of_shapes(params):
        return fitting.name
    own = log(_elements(params))
    by_size = min(titan.FLAVOURS, key=lambda f: abs(log(_elements(flavour_params(f))) - own))
    return by_size.name


def _elements(params: LlamaParams) -> int:
    total = 0
    for role, _ in keys.every(replace(params, n_layers=1)):
        shape = role.shape(params)
        product = shape[0] * (shape[1] if len(shape) > 1 else 1)
        total += product * (params.n_layers if role.per_layer else 1)
    return max(1, total)


def against_flavour(plan: Plan, flavour: str) -> Table:
    """Tensors whose presence, shape or dtype a stock TorchTitan flavour has otherwise.

    The flavour's shapes come from the formulas of `keys`, as from a model on the meta device; no
    weight is read. Names are those of the plan's generation. Raises `RefusedError` for a name
    that is none of `titan.FLAVOURS`.
    """
    found = {one.name: one for one in titan.FLAVOURS}
    if flavour not in found:
        raise RefusedError(f"flavour {flavour!r}; one of {', '.join(found)} was expected")
    stock = flavour_params(found[flavour])
    mine = _by_role(plan)
    theirs = {(role.name, layer): role.shape(stock) for role, layer in keys.every(stock)}
    rows: Counter[tuple[str, str, str, str]] = Counter()
    for key in dict.fromkeys([*theirs, *mine]):
        role, move, shape = keys.ROLES[key[0]], mine.get(key), theirs.get(key)
        name = role.names[plan.target.generation] or role.names["huggingface"] or role.name
        own = _shape(move.shape) if move else "absent"
        other = _shape(shape) if shape else "absent"
        if own != other:
            rows["shape" if move and shape else "presence", name, own, other] += 1
    shown: list[tuple[object, ...]] = [(*row, count) for row, count in rows.items()]
    # TorchTitan builds its model in float32 unless told otherwise; loading copies into that.
    for dtype, count in Counter(move.dtype for move in mine.values()).items():
        if dtype != "float32":
            shown.append(("dtype", "all of this dtype", dtype, "float32", count))
    shown += [("in no tensor", *row, 0) for row in _unstored(plan.params, stock)]
    differ = sum(rows.values())
    caption = f"{differ} tensors differ from TorchTitan's {flavour} in shape or presence"
    columns = ("what", "name", "this plan", flavour, "tensors")
    return Table(columns, shown, caption=caption, right=("tensors",))


def _unstored(params: LlamaParams | None, stock: LlamaParams) -> list[tuple[str, str, str]]:
    """Parameters that no weight carries and that differ: name, this model's, the flavour's."""
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


def disk(plan: Plan, place: str | Path) -> Table:
    """The bytes that the target needs and that are free where ``place`` is or will be."""
    path = Path(place).absolute()
    there = next(one for one in (path, *path.parents) if one.is_dir())
    free = shutil.disk_usage(there).free
    enough = "yes" if free > plan.bytes_to_write else "no: choose another place, or free some"
    rows = [("needed", size(plan.bytes_to_write)), ("free", size(free)), ("enough", enough)]
    return Table(("disk", ""), rows, right=("",))

"""The way back: a target taken to the format of its source, and held against it bit by bit.

Limit: a round trip alone cannot see a wrong direction, the rotated scores can; and it needs as
much disk beside the target as the source has bytes, for as long as it takes.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from llamaconv.comparison import WINDOW_BYTES, count_different
from llamaconv.convert import convert_checkpoint
from llamaconv.formats.detect import open_checkpoint
from llamaconv.opened import Checkpoint
from llamaconv.oracles import Oracle, oracle
from llamaconv.pieces import TensorInfo
from llamaconv.plan import Target
from llamaconv.planner import make_plan
from llamaconv.problems import some
from llamaconv.tables import Table


@dataclass(frozen=True, repr=False)
class WayBack:
    """What came back: names of tensors that are ``equal``, that are ``different``, and those
    that only the source has, ``lost``. ``irreversible`` says why none could come back equal."""

    equal: tuple[str, ...]
    different: tuple[str, ...]
    lost: tuple[str, ...]
    irreversible: str = ""

    @property
    def ok(self) -> bool:
        return bool(self.irreversible or self.equal) and not (self.different or self.lost)

    def table(self) -> Table:
        if self.irreversible:
            return Table(("the way back", ""), [("not reversible", self.irreversible)])
        rows = [
            ("equal to the bit", f"{len(self.equal)} tensors"),
            ("different", some(self.different, 3) or "none"),
            ("did not come back", some(self.lost, 3) or "none"),
        ]
        return Table(("the way back", ""), rows)

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def way_back(source: str | Path, target: str | Path) -> WayBack:
    """Converts ``target`` to the format of ``source`` in a folder beside it, compares, removes.

    Raises `RefusedError` where either cannot be opened or there is no way back.
    """
    first, there = open_checkpoint(source), open_checkpoint(target)
    casts = {tensor.dtype for tensor in there.tensors.values()} - {
        tensor.dtype for tensor in first.tensors.values()
    }
    if casts:
        return WayBack((), (), (), f"the target was cast to {', '.join(sorted(casts))}")
    with tempfile.TemporaryDirectory(dir=Path(target).absolute().parent) as folder:
        plan = make_plan(there, _towards(first))
        done = convert_checkpoint(plan, Path(folder) / "back", verified=False)
        return _compare(first, open_checkpoint(done.target))


def _towards(source: Checkpoint) -> Target:
    """The target options that make what ``source`` is."""
    if source.format == "dcp":
        assert source.generation and source.rope
        return Target(to="dcp", generation=source.generation, rope=source.rope, shards=2)
    if source.format == "meta":
        return Target(to="meta")
    return Target(to="hf", assets=str(source.folder))


def _compare(first: Checkpoint, back: Checkpoint) -> WayBack:
    here, there = oracle(first), oracle(back)
    equal, different, lost = [], [], []
    for name, tensor in first.tensors.items():
        other = back.tensors.get(name)
        if other is None:
            lost.append(name)
        elif (other.dtype, other.shape) == (tensor.dtype, tensor.shape) and _same(
            tensor, here, there
        ):
            equal.append(name)
        else:
            different.append(name)
    return WayBack(tuple(equal), tuple(different), tuple(lost))


def _same(tensor: TensorInfo, here: Oracle, there: Oracle) -> bool:
    for side in (here, there):
        side.prefetch([tensor.name])
    step = max(1, WINDOW_BYTES // max(1, tensor.row_bytes))
    for first in range(0, tensor.n_rows, step):
        last = min(first + step, tensor.n_rows)
        one, other = (side.rows(tensor.name, first, last) for side in (here, there))
        if count_different(one, other):
            return False
    return True

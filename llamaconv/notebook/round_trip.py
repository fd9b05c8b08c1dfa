"""A round trip: a target converted back to the format of its source, and compared bit by bit.

Limit: a round trip alone cannot see a wrong direction; the rotated scores can. It temporarily needs
as much disk next to the target as the source has bytes.
"""

from __future__ import annotations

import tempfile
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.open import open_checkpoint
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.convert.convert import convert_checkpoint
from llamaconv.plan.planner import make_plan
from llamaconv.plan.target import Target, target_like
from llamaconv.report.errors import first_few
from llamaconv.report.progress import Progress, no_progress
from llamaconv.report.tables import Table
from llamaconv.verify.bits_and_scores import WINDOW_BYTES, count_different
from llamaconv.verify.independent_readers import IndependentReader, reader_for


@dataclass(frozen=True, repr=False)
class RoundTrip:
    """The result of a round trip.

    Attributes:
        equal: Tensors that came back equal to the bit.
        different: Tensors that came back different.
        lost: Tensors of the source that did not come back.
        irreversible: Why no tensor could come back equal; empty if they could.
    """

    equal: tuple[str, ...]
    different: tuple[str, ...]
    lost: tuple[str, ...]
    irreversible: str = ""

    @property
    def ok(self) -> bool:
        """Whether every tensor came back equal, or none could."""
        return bool(self.irreversible or self.equal) and not (self.different or self.lost)

    def table(self) -> Table:
        """Return what came back, with the first few names."""
        rows = [
            ("equal to the bit", f"{len(self.equal)} tensors"),
            ("different", first_few(self.different, 3) or "none"),
            ("not in the result", first_few(self.lost, 3) or "none"),
        ]
        if self.irreversible:
            rows = [("not reversible", self.irreversible)]
        return Table(("round trip", ""), rows)

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def round_trip(
    source: str | Path, target: str | Path, progress: Progress | None = None
) -> RoundTrip:
    """Convert ``target`` to the format of ``source`` in a temporary folder, and compare.

    Args:
        source: The checkpoint that the target was converted from.
        target: The converted checkpoint. The temporary folder is next to it.
        progress: Called with "write" for the conversion and "verify" for the comparison, the bytes
            done, and all bytes of that step.

    Raises:
        RefusedError: One of the two cannot be opened, or the target cannot be converted.
    """
    start, there = open_checkpoint(source), open_checkpoint(target)
    casts = {tensor.dtype for tensor in there.tensors.values()} - {
        tensor.dtype for tensor in start.tensors.values()
    }
    if casts:
        return RoundTrip((), (), (), f"the target was cast to {', '.join(sorted(casts))}")
    with tempfile.TemporaryDirectory(dir=Path(target).absolute().parent) as folder:
        plan = make_plan(there, _target_like(start))
        done = convert_checkpoint(plan, Path(folder) / "back", verified=False, progress=progress)
        return _compare(start, open_checkpoint(done.target), progress or no_progress)


def _target_like(source: Checkpoint) -> Target:
    """Return the options of a target in the format of ``source``."""
    target = target_like(source)
    if source.format == "huggingface":
        return replace(target, assets=str(source.folder))
    return replace(target, rope=source.rope or target.rope, shards=2 if target.to == "dcp" else 1)


def _compare(start: Checkpoint, back: Checkpoint, progress: Progress) -> RoundTrip:
    with closing(reader_for(start)) as one, closing(reader_for(back)) as other:
        return _compared(start, back, one, other, progress)


def _compared(
    start: Checkpoint,
    back: Checkpoint,
    one: IndependentReader,
    other: IndependentReader,
    progress: Progress,
) -> RoundTrip:
    equal: list[str] = []
    different: list[str] = []
    lost: list[str] = []
    n_bytes = 0
    for name, tensor in start.tensors.items():
        twin = back.tensors.get(name)
        if twin is None:
            lost.append(name)
        elif (twin.dtype, twin.shape) != (tensor.dtype, tensor.shape):
            different.append(name)
        else:
            (equal if _same(tensor, one, other) else different).append(name)
        n_bytes += tensor.nbytes
        progress("verify", n_bytes, start.total_bytes)
    return RoundTrip(tuple(equal), tuple(different), tuple(lost))


def _same(tensor: TensorInfo, one: IndependentReader, other: IndependentReader) -> bool:
    for side in (one, other):
        side.prefetch([tensor.name])
    for first, last in tensor.windows(WINDOW_BYTES):
        if count_different(*(side.rows(tensor.name, first, last) for side in (one, other))):
            return False
    return True

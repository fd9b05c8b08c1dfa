"""One pass over both sides of a conversion: the bits of every tensor, the scores of every layer.

The source's rows are placed by index arithmetic from the definition of the layouts, and both
sides are read by `oracles`; no code that places or re-orders rows is the engine's. A window of
whole heads or of rows of each side is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from llamaconv import keys, rope
from llamaconv.checks import SCORE_TOLERANCE, Check, TensorResult
from llamaconv.oracles import WHOLE_BYTES, Oracle
from llamaconv.plan import Move, Plan
from llamaconv.problems import some
from llamaconv.ranks import ALONE, Ranks
from llamaconv.torch_rows import Window

Progress = Callable[[int, int], None]
"""Bytes compared so far, and bytes to compare in all."""

# A window of rows that is compared at once; at least one head where rows are re-ordered.
WINDOW_BYTES = 4 << 20
# Positions of the queries and keys; differences cover short and long distances.
_POSITIONS = (0, 1, 2, 5, 17, 64, 257, 1000)


class Comparison:
    """One pass over both sides: bits of every tensor, scores of every layer.

    Of several ranks each passes over its share of the moves; `merge` makes their findings one.
    """

    def __init__(self, plan: Plan, source: Oracle, target: Oracle) -> None:
        self.plan = plan
        self.params, self.layout = plan.ready()
        self.source = source
        self.target = target
        self.wrong_layout = other_layout(self.layout)
        self.tensors: list[TensorResult] = []
        self.scores: list[tuple[int, float, float]] = []
        generator = torch.Generator().manual_seed(0)
        shape = (len(_POSITIONS), self.params.dim)
        self._x_PC = torch.randn(shape, generator=generator) / self.params.dim**0.5
        self._projected: dict[str, tuple[Tensor, Tensor]] = {}
        # Each thing that is made of a window has memory of its own, the same for every window. New
        # memory each time left holes that small results then took: up to 8 MB more a window.
        self._cast, self._ordered, self._wide = Window(), Window(), Window()

    def run(self, progress: Progress, ranks: Ranks = ALONE) -> None:
        total, done = self.plan.bytes_to_write, 0
        units = self._units()
        # On by one: no rank vouches for what it wrote itself from a source as it alone sees it.
        mine = ranks.share([sum(move.nbytes for move in unit) for unit in units], shift=1)
        for batch in _batches(move for place in mine for move in units[place]):
            self.source.prefetch([move.source for move in batch])
            self.target.prefetch([move.writes for move in batch])
            for move in batch:
                row_bytes = move.nbytes // move.shape[0]
                for n_rows in self._compare(move, row_bytes):
                    done += n_rows * row_bytes
                    progress(done, total)

    def _units(self) -> list[list[Move]]:
        """The moves, those of a layer's q and k together: their scores need both."""
        units: dict[object, list[Move]] = {}
        for move in self.plan.written:
            role, layer = move.place
            units.setdefault(layer if role in ("wq", "wk") else move.writes, []).append(move)
        return list(units.values())

    def findings(self) -> dict[str, Any]:
        """What was found so far, as JSON can carry it; for `merge`."""
        return {"tensors": [astuple(tensor) for tensor in self.tensors], "scores": self.scores}

    def merge(self, findings: Iterable[dict[str, Any]]) -> None:
        """Puts the findings of all ranks, this one's too, in the place of this one's."""
        findings = list(findings)
        self.scores = [(n, *rest) for one in findings for n, *rest in one["scores"]]
        tensors = {name: (name, *rest) for one in findings for name, *rest in one["tensors"]}
        self.tensors = [TensorResult(*tensors[move.writes]) for move in self.plan.written]

    @property
    def layers(self) -> list[tuple[float, float]]:
        """Each layer's error of the rotated scores, and its yardstick."""
        return [(error, yardstick) for _, error, yardstick in sorted(self.scores)]

    def _compare(self, move: Move, row_bytes: int) -> Iterator[int]:
        """Compares one tensor window by window; yields the rows of each."""
        dtype = getattr(torch, move.dtype)
        heads = move.role.n_heads(self.params) if move.role else None
        unit = move.shape[0] // heads if heads else 1
        step = max(1, WINDOW_BYTES // (unit * row_bytes)) * unit
        products: list[tuple[Tensor, Tensor]] = []
        n_elements = n_different = n_if_wrong = 0
        for first in range(0, move.shape[0], step):
            last = min(first + step, move.shape[0])
            source = self.source.rows(move.source, first, last)
            if source.dtype != dtype:
                source = self._cast.tensor(source.shape, dtype).copy_(source)
            actual = self.target.rows(move.writes, first, last)
            expected = wrong = source
            if heads:
                other = self._ordered.tensor(source.shape, dtype)
                order = _order(last - first, unit, self.plan.source.rope)
                torch.index_select(source, 0, order, out=other)
                expected, wrong = (other, source) if move.heads else (source, other)
                if len(move.shape) == 2:
                    products.append((self._project(source), self._project(actual)))
            n_elements += actual.numel()
            different = count_different(expected, actual)
            n_different += different
            n_if_wrong += different if wrong is expected else count_different(wrong, actual)
            yield last - first
        self.tensors.append(TensorResult(move.writes, n_elements, n_different, n_if_wrong))
        if products and move.layer is not None:
            self._keep(move.place[0], move.layer, products)

    def _project(self, rows_RC: Tensor) -> Tensor:
        """The positions' vectors through some rows of q or k, (P, R) in float32."""
        projected: Tensor = (
            self._x_PC @ self._wide.tensor(rows_RC.shape, torch.float32).copy_(rows_RC).T
        )
        return projected

    def _keep(self, role: str, layer: int, products: list[tuple[Tensor, Tensor]]) -> None:
        """q or k of one layer at the positions, both sides; scores once both are there."""
        source_PHD, target_PHD = (
            torch.cat(side, dim=1).unflatten(1, (-1, self.params.head_dim))
            for side in zip(*products, strict=True)
        )
        self._projected[role] = source_PHD, target_PHD
        if len(self._projected) < 2:
            return
        (q_s, q_t), (k_s, k_t) = self._projected.pop("wq"), self._projected.pop("wk")
        params, plan = self.params, self.plan
        inverse_F = rope.inverse_frequencies(
            params.head_dim, params.rope_theta, params.rope_scaling
        )
        angles_PF = rope.angles(torch.tensor(_POSITIONS), inverse_F)
        right = rope.scores(q_s, k_s, angles_PF, self.layout)
        found = rope.scores(q_t, k_t, angles_PF, plan.target.layout)
        wrong = rope.scores(q_s, k_s, angles_PF, self.wrong_layout)
        apart = ~torch.eye(len(_POSITIONS), dtype=torch.bool)
        scale = right[:, apart].abs().max().clamp_min(1e-30)
        error, yardstick = (
            ((side - right)[:, apart].abs().max() / scale).item() for side in (found, wrong)
        )
        self.scores.append((layer, error, yardstick))

    def bits_check(self) -> Check:
        n_elements, n_different, n_if_wrong = (
            sum(getattr(tensor, count) for tensor in self.tensors)
            for count in ("n_elements", "n_different", "n_if_wrong")
        )
        detail = (
            f"all {n_elements:,} elements equal the source's, read whole and re-ordered by index"
        )
        if concession := self.source.concession or self.target.concession:
            detail += f"; {concession}"
        if n_different:
            different = [one.name for one in self.tensors if one.n_different]
            detail = (
                f"{n_different:,} of {n_elements:,} elements differ, in "
                f"{len(different)} tensors: {some(different, 4)}"
            )
        return Check("bits", not n_different, float(n_different), float(n_if_wrong), detail)

    def scores_check(self) -> Check:
        value = max((error for error, _ in self.layers), default=float("inf"))
        yardstick = min((wrong for _, wrong in self.layers), default=0.0)
        # nan is not below the tolerance.
        ok = value <= SCORE_TOLERANCE
        detail = f"largest relative difference over {len(self.layers)} layers, distances 1 to {_POSITIONS[-1]}"
        if not ok:
            detail = f"{detail}; above {SCORE_TOLERANCE:g}: q or k are in another layout than the rotation"
        elif yardstick <= 10 * SCORE_TOLERANCE:
            detail += "; the wrong layout would hardly show in these weights"
        return Check("rotated scores", ok, value, yardstick, detail, SCORE_TOLERANCE)


def other_layout(layout: keys.Layout) -> keys.Layout:
    return "half_split" if layout == "interleaved" else "interleaved"


def _order(n_rows: int, head_dim: int, layout: str | None) -> Tensor:
    """Which source row each row of the other layout is, from the definition, a row at a time."""
    half = head_dim // 2
    if layout == "half_split":  # interleaved row 2i is row i, row 2i + 1 is row i + half
        head = [i // 2 + half * (i % 2) for i in range(head_dim)]
    else:  # half_split row i is row 2i, row i + half is row 2i + 1
        head = [2 * (i % half) + i // half for i in range(head_dim)]
    return torch.tensor([start + row for start in range(0, n_rows, head_dim) for row in head])


def count_different(one: Tensor, other: Tensor) -> int:
    """Elements whose bits differ; a NaN equals itself, 0.0 and -0.0 differ."""
    one, other = one.contiguous(), other.contiguous()
    # Nearly always all are equal, which eight bytes at a time say in a seventh of the time.
    if _in_words(one) and _in_words(other) and torch.equal(_words(one), _words(other)):
        return 0
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return int(torch.count_nonzero(one.view(whole) != other.view(whole)))


def _in_words(tensor: Tensor) -> bool:
    size = tensor.element_size()
    return tensor.numel() * size % 8 == 0 and tensor.storage_offset() * size % 8 == 0


def _words(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.int64)


def _batches(moves: Iterable[Move]) -> Iterator[list[Move]]:
    """Moves in order, so that small tensors are loaded together and long ones alone."""
    batch: list[Move] = []
    for move in moves:
        if batch and sum(m.nbytes for m in batch) + move.nbytes > 2 * WHOLE_BYTES:
            yield batch
            batch = []
        batch.append(move)
    if batch:
        yield batch

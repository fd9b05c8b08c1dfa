"""Compare both sides in one pass: the bits of every tensor, the scores of every layer.

Rows of the source are reordered by index arithmetic from the definition of the layouts, and both
sides are read by `independent_readers`. No code here that places or reorders rows is the engine's.

Shape suffixes: R rows, C columns, P position, H head, D head dimension, F pair of a head.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor

from llamaconv.checkpoint.torch_rows import TensorBuffer, one_thread
from llamaconv.checkpoint.weight_values import OddValues, count_not_finite
from llamaconv.model import forward, rope
from llamaconv.model.names import Layout
from llamaconv.plan.plan import Move, Plan
from llamaconv.ranks import ALONE, Ranks
from llamaconv.report.errors import STOPPED, FailedError, first_few
from llamaconv.report.progress import Progress
from llamaconv.verify.independent_readers import WHOLE_BYTES, IndependentReader
from llamaconv.verify.results import SCORE_TOLERANCE, Check, TensorResult

# Bytes of rows that are compared at once; at least one head if rows are reordered.
WINDOW_BYTES = 2 << 20
# Positions of the queries and keys; differences cover short and long distances.
_POSITIONS = (0, 1, 2, 5, 17, 64, 257, 1000)


@dataclass
class Findings:
    """What one rank has found.

    Attributes:
        tensors: The bits of each tensor that it compared.
        scores: Layer, error of the rotated scores, and its control.
        unreadable: Why a side cannot be read; empty if both can.
    """

    tensors: list[TensorResult] = field(default_factory=list)
    scores: list[tuple[int, float, float]] = field(default_factory=list)
    unreadable: str = ""

    def to_json(self) -> list[Any]:
        """Return a value for `llamaconv.ranks.Ranks.all_gather`."""
        return [[astuple(tensor) for tensor in self.tensors], self.scores, self.unreadable]

    @classmethod
    def from_json(cls, value: list[Any]) -> Findings:
        """Return the inverse of `to_json`."""
        tensors, scores, unreadable = value
        return cls([TensorResult(*one) for one in tensors], [(*one,) for one in scores], unreadable)


class Comparison:
    """Compares both sides of a conversion, in one thread."""

    def __init__(self, plan: Plan, source: IndependentReader, target: IndependentReader) -> None:
        """Prepare to compare.

        Args:
            plan: The plan of the conversion.
            source: Reads the source.
            target: Reads the target.
        """
        self.plan = plan
        self.params, self.layout = plan.ready()
        self.source = source
        self.target = target
        self.wrong_layout = other_layout(self.layout)
        self.findings = Findings()
        generator = torch.Generator().manual_seed(0)
        shape = (len(_POSITIONS), self.params.dim)
        self._x_PC = torch.randn(shape, generator=generator) / self.params.dim**0.5
        # What scores need of one layer: the heads' products with the input, biases and norms.
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._needed = Counter(move.layer for move in plan.written if move.role and move.role.heads)
        # One buffer per step, reused for every window. New memory for each window left holes that
        # small results then took: up to 8 MB more per window.
        self._cast, self._ordered, self._wide = TensorBuffer(), TensorBuffer(), TensorBuffer()

    def compare(self, moves: Sequence[Move], count: Callable[[int], None]) -> None:
        """Compare what some moves read and write.

        Args:
            moves: Moves of the plan; all that one layer's scores need in one call.
            count: Called with the bytes of each window that was compared.

        Raises:
            FailedError: A reader failed.
        """
        for batch in _groups([move] for move in moves):
            self.source.prefetch([move.source for move in batch])
            self.target.prefetch([move.target_name for move in batch])
            for move in batch:
                row_bytes = move.nbytes // _n_rows(move)
                for n_rows in self._compare(move, row_bytes):
                    count(n_rows * row_bytes)

    def merge(
        self, findings: Sequence[Findings]
    ) -> tuple[list[TensorResult], list[tuple[float, float]]]:
        """Return the bits in the order of the plan, and per layer the score error and its control.

        Args:
            findings: Those of all ranks, this one's too.
        """
        tensors = {tensor.name: tensor for one in findings for tensor in one.tensors}
        scores = sorted(score for one in findings for score in one.scores)
        in_order = [tensors[move.target_name] for move in self.plan.stored]
        return in_order, [(error, control) for _, error, control in scores]

    def _compare(self, move: Move, row_bytes: int) -> Iterator[int]:
        """Compare one tensor window by window; yield the number of rows of each window."""
        dtype = getattr(torch, move.dtype)
        heads = move.role.n_heads(self.params) if move.role and move.shape else None
        unit = move.shape[0] // heads if heads else 1
        step = max(1, WINDOW_BYTES // (unit * row_bytes)) * unit
        kept: list[tuple[Tensor, Tensor]] = []
        n_elements = n_different = n_if_wrong = n_nan = n_infinite = 0
        for first in range(0, _n_rows(move), step):
            last = min(first + step, _n_rows(move))
            source = self.source.rows(move.source, first, last)
            if source.dtype != dtype:
                source = self._cast.tensor(source.shape, dtype).copy_(source)
            actual = self.target.rows(move.target_name, first, last)
            expected = wrong = source
            if heads:
                other = self._ordered.tensor(source.shape, dtype)
                order = rows_in_other_layout(last - first, unit, self.plan.source.rope)
                torch.index_select(source, 0, order, out=other)
                expected, wrong = (other, source) if move.heads else (source, other)
                if not move.state:
                    side = self._project if len(move.shape) == 2 else _in_float32
                    kept.append((side(source), side(actual)))
            n_elements += actual.numel()
            nan, infinite = count_not_finite(actual)
            n_nan, n_infinite = n_nan + nan, n_infinite + infinite
            different = count_different(expected, actual)
            n_different += different
            n_if_wrong += different if wrong is expected else count_different(wrong, actual)
            yield last - first
        self.findings.tensors.append(
            TensorResult(move.target_name, n_elements, n_different, n_if_wrong, n_nan, n_infinite)
        )
        if kept and move.layer is not None:
            self._keep(move.place[0], move.layer, kept)

    def _project(self, rows_RC: Tensor) -> Tensor:
        """Multiply the input at each position by some rows of q or k: (P, R), in float32."""
        projected: Tensor = (
            self._x_PC @ self._wide.tensor(rows_RC.shape, torch.float32).copy_(rows_RC).T
        )
        return projected

    def _keep(self, role: str, layer: int, windows: list[tuple[Tensor, Tensor]]) -> None:
        """Keep what scores need, of both sides; compare the scores once all of a layer is known."""
        source, target = (torch.cat(side, dim=-1) for side in zip(*windows, strict=True))
        self._kept[role] = source, target
        if len(self._kept) < self._needed[layer]:
            return
        params, plan = self.params, self.plan
        (q_s, k_s), (q_t, k_t) = (
            tuple(forward.heads(its[role], its, role, params) for role in ("wq", "wk"))
            for its in ({name: both[at] for name, both in self._kept.items()} for at in (0, 1))
        )
        self._kept.clear()
        inverse_F = rope.inverse_frequencies(
            params.head_dim, params.rope_theta, params.rope_scaling
        )
        angles_PF = rope.angles(torch.tensor(_POSITIONS), inverse_F)
        right = rope.scores(q_s, k_s, angles_PF, self.layout)
        found = rope.scores(q_t, k_t, angles_PF, plan.target.layout)
        wrong = rope.scores(q_s, k_s, angles_PF, self.wrong_layout)
        apart = ~torch.eye(len(_POSITIONS), dtype=torch.bool)
        scale = right[:, apart].abs().max().clamp_min(1e-30)
        error, control = (
            ((side - right)[:, apart].abs().max() / scale).item() for side in (found, wrong)
        )
        self.findings.scores.append((layer, error, control))

    def bits_check(self, tensors: Sequence[TensorResult]) -> Check:
        """Return the check of all bits: how many elements differ."""
        n_elements, n_different, n_if_wrong = (
            sum(getattr(tensor, count) for tensor in tensors)
            for count in ("n_elements", "n_different", "n_if_wrong")
        )
        detail = f"all {n_elements:,} elements equal the source's, reordered by index"
        concessions = {self.source.concession, self.target.concession} - {""}
        if concessions:
            detail += f"; {'; '.join(sorted(concessions))}"
        if n_different:
            different = [one.name for one in tensors if one.n_different]
            detail = (
                f"{n_different:,} of {n_elements:,} elements differ, in "
                f"{len(different)} tensors: {first_few(different, 4)}"
            )
        elif broken := not_finite(tensors):
            detail += f", but {broken}"
        ok = not n_different and not not_finite(tensors)
        return Check("bits", ok, float(n_different), float(n_if_wrong), detail)

    def scores_check(self, layers: Sequence[tuple[float, float]]) -> Check:
        """Return the check of the rotated scores: the largest error of any layer."""
        value = max((error for error, _ in layers), default=float("inf"))
        control = min((wrong for _, wrong in layers), default=0.0)
        # nan is not below the tolerance.
        ok = value <= SCORE_TOLERANCE
        longest = _POSITIONS[-1]
        detail = f"largest difference over {len(layers)} layers, distances 1 to {longest}"
        if not ok:
            detail += f"; above {SCORE_TOLERANCE:g}: q or k are in another layout than the rotation"
        elif control <= 10 * SCORE_TOLERANCE:
            detail += "; the wrong layout would hardly show in these weights"
        return Check("rotated scores", ok, value, control, detail, SCORE_TOLERANCE)


def compare_all(
    comparisons: Sequence[Comparison],
    progress: Progress,
    ranks: Ranks = ALONE,
    before: Findings | None = None,
) -> Findings:
    """Compare this rank's share of the tensors, each of ``comparisons`` in a thread of its own.

    Args:
        comparisons: Of one plan, each with its own readers.
        progress: Called from threads with "verify", the bytes compared so far, and the bytes of the
            target.
        ranks: The processes that share the work.
        before: What is known of some tensors, which are not compared again.

    Returns:
        What this rank has found, and what was known.

    Raises:
        FailedError: A reader failed.
    """
    plan = comparisons[0].plan
    found, left = _without(units(plan), before or Findings())
    # Shift the shares by one rank, so that no rank checks the files it wrote itself.
    mine = ranks.share([sum(move.nbytes for move in unit) for unit in left], shift=1)
    waiting = deque(_groups(left[place] for place in mine))
    done = plan.bytes_to_write - sum(move.nbytes for unit in left for move in unit)
    lock, stop = threading.Lock(), threading.Event()

    def count(n_bytes: int) -> None:
        nonlocal done
        if stop.is_set():
            raise FailedError(STOPPED)
        with lock:
            done += n_bytes
            so_far = done
        progress("verify", so_far, plan.bytes_to_write)

    def work(comparison: Comparison) -> None:
        while True:
            try:
                moves = waiting.popleft()
            except IndexError:
                return
            comparison.compare(moves, count)

    try:
        # Torch's own threads would compete with these: on busy cores they wait for each other.
        with one_thread(), ThreadPoolExecutor(len(comparisons)) as pool:
            jobs = [pool.submit(work, comparison) for comparison in comparisons]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
                for job in jobs:
                    if job.done():
                        job.result()
            finally:
                stop.set()
    finally:
        for comparison in comparisons:
            comparison.source.close()
            comparison.target.close()
    for comparison in comparisons:
        found.tensors += comparison.findings.tensors
        found.scores += comparison.findings.scores
    return found


def _without(every: Iterable[list[Move]], before: Findings) -> tuple[Findings, list[list[Move]]]:
    """Return what is known of whole units, and the units that are left to be compared."""
    tensors = {tensor.name: tensor for tensor in before.tensors}
    scores = {score[0]: score for score in before.scores}
    found, left = Findings(), []
    for unit in every:
        if any(move.target_name not in tensors for move in unit):
            left.append(unit)
            continue
        found.tensors += [tensors[move.target_name] for move in unit]
        if _in_scores(unit[0]) and unit[0].layer in scores:
            found.scores.append(scores[unit[0].layer])
    return found, left


def units(plan: Plan) -> list[list[Move]]:
    """Group the moves: q and k of a layer together, because their scores need both.

    With them come what is applied to their heads: biases, and norms.
    """
    found: dict[object, list[Move]] = {}
    for move in plan.stored:
        found.setdefault(move.layer if _in_scores(move) else move.target_name, []).append(move)
    return list(found.values())


def _in_scores(move: Move) -> bool:
    return move.role is not None and move.role.heads is not None and not move.state


def _groups(units: Iterable[list[Move]]) -> Iterator[list[Move]]:
    """Group moves in order: small tensors are loaded together, long ones alone, units stay whole."""
    group: list[Move] = []
    for unit in units:
        if group and sum(move.nbytes for move in [*group, *unit]) > 2 * WHOLE_BYTES:
            yield group
            group = []
        group += unit
    if group:
        yield group


def _n_rows(move: Move) -> int:
    """Return the number of rows of a tensor; a scalar has one."""
    return move.shape[0] if move.shape else 1


def _in_float32(rows_R: Tensor) -> Tensor:
    return rows_R.to(torch.float32, copy=True)


def not_finite(tensors: Sequence[TensorResult]) -> str:
    """Return the tensors that hold NaN or infinities, with their counts; empty if none does."""
    odd = [
        OddValues(one.name, one.n_nan, one.n_infinite)
        for one in tensors
        if one.n_nan or one.n_infinite
    ]
    return too_odd(odd)


def too_odd(odd: Sequence[OddValues]) -> str:
    """Return why no model computes with these values; empty if there are none."""
    if not odd:
        return ""
    return (
        f"{len(odd)} tensors hold NaN or infinities, as in the source: "
        f"{first_few(map(str, odd))}. Such a model computes nothing; use an earlier checkpoint, or "
        "--no-verify to convert it all the same"
    )


def other_layout(layout: Layout) -> Layout:
    """Return the layout that is not ``layout``."""
    return "half_split" if layout == "interleaved" else "interleaved"


def rows_in_other_layout(n_rows: int, head_dim: int, layout: str | None) -> Tensor:
    """Return the source row of each row in the other layout, row by row from the definition."""
    half = head_dim // 2
    if layout == "half_split":  # interleaved row 2i is row i, row 2i + 1 is row i + half
        head = [i // 2 + half * (i % 2) for i in range(head_dim)]
    else:  # half_split row i is row 2i, row i + half is row 2i + 1
        head = [2 * (i % half) + i // half for i in range(head_dim)]
    return torch.tensor([start + row for start in range(0, n_rows, head_dim) for row in head])


def count_different(one: Tensor, other: Tensor) -> int:
    """Return the number of elements whose bits differ. NaN equals itself; 0.0 and -0.0 differ."""
    one, other = one.contiguous(), other.contiguous()
    # Nearly always all are equal, and comparing eight bytes at a time takes a seventh of the time.
    if _in_words(one) and _in_words(other) and torch.equal(_words(one), _words(other)):
        return 0
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return int(torch.count_nonzero(one.view(whole) != other.view(whole)))


def _in_words(tensor: Tensor) -> bool:
    size = tensor.element_size()
    return tensor.numel() * size % 8 == 0 and tensor.storage_offset() * size % 8 == 0


def _words(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.int64)

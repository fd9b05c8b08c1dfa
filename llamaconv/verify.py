"""Checks that can fail: is the target what the source says, in every bit and in meaning?

- structure: torch's own loader opens the target; names, shapes and dtypes are the plan's;
- bits: every element against the source, read by the safetensors library and placed by index
  arithmetic, which shares no code with the engine;
- rotated scores: q and k of every layer give the same attention scores at distances above 0,
  each side with the rotation of its own layout;
- logits and loss: the reference model on both sides, where it is small enough.

Each figure stands beside its yardstick: the same figure for the conversion done wrong on
purpose, with q and k left in (or brought into) the other layout. A round trip could not see a
wrong direction, and the scores at distance 0 cannot either.

Memory stays bounded: tensors are compared a window of whole heads or of rows at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from llamaconv import keys, model, receipt, rope
from llamaconv.formats import dcp
from llamaconv.formats.detect import open_checkpoint
from llamaconv.params import LlamaParams
from llamaconv.pieces import Checkpoint, PieceReader, TensorInfo
from llamaconv.plan import Move, Plan, Target, make_plan
from llamaconv.problems import LlamaconvError, Problem, RefusedError, some
from llamaconv.sample import held_out_text
from llamaconv.tables import Table

Progress = Callable[[int, int], None]
"""Bytes compared so far, and bytes to compare in all."""

# A window of rows that is compared at once; at least one head where rows are re-ordered.
_WINDOW_BYTES = 4 << 20
# Tensors up to this size are loaded by `dcp.load` whole, a batch at a time; it always reads
# whole entries, so longer ones are read in windows at the place where torch finds their bytes.
_WHOLE_BYTES = 16 << 20
# The reference forward holds both sides in float32.
_FORWARD_BYTES = 64_000_000
_FORWARD_TOKENS = 512

# Scores and logits of the two layouts differ only by the rounding of float32 sums.
_SCORE_TOLERANCE = 1e-4
_LOGIT_TOLERANCE = 1e-3
# Positions of the queries and keys; differences cover short and long distances.
_POSITIONS = (0, 1, 2, 5, 17, 64, 257, 1000)


@dataclass(frozen=True)
class Check:
    """One figure. ``value`` is at most ``tolerance`` when all is right; ``yardstick`` is the same
    figure for the conversion done wrong on purpose, None where there is none to compare with."""

    name: str
    ok: bool
    value: float
    yardstick: float | None
    detail: str
    tolerance: float = 0.0

    def shown_value(self) -> str:
        """The figure for people: rounding noise is only said to be below the tolerance."""
        if 0 < self.value <= self.tolerance:
            return f"< {self.tolerance:g}"
        return f"{self.value:.3g}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ok": self.ok,
            "value": self.value,
            "yardstick": self.yardstick,
            "detail": self.detail,
        }


@dataclass(frozen=True, repr=False)
class Verification:
    """All checks of one target; ``ok`` only if each is.

    ``layers`` holds each layer's rotated-score error and its yardstick.
    """

    checks: tuple[Check, ...]
    layers: tuple[tuple[float, float], ...] = ()

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "checks": [check.to_json() for check in self.checks]}

    def problems(self) -> list[Problem]:
        return [
            Problem(f"check {check.name} failed: {check.detail}")
            for check in self.checks
            if not check.ok
        ]

    def table(self) -> Table:
        rows = [
            (
                "✓" if check.ok else "✗",
                check.name,
                check.shown_value(),
                "—" if check.yardstick is None else f"{check.yardstick:.2g}",
                check.detail,
            )
            for check in self.checks
        ]
        columns = ("", "check", "value", "done wrong", "what it says")
        caption = "every check passed" if self.ok else "NOT what the source says"
        return Table(columns, rows, caption=caption, right=("value", "done wrong"))

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def verify_checkpoint(
    source: str | Path, target: str | Path, progress: Progress | None = None
) -> Verification:
    """Checks the DCP at ``target`` against the Hugging Face folder it was made from.

    What was asked for (layout, dtype, tie) comes from the receipt; without one, from the
    target's names and the defaults. Raises `RefusedError` where either cannot be opened.
    """
    folder = Path(target)
    found = open_checkpoint(folder)
    if found.format != "dcp":
        raise RefusedError(f"{folder}: this is a {found.format} checkpoint; a DCP was expected")
    written = receipt.read(folder)
    if written:
        wanted = Target(**written.target)
    elif found.generation:
        wanted = Target(generation=found.generation)
    else:
        raise RefusedError(found.errors)
    plan = make_plan(open_checkpoint(source), wanted)
    plan.check()
    return verify_plan(plan, folder, progress)


def verify_plan(plan: Plan, folder: Path, progress: Progress | None = None) -> Verification:
    """Checks that ``folder`` holds what ``plan`` says, see the module's text."""
    try:
        target = dcp.open_folder(folder)
    except RefusedError as error:
        nothing = float(len(plan.written))
        return Verification((Check("structure", False, nothing, None, error.problems[0].message),))
    structure = _check_structure(plan, target)
    if not structure.ok:
        return Verification((structure,))
    try:
        comparison = _Comparison(plan, target)
        comparison.run(progress or (lambda done, total: None))
    except _UNREADABLE as error:
        detail = f"{type(error).__name__}: {error}".splitlines()[0]
        return Verification((structure, Check("bits", False, float("inf"), None, detail)))
    checks = [structure, comparison.bits_check(), comparison.scores_check()]
    if plan.bytes_to_write <= _FORWARD_BYTES:
        checks += _check_forward(plan, folder)
    return Verification(tuple(checks), tuple(comparison.layers))


# What torch, safetensors and the disk raise for a target that cannot be read back.
_UNREADABLE = (CheckpointException, LlamaconvError, OSError, RuntimeError, ValueError, KeyError)


def _check_structure(plan: Plan, target: Checkpoint) -> Check:
    """Names, shapes and stored dtypes of the target, against the plan's."""
    wanted = {move.writes: (move.dtype, move.shape) for move in plan.written}
    stored = {name: (tensor.dtype, tensor.shape) for name, tensor in target.tensors.items()}
    wrong = [name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name)]
    other = "titan-0.2" if plan.target.generation == "titan-0.3" else "titan-0.3"
    renamed = make_plan(plan.source, replace(plan.target, generation=other))
    yardstick = sum(move.writes not in stored for move in renamed.written)
    detail = f"{len(stored)} tensors with the plan's names, shapes and dtypes"
    if wrong:
        shown = (
            f"{name}: {wanted.get(name)} expected, {stored.get(name)} found"
            for name in sorted(wrong)
        )
        detail = f"{len(wrong)} tensors differ: {some(shown, 3)}"
    if target.errors:
        detail = "; ".join(problem.message for problem in target.errors[:3])
    return Check("structure", not wrong, float(len(wrong)), float(yardstick), detail)


class _Comparison:
    """One pass over both sides: bits of every tensor, scores of every layer."""

    def __init__(self, plan: Plan, target: Checkpoint) -> None:
        assert plan.params and plan.source.rope
        self.plan = plan
        self.params: LlamaParams = plan.params
        self.layout: keys.Layout = plan.source.rope
        self.target = target
        self.wrong_layout = _other(plan.source.rope)
        self.n_elements = self.n_different = self.n_if_wrong = 0
        self.different: list[str] = []
        self.layers: list[tuple[float, float]] = []
        generator = torch.Generator().manual_seed(0)
        shape = (len(_POSITIONS), self.params.dim)
        self._x_PC = torch.randn(shape, generator=generator) / self.params.dim**0.5
        self._projected: dict[str, tuple[Tensor, Tensor]] = {}

    def run(self, progress: Progress) -> None:
        total, done = self.plan.bytes_to_write, 0
        for batch in _batches(self.plan.written):
            loaded = _load(self.target.path, batch)
            with PieceReader() as reader:
                for move in batch:
                    info = self.target.tensors[move.writes]
                    for n_rows in self._compare(move, info, loaded.get(info.name), reader):
                        done += n_rows * info.row_bytes
                        progress(done, total)

    def _compare(
        self, move: Move, info: TensorInfo, whole: Tensor | None, reader: PieceReader
    ) -> Iterator[int]:
        """Compares one tensor window by window; yields the rows of each."""
        dtype = getattr(torch, move.dtype)
        known = keys.identify(info.name, self.plan.target.generation)
        heads = getattr(self.params, known[0].heads) if known and known[0].heads else None
        unit = info.n_rows // heads if heads else 1
        step = max(1, _WINDOW_BYTES // (unit * info.row_bytes)) * unit
        products: list[tuple[Tensor, Tensor]] = []
        before = self.n_different
        for first in range(0, info.n_rows, step):
            last = min(first + step, info.n_rows)
            source = _source_rows(self.plan.source, move.source, first, last).to(dtype)
            actual = whole[first:last] if whole is not None else _window(reader, info, first, last)
            expected = wrong = source
            if heads:
                other = source[_order(last - first, unit, self.plan.source.rope)]
                expected, wrong = (other, source) if move.heads else (source, other)
                products.append((self._x_PC @ source.float().T, self._x_PC @ actual.float().T))
            self.n_elements += actual.numel()
            self.n_different += _count_different(expected, actual)
            self.n_if_wrong += _count_different(wrong, actual)
            yield last - first
        if self.n_different > before:
            self.different.append(info.name)
        if heads and known:
            self._keep(known[0].name, products)

    def _keep(self, role: str, products: list[tuple[Tensor, Tensor]]) -> None:
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
        found = rope.scores(q_t, k_t, angles_PF, plan.target.rope)
        wrong = rope.scores(q_s, k_s, angles_PF, self.wrong_layout)
        apart = ~torch.eye(len(_POSITIONS), dtype=torch.bool)
        scale = right[:, apart].abs().max().clamp_min(1e-30)
        error, yardstick = (
            ((side - right)[:, apart].abs().max() / scale).item() for side in (found, wrong)
        )
        self.layers.append((error, yardstick))

    def bits_check(self) -> Check:
        detail = f"all {self.n_elements:,} elements equal the source's, read whole and re-ordered by index"
        if self.n_different:
            detail = (
                f"{self.n_different:,} of {self.n_elements:,} elements differ, in "
                f"{len(self.different)} tensors: {some(self.different, 4)}"
            )
        return Check(
            "bits", not self.n_different, float(self.n_different), float(self.n_if_wrong), detail
        )

    def scores_check(self) -> Check:
        value = max((error for error, _ in self.layers), default=float("inf"))
        yardstick = min((wrong for _, wrong in self.layers), default=0.0)
        # nan is not below the tolerance.
        ok = value <= _SCORE_TOLERANCE
        detail = f"largest relative difference over {len(self.layers)} layers, distances 1 to {_POSITIONS[-1]}"
        if not ok:
            detail = f"{detail}; above {_SCORE_TOLERANCE:g}: q or k are in another layout than the rotation"
        elif yardstick <= 10 * _SCORE_TOLERANCE:
            detail += "; the wrong layout would hardly show in these weights"
        return Check("rotated scores", ok, value, yardstick, detail, _SCORE_TOLERANCE)


def _other(layout: keys.Layout) -> keys.Layout:
    return "half_split" if layout == "interleaved" else "interleaved"


def _order(n_rows: int, head_dim: int, layout: str | None) -> Tensor:
    """Which source row each row of the other layout is, from the definition, a row at a time."""
    half = head_dim // 2
    if layout == "half_split":  # interleaved row 2i is row i, row 2i + 1 is row i + half
        head = [i // 2 + half * (i % 2) for i in range(head_dim)]
    else:  # half_split row i is row 2i, row i + half is row 2i + 1
        head = [2 * (i % half) + i // half for i in range(head_dim)]
    return torch.tensor([start + row for start in range(0, n_rows, head_dim) for row in head])


def _count_different(one: Tensor, other: Tensor) -> int:
    """Elements whose bits differ; a NaN equals itself, 0.0 and -0.0 differ."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return int(torch.count_nonzero(one.contiguous().view(whole) != other.contiguous().view(whole)))


def _batches(moves: Iterable[Move]) -> Iterator[list[Move]]:
    """Moves in order, so that small tensors are loaded together and long ones alone."""
    batch: list[Move] = []
    for move in moves:
        if batch and sum(m.nbytes for m in batch) + move.nbytes > 2 * _WHOLE_BYTES:
            yield batch
            batch = []
        batch.append(move)
    if batch:
        yield batch


def _load(folder: Path, moves: Iterable[Move], most: int = _WHOLE_BYTES) -> dict[str, Tensor]:
    """The tensors of ``moves`` of up to ``most`` bytes, whole, through `dcp.load`."""
    state = {
        move.writes: torch.empty(move.shape, dtype=getattr(torch, move.dtype))
        for move in moves
        if move.nbytes <= most
    }
    if state:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
            dcp_load(state, checkpoint_id=folder, no_dist=True)
    return state


def _window(reader: PieceReader, info: TensorInfo, first: int, last: int) -> Tensor:
    buffer = bytearray((last - first) * info.row_bytes)
    reader.read_rows(info, first, last, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=getattr(torch, info.dtype)).view(-1, *info.shape[1:])


def _source_rows(source: Checkpoint, name: str, first: int, last: int) -> Tensor:
    # Opened anew a window: a mapping kept open would count all that was read as memory.
    with safe_open(source.tensors[name].pieces[0].file, framework="pt") as file:
        rows: Tensor = file.get_slice(name)[first:last]
        return rows


def _check_forward(plan: Plan, folder: Path) -> list[Check]:
    """Logits and loss of the reference model on both sides, on the sample's held-out text."""
    assert plan.params and plan.source.rope
    loaded = _load(folder, plan.written, most=_FORWARD_BYTES)
    here: dict[tuple[str, int | None], Tensor] = {}
    there: dict[tuple[str, int | None], Tensor] = {}
    for move in plan.written:
        role, layer = keys.identify(move.writes, plan.target.generation) or (None, None)
        assert role is not None
        rows = _source_rows(plan.source, move.source, 0, move.shape[0])
        here[role.name, layer] = rows.to(getattr(torch, move.dtype))
        there[role.name, layer] = loaded[move.writes]
    n_tokens = min(_FORWARD_TOKENS, plan.params.max_position or _FORWARD_TOKENS)
    text = torch.tensor(list(held_out_text()[:n_tokens])) % plan.params.vocab_size
    tokens_BP = text.unsqueeze(0)
    with torch.no_grad():
        right = model.forward(here, plan.params, tokens_BP, plan.source.rope)
        found = model.forward(there, plan.params, tokens_BP, plan.target.rope)
        wrong = model.forward(here, plan.params, tokens_BP, _other(plan.source.rope))
    largest = max(1.0, right.abs().max().item())
    value, yardstick = ((side - right).abs().max().item() / largest for side in (found, wrong))
    losses = [model.loss(side, tokens_BP).item() for side in (right, found, wrong)]
    return [
        Check(
            "logits",
            value <= _LOGIT_TOLERANCE,
            value,
            yardstick,
            f"largest relative difference on {n_tokens} tokens, logits up to {largest:.2g}",
            _LOGIT_TOLERANCE,
        ),
        Check(
            "loss",
            abs(losses[1] - losses[0]) <= _LOGIT_TOLERANCE,
            abs(losses[1] - losses[0]),
            abs(losses[2] - losses[0]),
            f"source {losses[0]:.2f}, target {losses[1]:.2f}, done wrong {losses[2]:.2f} nats a token",
            _LOGIT_TOLERANCE,
        ),
    ]

"""The plan: every move from a source checkpoint to a target, with all problems at once.

`planner` makes it, and `convert` executes the same object that a preview shows.

Limit: a plan is for one target. To change an option, make another plan.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

from llamaconv.checkpoint.checkpoint import Checkpoint, ModelConfig
from llamaconv.checkpoint.fetch_ahead import MOST_BYTES
from llamaconv.checkpoint.tensors import DTYPE_BYTES, Location
from llamaconv.checkpoint.trainer_state import MadeValue, StoredValue
from llamaconv.model.names import OPTIMIZER, Layout, Role, whole
from llamaconv.model.params import LlamaParams
from llamaconv.plan.target import Target
from llamaconv.report.errors import Problem, RefusedError, printable
from llamaconv.report.tables import Fold, FoldedTable, Table, size
from llamaconv.torchtitan import releases

Operation = Literal["copy", "reorder", "cast", "tie", "drop"]

PEAK_MEMORY_BYTES = 100_000_000
"""Most memory of a conversion and its checks, on top of a process that has imported torch.

Blocks and windows are bounded, so it does not grow with the model. `tests/bench/memory.py` measured
33 MB of anonymous memory for 1B, 8B and 70B; 84 MB resident for the sample, with pages of files.
Further pages of files, which the system takes back when it needs them, are not counted.
"""


@dataclass(frozen=True)
class Move:
    """One row of a plan: what becomes of one source tensor, and why.

    Attributes:
        source: Name of the source tensor.
        target: Name of the target tensor, None for a tensor that is dropped. For rows of a tensor
            that holds several roles, its name and the role, such as ``….wqkv.weight[wq]``.
        operation: What is done to it. "reorder" and "tie" may cast as well.
        dtype: Dtype of the target tensor, as torch names it.
        shape: Shape of the target tensor.
        reason: Why, for people.
        heads: Number of heads whose rows are reordered, None for other operations.
        role: What the tensor is, None for a tensor that no Llama has.
        layer: Number of its layer, None outside the layers.
        state: Which of an optimizer's tensors of that role it is, such as ``exp_avg``; empty for
            the weights themselves.
    """

    source: str
    target: str | None
    operation: Operation
    dtype: str
    shape: tuple[int, ...]
    reason: str
    heads: int | None = None
    role: Role | None = None
    layer: int | None = None
    state: str = ""

    @property
    def target_name(self) -> str:
        """Name of the target tensor, for a move of `Plan.written`."""
        assert self.target is not None
        return self.target

    @property
    def place(self) -> tuple[str, int | None]:
        """Role name and layer, for a move of `Plan.written`."""
        assert self.role is not None
        return self.role.name, self.layer

    @property
    def nbytes(self) -> int:
        """Bytes of the target tensor; 0 for a tensor that is dropped."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype] if self.target else 0


@dataclass(frozen=True)
class ValueCopy:
    """An entry of a trainer's state that is copied as it lies, without being opened.

    Attributes:
        source: Where it lies; or one that the source does not have and the target's release wants.
        target: Its name in the target.
    """

    source: StoredValue | MadeValue
    target: str


@dataclass(frozen=True, repr=False)
class Plan:
    """Everything that a conversion will do, or why it will not.

    Every source tensor is moved, dropped on purpose, or unknown.

    Attributes:
        source: The opened checkpoint, with parameters from its assets and fused tensors split.
        target: The options, with the format decided.
        params: The target's parameters, None if they are not known.
        moves: What becomes of each tensor of the model, in the order of the target.
        problems: Errors, which refuse the conversion, and warnings.
        unknown: Names of source tensors that do not belong to a Llama.
        missing: Names of tensors that a Llama of these parameters needs and the source lacks.
        config: config.json of the assets.
        assets: The folder that config.json and the small files come from, if one is known.
        further: Entries of a written config.json that do not follow from parameters and tensors.
        small_files: The files that are copied, by their path in the target.
        state_moves: With ``with_optimizer``, what becomes of the optimizer's tensors.
        values: With ``with_optimizer``, the other entries of the trainer's state.
    """

    source: Checkpoint
    target: Target
    params: LlamaParams | None
    moves: tuple[Move, ...]
    problems: tuple[Problem, ...]
    unknown: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    config: ModelConfig | None = None
    assets: Path | None = None
    further: Mapping[str, Any] = field(default_factory=dict)
    small_files: Mapping[str, Location] = field(default_factory=dict)
    state_moves: tuple[Move, ...] = ()
    values: tuple[ValueCopy, ...] = ()

    @property
    def errors(self) -> list[Problem]:
        """The problems that refuse the conversion."""
        return [problem for problem in self.problems if problem.level == "error"]

    @cached_property
    def written(self) -> tuple[Move, ...]:
        """The moves that write a tensor of the model, in the order of the target."""
        return tuple(move for move in self.moves if move.target is not None)

    @cached_property
    def stored(self) -> tuple[Move, ...]:
        """The moves that write any tensor: those of the model, then those of the optimizer."""
        return (*self.written, *self.state_moves)

    @property
    def bytes_to_read(self) -> int:
        """Bytes of tensors and values that the conversion reads, without its checks."""
        n_bytes = sum(self.source.tensors[move.source].nbytes for move in self.stored)
        return n_bytes + self._value_bytes

    @property
    def bytes_to_write(self) -> int:
        """Bytes of tensors and values in the target."""
        return sum(move.nbytes for move in self.stored) + self._value_bytes

    @property
    def _value_bytes(self) -> int:
        return sum(copy.source.length for copy in self.values)

    @property
    def trainer_state(self) -> dict[str, int]:
        """Number of entries of each kind of the trainer's state; empty without it."""
        # Roles that are stored together are one entry.
        kinds = {
            whole(one.target_name): f"{OPTIMIZER}.state.{one.state}" for one in self.state_moves
        }
        for name in (copy.target for copy in self.values):
            first, second, *_ = f"{name}.".split(".")
            kinds[name] = f"{first}.{second}" if first == OPTIMIZER else first
        return dict(Counter(kinds.values()))

    @property
    def peak_memory_bytes(self) -> int:
        """`PEAK_MEMORY_BYTES`, and what is on its way from another machine."""
        remote = self.source.remote
        # Drivers of stores hold what they receive once more.
        copies = 0 if remote is None else 1 if remote.path.commit else 2
        return PEAK_MEMORY_BYTES + copies * MOST_BYTES

    @property
    def counts(self) -> dict[str, int]:
        """Number of tensors per class: moved, dropped, unknown, missing."""
        moved = {move.source for move in self.written}
        dropped = {move.source for move in self.moves} - moved
        return {
            "moved": len(moved),
            "dropped": len(dropped),
            "unknown": len(self.unknown),
            "missing": len(self.missing),
        }

    def raise_for_errors(self) -> None:
        """Raise `RefusedError` with all errors, if there are any."""
        if self.errors:
            raise RefusedError(self.errors)

    def ready(self) -> tuple[LlamaParams, Layout]:
        """Return the parameters, and the layout of the source's q and k rows.

        Raises:
            RefusedError: The plan has errors.
        """
        self.raise_for_errors()
        # A plan without errors has both: their absence is an error.
        assert self.params is not None
        assert self.source.rope is not None
        return self.params, self.source.rope

    def to_json(self) -> dict[str, Any]:
        """Return the plan as ``llamaconv plan --json`` prints it.

        Returns:
            An object with ``source`` (path), ``target`` (the options of `Target`), ``params``
            (those of `LlamaParams`, or null), ``moves`` (source, target, operation, dtype, shape,
            reason), ``counts`` (see `counts`), ``trainer_state`` (see `trainer_state`), ``problems`` and ``warnings`` (messages),
            ``unknown`` and ``missing`` (tensor names), ``bytes_to_read``, ``bytes_to_write``,
            ``peak_memory_bytes`` (see `peak_memory_bytes`), and ``releases`` (what each TorchTitan
            release makes of the model: release, generation, flavour, why; empty unless the target
            is a DCP).
        """
        releases = self.releases()
        return {
            "source": str(self.source.path),
            "target": asdict(self.target),
            "params": self.params.to_json() if self.params else None,
            "moves": [
                {
                    "source": move.source,
                    "target": move.target,
                    "operation": move.operation,
                    "dtype": move.dtype,
                    "shape": list(move.shape),
                    "reason": move.reason,
                }
                for move in self.moves
            ],
            "counts": self.counts,
            "trainer_state": self.trainer_state,
            "problems": [problem.message for problem in self.errors],
            "warnings": [p.message for p in self.problems if p.level == "warning"],
            "unknown": list(self.unknown),
            "missing": list(self.missing),
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "peak_memory_bytes": self.peak_memory_bytes,
            "releases": [
                dict(zip(("release", "generation", "flavour", "why"), row, strict=True))
                for row in (releases.rows if releases else ())
            ],
        }

    def table(self, most: int = 60) -> FoldedTable:
        """Return one row per move; a notebook folds the layers of more than ``most``."""
        before = [*itertools.takewhile(lambda move: move.layer is None, self.moves)]
        after = [move for move in self.moves[len(before) :] if move.layer is None]
        layers: dict[int, list[Move]] = {}
        for move in self.moves:
            if move.layer is not None:
                layers.setdefault(move.layer, []).append(move)
        folds = [_fold(f"layer {layer}", moves) for layer, moves in layers.items()]
        kinds = [
            tuple((m.role, m.operation, m.dtype, m.shape) for m in one) for one in layers.values()
        ]
        if folds:
            # Layers like the first are one fold, in which each is a fold.
            alike = sum(kind == kinds[0] for kind in kinds)
            if alike == len(folds) > 2:
                numbers = [*layers]
                title = f"layers {numbers[1]} to {numbers[-1]}: each like layer {numbers[0]}"
                folds = [folds[0], Fold(title, (), folds[1:])]
            folds[0] = replace(folds[0], is_open=True)
        if before:
            folds.insert(0, _fold("before the layers", before))
        if after:
            folds.append(_fold("after the layers", after))
        columns = ("operation", "source", "target", "dtype", "shape", "why")
        return FoldedTable(columns, folds, caption=self.summary(), right=("shape",), most=most)

    def cost(self) -> Table:
        """Return tensors per operation, bytes to read and to write, and `peak_memory_bytes`."""
        operations = Counter(move.operation for move in self.moves)
        rows = [
            *((f"tensors: {operation}", number) for operation, number in operations.items()),
            *((f"trainer's state: {kind}", number) for kind, number in self.trainer_state.items()),
            ("bytes to read", size(self.bytes_to_read)),
            ("bytes to write", size(self.bytes_to_write)),
            ("memory on top of torch, at most", size(self.peak_memory_bytes)),
        ]
        return Table(("cost", ""), rows, right=("",))

    def releases(self) -> Table | None:
        """Return what each TorchTitan release makes of the model; None if this is not a DCP."""
        if self.target.format != "dcp" or self.params is None:
            return None
        return releases.fits(self.params, self.target.layout, self.source_trains, self.biases)

    @property
    def biases(self) -> frozenset[str]:
        """The roles of the biases that the target gets."""
        roles = (move.role for move in self.written)
        return frozenset(role.name for role in roles if role and role.is_bias)

    @property
    def source_trains(self) -> bool:
        """Whether the source holds the target's values in a form that TorchTitan reads too.

        That is Hugging Face's, in safetensors, with one name per tensor and no other dtype. A tied head
        that is not stored is made from the embedding by TorchTitan, too.
        """
        in_safetensors = all(
            piece.file.name.endswith(".safetensors")
            for tensor in self.source.tensors.values()
            for piece in tensor.pieces
        )
        same = all(
            (move.operation == "tie" and self.target.tie == "auto")
            or (
                move.operation in ("copy", "reorder")
                and move.role is not None
                and move.role.in_naming("huggingface", move.layer) == move.source
            )
            for move in self.written
        )
        return self.source.format == "huggingface" and in_safetensors and same

    def summary(self) -> str:
        """Return one line: source, target, layout, dtype, and the number of tensors per class."""
        target, counts = self.target, self.counts
        classes = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
        state = f"; {len(self.errors)} problems, nothing will be written" if self.errors else ""
        return (
            f"{printable(self.source.path.name)} → {target}, {target.layout} rows, "
            f"dtype {target.dtype}: {classes or 'no tensors'}{state}"
        )

    def __repr__(self) -> str:
        return f"<Plan {self.summary()}>"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _fold(title: str, moves: Sequence[Move]) -> Fold:
    counts = Counter(move.operation for move in moves)
    said = ", ".join(f"{number} {operation}" for operation, number in counts.items())
    return Fold(f"{title}: {said}", [_row(move) for move in moves])


def _row(move: Move) -> tuple[str, ...]:
    shape = " × ".join(map(str, move.shape))
    return (move.operation, move.source, move.target or "—", move.dtype, shape, move.reason)

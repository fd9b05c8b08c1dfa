"""The plan: every move from a source checkpoint to a target, with all problems at once.

The preview is the program: `convert` executes the very object that is shown here. `planner`
makes it. Limit: a plan is a value for one target; change an option and make another.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

from llamaconv import keys, titan
from llamaconv.opened import Checkpoint
from llamaconv.params import LlamaParams
from llamaconv.pieces import DTYPE_BYTES
from llamaconv.problems import Problem, RefusedError, printable
from llamaconv.tables import Table, size

Operation = Literal["copy", "reorder", "cast", "tie", "drop"]

# What a target option may be; the command line and the notebook offer the same.
CHOICES: dict[str, tuple[str, ...]] = {
    "to": ("auto", "dcp", "hf", "meta"),
    "generation": ("titan-0.3", "titan-0.2", "titan-2024"),
    "rope": ("interleaved", "half_split"),
    "dtype": ("keep", "float32", "bfloat16", "float16"),
    "tie": ("auto", "embedding", "head", "untie"),
}

# Measured with torch 2.13 on Linux: 401 MB resident for a conversion of 3 GB with its checks, of
# which 275 MB are the imports. Blocks and windows are bounded, so a larger model needs no more.
PEAK_MEMORY_BYTES = 450_000_000


@dataclass(frozen=True)
class Target:
    """What to make of a checkpoint; the options of the command line by the same names.

    ``to`` of "auto" is a DCP, and from a DCP the way back to Hugging Face. ``max_shard_size``
    is in bytes. ``assets`` is the folder that config.json and tokenizer come from, by default
    the source, or what its receipt names. Raises `RefusedError` for a value that is not offered.
    """

    to: str = "auto"
    generation: str = "titan-0.3"
    rope: keys.Layout = "interleaved"
    dtype: str = "keep"
    shards: int = 1
    max_shard_size: int = 5_000_000_000
    assets: str = ""
    tie: str = "auto"

    def __post_init__(self) -> None:
        problems = [
            Problem(f"{option} is {value!r}; one of {', '.join(CHOICES[option])} was expected")
            for option in CHOICES
            if (value := getattr(self, option)) not in CHOICES[option]
        ]
        if type(self.shards) is not int or not 1 <= self.shards <= 65536:
            problems.append(
                Problem(f"shards is {self.shards!r}; a number from 1 to 65536 was expected")
            )
        if type(self.max_shard_size) is not int or self.max_shard_size < 1:
            problems.append(
                Problem(
                    f"max_shard_size is {self.max_shard_size!r}; a number of bytes was expected"
                )
            )
        if problems:
            raise RefusedError(problems)

    def resolve(self, source: Checkpoint) -> Target:
        """The same with ``to`` decided."""
        if self.to != "auto":
            return self
        return replace(self, to="hf" if source.format == "dcp" else "dcp")

    @property
    def naming(self) -> str:
        """The column of `keys` that the target's names come from."""
        return {"hf": "huggingface", "meta": "meta"}.get(self.to, self.generation)

    @property
    def layout(self) -> keys.Layout:
        """The layout of the target's q and k rows; only a DCP leaves a choice."""
        return {"hf": "half_split", "meta": "interleaved"}.get(self.to, self.rope)  # type: ignore[return-value]

    def __str__(self) -> str:
        return {"hf": "Hugging Face", "meta": "Meta"}.get(self.to, f"dcp {self.generation}")


@dataclass(frozen=True)
class Move:
    """One row of the plan: what becomes of one source tensor, and why.

    Attributes:
        source: Name of the source tensor.
        target: Name of the target tensor, None for a tensor that is dropped.
        operation: What is done to it.
        dtype: The target's, by torch's name.
        shape: The target's.
        reason: Why, in words.
        heads: How many heads have their rows re-ordered, None for other operations.
        role: What the tensor is; None for one that no Llama has.
        layer: The number of its layer, None for a tensor outside of the layers.
    """

    source: str
    target: str | None
    operation: Operation
    dtype: str
    shape: tuple[int, ...]
    reason: str
    heads: int | None = None
    role: keys.Role | None = None
    layer: int | None = None

    @property
    def writes(self) -> str:
        """The target's name, of a move that has one (those of `Plan.written`)."""
        assert self.target is not None
        return self.target

    @property
    def place(self) -> tuple[str, int | None]:
        """Name of the role, and layer, of a move that writes."""
        assert self.role is not None
        return self.role.name, self.layer

    @property
    def nbytes(self) -> int:
        """Bytes of the target tensor; 0 for a dropped one."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype] if self.target else 0


@dataclass(frozen=True, repr=False)
class Plan:
    """Everything that a conversion will do, or why it will not.

    ``unknown`` and ``missing`` are the names that fit nowhere and the names that a Llama of
    these parameters needs. Every source tensor is moved, dropped on purpose, or unknown.
    """

    source: Checkpoint
    target: Target
    params: LlamaParams | None
    moves: tuple[Move, ...]
    problems: tuple[Problem, ...]
    unknown: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == "error"]

    @cached_property
    def written(self) -> tuple[Move, ...]:
        """The moves that write a tensor."""
        return tuple(move for move in self.moves if move.target is not None)

    @property
    def bytes_to_read(self) -> int:
        return sum(self.source.tensors[move.source].nbytes for move in self.written)

    @property
    def bytes_to_write(self) -> int:
        return sum(move.nbytes for move in self.written)

    @property
    def counts(self) -> dict[str, int]:
        """How many source tensors fall in each class, and how many are missing."""
        moved = {move.source for move in self.written}
        dropped = {move.source for move in self.moves} - moved
        return {
            "moved": len(moved),
            "dropped": len(dropped),
            "unknown": len(self.unknown),
            "missing": len(self.missing),
        }

    def check(self) -> None:
        """Raises `RefusedError` with every error, where there is one."""
        if self.errors:
            raise RefusedError(self.errors)

    def ready(self) -> tuple[LlamaParams, keys.Layout]:
        """Return the parameters and the layout of the source's rows, of a plan without errors.

        Raises:
            RefusedError: The plan has errors; with all of them.
        """
        self.check()
        # A plan without errors has both: their absence is an error.
        assert self.params is not None
        assert self.source.rope is not None
        return self.params, self.source.rope

    def to_json(self) -> dict[str, Any]:
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
            "problems": [problem.message for problem in self.errors],
            "warnings": [p.message for p in self.problems if p.level == "warning"],
            "unknown": list(self.unknown),
            "missing": list(self.missing),
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "peak_memory_bytes": PEAK_MEMORY_BYTES,
            "releases": [
                dict(zip(("release", "generation", "flavour", "why"), row, strict=True))
                for row in (releases.rows if releases else ())
            ],
        }

    def table(self, most: int = 60) -> Table:
        rows = [
            (
                move.source,
                move.target or "—",
                move.operation,
                move.dtype,
                " × ".join(map(str, move.shape)),
                move.reason,
            )
            for move in self.moves
        ]
        columns = ("source", "target", "operation", "dtype", "shape", "why")
        return Table(columns, rows, caption=self.summary(), right=("shape",), most=most)

    def cost(self) -> Table:
        """Bytes to read and to write, and the memory at the peak, torch included."""
        operations = Counter(move.operation for move in self.moves)
        rows = [
            *((f"tensors: {operation}", number) for operation, number in operations.items()),
            ("bytes to read", size(self.bytes_to_read)),
            ("bytes to write", size(self.bytes_to_write)),
            ("memory at the peak, at most", size(PEAK_MEMORY_BYTES)),
        ]
        return Table(("cost", ""), rows, right=("",))

    def releases(self) -> Table | None:
        """What each TorchTitan release makes of the model; None where the target is no DCP."""
        if self.target.to != "dcp" or self.params is None:
            return None
        return titan.fits(self.params, self.target.layout)

    def summary(self) -> str:
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

"""The reader model: a checkpoint is a set of named rectangles of bytes in files.

Every format opens to the same values, and everything after works on these alone. No format
is known here, and neither is torch: dtypes are torch's names as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llamaconv import keys
from llamaconv.params import LlamaParams
from llamaconv.problems import Problem, printable
from llamaconv.receipt import Receipt
from llamaconv.remote import Remote
from llamaconv.tables import Table, size

if TYPE_CHECKING:
    from llamaconv.place import Place

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "complex64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
}
# What a Llama's weights may be stored as; the others are quantised or no weights at all.
WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Piece:
    """One rectangle: row-major bytes from ``offset`` on in ``file``.

    ``start`` is where it sits in the tensor, ``shape`` its extent, both in elements.
    """

    file: Path | Remote
    offset: int
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def local_file(self) -> Path:
        """``file``, for who reads weights. Raises `RefusedError` where it is on the Hub."""
        if isinstance(self.file, Remote):
            raise self.file.refusal()
        return self.file


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype (torch's name), shape, and the pieces that make the tensor up.

    ``stored`` is the name of the tensor in the files that this one is rows of, if it is.
    ``is_part`` says that further files may hold more of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    stored: str = ""
    is_part: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def n_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(piece.file.name for piece in self.pieces))

    def not_covered(self) -> str:
        """What is wrong with how the pieces make the tensor up; nothing where they tile it."""
        for piece in self.pieces:
            ends = [start + n for start, n in zip(piece.start, piece.shape, strict=True)]
            if any(end > n for end, n in zip(ends, self.shape, strict=True)):
                return f"a piece in {piece.file.name} reaches beyond shape {list(self.shape)}"
        found = sum(prod(piece.shape) for piece in self.pieces)
        if found != prod(self.shape):
            return f"its pieces have {found} elements, {prod(self.shape)} expected"
        # Without an overlap, that many elements leave no gap.
        if _overlap([piece for piece in self.pieces if prod(piece.shape)]):
            return "two of its pieces overlap"
        return ""

    def rows_of(self, name: str, runs: Sequence[tuple[int, int]]) -> TensorInfo:
        """The tensor ``name`` made of runs of this one's rows (first, and the last excluded)."""
        pieces, length = [], 0
        for first, last in runs:
            for piece in self.pieces:
                top = piece.start[0]
                begin, end = max(first, top), min(last, top + piece.shape[0])
                if begin >= end:
                    continue
                skipped = (begin - top) * prod(piece.shape[1:]) * DTYPE_BYTES[self.dtype]
                pieces.append(
                    Piece(
                        piece.file,
                        piece.offset + skipped,
                        (length + begin - first, *piece.start[1:]),
                        (end - begin, *piece.shape[1:]),
                    )
                )
            length += last - first
        return TensorInfo(name, self.dtype, (length, *self.shape[1:]), tuple(pieces))


def _overlap(pieces: Sequence[Piece]) -> bool:
    """Whether any two pieces (none of them empty) have an element in common."""
    axes = range(len(pieces[0].start)) if pieces else ()
    # Along the axis with the most cuts there are few to compare each one with.
    axis = max(axes, key=lambda axis: len({piece.start[axis] for piece in pieces}), default=None)
    if axis is None:
        return len(pieces) > 1  # of a single element
    pieces = sorted(pieces, key=lambda piece: piece.start[axis])
    for number, one in enumerate(pieces):
        end = one.start[axis] + one.shape[axis]
        for at in range(number + 1, len(pieces)):
            other = pieces[at]
            if other.start[axis] >= end:
                break  # and so do all after it
            spans = zip(one.start, one.shape, other.start, other.shape, strict=True)
            if all(max(a, c) < min(a + n, c + m) for a, n, c, m in spans):
                return True
    return False


def shapes_by_role(
    tensors: Mapping[str, TensorInfo], naming: str | None
) -> dict[str, tuple[int, ...]]:
    """The shape of the first tensor of each role; names that ``naming`` knows not are left out."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        if known := keys.identify(name, naming):
            shapes.setdefault(known[0].name, tensor.shape)
    return shapes


@dataclass(frozen=True)
class Ignored:
    """A file or tensor that is left out on purpose, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """What a folder holds, read from headers only.

    ``naming`` is the column of `keys` that its names come from, None where no one fits;
    ``rope`` the layout of its q and k rows. ``place`` holds the headers that were read from a
    repository; it is None for a folder here, whose files can be looked at again. ``seen`` is size
    and time of change of each of these when they were opened.
    """

    path: Path | Remote
    format: Literal["huggingface", "meta", "dcp"]
    tensors: dict[str, TensorInfo]
    naming: str | None
    rope: keys.Layout | None
    params: LlamaParams | None
    problems: tuple[Problem, ...] = ()
    ignored: tuple[Ignored, ...] = ()
    receipt: Receipt | None = field(default=None, repr=False)
    place: Place | None = field(default=None, repr=False, compare=False)
    seen: Mapping[Path, tuple[int, int] | None] = field(default_factory=dict, repr=False)

    def remembered(self) -> Checkpoint:
        """The same, with ``seen`` as the files are now."""
        return replace(self, seen={file: _state(file) for file in self.local_files})

    def changed(self) -> list[Problem]:
        """One for each file that has gone, or is not as it was when its header was read."""
        return [
            Problem(
                f"{file}: {'has changed' if now else 'has gone'} since it was opened; open the "
                "source again when nothing writes to it"
            )
            for file, before in self.seen.items()
            if (now := _state(file)) != before
        ]

    @property
    def folder(self) -> Path | Remote:
        """What its files lie in, where ``path`` may be one of them."""
        if isinstance(self.path, Remote) or self.path.is_dir():
            return self.path
        return self.path.parent

    @property
    def local_path(self) -> Path:
        """``path``, for who reads weights. Raises `RefusedError` where they are on the Hub."""
        if isinstance(self.path, Remote):
            raise self.path.refusal()
        return self.path

    @property
    def local_files(self) -> list[Path]:
        """The files that hold tensors, for who reads weights; raises as `local_path` does."""
        pieces = (piece for tensor in self.tensors.values() for piece in tensor.pieces)
        return sorted({piece.local_file for piece in pieces})

    @property
    def generation(self) -> str | None:
        return self.naming if self.format == "dcp" else None

    @cached_property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == "error"]

    @property
    def faults(self) -> list[Problem]:
        """What must not be in a target: the errors, and the warnings that name tensors."""
        return [problem for problem in self.problems if problem.level == "error" or problem.names]

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "commit": self.path.commit if isinstance(self.path, Remote) else None,
            "format": self.format,
            "generation": self.generation,
            "rope": self.rope,
            "params": self.params.to_json() if self.params else None,
            "tensors": [
                {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "files": list(t.files)}
                for t in self.tensors.values()
            ],
            "total_bytes": self.total_bytes,
            "problems": [p.message for p in self.errors],
            "warnings": [p.message for p in self.problems if p.level == "warning"],
            "ignored": [str(ignored) for ignored in self.ignored],
        }

    def table(self) -> Table:
        rows = [
            (t.name, t.dtype, " × ".join(map(str, t.shape)), size(t.nbytes), ", ".join(t.files))
            for t in self.tensors.values()
        ]
        columns = ("tensor", "dtype", "shape", "size", "file")
        return Table(columns, rows, caption=self.summary(), right=("shape", "size"))

    def summary(self) -> str:
        kind = self.format if self.generation is None else f"{self.format} ({self.generation})"
        files = {file for tensor in self.tensors.values() for file in tensor.files}
        return (
            f"{printable(self.path.name)}: {kind}, {self.rope or 'no'} RoPE layout, {len(self.tensors)} tensors "
            f"in {len(files)} files, {self.parameters:,} elements, {size(self.total_bytes)}"
        )

    def __repr__(self) -> str:
        return f"<Checkpoint {self.summary()}>"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _state(file: Path) -> tuple[int, int] | None:
    """Size in bytes and time of change in nanoseconds, None where it is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns

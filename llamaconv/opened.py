"""A checkpoint as it is opened: what a folder holds, read from headers only.

Every format opens to the same value, and everything after works on it alone. No format is known
here, and neither is torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llamaconv import keys
from llamaconv.params import LlamaParams
from llamaconv.pieces import TensorInfo
from llamaconv.problems import Problem, printable
from llamaconv.receipt import Receipt
from llamaconv.remote import Remote
from llamaconv.tables import Table, size

if TYPE_CHECKING:
    from llamaconv.place import Place


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

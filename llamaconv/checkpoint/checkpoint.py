"""A checkpoint as it is opened: what a folder holds, read from headers only.

Every format opens to the same value, and everything after works on it alone. This module knows no
format and does without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llamaconv.checkpoint.address import local
from llamaconv.checkpoint.model_order import folded_rows, in_order, where
from llamaconv.checkpoint.receipt import Receipt
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.model.names import Layout
from llamaconv.model.params import LlamaParams
from llamaconv.report.errors import Problem, printable
from llamaconv.report.tables import Table, size

if TYPE_CHECKING:
    from llamaconv.checkpoint.folder import RemoteFolder


Format = Literal["huggingface", "meta", "dcp", "torch_checkpointing"]

OF_TRAINERS: tuple[Format, ...] = ("dcp", "torch_checkpointing")
"""The formats in which trainers save: names of a TorchTitan generation, no config.json."""


@dataclass(frozen=True)
class Ignored:
    """A file or tensor that is left out on purpose, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class ModelConfig:
    """What config.json or params.json says about the model.

    Attributes:
        path: The file.
        entries: What it holds, as it is.
        params: The parameters by it; None if a size is missing or impossible.
        problems: What is wrong in it and, as warnings, what it leaves out and what is used instead.
    """

    path: Path | RemoteFile
    entries: Mapping[str, Any]
    params: LlamaParams | None
    problems: tuple[Problem, ...]


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """What a folder holds, read from headers only.

    Attributes:
        path: The folder or file that was opened, or the repository.
        format: How it is stored.
        tensors: Every tensor that a model may use, by its name in the checkpoint.
        naming: The column of `names` that the names come from; None if they fit no column.
        rope: The layout of the q and k rows; None if it is unknown.
        params: The model's parameters; None if no file says them.
        problems: Everything that is wrong.
        ignored: Files and tensors that are left out on purpose.
        receipt: The receipt, if llamaconv wrote the checkpoint.
        config: config.json or params.json; None if there is none that can be read.
        remote: The repository or the folder of a store, with what was read of it; None for local files,
            which can be read again.
        seen: Size in bytes and time of modification in nanoseconds of each local file when it was
            opened.
    """

    path: Path | RemoteFile
    format: Format
    tensors: dict[str, TensorInfo]
    naming: str | None
    rope: Layout | None
    params: LlamaParams | None
    problems: tuple[Problem, ...] = ()
    ignored: tuple[Ignored, ...] = ()
    receipt: Receipt | None = field(default=None, repr=False)
    config: ModelConfig | None = field(default=None, repr=False)
    remote: RemoteFolder | None = field(default=None, repr=False, compare=False)
    seen: Mapping[Path, tuple[int, int] | None] = field(default_factory=dict, repr=False)

    def remembered(self) -> Checkpoint:
        """Return the same checkpoint with ``seen`` as its files are now."""
        return replace(self, seen={file: _state(file) for file in self.local_files})

    def changed(self) -> list[Problem]:
        """Return a problem for each file that was deleted or modified after it was opened."""
        found = [
            Problem(
                f"{file}: {'modified' if now else 'deleted'} since it was opened; open the "
                "source again when nothing writes to it"
            )
            for file, before in self.seen.items()
            if (now := _state(file)) != before
        ]
        return found + (self.remote.changed() if self.remote else [])

    @property
    def folder(self) -> Path | RemoteFile:
        """The folder of its files; ``path`` may be a file in it."""
        if isinstance(self.path, RemoteFile):
            return self.remote.path if self.remote else self.path
        if self.path.is_dir():
            return self.path
        return self.path.parent

    @property
    def local_path(self) -> Path:
        """``path``, to read weights from. Raises `RefusedError` if it is on the Hub."""
        return local(self.path)

    @property
    def local_files(self) -> list[Path]:
        """The files that hold tensors. Raises `RefusedError` if they are on the Hub."""
        pieces = (piece for tensor in self.tensors.values() for piece in tensor.pieces)
        return sorted({piece.local_file for piece in pieces})

    @property
    def file_bytes(self) -> dict[str, int]:
        """Bytes of each file that holds tensors, by its name."""
        files = {piece.file for tensor in self.tensors.values() for piece in tensor.pieces}
        return {
            file.name: file.stat().st_size if isinstance(file, Path) else file.size
            for file in sorted(files, key=lambda file: file.name)
        }

    @property
    def resolved_path(self) -> str:
        """``path`` without links, or the address of a repository at its commit."""
        return str(self.path.resolve() if isinstance(self.path, Path) else self.path)

    @property
    def generation(self) -> str | None:
        """The generation of TorchTitan names, for what a trainer saved."""
        return self.naming if self.format in OF_TRAINERS else None

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def errors(self) -> list[Problem]:
        """The problems that stop a conversion."""
        return [problem for problem in self.problems if problem.level == "error"]

    @property
    def blocking_problems(self) -> list[Problem]:
        """What must not be in a target: the errors, and the warnings that name tensors."""
        return [problem for problem in self.problems if problem.level == "error" or problem.names]

    def to_json(self) -> dict[str, Any]:
        """Return what ``inspect --json`` prints.

        Returns:
            ``path``, ``commit`` (of a repository), ``format``, ``generation``, ``rope``,
            ``params``; ``tensors``, each with ``name``, ``dtype``, ``shape`` and ``files``;
            ``total_bytes``; ``problems``, ``warnings`` and ``ignored``, each a list of texts.
        """
        return {
            "path": str(self.path),
            "commit": self.path.commit if isinstance(self.path, RemoteFile) else None,
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

    def table(self, most: int = 60) -> Table:
        """Return one row per tensor, in the order of a forward pass; ``most`` of them are shown."""
        rows = [
            (t.name, t.dtype, " × ".join(map(str, t.shape)), size(t.nbytes), where(t.files))
            for t in in_order(self.tensors.values(), self.naming)
        ]
        columns = ("tensor", "dtype", "shape", "size", "file")
        return Table(columns, rows, caption=self.summary(), right=("shape", "size"), most=most)

    def folded(self) -> Table:
        """Return one row for all layers of one role, shape and dtype."""
        columns = ("tensor", "tensors", "dtype", "shape", "size", "file")
        rows = folded_rows(self.tensors.values(), self.naming)
        right = ("tensors", "shape", "size")
        return Table(columns, rows, caption=self.summary(), right=right)

    def summary(self) -> str:
        """Return format, layout and size in one line."""
        kind = self.format if self.generation is None else f"{self.format} ({self.generation})"
        files = {file for tensor in self.tensors.values() for file in tensor.files}
        return (
            f"{printable(self.path.name)}: {kind}, {self.rope or 'no'} RoPE layout, "
            f"{len(self.tensors)} tensors in {len(files)} files, "
            f"{self.parameters:,} elements, {size(self.total_bytes)}"
        )

    def __repr__(self) -> str:
        return f"<Checkpoint {self.summary()}>"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _state(file: Path) -> tuple[int, int] | None:
    """Return size in bytes and time of modification in nanoseconds; None if it cannot be read."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns

"""The files of a Hugging Face folder, and its index compared with the headers of its files.

transformers has two kinds of weight files, safetensors and torch's. An index maps each tensor name
to a file; `read_weight_map` reads it, `read_indexed` the header of every file that it names. Opening a
folder reports how they differ as problems, `index_diff` as a table.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.folder import Folder, LocalFolder
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.checkpoint.untrusted.values import is_bare_name
from llamaconv.report.errors import Problem, RefusedError, printable
from llamaconv.report.tables import Sentence, Table

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Kind:
    """A kind of weight files: the names of index and single file, and a pattern."""

    index: str
    single: str
    files: str


SAFETENSORS = Kind(INDEX, SINGLE, "*.safetensors")
BIN = Kind("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin")


@dataclass(frozen=True)
class IndexedFiles:
    """An index, and the headers of the files that it names.

    Attributes:
        path: The index.
        weight_map: The file of each tensor, as the index has it.
        headers: The tensors of each file that could be read.
        unreadable: The problems of each other file.
        stated_bytes: ``total_size`` of the index, whatever it is.
    """

    path: Path | RemoteFile
    weight_map: dict[str, str]
    headers: dict[str, dict[str, TensorInfo]]
    unreadable: dict[str, list[Problem]]
    stated_bytes: object

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors that are in the file that the index names, in its order."""
        return {
            name: self.headers[file][name]
            for name, file in self.weight_map.items()
            if name in self.headers.get(file, ())
        }

    @cached_property
    def misplaced(self) -> dict[str, str]:
        """Tensors that are not in the file that the index names: the file that has them, or ""."""
        where = {name: file for file, tensors in self.headers.items() for name in tensors}
        return {
            name: where.get(name, "")
            for name, file in self.weight_map.items()
            if file in self.headers and name not in self.headers[file]
        }

    def names_in(self, files: Collection[str]) -> tuple[str, ...]:
        """Return the tensors that the index says are in ``files``."""
        return tuple(name for name, file in self.weight_map.items() if file in files)

    @property
    def actual_bytes(self) -> int:
        """Bytes of `tensors`."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class WeightMap:
    """An index as it was read, without the headers of its files.

    Attributes:
        path: The index.
        files: The file of each tensor.
        stated_bytes: ``total_size`` of the index, whatever it is.
    """

    path: Path | RemoteFile
    files: dict[str, str]
    stated_bytes: object


def read_weight_map(folder: Folder, name: str) -> WeightMap:
    """Read the index ``name`` of ``folder``.

    Raises:
        RefusedError: The index cannot be read, or maps no names to files.
    """
    path = folder.path / name
    index = folder.read_json(name)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise RefusedError(
            f"{path}: no weight_map from tensor names to file names. Download it again"
        )
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    return WeightMap(path, weight_map, stated)


def read_indexed(folder: Folder, index: WeightMap) -> IndexedFiles:
    """Read the header of each file that ``index`` names."""
    path = index.path
    headers: dict[str, dict[str, TensorInfo]] = {}
    unreadable: dict[str, list[Problem]] = {}
    for file in dict.fromkeys(index.files.values()):
        # An untrusted index must not have files of other folders read.
        if not is_bare_name(file):
            reason = f"{path}: {printable(file)!r} is not a bare file name; it was not opened"
            unreadable[file] = [Problem(reason)]
        elif not folder.is_file(file):
            unreadable[file] = [Problem(f"{folder.path / file}: {folder.why_no_file(file)}")]
        else:
            tensors, problems = folder.read_header(file)
            if any(problem.level == "error" for problem in problems):
                unreadable[file] = problems
            else:
                headers[file] = tensors
    return IndexedFiles(path, index.files, headers, unreadable, index.stated_bytes)


def incomplete(folder: Folder) -> str:
    """Return the likely cause of a missing file, as a sentence."""
    upload = isinstance(folder.path, RemoteFile)
    return f"The {'upload' if upload else 'download'} is incomplete"


def index_diff(checkpoint: Checkpoint) -> Table | Sentence:
    """Compare the index of a Hugging Face folder with the headers of its files.

    Returns:
        One row per tensor that only one of them has or that is in another file, per file that
        cannot be read, and for a wrong ``total_size``; or a sentence if there is nothing to show.
    """
    if checkpoint.format == "dcp":
        return Sentence("A DCP has no headers to compare: .metadata alone says where tensors are.")
    if checkpoint.format == "torch_checkpointing":
        return Sentence(
            "torch_checkpointing has no index: metadata.pkl alone says which part is in which file."
        )
    if checkpoint.format == "meta":
        return Sentence("Meta's format has no index: each file lists its own tensors.")
    if isinstance(checkpoint.path, Path) and not checkpoint.path.exists():
        return Sentence(f"{checkpoint.path.name} was opened, but no longer exists.")
    folder, name = _folder_of(checkpoint)
    if not folder.is_file(name):
        return Sentence("There is no index: the headers alone say where each tensor is.")
    try:
        index = read_indexed(folder, read_weight_map(folder, name))
    except RefusedError:
        return Sentence(f"{name} cannot be read; see the problems.")
    rows = _differences(folder, index)
    if not rows:
        return Sentence(
            f"Index and headers agree: {len(index.weight_map):,} tensors in "
            f"{len(index.headers):,} files, {index.actual_bytes:,} bytes."
        )
    columns = ("tensor or file", "the index says", "the headers say")
    return Table(columns, rows, caption=f"index and headers differ in {len(rows):,} rows")


def _differences(folder: Folder, index: IndexedFiles) -> list[tuple[str, str, str]]:
    rows = [
        (file, "a file", without_path(folder.path / file, problems[0].message))
        for file, problems in sorted(index.unreadable.items())
    ]
    rows += [
        (name, index.weight_map[name], found or "in no file")
        for name, found in index.misplaced.items()
    ]
    rows += [
        (name, "nothing", file)
        for file, tensors in index.headers.items()
        for name in tensors
        if name not in index.weight_map
    ]
    if index.stated_bytes != index.actual_bytes:
        actual = f"{index.actual_bytes} bytes in what could be read"
        rows.append(("total_size", f"{index.stated_bytes} bytes", actual))
    return rows


def _folder_of(checkpoint: Checkpoint) -> tuple[Folder, str]:
    """Return where the files of ``checkpoint`` can be read again, and the name of their index."""
    if checkpoint.remote is not None:
        return checkpoint.remote, INDEX
    folder = checkpoint.folder
    assert isinstance(folder, Path)
    has_only_bin = (folder / BIN.index).exists() and not (folder / INDEX).exists()
    kind = BIN if has_only_bin else SAFETENSORS
    return LocalFolder(folder), kind.index


def without_path(path: Path | RemoteFile, message: str) -> str:
    """Return ``message`` without the folder, or the file, that a table names already."""
    return message.replace(f"{path}/", "").removeprefix(f"{path}: ")

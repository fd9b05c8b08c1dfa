"""A Hugging Face index against the headers of the files that it names, one by one.

Opening a folder reports such differences as problems, a sentence each; this is the whole list.
Reads headers and JSON, without torch except where the files are torch's.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llamaconv.formats import huggingface
from llamaconv.opened import Checkpoint
from llamaconv.pieces import TensorInfo
from llamaconv.place import Place, try_json
from llamaconv.remote import Remote
from llamaconv.tables import Sentence, Table


def index_diff(checkpoint: Checkpoint) -> Table | Sentence:
    """What a Hugging Face index says against what the headers of its files say.

    A row for each tensor that only one of them has or that lies in another file, for each file
    that cannot be read, and for a wrong ``total_size``.
    """
    if checkpoint.format == "dcp":
        return Sentence("A DCP has no headers to compare: .metadata alone says what lies where.")
    if checkpoint.format == "meta":
        return Sentence("Meta's format has no index: each file says itself what it holds.")
    if isinstance(checkpoint.path, Path) and not checkpoint.path.exists():
        return Sentence(f"{checkpoint.path.name} was opened, but is not there any more.")
    place, index_name = huggingface.place_of(checkpoint)
    if not place.is_file(index_name):
        return Sentence("There is no index: the headers alone say where each tensor lies.")
    index = try_json(place, index_name, []) or {}
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
        return Sentence(f"{index_name} cannot be read; see the problems.")
    held, rows = _headers(place, sorted(set(listed.values())))
    where = {name: file for file, tensors in held.items() for name in tensors}
    for name, file in listed.items():
        if file in held and name not in held[file]:
            rows.append((name, file, where.get(name, "in no file")))
    rows += [
        (name, listed.get(name, "nothing"), file)
        for file, tensors in held.items()
        for name in tensors
        if name not in listed
    ]
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(
        tensor.nbytes
        for file, tensors in held.items()
        for tensor in tensors.values()
        if listed.get(tensor.name) == file
    )
    if stated != actual:
        rows.append(("total_size", f"{stated} bytes", f"{actual} bytes in what could be read"))
    if not rows:
        return Sentence(
            f"Index and headers agree: {len(listed):,} tensors in {len(held):,} files, {actual:,} bytes."
        )
    columns = ("tensor or file", "the index says", "the headers say")
    return Table(columns, rows, caption=f"index and headers differ at {len(rows):,} places")


def _headers(
    place: Place, files: Iterable[str]
) -> tuple[dict[str, dict[str, TensorInfo]], list[tuple[str, str, str]]]:
    """Tensors by file, and a row for each file that gives none."""
    held: dict[str, dict[str, TensorInfo]] = {}
    rows = []
    for file in files:
        # An index of a stranger must not make other folders be read.
        if Path(file).name != file or "\\" in file or "\0" in file:
            rows.append((file, "a file", "not a bare file name; not opened"))
        elif not place.is_file(file):
            rows.append((file, "a file", "is not there"))
        else:
            tensors, problems = place.read_header(file)
            if problems:
                message = without_path(place.path / file, problems[0].message)
                rows.append((file, "a file", message))
            else:
                held[file] = tensors
    return held, rows


def without_path(path: Path | Remote, message: str) -> str:
    """The message without the folder, or the file, that the table names already."""
    return message.replace(f"{path}/", "").removeprefix(f"{path}: ")

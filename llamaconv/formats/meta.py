"""Meta's original files: ``consolidated.NN.pth`` and params.json, in the folder or ``original/``.

With several files every file has its part of each matrix: rows of wq, wk, wv, w1, w3 and output,
columns of wo and w2, rows or columns of the embedding (Llama 3 and Llama 1, 2), and a copy of
every norm. Headers are read only; norms, which are short, are compared.
"""

from __future__ import annotations

import re
from dataclasses import replace
from math import inf, isnan
from pathlib import Path

from llamaconv import keys, receipt
from llamaconv.compare import same_bytes
from llamaconv.files import try_json
from llamaconv.formats.torch_file import read_header
from llamaconv.opened import Checkpoint, Ignored
from llamaconv.params_json import from_params_json
from llamaconv.piece_reader import PieceReader
from llamaconv.pieces import WEIGHT_DTYPES, Piece, TensorInfo, shapes_by_role
from llamaconv.problems import Problem, some, warning
from llamaconv.torch_rows import read_rows

_FILE = re.compile(r"consolidated\.(\d+)\.pth")
# The largest released model has 16.
_MOST_FILES = 4096
# Elements of a norm that are compared at once; the widest Llama's has 16,384.
_BLOCK = 1 << 20
# Copies of a norm that differ by more are of different models.
NORM_TOLERANCE = 0.01


def find_folder(path: Path) -> Path | None:
    """The folder that holds consolidated files: ``path``, its ``original/``, or None."""
    for folder in (path, path / "original"):
        if any(_FILE.fullmatch(name.name) for name in folder.glob("consolidated.*.pth")):
            return folder
    return None


def open_folder(path: Path) -> Checkpoint:
    """The checkpoint in ``path`` (see `find_folder`), from headers; problems inside."""
    folder = find_folder(path) or path
    opener = _Opener(folder)
    opener.read_files()
    entries = try_json(folder / "params.json", opener.problems)
    params = None
    if entries is not None:
        shapes = shapes_by_role(opener.tensors, "meta")
        params, problems = from_params_json(entries, shapes, str(folder / "params.json"))
        opener.problems += problems
        if params and _ties(opener.tensors):
            params = replace(params, tied=True)
    written = receipt.try_read(folder, opener.problems)
    if written and params:
        # params.json has no factor of the scaling and does not say what is tied.
        params = written.params
    return Checkpoint(
        path=path,
        format="meta",
        tensors=opener.tensors,
        naming="meta",
        rope="interleaved",
        params=params,
        problems=tuple(opener.problems),
        ignored=tuple(opener.ignored),
        receipt=written,
    )


def _ties(tensors: dict[str, TensorInfo]) -> bool:
    """Whether the head is the embedding; params.json does not say, so the bytes do."""
    embedding, head = (tensors.get(f"{name}.weight") for name in ("tok_embeddings", "output"))
    if embedding is None or head is None:
        return head is None
    return embedding.pieces == head.pieces or same_bytes(embedding, head)


class _Opener:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self.problems: list[Problem] = []
        self.ignored: list[Ignored] = []
        self.apart: dict[str, float] = {}

    def read_files(self) -> None:
        numbered = {
            int(match[1]): path
            for path in self.folder.glob("consolidated.*.pth")
            if (match := _FILE.fullmatch(path.name))
        }
        if max(numbered, default=0) > _MOST_FILES:
            self.problems.append(
                Problem(
                    f"{self.folder}: there is a {numbered[max(numbered)].name}; no model is cut into "
                    f"more than {_MOST_FILES} files"
                )
            )
            return
        absent = sorted(set(range(max(numbered, default=0) + 1)) - set(numbered))
        if absent:
            self.problems.append(
                Problem(
                    f"{self.folder}: consolidated files {some(map(str, absent))} are not there; "
                    f"{max(numbered, default=0) + 1} files from 0 on were expected. The download "
                    "is incomplete"
                )
            )
            return
        parts: dict[str, list[TensorInfo]] = {}
        for number in sorted(numbered):
            tensors, problems = read_header(numbered[number])
            self.problems += problems
            for name, tensor in tensors.items():
                parts.setdefault(name, []).append(tensor)
        if self.problems:
            return
        # Norms are whole in every file, and as long as the model is wide.
        dims = {p.shape[0] for name, ps in parts.items() if "norm" in name for p in ps if p.shape}
        dim = dims.pop() if len(dims) == 1 else None
        for name, pieces in parts.items():
            self._join(name, pieces, len(numbered), dim)
        if self.apart:
            self._report_norms()

    def _join(self, name: str, parts: list[TensorInfo], n_files: int, dim: int | None) -> None:
        known = keys.identify(name, "meta")
        if keys.is_computed(name):
            self.ignored.append(Ignored(name, "RoPE's angles: every model computes them anew"))
            return
        if n_files == 1:
            self.tensors[name] = parts[0]
            return
        dtypes = {part.dtype for part in parts}
        if known is None or len(parts) != n_files or len(dtypes) != 1:
            if known is not None:
                what = f"in {len(parts)} of {n_files} files, as {' and '.join(sorted(dtypes))}"
                self.problems.append(
                    Problem(
                        f"{self.folder}: {name} is {what}; the files are of different models",
                        (name,),
                    )
                )
            self.tensors[name] = parts[0]
            return
        if odd := {part.shape for part in parts if len(part.shape) != len(known[0].axes)}:
            self.problems.append(
                Problem(
                    f"{self.folder}: {name} has the shape {list(min(odd))}, {len(known[0].axes)} "
                    "axes expected; the files are of another model",
                    (name,),
                )
            )
            self.tensors[name] = parts[0]
            return
        if len(parts[0].shape) == 1 and not name.endswith(".bias"):
            self._compare_copies(name, parts)
            self.tensors[name] = parts[0]
            return
        axis = self._axis(name, parts, dim)
        if axis is None:
            self._two_readings(name, parts)
            return
        rest = {part.shape[:axis] + part.shape[axis + 1 :] for part in parts}
        if len(rest) != 1:
            self._unfit(name, parts)
            return
        self.tensors[name] = _joined(name, parts, axis)

    def _unfit(self, name: str, parts: list[TensorInfo]) -> None:
        shapes = some(str(list(part.shape)) for part in parts)
        self.problems.append(
            Problem(
                f"{self.folder}: the parts of {name} do not fit each other: {shapes}; the "
                "files are of different models",
                (name,),
            )
        )

    def _axis(self, name: str, parts: list[TensorInfo], dim: int | None) -> int | None:
        if name != "tok_embeddings.weight" or len(parts) == 1:
            return keys.cut_axis(name)
        # Rows where each part is as wide as the model (Llama 3), columns otherwise (Llama 1, 2).
        width = parts[0].shape[1]
        if dim == width:
            return 0
        return 1 if dim == width * len(parts) else None

    def _two_readings(self, name: str, parts: list[TensorInfo]) -> None:
        n_rows, width = parts[0].shape
        n_files = len(parts)
        self.problems.append(
            Problem(
                f"{self.folder}: {name} is {[n_rows, width]} in each of {n_files} files, and no norm "
                f"says which: cut by rows (Llama 3) it is {[n_rows * n_files, width]}, by columns "
                f"(Llama 1, 2) {[n_rows, width * n_files]}. A file is missing, or they are of "
                "different models",
                (name,),
            )
        )

    def _compare_copies(self, name: str, parts: list[TensorInfo]) -> None:
        if len({part.shape for part in parts}) != 1:
            self.problems.append(
                Problem(f"{self.folder}: the copies of {name} are of different lengths", (name,))
            )
            return
        others = [part for part in parts[1:] if not same_bytes(parts[0], part)]
        if parts[0].dtype in WEIGHT_DTYPES and others:
            self.apart[name] = max(_apart(parts[0], other) for other in others)

    def _report_norms(self) -> None:
        name, largest = max(self.apart.items(), key=lambda item: item[1])
        message = (
            f"{self.folder}: {len(self.apart)} norms differ between the files, by {largest:.2g} at "
            f"most ({name}); "
        )
        if largest > NORM_TOLERANCE:
            self.problems.append(
                Problem(
                    f"{message}above {NORM_TOLERANCE:g} the files are of different models",
                    tuple(self.apart),
                )
            )
        else:
            self.problems.append(warning(f"{message}the first file's are taken", self.apart))


def _joined(name: str, parts: list[TensorInfo], axis: int) -> TensorInfo:
    pieces: list[Piece] = []
    length = 0
    for part in parts:
        start = [0] * len(part.shape)
        start[axis] = length
        pieces.append(Piece(part.pieces[0].file, part.pieces[0].offset, tuple(start), part.shape))
        length += part.shape[axis]
    shape = (*parts[0].shape[:axis], length, *parts[0].shape[axis + 1 :])
    return TensorInfo(name, parts[0].dtype, shape, tuple(pieces))


def _apart(one: TensorInfo, other: TensorInfo) -> float:
    """The largest difference of two vectors, inf where one is no number.

    A block at a time, since a header may claim any length.
    """
    largest = 0.0
    with PieceReader() as reader:
        for first in range(0, one.n_rows, _BLOCK):
            last = min(first + _BLOCK, one.n_rows)
            a, b = (read_rows(reader, side, first, last).float() for side in (one, other))
            apart = (a - b).abs().max().item()
            # max would pass a nan by.
            largest = inf if isnan(apart) else max(largest, apart)
    return largest

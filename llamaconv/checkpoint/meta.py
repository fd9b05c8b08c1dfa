"""Meta's original files: ``consolidated.NN.pth`` and params.json, in the folder or ``original/``.

Each of several files has its part of each matrix: rows of wq, wk, wv, w1, w3 and output, columns
of wo and w2, rows (Llama 3) or columns (Llama 1, 2) of the embedding, and a copy of every norm.
Only headers are read, and norms, which are short, to compare their copies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf, isnan
from pathlib import Path
from typing import Any

from llamaconv.checkpoint import receipt
from llamaconv.checkpoint.checkpoint import Checkpoint, Ignored, ModelConfig
from llamaconv.checkpoint.folder import OpenableFolder, try_json_in
from llamaconv.checkpoint.reader import PieceReader, same_bytes
from llamaconv.checkpoint.remote_file import RemoteFile
from llamaconv.checkpoint.tensors import WEIGHT_DTYPES, Piece, TensorInfo, shapes_by_role
from llamaconv.model.names import bare_name, cut_axis, identify, why_needless
from llamaconv.model.params_json import PARAMS, completed, from_params_json
from llamaconv.report.errors import Problem, first_few, warning

CONSOLIDATED = "consolidated.*.pth"
"""Pattern of the files' names."""

_FILE = re.compile(r"consolidated\.(\d+)\.pth")
# The largest released model has 16.
_MOST_FILES = 4096
# Bytes of a norm that are compared at once; that of the widest Llama has 32 kB.
_BLOCK_BYTES = 4 << 20

NORM_TOLERANCE = 0.01
"""Copies of a norm that differ by more belong to different models."""


def find_folder(folder: OpenableFolder) -> OpenableFolder | None:
    """Return the folder of the consolidated files: ``folder``, its ``original/``, or None."""
    for one in (folder, folder.subfolder("original")):
        if any(map(_FILE.fullmatch, one.names())):
            return one
    return None


def open_meta(top: OpenableFolder) -> Checkpoint:
    """Open the files in ``top`` (see `find_folder`) from headers.

    Never raises for bad content: everything wrong is in ``problems``.
    """
    folder = find_folder(top) or top
    opener = MetaOpener(folder)
    opener.read_files()
    entries = try_json_in(folder, PARAMS, opener.problems)
    path = folder.path / PARAMS
    config = None if entries is None else read_params_json(path, entries, opener.tensors)
    written = receipt.try_read_in(folder, opener.problems)
    return meta_checkpoint(
        top.path, opener.tensors, config, written, opener.problems, opener.ignored
    )


def meta_checkpoint(
    path: Path | RemoteFile,
    tensors: dict[str, TensorInfo],
    config: ModelConfig | None,
    written: receipt.Receipt | None,
    problems: Iterable[Problem],
    ignored: Iterable[Ignored],
) -> Checkpoint:
    """Return the checkpoint that ``tensors`` of Meta's names are, in whatever files they are.

    Args:
        path: What was opened.
        tensors: The tensors.
        config: What params.json, or config.json in its place, says about the model.
        written: The receipt.
        problems: What was found so far, without the problems of ``config``.
        ignored: What is left out.
    """
    params = config.params if config else None
    if params and _ties(tensors):
        params = replace(params, tied=True)
    if written and params:
        params = completed(params, written.params)
    # A receipt says what params.json cannot.
    of_config = (
        [one for one in config.problems if not (written and one.is_inherent)] if config else []
    )
    return Checkpoint(
        path=path,
        format="meta",
        tensors=tensors,
        naming="meta",
        rope="interleaved",
        params=params,
        problems=(*problems, *of_config),
        ignored=tuple(ignored),
        receipt=written,
        config=config,
    )


def read_params_json(
    path: Path | RemoteFile, entries: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> ModelConfig:
    """Return what the ``entries`` of params.json say about the model of ``tensors``."""
    params, problems = from_params_json(entries, shapes_by_role(tensors, "meta"), str(path))
    return ModelConfig(path, entries, params, tuple(problems))


def _ties(tensors: dict[str, TensorInfo]) -> bool:
    """Return whether the head is the embedding; params.json does not say, so the bytes do."""
    outer = {bare_name(name, "meta"): tensor for name, tensor in tensors.items()}
    embedding, head = (outer.get(f"{name}.weight") for name in ("tok_embeddings", "output"))
    if embedding is None or head is None:
        return head is None
    if embedding.pieces == head.pieces:
        return True
    return embedding.is_here and head.is_here and same_bytes(embedding, head)


class MetaOpener:
    """Joins the parts of each tensor, and collects problems and what is ignored."""

    def __init__(self, folder: OpenableFolder) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self.problems: list[Problem] = []
        self.ignored: list[Ignored] = []
        self._norm_differences: dict[str, float] = {}

    def read_files(self) -> None:
        """Read the header of every file, and join what belongs together."""
        files = self._numbered_files()
        parts: dict[str, list[TensorInfo]] = {}
        for file in files:
            tensors, problems = self.folder.read_header(file)
            self.problems += [replace(problem, explains_missing=True) for problem in problems]
            for name, tensor in tensors.items():
                parts.setdefault(name, []).append(tensor)
        if any(problem.level == "error" for problem in self.problems):
            return
        # Norms are whole in every file, and as long as the model is wide.
        dims = {p.shape[0] for name, ps in parts.items() if "norm" in name for p in ps if p.shape}
        dim = dims.pop() if len(dims) == 1 else None
        for name, its_parts in parts.items():
            if reason := why_needless(name):
                self.ignored.append(Ignored(name, reason))
            elif len(files) == 1:
                self.tensors[name] = its_parts[0]
            elif joined := self._joined(name, its_parts, len(files), dim):
                self.tensors[name] = joined
        if self._norm_differences:
            self._report_norms()

    def _numbered_files(self) -> list[str]:
        """Return the files in order; report those that are missing."""
        numbered = {
            int(match[1]): name for name in self.folder.names() if (match := _FILE.fullmatch(name))
        }
        last = max(numbered, default=0)
        if last > _MOST_FILES:
            self._error(
                f"{numbered[last]} has too high a number; no model is cut into more than "
                f"{_MOST_FILES} files"
            )
            return []
        if missing := sorted(set(range(last + 1)) - set(numbered)):
            self._error(
                f"{len(missing)} of {last + 1} files are missing: "
                f"{first_few(f'consolidated.{number:02}.pth' for number in missing)}. The download "
                "is incomplete"
            )
        return [numbered[number] for number in sorted(numbered)]

    def _error(self, message: str, *names: str) -> None:
        problem = Problem(f"{self.folder.path}: {message}", names, explains_missing=not names)
        self.problems.append(problem)

    def _joined(
        self, name: str, parts: list[TensorInfo], n_files: int, dim: int | None
    ) -> TensorInfo | None:
        """Return the tensor that the parts make up. If they do not fit, report it."""
        known = identify(name, "meta")
        if known is None:
            return parts[0]
        n_axes = len(known[0].axes)
        dtypes = {part.dtype for part in parts}
        if len(parts) != n_files or len(dtypes) != 1:
            self._error(
                f"{name} is in {len(parts)} of {n_files} files, as {' and '.join(sorted(dtypes))}; "
                "the files belong to different models",
                name,
            )
        elif odd := {part.shape for part in parts if len(part.shape) != n_axes}:
            self._error(
                f"{name} has the shape {list(min(odd))} instead of {n_axes} axes; the files belong "
                "to another model",
                name,
            )
        elif n_axes == 1 and not name.endswith(".bias"):
            self._compare_copies(name, parts)
        else:
            return self._concatenated(name, parts, dim)
        return parts[0]

    def _concatenated(
        self, name: str, parts: list[TensorInfo], dim: int | None
    ) -> TensorInfo | None:
        axis = self._axis(name, parts, dim)
        if axis is None:
            self._two_readings(name, parts)
        elif len({part.shape[:axis] + part.shape[axis + 1 :] for part in parts}) != 1:
            shapes = first_few(str(list(part.shape)) for part in parts)
            self._error(
                f"the parts of {name} do not fit each other: {shapes}; the files belong to "
                "different models",
                name,
            )
        else:
            return _concatenate(name, parts, axis)
        return None

    def _axis(self, name: str, parts: list[TensorInfo], dim: int | None) -> int | None:
        if bare_name(name, "meta") != "tok_embeddings.weight":
            return cut_axis(name)
        # Cut by rows if each part is as wide as the model (Llama 3), else by columns (Llama 1, 2).
        width = parts[0].shape[1]
        if dim == width:
            return 0
        return 1 if dim == width * len(parts) else None

    def _two_readings(self, name: str, parts: list[TensorInfo]) -> None:
        n_rows, width = parts[0].shape
        n_files = len(parts)
        self._error(
            f"{name} is {[n_rows, width]} in each of {n_files} files, and no norm tells how it is "
            f"cut: by rows (Llama 3) it is {[n_rows * n_files, width]}, by columns (Llama 1, 2) "
            f"{[n_rows, width * n_files]}. A file is missing, or the files belong to different "
            "models",
            name,
        )

    def _compare_copies(self, name: str, parts: list[TensorInfo]) -> None:
        if len({part.shape for part in parts}) != 1:
            self._error(f"the copies of {name} have different lengths", name)
            return
        others = [part for part in parts[1:] if not same_bytes(parts[0], part)]
        if parts[0].dtype in WEIGHT_DTYPES and others:
            self._norm_differences[name] = max(_difference(parts[0], other) for other in others)

    def _report_norms(self) -> None:
        name, largest = max(self._norm_differences.items(), key=lambda item: item[1])
        names = tuple(self._norm_differences)
        message = f"{len(names)} norms differ between the files, by up to {largest:.2g} ({name}); "
        if largest > NORM_TOLERANCE:
            self._error(
                f"{message}above {NORM_TOLERANCE:g} the files belong to different models", *names
            )
        else:
            self.problems.append(
                warning(f"{self.folder.path}: {message}using those of the first file", names)
            )


def _concatenate(name: str, parts: list[TensorInfo], axis: int) -> TensorInfo:
    """Return the tensor of ``parts``, one after another along ``axis``."""
    pieces: list[Piece] = []
    length = 0
    for part in parts:
        start = [0] * len(part.shape)
        start[axis] = length
        pieces.append(replace(part.pieces[0], start=tuple(start)))
        length += part.shape[axis]
    shape = (*parts[0].shape[:axis], length, *parts[0].shape[axis + 1 :])
    return TensorInfo(name, parts[0].dtype, shape, tuple(pieces), keys=parts[0].keys)


def _difference(one: TensorInfo, other: TensorInfo) -> float:
    """Return the largest difference of two vectors, inf if a value is nan.

    Reads a block at a time, because a header may claim any length.
    """
    # torch is imported for the rare files that differ here.
    from llamaconv.checkpoint.torch_rows import read_rows

    largest = 0.0
    with PieceReader() as reader:
        for first, last in one.windows(_BLOCK_BYTES):
            a, b = (read_rows(reader, side, first, last).float() for side in (one, other))
            difference = (a - b).abs().max().item()
            # max would ignore a nan.
            largest = inf if isnan(difference) else max(largest, difference)
    return largest

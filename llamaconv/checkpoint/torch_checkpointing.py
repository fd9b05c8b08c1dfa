"""Folders of torch_checkpointing, which TorchTitan means to use instead of DCP; read only.

A checkpoint is a folder with ``metadata.pkl`` and a file per item and rank: ``model_0.pt`` of
``torch.save``, or safetensors. TorchTitan saves the items ``model``, ``optimizer``, ``dataloader``,
``lr_scheduler`` and ``train_state``; ``metadata.pkl`` describes the first two. A file has a rank's own
parts of the tensors, so the metadata says where each belongs. Parts that several ranks hold are read
from the first of them.

Nothing in it runs, and no tensor is loaded: `torch_checkpointing_metadata` reads the metadata,
`torch_archive` and `safetensors_header` the headers of the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.dcp import (
    IgnoredEntries,
    naming_of_states,
    other_models,
    receipt_of_step_0,
    usual_layout,
)
from llamaconv.checkpoint.folder import LocalFolder
from llamaconv.checkpoint.fused import mixed_generations
from llamaconv.checkpoint.other_families import what_names_are
from llamaconv.checkpoint.tensors import DTYPE_BYTES, Piece, TensorInfo
from llamaconv.checkpoint.untrusted.files import open_bytes
from llamaconv.checkpoint.untrusted.pickle_data import ForbiddenNameError, UnknownFormError
from llamaconv.checkpoint.untrusted.placements import Box
from llamaconv.checkpoint.untrusted.safetensors_header import read_safetensors_header
from llamaconv.checkpoint.untrusted.torch_archive import Archive, Stored, is_tensor
from llamaconv.checkpoint.untrusted.torch_checkpointing_metadata import (
    NAME,
    Nested,
    Part,
    RankFile,
    StoredTensor,
    read_metadata,
)
from llamaconv.model.names import identify, trainer_state, why_needless
from llamaconv.report.errors import Problem, first_few, printable, warning

_RANKS_FILE = re.compile(r"(.+)_(\d+)\.(?:pt|safetensors|json|bin)")
_NO_MODEL = (
    "no tensor of a model is described in it. torch_checkpointing describes only the items that "
    "have a resharder; save the model's again with ItemSpec(resharder=DefaultResharder())"
)


def open_torch_checkpointing(folder: Path) -> Checkpoint:
    """Open a folder from its metadata and the headers of its ranks' files.

    State of the trainer is ignored and listed.

    Raises:
        RefusedError: The metadata cannot be trusted or read. Everything else that is wrong is in
            ``problems``.
    """
    metadata = read_metadata(folder)
    problems: list[Problem] = []
    ignored = IgnoredEntries()
    of_trainer: dict[str, list[str]] = {}
    items: dict[str, list[StoredTensor]] = {}
    for tensor in metadata.tensors:
        # Without a path a tensor is an item of its own; such items are one state.
        item = tensor.item if tensor.path else ""
        if key := trainer_state(f"{item}.{tensor.name}" if item else tensor.name):
            ignored.add(key, "state of the trainer, not of the model")
            of_trainer.setdefault(key, []).append(tensor.name)
        elif reason := why_needless(tensor.name):
            ignored.add(tensor.name.rpartition(".")[2], reason)
        else:
            items.setdefault(item, []).append(tensor)
    item = _model_among(items)
    for other in items.keys() - {item}:
        ignored.add(other or "the top level", f"beside {item!r}, which is the model")
    wanted = items.get(item, [])
    for name in _undescribed(folder, {one.file for one in metadata.files.values()}):
        is_trainers = trainer_state(f"{name}.")
        reason = "state of the trainer, not of the model"
        ignored.add(name, reason if is_trainers else f"not described in {NAME}")
    tensors = _Opener(folder, metadata.files, problems).tensors(wanted)
    names = {tensor.name for tensor in wanted}
    naming = naming_of_states(names)
    problems += mixed_generations(names, naming)
    others = other_models(of_trainer, "torch_checkpointing")
    if names:
        problems += [warning(f"{folder}: {other}") for other in others]
    if naming is None:
        what = what_names_are(names) if names else next(others, f"{NAME}: {_NO_MODEL}")
        problems.append(Problem(f"{folder}: {what}", tuple(names), explains_missing=True))
    written = receipt_of_step_0(LocalFolder(folder), problems)
    return Checkpoint(
        path=folder,
        format="torch_checkpointing",
        tensors=tensors,
        naming=naming,
        rope=written.target.rope if written else usual_layout(names, naming),
        params=written.params if written else None,
        problems=tuple(problems),
        ignored=ignored.listed(),
        receipt=written,
    )


def _model_among(items: Mapping[str, list[StoredTensor]]) -> str:
    """Return the item with the most tensors of a Llama; of several with as many, the first."""

    def fitting(item: str) -> int:
        names = [tensor.name for tensor in items[item]]
        naming = naming_of_states(names)
        return sum(identify(name, naming) is not None for name in names)

    return max(items, key=lambda item: (fitting(item), item == "model"), default="")


def _undescribed(folder: Path, described: set[str]) -> Iterator[str]:
    """Yield the item of each rank's file that the metadata does not list."""
    for name in sorted(path.name for path in folder.iterdir()):
        if name not in described and (match := _RANKS_FILE.fullmatch(name)):
            yield match[1]


@dataclass(frozen=True)
class _Wanted:
    """A part of a tensor that is read from one rank's file."""

    tensor: StoredTensor
    part: Part
    boxes: tuple[Box, ...]


class _Opener:
    """Finds the bytes of each part, and adds one problem per file and per tensor that are wrong."""

    def __init__(
        self,
        folder: Path,
        files: Mapping[tuple[str, int], RankFile],
        problems: list[Problem],
    ) -> None:
        self.folder = folder
        self.files = files
        self.problems = problems
        self._wrong: set[str] = set()

    def tensors(self, wanted: list[StoredTensor]) -> dict[str, TensorInfo]:
        """Return the tensors that can be read."""
        by_file: dict[RankFile, list[_Wanted]] = {}
        seen: set[str] = set()
        for tensor in wanted:
            if tensor.unknown:
                self._tensor_problem(tensor, tensor.unknown)
                continue
            if tensor.name in seen:
                self._tensor_problem(tensor, "two tensors of the item have this name")
                continue
            seen.add(tensor.name)
            try:
                for one in _parts_of(tensor):
                    by_file.setdefault(self.files[tensor.item, one.part.rank], []).append(one)
            except ValueError as error:
                self._tensor_problem(tensor, str(error))
        pieces: dict[str, list[Piece]] = {tensor.name: [] for tensor in wanted}
        for file in sorted(by_file, key=lambda one: one.file):
            self._read(file, by_file[file], pieces)
        found: dict[str, TensorInfo] = {}
        for tensor in wanted:
            if tensor.name in self._wrong:
                continue
            kind = tensor.shardings[0]
            its = tuple(sorted(pieces[tensor.name], key=lambda piece: piece.start))
            info = TensorInfo(tensor.name, kind.dtype, kind.shape, its)
            if wrong := info.coverage_error():
                self._tensor_problem(tensor, wrong)
            else:
                found[tensor.name] = info
        return found

    def _tensor_problem(self, tensor: StoredTensor, reason: str) -> None:
        self._wrong.add(tensor.name)
        name = printable(tensor.name)
        self.problems.append(Problem(f"{self.folder}: tensor {name}: {reason}", (tensor.name,)))

    def _file_problem(self, file: RankFile, wanted: list[_Wanted], reason: str) -> None:
        names = tuple(dict.fromkeys(one.tensor.name for one in wanted))
        self._wrong.update(names)
        rank = wanted[0].part.rank
        self.problems.append(
            Problem(
                f"{self.folder / file.file}: {reason}; rank {rank} saved its parts of {len(names)} "
                f"tensors in it ({first_few(names, 3)})",
                names,
            )
        )

    def _read(self, file: RankFile, wanted: list[_Wanted], pieces: dict[str, list[Piece]]) -> None:
        path = self.folder / file.file
        if not path.is_file():
            reason = "not found. The save or the download is incomplete"
            self._file_problem(file, wanted, reason)
            return
        if file.kind == "other":
            self._file_problem(file, wanted, "not a file of tensors, by metadata.pkl")
            return
        try:
            if file.kind == "safetensors":
                parts = _in_safetensors(path)
                self._place(path, wanted, parts, pieces)
            else:
                with open_bytes(path) as opened:
                    archive = Archive(opened, 0, opened.n_bytes, True)
                    self._place(path, wanted, _InArchive(archive), pieces)
        except OSError as error:
            self._file_problem(file, wanted, error.strerror or str(error))
        except ForbiddenNameError as error:
            reason = (
                f"it asks for {error}, which no file of tensors needs. It is damaged or hostile, and "
                "was not opened further"
            )
            self._file_problem(file, wanted, reason)
        except UnknownFormError as error:
            self._file_problem(file, wanted, str(error))
        except ValueError as error:
            self._file_problem(file, wanted, f"cut or damaged ({error})")

    def _place(
        self,
        path: Path,
        wanted: list[_Wanted],
        parts: _InArchive | _InSafetensors,
        pieces: dict[str, list[Piece]],
    ) -> None:
        for one in wanted:
            if one.tensor.name in self._wrong:
                continue
            try:
                stored = parts.find(one.tensor.path)
                _check_part(stored, one)
                pieces[one.tensor.name] += [_piece(path, stored, box) for box in one.boxes]
            except ValueError as error:
                self._tensor_problem(
                    one.tensor, f"its part of rank {one.part.rank}, in {path.name}: {error}"
                )


def _parts_of(tensor: StoredTensor) -> Iterator[_Wanted]:
    """Yield each part to read. A rectangle that several ranks have is read from the first."""
    first: dict[Box, int] = {}
    parts = [part for sharding in tensor.shardings for part in sharding.parts()]
    for part in sorted(parts, key=lambda part: part.rank):
        fresh = []
        for box in part.boxes:
            key = Box(box.start, (), box.shape)
            if key not in first:
                first[key] = part.rank
                fresh.append(box)
        if fresh:
            yield _Wanted(tensor, part, tuple(fresh))


class _InArchive:
    """The tensors of a file of ``torch.save``, by their path in it."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def find(self, path: Nested) -> Stored:
        """Return a tensor. Raises ``ValueError``."""
        value: Any = self._archive.value
        for key in path:
            is_list = type(value) in (list, tuple)
            there = range(len(value)) if is_list else value if type(value) is dict else ()
            if key not in there:
                raise ValueError("the file does not have it")
            value = value[key]
        if not is_tensor(value):
            raise ValueError("not a tensor in the file")
        return self._archive.tensor(value, views=True)


class _InSafetensors:
    """The tensors of a safetensors file, by their path with dots between the parts."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors

    def find(self, path: Nested) -> Stored:
        """Return a tensor. Raises ``ValueError``."""
        found = self._tensors.get(".".join(map(str, path)))
        if found is None:
            raise ValueError("the file does not have it")
        return Stored(found.dtype, found.shape, found.pieces[0].offset)


def _in_safetensors(path: Path) -> _InSafetensors:
    with open_bytes(path) as opened:
        tensors, problems = read_safetensors_header(path, opened)
    if problems:
        raise ValueError(problems[0].message.removeprefix(f"{path}: "))
    return _InSafetensors(tensors)


def _check_part(stored: Stored, one: _Wanted) -> None:
    """Raise ``ValueError`` if a file has another part than the metadata says."""
    dtype, shape = one.tensor.shardings[0].dtype, one.part.shape
    if stored.dtype != dtype:
        raise ValueError(f"{stored.dtype}, and {dtype} by metadata.pkl")
    if shape is None:
        fits = all(
            len(stored.shape) == len(box.shape)
            and all(
                start + n <= length
                for start, n, length in zip(box.local_start, box.shape, stored.shape, strict=True)
            )
            for box in one.boxes
        )
        shape = one.boxes[0].shape
    else:
        fits = stored.shape == shape
    if not fits:
        whole = list(one.tensor.shardings[0].shape)
        raise ValueError(
            f"shape {list(stored.shape)}, and {list(shape)} of {whole} by metadata.pkl; the files are "
            "of different saves"
        )


def _piece(path: Path, stored: Stored, box: Box) -> Piece:
    """Return where a rectangle of a stored part is. Raises ``ValueError`` if it is too scattered."""
    item, strides = DTYPE_BYTES[stored.dtype], stored.strides
    if not strides and box.shape[1:] != stored.shape[1:]:
        if len(stored.shape) != 2:
            raise ValueError("a strided cut of a tensor of three axes, which is not read")
        strides = (stored.shape[1], 1)
    steps = strides or _row_major(stored.shape)
    skipped = sum(start * step for start, step in zip(box.local_start, steps, strict=True))
    return Piece(path, stored.offset + skipped * item, box.start, box.shape, strides)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps: list[int] = []
    step = 1
    for length in reversed(shape):
        steps.insert(0, step)
        step *= length
    return tuple(steps)

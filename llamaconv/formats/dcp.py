"""PyTorch Distributed Checkpoints, opened from their metadata; `dcp_write` writes them.

Nothing in them runs, and no tensor is loaded: `dcp_metadata` reads the metadata, `torch_archive`
the envelope of each entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from llamaconv import keys, receipt
from llamaconv.files import open_file
from llamaconv.foreign import what_names_are
from llamaconv.formats.dcp_metadata import (
    NAME,
    Entry,
    Offsets,
    Place,
    UnknownEntry,
    read_metadata,
)
from llamaconv.formats.torch_archive import Archive
from llamaconv.fused import is_fused
from llamaconv.opened import Checkpoint, Ignored
from llamaconv.pieces import Piece, TensorInfo
from llamaconv.problems import Problem, some, warning

# What a reader passes by: optimizer and trainer state of a full training checkpoint.
_TRAINER_STATE = ("optimizer", "lr_scheduler", "dataloader", "train_state", "ft_dataloader")


def open_folder(folder: Path) -> Checkpoint:
    """The checkpoint that ``folder`` holds, from its metadata and the envelopes of its entries.

    Trainer state beside the model is passed by and listed. Raises `RefusedError` where the
    metadata cannot be trusted or read.
    """
    metadata = read_metadata(folder)
    problems = [warning(f"{folder / NAME}: {addition}") for addition in metadata.additions]
    written = receipt.try_read(folder, problems) or _of_step_0(folder, problems)
    ignored: list[Ignored] = []
    tensors: dict[str, TensorInfo] = {}
    lost = _lost_in_files(folder, metadata.places, problems)
    for name, entry in metadata.entries.items():
        if name.split(".")[0] in _TRAINER_STATE:
            ignored.append(Ignored(name, "state of the trainer, not of the model"))
        elif keys.is_computed(name):
            ignored.append(Ignored(name, "RoPE's angles: every model computes them anew"))
        elif name in lost:
            continue
        elif isinstance(entry, UnknownEntry):
            problems.append(Problem(f"{folder / NAME}: tensor {name}: {entry.reason}", (name,)))
        elif entry is not None:
            try:
                tensors[name] = _tensor(folder, name, entry, metadata.places)
            except (OSError, ValueError) as error:
                problems.append(Problem(f"{folder}: tensor {name}: {error}", (name,)))
        else:
            ignored.append(Ignored(name, "not a tensor"))
    names = tensors.keys() | (lost if not tensors else set())
    naming = _naming(names)
    if naming is None:
        problems.append(Problem(f"{folder}: {what_names_are(names)}"))
    # Without a receipt the rows are taken to be what the owner of the names trains.
    usual: keys.Layout = "half_split" if naming == "huggingface" else "interleaved"
    return Checkpoint(
        path=folder,
        format="dcp",
        tensors=tensors,
        naming=naming,
        rope=written.target.rope if written else usual,
        params=written.params if written else None,
        problems=tuple(problems),
        ignored=tuple(ignored),
        receipt=written,
    )


def _lost_in_files(
    folder: Path, places: Mapping[tuple[str, Offsets | None], Place], problems: list[Problem]
) -> set[str]:
    """Names of tensors whose files are gone or too short, a problem a file."""
    ends: dict[str, int] = {}
    names: dict[str, set[str]] = {}
    for (name, _), place in places.items():
        ends[place.file] = max(ends.get(place.file, 0), place.offset + place.length)
        names.setdefault(place.file, set()).add(name)
    lost: set[str] = set()
    for file, expected in ends.items():
        path = folder / file
        found = path.stat().st_size if path.is_file() else None
        if found is not None and found >= expected:
            continue
        what = "is not there" if found is None else f"{expected} bytes expected, {found} found"
        problems.append(
            Problem(
                f"{path}: {what}; it holds parts of {len(names[file])} tensors "
                f"({some(sorted(names[file]), 3)}). The save or the download is incomplete",
                tuple(sorted(names[file])),
            )
        )
        lost |= names[file]
    return lost


def _of_step_0(folder: Path, problems: list[Problem]) -> receipt.Receipt | None:
    """The receipt of the step-0 that a later step of TorchTitan was trained from."""
    origin = folder.absolute().parent / "step-0"
    found = receipt.try_read(origin, problems) if folder.name.startswith("step-") else None
    if found:
        problems.append(
            warning(f"{folder}: no receipt; parameters and layout are those of {origin}'s")
        )
    return found


def _naming(tensors: Iterable[str]) -> str | None:
    """The naming that every name fits, fused ones aside, or None."""
    names = [name for name in tensors if not is_fused(name)]
    # transformers' own names are in what FSDP and accelerate save of its models.
    for naming in (*keys.GENERATIONS, "huggingface"):
        if names and all(keys.identify(name, naming) for name in names):
            return naming
    return None


def _tensor(
    folder: Path, name: str, entry: Entry, places: Mapping[tuple[str, Offsets | None], Place]
) -> TensorInfo:
    pieces = []
    for offsets, sizes in entry.chunks:
        if (name, offsets) not in places:
            raise ValueError(f"its chunk at {list(offsets)} is in no file")
        place = places[name, offsets]
        offset = payload_offset(folder, place, entry.dtype, sizes)
        pieces.append(Piece(folder / place.file, offset, offsets, sizes))
    tensor = TensorInfo(name, entry.dtype, entry.shape, tuple(pieces))
    if wrong := tensor.not_covered():
        raise ValueError(f"{wrong}; the metadata is damaged")
    return tensor


def payload_offset(folder: Path, place: Place, dtype: str, shape: tuple[int, ...]) -> int:
    """Where the bytes of one entry begin in its file, each entry being what ``torch.save`` writes.

    Raises ``ValueError`` where the entry holds another tensor than the metadata says, ``OSError``.
    """
    with open_file(folder / place.file) as file:
        try:
            archive = Archive(file, place.offset, place.length)
            found = archive.tensor(archive.value)
        except ValueError as error:
            raise ValueError(f"its entry in {place.file} cannot be read: {error}") from error
    if (found.shape, found.dtype) != (shape, dtype):
        raise ValueError(
            f"its entry in {place.file} holds {list(found.shape)} {found.dtype}, "
            f"the metadata says {list(shape)} {dtype}"
        )
    return found.offset

"""PyTorch Distributed Checkpoints, opened from their metadata; `to_dcp` writes them.

Nothing in them runs, and no tensor is loaded: `dcp_metadata` reads the metadata, `torch_archive`
the header of each entry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping

from llamaconv.checkpoint import receipt
from llamaconv.checkpoint.checkpoint import Checkpoint, Ignored
from llamaconv.checkpoint.folder import OpenableFolder
from llamaconv.checkpoint.fused import mixed_generations
from llamaconv.checkpoint.other_families import what_names_are
from llamaconv.checkpoint.tensors import Piece, TensorInfo
from llamaconv.checkpoint.untrusted.dcp_metadata import (
    NAME,
    EntryLocation,
    Metadata,
    Offsets,
    TensorEntry,
    UnknownEntry,
    read_metadata_of,
)
from llamaconv.checkpoint.untrusted.torch_archive import Archive
from llamaconv.checkpoint.weight_sets import is_complete
from llamaconv.model.families import FAMILIES, family_with
from llamaconv.model.names import (
    GENERATIONS,
    Layout,
    best_naming,
    identify,
    trainer_state,
    why_needless,
)
from llamaconv.model.params import LlamaParams
from llamaconv.report.errors import Problem, first_few, warning

# transformers' models are saved under transformers' own names, by FSDP and others.
_NAMINGS = (*GENERATIONS, "huggingface", "torchtune")

_NO_MODEL = (
    "no tensor of a model found; only the trainer's state was saved, or the save never finished. "
    "Accelerate and others save the model in a folder next to this one: give that"
)

Locations = Mapping[tuple[str, Offsets | None], EntryLocation]


def open_dcp(folder: OpenableFolder) -> Checkpoint:
    """Open a folder from its metadata and the headers of its entries.

    State of the trainer is ignored and listed.

    Raises:
        RefusedError: The metadata cannot be trusted or read. Everything else that is wrong is in
            ``problems``.
    """
    path = folder.path
    metadata = read_metadata_of(path / NAME, folder.open(NAME))
    problems = [warning(f"{path / NAME}: {addition}") for addition in metadata.additions]
    written = receipt.try_read_in(folder, problems) or receipt_of_step_0(folder, problems)
    ignored = IgnoredEntries()
    tensors: dict[str, TensorInfo] = {}
    of_trainer: dict[str, list[str]] = {}
    lost = _lost_in_files(folder, metadata.locations, problems)
    _fetch_headers(folder, metadata, lost)
    for name, entry in metadata.entries.items():
        if key := trainer_state(name):
            ignored.add(key, "state of the trainer, not of the model")
            if isinstance(entry, TensorEntry):
                of_trainer.setdefault(key, []).append(name.partition(f"{key}.")[2])
        elif reason := why_needless(name):
            ignored.add(name.rpartition(".")[2], reason)
        elif name in lost:
            continue
        elif isinstance(entry, UnknownEntry):
            problems.append(Problem(f"{path / NAME}: tensor {name}: {entry.reason}", (name,)))
        elif entry is not None:
            try:
                tensors[name] = entry_tensor(folder, name, entry, metadata.locations)
            except (OSError, ValueError) as error:
                problems.append(Problem(f"{path}: tensor {name}: {error}", (name,)))
        else:
            ignored.add(name, "not a tensor")
    names = tensors.keys() | (lost if not tensors else set())
    naming = naming_of_states(names)
    problems += mixed_generations(names, naming)
    others = other_models(of_trainer)
    if names:
        problems += [warning(f"{path}: {other}") for other in others]
    if naming is None:
        what = what_names_are(names) if names else next(others, _NO_MODEL)
        problems.append(Problem(f"{path}: {what}", tuple(names), explains_missing=True))
    return Checkpoint(
        path=path,
        format="dcp",
        tensors=tensors,
        naming=naming,
        rope=written.target.rope if written else usual_layout(names, naming),
        params=written.params if written else None,
        problems=tuple(problems),
        ignored=ignored.listed(),
        receipt=written,
    )


def usual_layout(
    names: Iterable[str], naming: str | None, params: LlamaParams | None = None
) -> Layout:
    """Return the layout that the owner of ``names`` trains, for a DCP that has no receipt.

    Without the parameters, the tensors show the family.
    """
    if naming == "huggingface":
        return "half_split"
    found = (identify(name, naming) for name in names)
    family = family_with({known[0].name for known in found if known})
    return (FAMILIES[params.family] if params else family).titan.layout


def naming_of_states(names: Collection[str]) -> str | None:
    """Return the naming of what a trainer saved; None if the names fit none that trainers have."""
    return best_naming(names, _NAMINGS)


def _lost_in_files(
    folder: OpenableFolder, locations: Locations, problems: list[Problem]
) -> set[str]:
    """Return the tensors whose files are missing or too short; add one problem per file."""
    ends: dict[str, int] = {}
    names: dict[str, set[str]] = {}
    for (name, _), location in locations.items():
        ends[location.file] = max(ends.get(location.file, 0), location.offset + location.length)
        names.setdefault(location.file, set()).add(name)
    lost: set[str] = set()
    for file, expected in ends.items():
        found = folder.size_of(file)
        if found is not None and found >= expected:
            continue
        what = "not found" if found is None else f"cut to {found} of {expected} bytes"
        problems.append(
            Problem(
                f"{folder.path / file}: {what}; it holds parts of {len(names[file])} tensors "
                f"({first_few(sorted(names[file]), 3)}). The save or the download is incomplete",
                tuple(sorted(names[file])),
            )
        )
        lost |= names[file]
    return lost


def receipt_of_step_0(folder: OpenableFolder, problems: list[Problem]) -> receipt.Receipt | None:
    """Return the receipt of the step-0 that a later step of TorchTitan was trained from."""
    origin = folder.beside("step-0") if folder.path.name.startswith("step-") else None
    found = receipt.try_read_in(origin, problems) if origin else None
    if origin and found:
        problems.append(
            warning(
                f"{folder.path}: no receipt; using the parameters and the layout of {origin.path}"
            )
        )
    return found


# What torch.save writes around the bytes of a tensor: before them, and after them.
_HEAD_BYTES, _TAIL_BYTES = 2048, 1536


def _fetch_headers(folder: OpenableFolder, metadata: Metadata, lost: Container[str]) -> None:
    """Have the headers of all entries that are going to be read fetched together."""
    wanted = {
        name
        for name, entry in metadata.entries.items()
        if isinstance(entry, TensorEntry)
        and not (trainer_state(name) or why_needless(name) or name in lost)
    }
    parts: list[tuple[str, int, int]] = []
    for (name, _), at in metadata.locations.items():
        if name in wanted:
            end = at.offset + at.length
            parts.append((at.file, at.offset, min(at.offset + _HEAD_BYTES, end)))
            parts.append((at.file, max(at.offset, end - _TAIL_BYTES), end))
    folder.fetch(parts)


def other_models(
    of_trainer: Mapping[str, list[str]], loader: str = "torch.distributed.checkpoint"
) -> Iterator[str]:
    """Yield what to say of each complete model in a trainer's state, such as an average of weights.

    Args:
        of_trainer: The names of tensors under each key of a trainer, without the key.
        loader: What loads the checkpoint and can save a part of it.
    """
    for key, names in of_trainer.items():
        naming = naming_of_states(names)
        known = [found for name in names if (found := identify(name, naming))]
        if is_complete(
            [(part, layer) for role, layer in known for part in role.parts or (role.name,)]
        ):
            yield (
                f"{len(known)} tensors under {key!r} are a complete Llama, which is left out as a "
                f"trainer's state. To convert it, load {key!r} with {loader} and "
                "save it alone, under 'model'"
            )


class IgnoredEntries:
    """What is left out, counted per key: a trainer saves many entries under one."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, key: str, reason: str) -> None:
        """Count one entry under ``key``."""
        self._counts[key, reason] += 1

    def listed(self) -> tuple[Ignored, ...]:
        """Return one `Ignored` per key, with the number of its entries if there are several."""
        return tuple(
            Ignored(key, reason if n == 1 else f"{reason} ({n} entries)")
            for (key, reason), n in self._counts.items()
        )


def entry_tensor(
    folder: OpenableFolder, name: str, entry: TensorEntry, locations: Locations
) -> TensorInfo:
    """Return the tensor ``name`` of the checkpoint in ``folder``, from the headers of its chunks.

    Raises:
        ValueError: Its chunks do not hold it.
        OSError: A file cannot be read.
    """
    pieces = []
    for offsets, sizes in entry.chunks:
        if (name, offsets) not in locations:
            raise ValueError(f"its chunk at {list(offsets)} is in no file")
        location = locations[name, offsets]
        offset = payload_offset(folder, location, entry.dtype, sizes)
        pieces.append(Piece(folder.path / location.file, offset, offsets, sizes))
    tensor = TensorInfo(name, entry.dtype, entry.shape, tuple(pieces))
    if wrong := tensor.coverage_error():
        raise ValueError(wrong)
    return tensor


def payload_offset(
    folder: OpenableFolder, location: EntryLocation, dtype: str, shape: tuple[int, ...]
) -> int:
    """Return the byte in its file at which the values of one entry begin.

    Each entry is what ``torch.save`` writes for a tensor.

    Raises:
        ValueError: The entry does not hold a tensor of this dtype and shape.
        OSError: The file cannot be read.
    """
    with folder.open(location.file) as file:
        try:
            archive = Archive(file, location.offset, location.length)
            found = archive.tensor(archive.value)
        except ValueError as error:
            raise ValueError(f"its entry in {location.file} cannot be read: {error}") from error
    if (found.shape, found.dtype) != (shape, dtype):
        raise ValueError(
            f"its entry in {location.file} holds {list(found.shape)} {found.dtype}, "
            f"the metadata says {list(shape)} {dtype}"
        )
    return found.offset

"""What TorchTitan saved beside the model in a distributed checkpoint: the state of its trainer.

A DCP is opened without it (`dcp.open_dcp`); this reads it for a conversion that carries it along. Its
tensors are those of the optimizer. All else is one ``torch.save`` archive per entry, of a number, a
tuple or bytes: these are located, and for 0.2.x three numbers are opened, as data.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from llamaconv.checkpoint.checkpoint import Checkpoint
from llamaconv.checkpoint.dcp import entry_tensor
from llamaconv.checkpoint.folder import LocalFolder
from llamaconv.checkpoint.fused import fused_role, parts_of
from llamaconv.checkpoint.tensors import TensorInfo
from llamaconv.checkpoint.untrusted.dcp_metadata import NAME, UnknownEntry, read_metadata
from llamaconv.checkpoint.untrusted.files import open_bytes
from llamaconv.checkpoint.untrusted.torch_archive import Archive
from llamaconv.model.names import OPTIMIZER, Role, identify, trainer_state
from llamaconv.model.params import LlamaParams
from llamaconv.report.errors import FailedError, Problem

_BLOCK_BYTES = 1 << 20
_STATE = f"{OPTIMIZER}.state."


@dataclass(frozen=True)
class StoredValue:
    """An entry that is not a tensor, where it lies: its file, its first byte, its length in bytes."""

    name: str
    file: Path
    offset: int
    length: int

    def blocks(self, first: int = 0) -> Iterator[bytes]:
        """Yield its bytes from ``first`` on, which are never unpickled.

        Raises:
            OSError: Its file cannot be read.
            FailedError: The file is shorter than its metadata says.
        """
        with self.file.open("rb") as opened:
            opened.seek(self.offset + first)
            while first < self.length:
                block = opened.read(min(_BLOCK_BYTES, self.length - first))
                if not block:
                    raise FailedError(
                        f"{self.file}: {self.name} ends {self.length - first} bytes early; the file "
                        "was modified after it was opened. Try again when nothing writes to it"
                    )
                first += len(block)
                yield block

    def digest(self) -> str:
        """Return the xxh3-128 of its bytes; raises what `blocks` does."""
        digest = xxhash.xxh3_128()
        for block in self.blocks():
            digest.update(block)
        return digest.hexdigest()

    def number(self) -> int | float:
        """Return the number that it is, read as data.

        Raises:
            ValueError: It is something else.
            OSError: Its file cannot be read.
        """
        with open_bytes(self.file) as opened:
            found = Archive(opened, self.offset, self.length).value
        if type(found) not in (int, float):
            raise ValueError(f"{self.name}: expected a number")
        number: int | float = found
        return number


@dataclass(frozen=True)
class MadeValue:
    """An entry that one release saves and another does not, made from what that one saves.

    Attributes:
        name: The entry that it was made from.
        value: A plain value.
    """

    name: str
    value: Any

    @cached_property
    def _saved(self) -> bytes:
        # Planning does without torch, but for this: its lengths are part of a plan.
        import torch

        stream = io.BytesIO()
        torch.save(self.value, stream)
        return stream.getvalue()

    @property
    def length(self) -> int:
        """Its length in bytes."""
        return len(self._saved)

    def blocks(self, first: int = 0) -> Iterator[bytes]:
        """Yield what ``torch.save`` writes for it, from byte ``first`` on."""
        yield self._saved[first:]


@dataclass(frozen=True)
class TrainerState:
    """The trainer's entries of a checkpoint.

    Attributes:
        tensors: Its tensors by name.
        values: All other entries by name.
        problems: An error for each entry that cannot be read.
    """

    tensors: dict[str, TensorInfo]
    values: dict[str, StoredValue]
    problems: tuple[Problem, ...] = ()


def read_trainer_state(folder: Path) -> TrainerState:
    """Read where the trainer's entries of the DCP in ``folder`` are.

    Raises:
        RefusedError: The metadata cannot be trusted or read.
    """
    metadata, here = read_metadata(folder), LocalFolder(folder)
    tensors: dict[str, TensorInfo] = {}
    values: dict[str, StoredValue] = {}
    problems: list[Problem] = []
    for name, entry in metadata.entries.items():
        if not trainer_state(name):
            continue
        if isinstance(entry, UnknownEntry):
            problems.append(Problem(f"{folder / NAME}: {name}: {entry.reason}", (name,)))
        elif entry is None:
            place = metadata.locations.get((name, None))
            if place is None:
                problems.append(Problem(f"{folder}: {name}: is in no file", (name,)))
                continue
            values[name] = StoredValue(name, folder / place.file, place.offset, place.length)
        else:
            try:
                tensors[name] = entry_tensor(here, name, entry, metadata.locations)
            except (OSError, ValueError) as error:
                problems.append(Problem(f"{folder}: tensor {name}: {error}", (name,)))
    return TrainerState(tensors, values, tuple(problems))


def parameter_of(name: str, naming: str | None) -> tuple[Role, int | None, str, str] | None:
    """Return what a tensor of an optimizer belongs to; None for other names.

    Args:
        name: Such as ``optimizer.state.layers.0.attention.wo.weight.exp_avg``.
        naming: The naming of the model's tensors.

    Returns:
        Role and layer of the parameter, whose role may be one of `FUSED`; its name; and the name of
        the state, such as ``exp_avg``.
    """
    if not name.startswith(_STATE):
        return None
    parameter, _, state = name.removeprefix(_STATE).rpartition(".")
    known = identify(parameter, naming) or fused_role(parameter)
    return (*known, parameter, state) if known else None


def with_optimizer(checkpoint: Checkpoint, params: LlamaParams) -> Checkpoint:
    """Return a DCP with the optimizer's tensors among its own, and fused ones of them apart.

    Raises:
        RefusedError: The metadata cannot be read.
    """
    found = read_trainer_state(checkpoint.local_path)
    tensors = dict(checkpoint.tensors)
    for name, tensor in found.tensors.items():
        known = parameter_of(name, checkpoint.naming)
        if known and known[0].parts and tensor.shape == known[0].shape(params):
            tensors |= {one.name: one for one in split_state(tensor, known[0], params)}
        elif name.startswith(_STATE):
            tensors[name] = tensor
    return replace(checkpoint, tensors=tensors, problems=(*checkpoint.problems, *found.problems))


def split_state(tensor: TensorInfo, role: Role, params: LlamaParams) -> list[TensorInfo]:
    """Return the parts of an optimizer's tensor of a fused parameter, as its weight is split."""
    return [*parts_of(tensor, role, [f"{tensor.name}[{part}]" for part in role.parts], params)]

"""Check that what is no tensor in a trainer's state was copied as it lay, by torch's own index.

Torch's metadata says where each entry of both sides is; their bytes are compared and never unpickled. What the source does
not have, and the plan made, is loaded by torch and compared by its value.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from llamaconv.checkpoint.trainer_state import MadeValue, StoredValue
from llamaconv.plan.plan import Plan
from llamaconv.report.errors import first_few
from llamaconv.verify.results import Check
from llamaconv.verify.torch_metadata import unpickle_metadata

NAME = "trainer's values"


def check_values(plan: Plan, folder: Path) -> Check:
    """Compare every value of ``plan`` with its source; the control is each with the one before it.

    Args:
        plan: The conversion, without errors, both sides of which `dcp_metadata` has read.
        folder: The target.
    """
    here, there = _Values(plan.source.local_path), _Values(folder)
    wrong, mixed_up, before = [], 0, b""
    for copy in plan.values:
        found = there.read(copy.target)
        if found is None or not _is_same(found, copy.source, here):
            wrong.append(copy.target)
        mixed_up += found != before
        before = found or b""
    expected = {copy.target for copy in plan.values}
    wrong += sorted(there.names - expected)
    detail = f"all {len(plan.values)} have the source's bytes"
    if wrong:
        detail = f"{len(wrong)} entries differ from the source's: {first_few(wrong, 3)}"
    return Check(NAME, not wrong, float(len(wrong)), float(mixed_up), detail)


def _is_same(found: bytes, source: StoredValue | MadeValue, here: _Values) -> bool:
    if isinstance(source, StoredValue):
        return found == here.read(source.name)
    loaded = torch.load(io.BytesIO(found), weights_only=True)
    return bool(loaded == source.value)


class _Values:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = unpickle_metadata(folder)
        entries = self._metadata.state_dict_metadata
        self.names = {n for n, one in entries.items() if isinstance(one, BytesStorageMetadata)}

    def read(self, name: str) -> bytes | None:
        """Return the bytes of an entry; None if there is none."""
        info = (self._metadata.storage_data or {}).get(MetadataIndex(name))
        if info is None:
            return None
        with (self.folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            found: bytes = file.read(info.length)
            return found
